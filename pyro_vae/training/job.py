"""`fit`: the whole training job, from checked data to a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import nn

from pyro_vae.checks import whole
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.seeding import seeded
from pyro_vae.training import checkpoint
from pyro_vae.training.batches import Batches, sources
from pyro_vae.training.checks import (
    check_arguments,
    check_parameters,
    check_settings,
    frozen_parameters_allowed,
    make_optimizer,
    make_scheduler,
    try_again,
    try_program,
    weights_of,
)
from pyro_vae.training.devices import launch, parameter_dtype
from pyro_vae.training.folder import MODEL, check_free, check_resumable, write_config
from pyro_vae.training.loop import Loop, Tracker
from pyro_vae.training.mean_terms import MeanTerms
from pyro_vae.training.metrics import Row
from pyro_vae.training.settings import MakeOptimizer, MakeScheduler, Settings
from pyro_vae.typing import Compile


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
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    kl_schedule: Callable[[int], float] | None = None,
    gradient_clip: float | None = None,
    patience: int | None = None,
    trackers: Sequence[Tracker] = (),
    compile: Compile = False,
    device: str | torch.device | None = "auto",
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
        optimizer: makes one of torch's (not of `pyro.optim`, which is for SVI) from the parameters,
            in place of Adam.
        scheduler: makes one of torch's learning-rate schedulers from the optimizer; it is stepped
            once an epoch, a `ReduceLROnPlateau` with the validation loss (that of training, where
            there is no validation).
        kl_schedule: maps the step (from 0) to a factor of the objective's KL weight, which is put
            back afterwards. Validation always has the objective's own weight. It is also asked for
            a few steps before training, so it should depend on the step alone.
        gradient_clip: largest norm of the gradient (of the loss per datum).
        patience: stop after this many epochs without gain in validation loss, and go back to the
            best weights.
        trackers: called with the number of each finished epoch, they return figures for its row of
            metrics, or None.
        compile: trace the objective into one fused graph (see `pyro_vae.compile`): the same draws
            and, within rounding, the same weights. The first step then takes seconds to a minute
            (less when the graph is in the cache on disk), so it pays for long training. `True`
            raises what stands in the way, "auto" warns of it and goes on without.
        device: "auto" or None (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        devices: processes, each with a device of its own; more than one runs the script anew in
            each (Lightning Fabric's "ddp").
        precision: "32-true" leaves parameters as they are (torch's default dtype), "64-true" makes
            them float64, "bf16-mixed" takes matrix products in bfloat16. (float16 is left out: sums
            of log-likelihoods overflow it, and its loss scaling steps over infinite gradients.)
        seed: of everything random here; the weights are drawn before, by whoever makes the `vae`.
            torch's generators are put back afterwards.
        out: run folder: config.json, metrics.csv, checkpoint.safetensors (at the start, each epoch,
            and on Ctrl-C), model.safetensors (the weights in the end). None writes nothing.
        resume: go on from the checkpoint in `out`, with the settings and data of that run; only
            `epochs` (not fewer than are done) and `device` may differ. Arrays are compared by a
            fingerprint, `kl_schedule` at a few steps, optimizer and scheduler by their options. Not
            compared are trackers, the data of a `DataLoader`, and functions within a scheduler.
        overwrite: replace what a run left in `out`.
        config: further entries of config.json.
        tensorboard: also write event files, into `out/tensorboard`.
        progress: show a progress bar; by default where the output is a terminal.

    Returns:
        A `Run`. The weights are in `vae`, on the device.

    Raises:
        ConfigError, DeviceError, DataError, ShapeError, SupportError, SiteError, CompileError: an
            argument, the device, the data or the program is not fit for training.
        RunExistsError, RunPermissionError, CheckpointError: of the run folder.
        NonFiniteError: loss, gradient or parameter became NaN or infinite; names the step, the
            term and site, the parameter, and what to try. On a GPU loss and gradient are read every
            50 steps, so the step is that of discovery, and a gradient found bad after its update is
            no longer known by term and site.
        KeyboardInterrupt: after Ctrl-C, the state saved in `out`.

    Warns:
        RuntimeWarning: a hundred batches on end had a larger loss than the very first, before any
            update: training diverges, though every number is finite. (On a GPU, of those read.)
    """
    settings = Settings(
        objective=ELBO(kl="auto") if objective is None else objective,
        epochs=whole("epochs", epochs), batch_size=whole("batch_size", batch_size),
        learning_rate=learning_rate, optimizer=optimizer, scheduler=scheduler,
        kl_schedule=kl_schedule, gradient_clip=gradient_clip,
        patience=None if patience is None else whole("patience", patience),
        compile=compile, devices=whole("devices", devices), precision=precision,
        seed=whole("seed", seed),
    )  # fmt: skip
    check_settings(settings)
    check_arguments(
        data, settings.patience, trackers, out, resume=resume, overwrite=overwrite,
        tensorboard=tensorboard,
    )  # fmt: skip
    weights = weights_of(vae)
    fabric = launch("auto" if device is None else str(device), settings.devices, precision)
    folder = None if out is None else Path(out)
    with seeded(settings.seed), pyro.get_param_store().scope(), frozen_parameters_allowed():
        dtype = parameter_dtype(weights, precision)
        train, valid = sources(vae, data, settings.batch_size, fabric, dtype)
        loop, estimators = _make_loop(vae, weights, settings, trackers, fabric, train, valid)
        if folder is not None:
            fitting = settings.to_json(
                loop.optimizer, loop.scheduler, data, len(train), fabric.device
            )
            _prepare(loop, folder, resume, overwrite, {**(config or {}), "fit": fitting}, data)
        try:
            stopped = loop.run(
                train, valid, settings.epochs, folder, tensorboard=tensorboard, progress=progress
            )
        except KeyboardInterrupt:
            _say_goodbye(loop, folder)
            raise
    state = loop.state
    if state.best_weights is not None:
        checkpoint.set_weights(weights, state.best_weights)
    if folder is not None and fabric.is_global_zero:
        checkpoint.save_weights(weights, folder / MODEL)
    return Run(state.rows, state.best_epoch, stopped, estimators, folder)


