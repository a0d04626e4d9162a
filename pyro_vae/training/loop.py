"""The loop: steps, epochs, validation, early stopping; its state can be put down anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pyro_vae import programs
from pyro_vae.objectives import Objective
from pyro_vae.seeding import derive, seeded
from pyro_vae.training import checkpoint
from pyro_vae.training.batches import Batch, Batches
from pyro_vae.training.folder import CHECKPOINT
from pyro_vae.training.guard import Interruption, check_parameters, diagnose
from pyro_vae.training.metrics import MetricsLog, Row, means

FORMAT = 1
Tracker = Callable[[int], Row]


class MeanTerms(nn.Module):
    """An objective of a (model, guide) as a module: loss, reconstruction and KL per datum."""

    def __init__(self, objective: Objective, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.objective, self.model, self.guide = objective, model, guide

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        terms = self.objective.terms(self.model, self.guide, *batch)
        n = len(batch[0])
        return terms.loss / n, terms.reconstruction / n, terms.kl / n


@dataclass
class State:
    """Where a run stands: everything but the weights, the optimizer and the scheduler."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    random: dict[str, Tensor] | None = None
    best_loss: float = math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = None
    rows: list[Row] = field(default_factory=list)


class Loop:
    """Trains `module` until `epochs` are done, patience ends, or the user interrupts.

    The draws of an epoch depend on the seed and the epoch's number alone, so a run that is taken
    up again goes on exactly as if it had never stopped.

    Args:
        fabric: launched; owns device, precision and processes.
        module: the objective, not yet set up.
        weights: the module whose parameters and buffers are saved.
        kl_schedule: multiplies the objective's KL weight by its value at the step.
        patience: epochs without gain in validation loss before training stops.
        trackers: called with the number of each finished epoch; return figures for its row.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: MeanTerms,
        weights: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None,
        *,
        seed: int,
        gradient_clip: float | None,
        kl_schedule: Callable[[int], float] | None,
        patience: int | None,
        trackers: Sequence[Tracker],
        progress: bool | None,
    ) -> None:
        self.fabric, self.terms, self.weights = fabric, module, weights
        self.module, self.optimizer = fabric.setup(module, optimizer)
        self.scheduler = scheduler
        self.seed, self.gradient_clip, self.patience = seed, gradient_clip, patience
        self.kl_schedule, self.trackers, self.progress = kl_schedule, trackers, progress
        self.base_weight = float(getattr(module.objective, "kl_weight", 1.0))
        self.state = State()

    def run(
        self,
        train: Batches,
        valid: Batches | None,
        epochs: int,
        folder: Path | None,
        tensorboard: bool,
    ) -> str:
        """Train; returns why it stopped: "finished" or "patience".

        Raises:
            KeyboardInterrupt: after the step at hand, its state saved.
            NonFiniteError: the loss, a gradient or a parameter is NaN or infinite.
        """
        log = MetricsLog(
            folder if self.fabric.is_global_zero else None, self.state.rows, tensorboard
        )
        self.state.rows = log.rows
        bar = tqdm(
            total=epochs * len(train), initial=self.state.step, unit="batch", dynamic_ncols=True,
            disable=None if self.progress is None else not self.progress,
        )  # fmt: skip
        with seeded(self.seed), pyro.validation_enabled(False), Interruption() as stop, bar:
            try:
                while self.state.epoch < epochs:
                    if self._out_of_patience():
                        return "patience"
                    self._train_epoch(train, bar, stop, folder)
                    log.append(self._finish_epoch(valid))
                    self.save(folder)
                return "patience" if self._out_of_patience() else "finished"
            finally:
                self._set_kl_weight(1.0)
                log.close()

    def _train_epoch(
        self, train: Batches, bar: Any, stop: Interruption, folder: Path | None
    ) -> None:
        state = self.state
        self.weights.train()
        torch.manual_seed(derive(self.seed, state.epoch, self.fabric.global_rank))
        batches = train.epoch(derive(self.seed, state.epoch), state.position)
        if state.random is not None:
            _set_random_state(state.random)
            state.random = None
        sums = torch.tensor(state.sums, dtype=torch.float64, device=self.fabric.device)
        before, started = state.seconds, time.monotonic()
        shown, visited = started, 0
        for batch in batches:
            self._step(batch, sums)
            visited += len(batch[0])
            state.seconds = before + time.monotonic() - started
            bar.update()
            if not bar.disable and time.monotonic() - shown > 0.5:
                shown = time.monotonic()
                bar.set_postfix_str(_postfix(sums, visited / (shown - started), state.epoch))
            if stop.requested:
                state.sums = sums.tolist()
                state.random = _random_state()
                self.save(folder)
                raise KeyboardInterrupt
        total = self.fabric.all_reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        state.sums = total.tolist()

    def _step(self, batch: Batch, sums: Tensor) -> None:
        if self.kl_schedule is not None:
            self._set_kl_weight(self.kl_schedule(self.state.step))
        self.state.step += 1
        self.state.position += 1
        loss, reconstruction, kl = self.module(*batch)
        n = len(batch[0])
        sums += n * torch.stack([loss, reconstruction, kl, torch.ones_like(loss)]).detach()
        # reading the loss waits for a GPU, so there it is read now and then: NaN stays in the sums
        if (sums.device.type == "cpu" or self.state.position % 50 == 0) and not _finite(sums):
            raise diagnose(
                self.terms.objective, self.terms.model, self.terms.guide, batch, self.state.step
            )
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if self.gradient_clip is not None:
            norm = self.fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.gradient_clip, error_if_nonfinite=False
            )
            if norm is not None and not torch.isfinite(norm):
                self.state.step += 1  # diagnose speaks of the step before, whose gradients are here
                raise diagnose(
                    self.terms.objective, self.terms.model, self.terms.guide, batch, self.state.step
                )
        self.optimizer.step()

    def _finish_epoch(self, valid: Batches | None) -> Row:
        state = self.state
        check_parameters(self.weights, state.step)
        *sums, count = state.sums
        names = ("loss", "reconstruction", "kl")
        row: Row = {
            "epoch": state.epoch + 1, "step": state.step, "seconds": state.seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "kl_weight": float(getattr(self.terms.objective, "kl_weight", 1.0)),
            **means(dict(zip(names, sums, strict=True)), count, "train"),
        }  # fmt: skip
        if valid is not None:
            row |= self._validate(valid)
            if row["valid_loss"] < state.best_loss:
                state.best_loss, state.best_epoch = row["valid_loss"], state.epoch + 1
                if self.patience is not None:
                    state.best_weights = checkpoint.copy_weights(self.weights)
        state.epoch, state.position, state.sums = state.epoch + 1, 0, [0.0] * 4
        for tracker in self.trackers:
            row |= tracker(state.epoch)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row.get("valid_loss", row["train_loss"]))
        elif self.scheduler is not None:
            self.scheduler.step()
        return row

    @torch.no_grad()
    def _validate(self, valid: Batches) -> Row:
        """The objective at its own KL weight, on the same draws at every epoch."""
        self._set_kl_weight(1.0)
        sums = torch.zeros(4, dtype=torch.float64, device=self.fabric.device)
        with programs.evaluating(self.weights), seeded(derive(self.seed, -1 & 0xFFFFFFFF)):
            for batch in valid.epoch(self.seed):
                loss, reconstruction, kl = self.module(*batch)
                sums += len(batch[0]) * torch.stack(
                    [loss, reconstruction, kl, torch.ones_like(loss)]
                )  # fmt: skip
        *sums_, count = sums.tolist()
        return means(
            dict(zip(("loss", "reconstruction", "kl"), sums_, strict=True)), count, "valid"
        )

    def _out_of_patience(self) -> bool:
        if self.patience is None or self.state.best_epoch == 0:
            return False
        return self.state.epoch - self.state.best_epoch >= self.patience

    def _set_kl_weight(self, factor: float) -> None:
        if self.kl_schedule is not None:
            self.terms.objective.kl_weight = self.base_weight * factor  # type: ignore[attr-defined]

    def save(self, folder: Path | None) -> None:
        """Write the checkpoint, if there is a folder."""
        if folder is None or not self.fabric.is_global_zero:
            return
        checkpoint.save_tree(folder / CHECKPOINT, {
            "format": FORMAT,
            "seed": self.seed,
            "weights": checkpoint.weights(self.weights),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "state": vars(self.state),
        })  # fmt: skip

    def load(self, folder: Path) -> None:
        """Go back to the state that `save` wrote.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another architecture.
        """
        tree = checkpoint.load_tree(folder / CHECKPOINT)
        checkpoint.set_weights(self.weights, tree["weights"])
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.scheduler is not None and tree["scheduler"] is not None:
            self.scheduler.load_state_dict(tree["scheduler"])
        self.state = State(**tree["state"])


def _finite(sums: Tensor) -> bool:
    return bool(torch.isfinite(sums).all())


def _postfix(sums: Tensor, rate: float, epoch: int) -> str:
    loss, reconstruction, kl, count = sums.tolist()
    return (
        f"epoch {epoch + 1}, loss {loss / count:.2f}, reconstruction {reconstruction / count:.2f}, "
        f"KL {kl / count:.2f}, {rate:,.0f} data/s"
    )


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
