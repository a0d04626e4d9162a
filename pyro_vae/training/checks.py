"""What `fit` checks before it writes anything: arguments, program, parameters."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import ParamStoreDict
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae import programs
from pyro_vae.checks import check_compile, positive
from pyro_vae.errors import ConfigError, PyroVAEError, ShapeError, SiteError
from pyro_vae.objectives import Objective, Terms
from pyro_vae.training.batches import Batch
from pyro_vae.training.guard import Guard
from pyro_vae.training.metrics import summary_writer
from pyro_vae.training.settings import MakeOptimizer, MakeScheduler, Settings


def check_settings(settings: Settings) -> None:
    """Raise `ConfigError` for a setting that means nothing."""
    objective, schedule = settings.objective, settings.kl_schedule
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"fit needs one of this library's objectives, got {type(objective).__name__}; "
            "train with others through pyro.infer.SVI"
        )
    for name in ("epochs", "patience"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    for name in ("learning_rate", "gradient_clip"):
        value = getattr(settings, name)
        if value is not None:
            positive(name, value)
    if settings.seed < 0:
        raise ConfigError(f"seed must not be negative, got {settings.seed}")
    if schedule is not None and not hasattr(objective, "kl_weight"):
        raise ConfigError(f"{type(objective).__name__} has no KL weight for kl_schedule to change")
    if schedule is not None:
        _check_schedule(schedule)
    check_compile(settings.compile)


def check_arguments(
    data: Any,
    patience: int | None,
    trackers: Sequence[Any],
    out: str | Path | None,
    *,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
) -> None:
    """Raise `ConfigError` for other arguments of `fit`, or combinations, that mean nothing."""
    if patience is not None and getattr(data, "valid", None) is None:
        raise ConfigError(f"patience={patience} needs validation data, and there is none")
    if not isinstance(trackers, Sequence) or not all(map(callable, trackers)):
        raise ConfigError(f"trackers is a list of functions of the epoch, got {trackers!r}")
    if resume and out is None:
        raise ConfigError("resume=True needs out=, the folder to resume from")
    if resume and overwrite:
        raise ConfigError("resume=True goes on with a run, overwrite=True removes it: choose one")
    if tensorboard:
        if out is None:
            raise ConfigError("tensorboard=True needs out=, the folder to write to")
        summary_writer()


def _check_schedule(schedule: Callable[[int], float]) -> None:
    if not callable(schedule):
        raise ConfigError(f"kl_schedule maps a step to a factor, got {schedule!r}")
    first = schedule(0)
    try:
        sound = 0 <= float(first) < math.inf
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ConfigError(f"kl_schedule(0) must be finite and not negative, got {first!r}")


def make_optimizer(
    make: MakeOptimizer | None,
    parameters: list[nn.Parameter],
    learning_rate: float,
) -> Optimizer:
    """The user's optimizer, or torch's fused Adam.

    Raises:
        ConfigError: `make` makes no torch optimizer, or one whose step needs a closure.
    """
    if make is None:
        return Adam(parameters, learning_rate, fused=True)
    # calling a PyroOptim would take a step
    made = make(parameters) if callable(make) and not isinstance(make, PyroOptim) else make
    if made is make or not isinstance(made, Optimizer):
        raise ConfigError(
            "optimizer makes a torch.optim.Optimizer from the parameters, got "
            f"{type(made).__name__}: pyro.optim is for SVI, give torch.optim, such as "
            "optimizer=lambda p: torch.optim.SGD(p, lr=0.1)"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(made).__name__} evaluates the loss several times a step, through a closure, "
            "which fit does not give it: choose another optimizer"
        )
    return made


def make_scheduler(make: MakeScheduler | None, optimizer: Optimizer) -> LRScheduler | None:
    """The user's scheduler, if there is one.

    Raises:
        ConfigError: `make` makes no scheduler of torch's.
    """
    if make is None:
        return None
    made = make(optimizer) if callable(make) else make
    if not isinstance(made, LRScheduler):
        raise ConfigError(
            "scheduler makes one of torch.optim.lr_scheduler's from the optimizer, got "
            f"{type(made).__name__}"
        )
    return made


def weights_of(vae: Any) -> nn.Module:
    """The module whose weights are trained and saved.

    Raises:
        ConfigError: there are no modules `model` and `guide`.
    """
    for name in ("model", "guide"):
        if not isinstance(getattr(vae, name, None), nn.Module):
            raise ConfigError(
                f"fit needs an object with nn.Modules model and guide, and the {name} of this "
                f"{type(vae).__name__} is {type(getattr(vae, name, None)).__name__}"
            )
    return vae if isinstance(vae, nn.Module) else nn.ModuleList([vae.model, vae.guide])


@torch.no_grad()
def try_program(
    vae: Any, objective: Objective, batches: Sequence[Batch], compile: bool | str = False
) -> Terms:
    """Run the objective once on small batches, so that what cannot work fails early.

    Args:
        compile: True also traces it.

    Raises:
        ShapeError, SiteError: see `VAE.check_shape` and the objectives.
        NonFiniteError: the program gives NaN or infinity before any training.
        CompileError: it cannot be traced.
        ConfigError: the program cannot run.
    """
    guard = Guard(objective, vae.model, vae.guide)
    for batch in batches:
        try:
            with programs.evaluating(vae.model, vae.guide):
                with pyro.validation_enabled(False):
                    if hasattr(vae, "check_shape"):
                        vae.check_shape(*batch)
                    loss = objective.terms(vae.model, vae.guide, *batch).loss
                    if not math.isfinite(loss.item()):
                        raise guard.bad_loss(batch, 0, "before the first step")
                with pyro.validation_enabled(True):
                    terms = objective.terms(vae.model, vae.guide, *batch)
        except (ShapeError, ConfigError) as error:
            raise type(error)(f"{error}{_about_context(batch)}") from error
        except PyroVAEError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            shapes = ", ".join(str(tuple(getattr(part, "shape", ()))) for part in batch)
            raise ConfigError(
                f"model and guide cannot run on a batch of shape {shapes}: {error}"
                f"{_about_context(batch)}"
            ) from error
        if compile is True:
            with programs.evaluating(vae.model, vae.guide), pyro.validation_enabled(False):
                _trace(vae, objective, batch)
    return terms


@torch.enable_grad()
def _trace(vae: Any, objective: Objective, batch: Batch) -> None:
    """What compiling begins with, a fraction of a second; what takes long is left to training."""
    from pyro_vae.compiled import terms

    terms(objective, vae.model, vae.guide, True, backend=lambda graph, inputs: graph)(*batch)


def try_again(vae: Any, objective: Objective, batch: Batch) -> None:
    """See that a guide which the gradient runs twice is the same both times, in training mode.

    The path derivatives take it for granted while training. Buffers (of batch normalisation) are
    put back.

    Raises:
        SiteError: it is not, as with dropout.
    """
    if getattr(objective, "gradient", "standard") == "standard":
        return
    modules = programs.modules_of(vae.model, vae.guide)
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with programs.evaluating(vae.model, vae.guide), pyro.validation_enabled(True):
        for module in modules:
            module.train()
        objective.terms(vae.model, vae.guide, *batch)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _about_context(batch: Batch) -> str:
    if len(batch) == 1:
        return ""
    return (
        ". A split's context, and a loader's second tensor, is passed to model and guide as "
        "`context`: where it holds labels that they do not take, drop them, as in "
        "DataLoader(TensorDataset(x))"
    )


def check_parameters(weights: nn.Module, store: ParamStoreDict) -> list[nn.Parameter]:
    """The parameters to train, after the program has run once with `store`.

    Raises:
        SiteError: the program has a parameter that is in no module, and would never be trained.
        ConfigError: there are none.
    """
    known = {id(p) for p in weights.parameters()}
    for name, parameter in store.named_parameters():
        if id(parameter) not in known:
            raise SiteError(
                f'pyro.param "{name}" belongs to no module, so fit cannot train or save it: make '
                "it an nn.Parameter, or a PyroParam of a PyroModule"
            )
    trained = [p for p in weights.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("model and guide have no parameters to train")
    return trained


@contextmanager
def frozen_parameters_allowed() -> Iterator[None]:
    """Without pyro.module's remark, at every step, on every parameter that wants no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        yield
