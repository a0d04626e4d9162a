"""What `fit` checks before it writes anything: arguments, program, parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from torch import nn

from pyro_vae import programs
from pyro_vae.errors import ConfigError, PyroVAEError, SiteError
from pyro_vae.objectives import Objective, Terms
from pyro_vae.training.batches import Batch
from pyro_vae.training.guard import Guard
from pyro_vae.training.metrics import summary_writer


def check_arguments(
    objective: Objective,
    data: Any,
    *,
    epochs: int,
    learning_rate: float,
    kl_schedule: Callable[[int], float] | None,
    gradient_clip: float | None,
    patience: int | None,
    seed: int,
    out: str | Path | None,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
) -> None:
    """Raise `ConfigError` for an argument of `fit`, or a combination, that means nothing."""
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"fit needs one of this library's objectives, got {type(objective).__name__}; "
            "train with others through pyro.infer.SVI"
        )
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}")
    for name, value in (("learning_rate", learning_rate), ("gradient_clip", gradient_clip)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be positive and finite, got {value}")
    if seed < 0:
        raise ConfigError(f"seed must not be negative, got {seed}")
    if kl_schedule is not None and not hasattr(objective, "kl_weight"):
        raise ConfigError(f"{type(objective).__name__} has no KL weight for kl_schedule to change")
    if patience is not None and patience < 1:
        raise ConfigError(f"patience must be at least 1, got {patience}")
    if patience is not None and getattr(data, "valid", None) is None:
        raise ConfigError(f"patience={patience} needs validation data, and there is none")
    if resume and out is None:
        raise ConfigError("resume=True needs out=, the folder to resume from")
    if resume and overwrite:
        raise ConfigError("resume=True goes on with a run, overwrite=True removes it: choose one")
    if tensorboard:
        if out is None:
            raise ConfigError("tensorboard=True needs out=, the folder to write to")
        summary_writer()


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
def try_program(vae: Any, objective: Objective, batches: Sequence[Batch]) -> Terms:
    """Run the objective once on small batches, so that what cannot work fails early.

    Raises:
        ShapeError, SiteError: see `VAE.check_shape` and the objectives.
        NonFiniteError: the program gives NaN or infinity before any training.
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
        except PyroVAEError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            shapes = ", ".join(str(tuple(getattr(part, "shape", ()))) for part in batch)
            raise ConfigError(
                f"model and guide cannot run on a batch of shape {shapes}: {error}"
            ) from error
    return terms


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