def _make_loop(
    vae: Any,
    weights: nn.Module,
    settings: Settings,
    trackers: Sequence[Tracker],
    fabric: Fabric,
    train: Batches,
    valid: Batches | None,
) -> tuple[Loop, Mapping[str, str]]:
    """The loop, once the program has been tried on the device; and the KL estimators it used."""
    weights.to(fabric.device)
    if settings.precision == "64-true":
        weights.double()
    objective, compile = settings.objective, settings.compile
    samples = [batches.first() for batches in (train, valid) if batches is not None]
    estimators = try_program(vae, objective, samples, compile).estimators
    try_again(vae, objective, samples[0])
    parameters = check_parameters(weights, pyro.get_param_store())
    optimizer = make_optimizer(settings.optimizer, parameters, settings.learning_rate)
    scheduler = make_scheduler(settings.scheduler, optimizer)
    terms = MeanTerms(objective, vae.model, vae.guide, compile)
    return Loop(fabric, terms, weights, optimizer, scheduler, settings, trackers), estimators


def _prepare(
    loop: Loop, folder: Path, resume: bool, overwrite: bool, config: Mapping[str, Any], data: Any
) -> None:
    """Make the run folder, or take up the run in it; what is refused leaves it untouched."""
    if resume and check_resumable(folder, config["fit"]):
        loop.load(folder, config["fit"]["epochs"])
    if loop.fabric.is_global_zero:
        if not resume:
            check_free(folder, overwrite)
        write_config(folder, config, data, fresh=not resume)
    loop.fabric.barrier()


def _say_goodbye(loop: Loop, folder: Path | None) -> None:
    if not loop.fabric.is_global_zero:
        return
    where = f"Interrupted in epoch {loop.state.epoch + 1}, after step {loop.state.step}"
    if folder is None:
        print(f"{where}; nothing was saved, for fit had no out= folder.")
    else:
        print(
            f"{where}; {folder} holds the state after step {loop.saved_step}. "
            f"Resume with fit(..., out={str(folder)!r}, resume=True)."
        )
