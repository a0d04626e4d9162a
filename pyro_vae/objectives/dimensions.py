"""The densities of a latent site by dimension of its event, for sites that factorise over them."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Independent

from pyro_vae import programs
from pyro_vae.objectives.expectation import Expectation
from pyro_vae.programs import Site


def factors(q: Site, p: Site) -> bool:
    """Whether both distributions are products over the same dimensions, of which a number is one.

    Not so a Delta: an AutoGuide's has no more than a part of log q.
    """
    both = (q["fn"], p["fn"])
    if not any(fn.event_shape for fn in both):
        return not isinstance(q["fn"], Delta)
    return all(
        isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == len(fn.event_shape)
        for fn in both
    )


def factor(fn: Any) -> Any:
    """The distribution of every dimension, of one that factorises."""
    return fn.base_dist if fn.event_shape else fn


def monte_carlo_kl(q: Site, p: Site, mean: Expectation) -> Tensor:
    """E[log q(z) - log p(z)] from the draws, each with its site's mask and scale: by dimension
    where both factorise, else one number."""
    by_dimension = factors(q, p)
    log_q, log_p = (mean(s, programs.masked(s, _log_prob(s, by_dimension))) for s in (q, p))
    return log_q - log_p


def dimension_first(value: Tensor, site: Site, by_dimension: bool) -> Tensor:
    """`(*batch, *event)` to `(event, *batch)`: masks and scales then broadcast over the batch."""
    dims = len(site["fn"].event_shape)
    if not by_dimension or dims == 0:
        return value.unsqueeze(0)
    return value.flatten(-dims).movedim(-1, 0)


def _log_prob(site: Site, by_dimension: bool) -> Tensor:
    if not by_dimension:
        return programs.log_prob(site).unsqueeze(0)
    value = factor(site["fn"]).log_prob(site["value"], *site["args"], **site["kwargs"])
    return dimension_first(value, site, by_dimension)
