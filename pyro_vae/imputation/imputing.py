"""`impute`: the whole job, from checked data to imputations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import at_least, check_known
from pyro_vae.errors import DataError, NonFiniteError, ShapeError
from pyro_vae.evidence.diagnostics import MIN_ESS
from pyro_vae.evidence.ground import prepare, undisturbed
from pyro_vae.imputation.chains import run_chains
from pyro_vae.imputation.holes import Holes
from pyro_vae.imputation.result import Imputations
from pyro_vae.likelihoods.incomplete import check_rows
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program

METHODS = ("metropolis", "importance", "gibbs")
AGREEMENT = 1.1  # R-hat below which chains agree
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
    num_sweeps: int = 50,
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
        x: `(N, ...)`, NaN where missing; a tensor, a `Split` or an array, of which NumPy's masked
            ones will do.
        args: further arguments of the programs; tensors of length N are taken by row.
        num_imputations: M, completions of every datum.
        mask: boolean, True where a value is observed, beside the NaN in `x`: of the shape of `x`,
            or of one that broadcasts to it, such as that of one datum. What `x` holds where it is
            False does not matter.
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
    values, mean, ess, acceptance, rhat = (
        torch.cat(column, 1 if i == 0 else 0) for i, column in enumerate(zip(*parts, strict=True))
    )
    trusted = ess >= max(num_imputations, MIN_ESS) if method == "importance" else rhat < AGREEMENT
    flagged = ~trusted & ~observed.flatten(1).all(1)
    return Imputations(values, observed, mean, method, ess, acceptance, rhat, flagged)


def _impute(
    holes: Holes, num_imputations: int, method: str, num_samples: int, num_sweeps: int
) -> tuple[Tensor, ...]:
    """Values, mean, effective draws, acceptance and R-hat of some rows."""
    draws, log_w = holes.draw(num_samples)
    weights = _normalized(log_w, holes)
    chosen = torch.multinomial(weights.T, num_imputations, replacement=True).T
    state, ess = draws.select(chosen, holes), 1 / weights.square().sum(0)
    if method == "importance":
        acceptance = rhat = torch.full_like(ess, torch.nan)
    else:
        state, acceptance, rhat = run_chains(holes, state, num_sweeps, method == "metropolis")
    values, mean = state.x, state.mean
    empty = ~holes.observed.flatten(1).any(1)
    if empty.any():  # of which the model itself is the posterior
        drawn = holes.draw_from_model(num_imputations)
        values[:, empty], mean[:, empty] = drawn.x[:, empty], drawn.mean[:, empty]
        ess[empty] = math.inf
        if method != "importance":
            acceptance[empty] = rhat[empty] = 1.0
    mean = torch.where(holes.observed, holes.x, mean.mean(0))
    return values, mean, ess, acceptance, rhat


def _normalized(log_w: Tensor, holes: Holes) -> Tensor:
    """Weights that sum to one over the draws."""
    weights = log_w.softmax(0)
    if weights.isnan().any():
        row = int(weights.isnan().any(0).nonzero()[0])
        raise NonFiniteError(
            f"the importance weights of datum {holes.rows[row]} are NaN, or all zero: no draw "
            "explains what is observed; check the datum and the parameters"
        )
    return weights


def _observed(x: Tensor, mask: Any) -> Tensor:
    """Where values are: not NaN, and not masked."""
    if x.dim() < 2:
        raise ShapeError(f"x has a datum a row, (N, ...), but its shape is {tuple(x.shape)}")
    if not x.is_floating_point():
        raise DataError(f"x must be floating point, to hold NaN, got {x.dtype}")
    observed = ~x.isnan()
    if mask is not None:
        observed &= _mask(mask, x)
    if (infinite := x.isinf() & observed).any():
        place = tuple(infinite.nonzero()[0].tolist())
        raise DataError(f"observed values must be finite, but x{list(place)} = {x[place].item()}")
    return observed


def _mask(mask: Any, x: Tensor) -> Tensor:
    """A mask in the shape of `x`."""
    array = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if array.dtype != np.bool_:
        raise DataError(f"a mask is boolean, True where observed, got {array.dtype}")
    try:
        return torch.as_tensor(np.broadcast_to(array, x.shape).copy(), device=x.device)
    except ValueError:
        raise ShapeError(f"a mask of shape {array.shape} for x of {tuple(x.shape)}") from None


def _check_options(num_imputations: int, num_samples: int, num_sweeps: int, method: str) -> None:
    check_known("method", method, METHODS)
    at_least("num_imputations", num_imputations, 1)
    at_least("num_samples", num_samples, 1)
    at_least("num_sweeps", num_sweeps, 1)
