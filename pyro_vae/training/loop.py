"""The loop: steps, epochs, validation, early stopping; its state can be put down anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae import programs
from pyro_vae.errors import CheckpointError, CompileError, ConfigError, DataError
from pyro_vae.seeding import derive, seeded
from pyro_vae.training import checkpoint
from pyro_vae.training.batches import Batch, Batches
from pyro_vae.training.folder import CHECKPOINT
from pyro_vae.training.guard import DIVERGED, Guard, Interruption
from pyro_vae.training.mean_terms import MeanTerms
from pyro_vae.training.metrics import MetricsLog, Row, means
from pyro_vae.training.progress import Progress
from pyro_vae.training.settings import Settings
from pyro_vae.training.state import State, random_state, set_random_state

FORMAT = 1
VALIDATION = 2**32 - 1  # the key of validation's draws, which no epoch reaches
# at what a compiled step uses besides its batch; and at a GPU's loss, for which reading would wait
# (NaN stays in the sums)
STEPS_BETWEEN_LOOKS = 50
STEPS_BETWEEN_TALKS = 20  # of several processes, whether one of them was interrupted
Tracker = Callable[[int], Mapping[str, float] | None]


class Loop:
    """Trains `module` until `epochs` are done, patience ends, or the user interrupts.

    The draws of an epoch depend on the seed and the epoch's number alone, so a run that is taken
    up again goes on exactly as if it had never stopped.

    Args:
        fabric: launched; owns device, precision and processes.
        module: the objective, not yet set up.
        weights: the module whose parameters and buffers are saved.
        settings: of the run.
        trackers: called with the number of each finished epoch; return figures for its row.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: MeanTerms,
        weights: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None,
        settings: Settings,
        trackers: Sequence[Tracker],
    ) -> None:
        self.fabric, self.objective, self.weights = fabric, module.objective, weights
        self.guard = Guard(module.objective, module.model, module.guide)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Fabric's wrappers take 40 us a step, and a single process needs none of what they do
        self.module = module if fabric.world_size == 1 else fabric.setup_module(module)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed, self.gradient_clip = settings.seed, settings.gradient_clip
        self.kl_schedule, self.patience = settings.kl_schedule, settings.patience
        self.trackers = trackers
        self.kl_weight = self._kl_weight()
        self.on_cpu = fabric.device.type == "cpu"
        self.mean_terms = module
        self.fused = None
        if fabric.world_size == 1:
            self.fused = module.step(optimizer, settings.gradient_clip)
        self.state = State()
        self.saved_step: int | None = None

    def run(
        self,
        train: Batches,
        valid: Batches | None,
        epochs: int,
        folder: Path | None,
        *,
        tensorboard: bool,
        progress: bool | None,
    ) -> str:
        """Train; returns why it stopped: "finished" or "patience".

        Raises:
            KeyboardInterrupt: after the step at hand, its state saved.
            NonFiniteError: the loss, a gradient or a parameter is NaN or infinite.
        """
        main = self.fabric.is_global_zero
        log = MetricsLog(folder if main else None, self.state.rows, tensorboard)
        self.state.rows = log.rows
        bar = Progress(epochs * len(train), self.state.step, progress if main else False)
        with pyro.validation_enabled(False), Interruption() as stop, bar:
            try:
                if self.state.step == 0:
                    self.save(folder)  # so that there is something to resume from the start
                while self.state.epoch < epochs and not self._out_of_patience():
                    self._train_epoch(train, bar, stop, folder)
                    log.append(self._finish_epoch(valid))
                    self.save(folder)
                    if self._interrupted(stop):
                        raise KeyboardInterrupt
            finally:
                self._set_kl_factor(1.0)
                log.close()
        return "patience" if self._out_of_patience() else "finished"

    def _train_epoch(
        self, train: Batches, bar: Progress, stop: Interruption, folder: Path | None
    ) -> None:
        state = self.state
        self.weights.train()
        torch.manual_seed(derive(self.seed, state.epoch, self.fabric.global_rank))
        batches = train.epoch(derive(self.seed, state.epoch), state.position)
        if state.random is not None:
            set_random_state(state.random, self.fabric)
            state.random = None
        state.sums = state.sums.to(self.fabric.device)
        before, started = state.seconds, time.monotonic()
        batch = None
        for batch in batches:
            self._step(batch)
            state.seconds = before + time.monotonic() - started
            bar.update(len(batch[0]), state.sums, state.epoch + 1)
            if state.position < len(train) and self._interrupted(stop):
                self._check(batch)
                state.random = random_state(self.fabric)
                state.sums = self._over_processes(state.sums)
                self.save(folder)
                raise KeyboardInterrupt
        if batch is None:
            raise DataError(f"the data gave no batch in epoch {state.epoch + 1}")
        self._check(batch)

    def _step(self, batch: Batch) -> None:
        state = self.state
        if self.kl_schedule is not None:
            self._set_kl_factor(self.kl_schedule(state.step))
        due = state.position % STEPS_BETWEEN_LOOKS == 0
        look = self.on_cpu or due
        # an objective may hold its weight as it likes
        first = due or self.kl_schedule is not None
        if not self._fused_update(batch, look, first):
            self._update(batch, look)
        state.step += 1
        state.position += 1

    def _fused_update(self, batch: Batch, look: bool, first: bool) -> bool:
        """Let one graph take the step, if there is one. It leaves the weights as they are where
        loss or gradient is not finite; `look` finds out. After a `first` nothing changes but the
        batches until the next."""
        if self.fused is None:
            return False
        try:
            with self.fabric.autocast():
                take = self.fused if first else self.fused.again
                taken = take(self.state.sums, *batch)
        except CompileError as error:
            self.fused = None
            self.mean_terms.run_eagerly(error)
            return False
        if taken is None:
            return False
        loss, self.state.sums = taken.outputs
        if look:
            self._judge(batch, loss.item())
            if not taken.finite:
                raise self.guard.bad_gradient(batch, self.state.step + 1)
        return True

    def _update(self, batch: Batch, look: bool) -> None:
        loss = self._add_terms(batch, self.state.sums)
        if look:
            self._judge(batch, loss.item())
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if look or self.gradient_clip is not None:
            self._treat_gradient(batch, look)
        self.optimizer.step()

    def _judge(self, batch: Batch, loss: float) -> None:
        """Stop at a loss that is not finite; warn where training has long been worse than none."""
        state = self.state
        if not math.isfinite(loss):
            raise self.guard.bad_loss(batch, state.step, self._place())
        if state.first_loss is None:
            # with the whole KL, if that is more: a schedule's first weight may be 0
            _, reconstruction, kl = (state.sums[:3] / state.sums[3]).tolist()
            state.first_loss = max(loss, kl - reconstruction)
        state.worse = state.worse + 1 if loss > state.first_loss else 0
        if state.worse == DIVERGED and self.fabric.is_global_zero:
            self.guard.warn_of_divergence(state.first_loss, loss)

    def _treat_gradient(self, batch: Batch, look: bool) -> None:
        """See that the gradient is finite, while the weights still are, and clip it."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        step = self.state.step + 1
        # a sum, the cheapest screen, hides no NaN or infinity (and may overflow without one)
        if look and not math.isfinite(sum(gradient.sum() for gradient in gradients)):
            self.guard.check_gradient(batch, step)
        if self.gradient_clip is None:
            return
        norm = nn.utils.get_total_norm(gradients)
        if look:
            self.guard.check_norm(norm, step)
        nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, norm)

    def _check(self, batch: Batch) -> None:
        """Nothing is saved before this: all terms, gradients and parameters are finite."""
        if not math.isfinite(self.state.sums.sum().item()):
            raise self.guard.bad_loss(batch, self.state.step, self._place())
        self.guard.check_update(self.state.step)

    def _finish_epoch(self, valid: Batches | None) -> Row:
        state = self.state
        state.epoch += 1
        row: Row = {
            "epoch": state.epoch, "step": state.step, "seconds": state.seconds,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "kl_weight": self._kl_weight(),
            **means(self._over_processes(state.sums), "train"),
        }  # fmt: skip
        if valid is not None:
            row |= self._validate(valid)
            if row["valid_loss"] < state.best_loss:
                state.best_loss, state.best_epoch = row["valid_loss"], state.epoch
                if self.patience is not None:
                    state.best_weights = checkpoint.copy_weights(self.weights)
        state.position, state.sums = 0, torch.zeros_like(state.sums)
        for tracker in self.trackers:
            row |= {name: float(value) for name, value in (tracker(state.epoch) or {}).items()}
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(row.get("valid_loss", row["train_loss"]))
        elif self.scheduler is not None:
            self.scheduler.step()
        return row

    @torch.no_grad()
    def _validate(self, valid: Batches) -> Row:
        """The objective at its own KL weight, on the same draws at every epoch."""
        self._set_kl_factor(1.0)
        seed = derive(self.seed, VALIDATION)
        sums = torch.zeros_like(self.state.sums)
        place = f"in validation after step {self.state.step} (epoch {self.state.epoch})"
        with programs.evaluating(self.weights), seeded(seed):
            for batch in valid.epoch(seed):
                self._add_terms(batch, sums)
                if not math.isfinite(sums.sum().item()):
                    raise self.guard.bad_loss(batch, self.state.step, place)
        return means(sums, "valid")

    def _add_terms(self, batch: Batch, sums: Tensor) -> Tensor:
        """The loss per datum of a batch; its terms are added to `sums`."""
        with self.fabric.autocast():
            loss, row = self.module(*batch)
        sums.add_(row, alpha=len(batch[0]))
        return loss

    def _place(self) -> str:
        state = self.state
        return f"at step {state.step + 1} (epoch {state.epoch + 1}, batch {state.position + 1})"

    def _over_processes(self, sums: Tensor) -> Tensor:
        total = self.fabric.all_reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _interrupted(self, stop: Interruption) -> bool:
        """Whether any process was; all of them leave at the same step, or they would hang."""
        if self.fabric.world_size == 1:
            return stop.requested
        if self.state.position % STEPS_BETWEEN_TALKS:
            return False
        flag = torch.tensor(float(stop.requested), device=self.fabric.device)
        return bool(self._over_processes(flag) > 0)

    def _out_of_patience(self) -> bool:
        if self.patience is None or self.state.best_epoch == 0:
            return False
        return self.state.epoch - self.state.best_epoch >= self.patience

    def _kl_weight(self) -> float:
        return float(getattr(self.objective, "kl_weight", 1.0))

    def _set_kl_factor(self, factor: float) -> None:
        if self.kl_schedule is not None:
            self.objective.kl_weight = self.kl_weight * factor  # type: ignore[attr-defined]

    def save(self, folder: Path | None) -> None:
        """Write the checkpoint, if there is a folder."""
        if folder is None or not self.fabric.is_global_zero:
            return
        checkpoint.save_tree(folder / CHECKPOINT, {
            "format": FORMAT,
            "weights": checkpoint.weights(self.weights),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "state": vars(self.state),
        })  # fmt: skip
        self.saved_step = self.state.step

    def load(self, folder: Path, epochs: int) -> None:
        """Go back to the state that `save` wrote, to train until `epochs` are done.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another architecture or optimizer.
            ConfigError: more epochs than that are done, or begun.
        """
        path = folder / CHECKPOINT
        tree = checkpoint.load_tree(path)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise CheckpointError(f"{path} holds no state of training in format {FORMAT}")
        state = State(**tree["state"])
        if epochs < state.begun:
            raise ConfigError(
                f"epochs={epochs} is fewer than the run in {folder} has trained: {state.epoch} "
                f"epochs and {state.position} steps of the next. epochs counts those of the "
                f"resumed run too: give at least {state.begun}"
            )
        checkpoint.set_weights(self.weights, tree["weights"])
        try:
            self.optimizer.load_state_dict(tree["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{path} is of another optimizer: {error}") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(tree["scheduler"])
        self.state = state
        self.saved_step = self.state.step
        if not self.fabric.is_global_zero:  # the first process holds what all had summed
            self.state.sums = torch.zeros_like(self.state.sums)
