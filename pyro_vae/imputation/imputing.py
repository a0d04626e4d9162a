"""`impute`: the whole job, from checked data to imputations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    ShapeError,
    UnknownNameError,
)
from pyro_vae.evidence.diagnostics import MIN_ESS
from pyro_vae.evidence.ground import prepare, undisturbed
from pyro_vae.imputation.holes import Holes
from pyro_vae.imputation.result import Imputations
from pyro_vae.likelihoods.incomplete import check_rows
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program

METHODS = ("metropolis", "importance", "gibbs")
LEAST_ACCEPTANCE = 0.02
VALUES_AT_ONCE = 2**21  # of drawn data; decides the rows at once, so part of what a seed means


def impute(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_imputations: int = 20,
    mask: Any = None,
    method: str = "metropolis",
    num_samples: int = 500,
    num_sweeps: int = 100,
    site: str | None = None,
    allow_empty: bool = False,
    seed: int = 0,
) -> Imputations:
    """Draw the missing values of every datum several times from p(x_mis|x_obs).

    The model may have been trained on complete data or on data with holes. A guide that takes NaN
    (`posteriors.Incomplete`) sees the holes; any other sees them filled with the mean of what is
    observed of the same feature in `x`. That is a proposal, and biases "gibbs" alone.

    The programs run in evaluation mode; parameters, modes, the parameter store and the random
    generators are as before afterwards.

    Args:
        model, guide: any Pyro programs of `x` and `args` whose latent variables belong to one
            datum each (see `log_marginal`), all of them drawn by the guide.
        x: `(N, ...)`, NaN where missing; a tensor, a `Split` or an array.
        args: further arguments of the programs; tensors of length N are taken by row.
        num_imputations: M, completions of every datum.
        mask: `(N, ...)`, boolean, True where a value is observed, beside the NaN in `x`.
        method: "metropolis", "importance" or "gibbs": see the module.
        num_samples: importance draws of every datum. Every method begins with a resample of them.
        num_sweeps: of the M chains that "metropolis" and "gibbs" run for every datum. Their last
            states are the imputations.
        site: the observed site that holds `x`, where there are several.
        allow_empty: whether a datum may have no observed value. It is then drawn from the model.
        seed: of the draws.

    Raises:
        DataError: a row has no observed value, a value is infinite, a mask is not boolean.
        ShapeError: a mask, or the observed site, has another shape than `x`.
        SupportError: an observed value is outside its distribution's support.
        SiteError: the pair is not as above, or the values of a datum are not independent given z.
        NonFiniteError: the importance weights of a row are all zero, or NaN.
        ConfigError, UnknownNameError: an option means nothing.
    """
    _check_options(num_imputations, num_samples, num_sweeps, method)
    x, args = prepare(model, guide, x, args)
    observed = _observed(x, mask)
    if not allow_empty:
        check_rows(observed)
    with undisturbed(model, guide), seeded(seed):
        holes = Holes.of(model, guide, torch.where(observed, x, torch.nan), args, site)
        step = max(1, VALUES_AT_ONCE // (x[0].numel() * max(num_samples, num_imputations)))
        parts = []
        for start in range(0, len(x), step):
            torch.manual_seed(derive(seed, start))
            part = holes.take(range(start, min(start + step, len(x))))
            parts.append(_impute(part, num_imputations, method, num_samples, num_sweeps))
    values, mean, ess, acceptance = (
        torch.cat(column, 1 if i == 0 else 0) for i, column in enumerate(zip(*parts, strict=True))
    )
    if method == "importance":
        flagged = ess < max(num_imputations, MIN_ESS)
    else:
        flagged = acceptance < LEAST_ACCEPTANCE
    return Imputations(values, observed, mean, method, ess, acceptance, flagged)


def _impute(
    holes: Holes, num_imputations: int, method: str, num_samples: int, num_sweeps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, mean, effective draws and acceptance of some rows."""
    draws, log_w = holes.draw(num_samples)
    weights = _normalized(log_w, holes)
    chosen = torch.multinomial(weights.T, num_imputations, replacement=True).T
    state = draws.select(chosen, holes)
    acceptance = torch.full_like(weights[0], torch.nan)
    if method != "importance":
        chains = holes.repeat(num_imputations)
        state = state.flatten(holes)
        accepted = torch.zeros(len(chains.x), device=weights.device)
        for _ in range(num_sweeps):
            state, moved = chains.sweep(state, correct=method == "metropolis")
            accepted += moved
        acceptance = accepted.double().unflatten(0, chosen.shape).mean(0) / num_sweeps
        state = replace(state, x=state.x.unflatten(0, chosen.shape),
                        mean=state.mean.unflatten(0, chosen.shape))  # fmt: skip
    values, mean, ess = state.x, state.mean, 1 / weights.square().sum(0)
    empty = ~holes.observed.flatten(1).any(1)
    if empty.any():  # of which the model itself is the posterior
        drawn = holes.draw_from_model(num_imputations)
        values[:, empty], mean[:, empty] = drawn.x[:, empty], drawn.mean[:, empty]
        ess[empty], acceptance[empty] = math.inf, acceptance[empty].clamp(min=1.0)
    mean = torch.where(holes.observed, holes.x, mean.mean(0))
    return values, mean, ess, acceptance


def _normalized(log_w: Tensor, holes: Holes) -> Tensor:
    """Weights that sum to one over the draws."""
    weights = log_w.softmax(0)
    if weights.isnan().any():
        row = int(weights.isnan().any(0).nonzero()[0])
        raise NonFiniteError(
            f"the importance weights of datum {holes.rows[row]} are NaN, or all zero: no draw "
            "of the guide explains what is observed; check the datum and the parameters"
        )
    return weights


def _observed(x: Tensor, mask: Any) -> Tensor:
    """Where values are: not NaN, and not masked."""
    if not x.is_floating_point():
        raise DataError(f"x must be floating point, to hold NaN, got {x.dtype}")
    if x.isinf().any():
        place = tuple(x.isinf().nonzero()[0].tolist())
        raise DataError(f"observed values must be finite, but x{list(place)} = {x[place].item()}")
    if mask is None:
        return ~x.isnan()
    mask = torch.as_tensor(mask if isinstance(mask, Tensor) else np.asarray(mask))
    if mask.dtype != torch.bool:
        raise DataError(f"a mask is boolean, True where observed, got {mask.dtype}")
    if mask.shape != x.shape:
        raise ShapeError(f"a mask of shape {tuple(mask.shape)} for x of {tuple(x.shape)}")
    return mask.to(x.device) & ~x.isnan()


def _check_options(num_imputations: int, num_samples: int, num_sweeps: int, method: str) -> None:
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise UnknownNameError(f"method is one of {known}; got {method!r}")
    numbers = {"num_imputations": num_imputations, "num_samples": num_samples,
               "num_sweeps": num_sweeps}  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
