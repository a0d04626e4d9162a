"""`fit`: the whole training job, from checked data to a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from pyro_vae import programs
from pyro_vae.errors import ConfigError, DeviceError
from pyro_vae.likelihoods import check_finite
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.seeding import seeded
from pyro_vae.training import checkpoint
from pyro_vae.training.batches import Batches, Resident, Streamed, as_split
from pyro_vae.training.folder import MODEL, describe, prepare_folder
from pyro_vae.training.loop import Loop, MeanTerms, Tracker
from pyro_vae.training.metrics import Row


@dataclass(frozen=True)
class Run:
    """What `fit` leaves behind.

    Attributes:
        metrics: a row an epoch; nats per datum.
        best_epoch: of the lowest validation loss (1 is the first epoch), 0 without validation.
        stopped: "finished" or "patience".
        estimators: which KL estimator each latent site used.
        folder: of the run, or None.
    """

    metrics: list[Row]
    best_epoch: int
    stopped: str
    estimators: Mapping[str, str]
    folder: Path | None


def fit(
    vae: Any,
    data: Any,
    *,
    objective: Objective | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
    kl_schedule: Callable[[int], float] | None = None,
    gradient_clip: float | None = None,
    patience: int | None = None,
    trackers: Sequence[Tracker] = (),
    device: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    progress: bool | None = None,
) -> Run:
    """Train a model and guide by stochastic gradient ascent on an objective.

    Everything is checked before anything is written: device, data, shapes, the objective, the run
    folder. The same seed on the same machine gives the same weights, also when the run is killed
    and resumed.

    Args:
        vae: a `VAE`, or any object with `nn.Module`s `model` and `guide`.
        data: a `Data`, or any object with `train` and perhaps `valid`; or training data alone. Each
            is a `Split`, an array or tensor `(N, features)`, or a torch `DataLoader` whose batches
            are the arguments of model and guide.
        objective: by default `ELBO(kl="auto")`.
        epochs: in all, those of a resumed run included.
        batch_size: rows a batch and process (a `DataLoader` brings its own).
        learning_rate: of the default optimizer, Adam.
        optimizer: makes one from the parameters, in place of Adam.
        scheduler: makes one of torch's learning-rate schedulers from the optimizer; it is stepped
            once an epoch, a `ReduceLROnPlateau` with the validation loss.
        kl_schedule: maps the step (from 0) to a factor of the objective's KL weight.
        gradient_clip: largest norm of the gradient (of the loss per datum).
        patience: stop after this many epochs without gain in validation loss, and go back to the
            best weights.
        trackers: called with the number of each finished epoch, they return figures for its row of
            metrics.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        devices: processes, each with a device of its own; more than one runs the script anew in
            each (Lightning Fabric's "ddp").
        precision: Fabric's: "32-true", "64-true", "bf16-mixed", "16-mixed".
        seed: of everything random here; the weights are drawn before, by whoever makes the `vae`.
        out: run folder: config.json, metrics.csv, checkpoint.safetensors (each epoch, and on
            Ctrl-C), model.safetensors (the weights in the end). None writes nothing.
        resume: go on from the checkpoint in `out`.
        overwrite: replace what a run left in `out`.
        config: further entries of config.json.
        tensorboard: also write event files, into `out/tensorboard`.
        progress: show a progress bar; by default where the output is a terminal.

    Returns:
        A `Run`. The weights are in `vae`, on the device.

    Raises:
        ConfigError, DeviceError, DataError, ShapeError, SupportError, SiteError: an argument, the
            device, the data or the program is not fit for training.
        RunExistsError, RunPermissionError, CheckpointError: of the run folder.
        NonFiniteError: loss, gradient or parameter became NaN or infinite; names the step, the
            term, the site and what to try.
        KeyboardInterrupt: after Ctrl-C, the state saved in `out`.
    """
    objective = ELBO(kl="auto") if objective is None else objective
    _check_arguments(objective, epochs, kl_schedule, patience, data, out, resume)
    fabric = _fabric(device, devices, precision)
    weights = vae if isinstance(vae, nn.Module) else nn.ModuleList([vae.model, vae.guide])
    dtype = _dtype(weights)
    check = getattr(vae, "check", check_finite)
    train = _batches(getattr(data, "train", data), batch_size, fabric, dtype, check)
    held_out = getattr(data, "valid", None)
    valid = None if held_out is None else _fixed_batches(held_out, batch_size, fabric, dtype, check)

    folder = None if out is None else Path(out)
    with pyro.get_param_store().scope():
        weights.to(fabric.device)
        estimators = _try(vae, objective, train.first())
        parameters = [p for p in weights.parameters() if p.requires_grad]
        make = optimizer or (lambda p: torch.optim.Adam(p, learning_rate, fused=True))
        opt = make(parameters)
        loop = Loop(
            fabric, MeanTerms(objective, vae.model, vae.guide), weights, opt,
            None if scheduler is None else scheduler(opt),
            seed=seed, gradient_clip=gradient_clip, kl_schedule=kl_schedule, patience=patience,
            trackers=trackers, progress=progress,
        )  # fmt: skip
        settings = {
            "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
            "objective": describe(objective), "gradient_clip": gradient_clip, "patience": patience,
            "device": str(fabric.device), "devices": devices, "precision": precision, "seed": seed,
        }  # fmt: skip
        if folder is not None and fabric.is_global_zero:
            prepare_folder(folder, resume, overwrite, {**(config or {}), "fit": settings}, data)
        fabric.barrier()
        if resume and folder is not None:
            loop.load(folder)
        try:
            stopped = loop.run(train, valid, epochs, folder, tensorboard)
        except KeyboardInterrupt:
            _say_goodbye(loop, folder)
            raise
    state = loop.state
    if patience is not None and state.best_weights is not None:
        checkpoint.set_weights(weights, state.best_weights)
    if folder is not None and fabric.is_global_zero:
        checkpoint.save_weights(weights, folder / MODEL)
    return Run(state.rows, state.best_epoch, stopped, estimators, folder)


def _check_arguments(
    objective: Objective,
    epochs: int,
    kl_schedule: Callable[[int], float] | None,
    patience: int | None,
    data: Any,
    out: str | Path | None,
    resume: bool,
) -> None:
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"fit needs one of this library's objectives, got {type(objective).__name__}; "
            "train with others through pyro.infer.SVI"
        )
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}")
    if kl_schedule is not None and not hasattr(objective, "kl_weight"):
        raise ConfigError(f"{type(objective).__name__} has no KL weight for kl_schedule to change")
    if patience is not None and getattr(data, "valid", None) is None:
        raise ConfigError(f"patience={patience} needs validation data, and there is none")
    if resume and out is None:
        raise ConfigError("resume=True needs out=, the folder to resume from")


def _fabric(device: str, devices: int, precision: str) -> Fabric:
    """A launched Fabric on the device asked for."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda"):
        raise DeviceError(f'device is "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={device!r} was asked for, and torch sees no CUDA device")
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=[int(index)] if index else devices,
            strategy="auto" if devices == 1 else "ddp",
            precision=precision,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ConfigError(f"precision={precision!r}, devices={devices}: {error}") from error
    fabric.launch()
    return fabric


def _batches(
    data: Any, batch_size: int, fabric: Fabric, dtype: torch.dtype, check: Callable[[Tensor], None]
) -> Batches:
    if isinstance(data, DataLoader):
        return Streamed(data, fabric.device, dtype, check)
    split = as_split(data)
    check_finite(split.x)
    check(split.x if split.draw is None else split.fixed().x)
    return Resident(split, batch_size, fabric.device, dtype, fabric.global_rank, fabric.world_size)


def _fixed_batches(
    data: Any, batch_size: int, fabric: Fabric, dtype: torch.dtype, check: Callable[[Tensor], None]
) -> Batches:
    """Validation data: drawn once, and seen whole by every process."""
    if isinstance(data, DataLoader):
        return Streamed(data, fabric.device, dtype, check)
    split = as_split(data).fixed()
    check(split.x)
    return Resident(split, min(batch_size, len(split)), fabric.device, dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _try(vae: Any, objective: Objective, batch: tuple[Any, ...]) -> Mapping[str, str]:
    """Run the objective once on a small batch, so that what cannot work fails before writing."""
    if hasattr(vae, "check_shape"):
        vae.check_shape(*batch)
    with (
        seeded(0),
        pyro.validation_enabled(True),
        torch.no_grad(),
        programs.evaluating(vae.model, vae.guide),
    ):
        return objective.terms(vae.model, vae.guide, *batch).estimators


def _say_goodbye(loop: Loop, folder: Path | None) -> None:
    if not loop.fabric.is_global_zero:
        return
    state = loop.state
    where = f"Interrupted in epoch {state.epoch + 1}, after step {state.step}"
    if folder is None:
        print(f"{where}; nothing was saved, for fit had no out= folder.")
    else:
        print(
            f"{where}; saved in {folder}. Resume with fit(..., out={str(folder)!r}, resume=True)."
        )
