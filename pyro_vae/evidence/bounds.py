"""Bounds from both sides on log p(x), for data that the model itself made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae import programs
from pyro_vae.checks import at_least, check_known
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence.ais import Annealing
from pyro_vae.evidence.annealing import Annealer, Start, check_annealing
from pyro_vae.evidence.ground import CHUNK_BYTES, prepare, undisturbed
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.target import Target
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program


@dataclass(frozen=True, eq=False)
class Sandwich:
    """log p(x) of simulated data between two bounds, each valid in expectation; nats.

    Attributes:
        lower: E[lower] <= log p(x), `(N,)`.
        upper: E[upper] >= log p(x), `(N,)`.
        method: "is" or "ais".
        tolerance: the mean gap, nats a datum, up to which the verdict is good.
    """

    lower: np.ndarray
    upper: np.ndarray
    method: str
    tolerance: float

    @property
    def gap(self) -> float:
        """Mean of upper minus lower: the mean of log p(x) lies within."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_se(self) -> float:
        """Standard error of `gap`; NaN for one datum."""
        if len(self.lower) == 1:
            return math.nan
        return float((self.upper - self.lower).std(ddof=1)) / math.sqrt(len(self.lower))

    @property
    def tight(self) -> bool:
        """Whether the gap, with two of its standard errors, is within the tolerance."""
        return self.gap + 2 * self.gap_se <= self.tolerance

    def __str__(self) -> str:
        limit = f"{self.tolerance:g} nats"
        if self.tight:
            told = f"Estimates can be trusted to {limit} on data like the model's own"
        elif self.gap > self.tolerance:
            told = f"The gap exceeds {limit}: read estimates of this model as bounds"
        else:
            told = f"So few data cannot tell whether the gap is within {limit}"
        return (
            f"{self.lower.mean():.3f} <= log p(x) <= {self.upper.mean():.3f} nats a datum, "
            f"gap {self.gap:.3g} ± {self.gap_se:.2g} ({len(self.lower):,} simulated data, "
            f"{self.method}). {told}; of real data it says nothing."
        )


def sandwich(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    method: str = "is",
    num_samples: int = 1000,
    annealing: Annealing | None = None,
    start: Start = "guide",
    tolerance: float = 0.5,
    seed: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Sandwich:
    """Simulate data from the model and bound their log p(x) from below and from above.

    The latent variables that made a simulated datum are an exact draw from its posterior, which
    real data do not have. "is" plants it among the weights: with one of K weights taken at the
    posterior draw, E[1/mean of w] = 1/p(x), so the log of the mean is an upper bound in
    expectation, at the cost of importance sampling. "ais" runs annealing backward from it
    (bidirectional Monte Carlo: Grosse et al. 2015). Either shows modes that the guide misses.

    Args:
        model, guide: as in `log_marginal`; the model observes one site, whose value is `x`.
        x: data, `(N, ...)`: only its shape counts; N data are simulated.
        args: further arguments of the programs.
        method: "is" or "ais".
        num_samples: K of "is".
        annealing, start: of "ais".
        tolerance: mean gap, nats a datum, that the verdict calls good.
        seed: of simulation and bounds.
        chunk_bytes: as in `log_marginal`.

    Raises:
        SiteError: the model observes more than one site, or as `log_marginal`.
        UnknownNameError: another method.
        ConfigError: an option means nothing; `num_samples` is at least 2.
    """
    check_known("method", method, ("is", "ais"))
    at_least("num_samples", num_samples, 2)
    at_least("chunk_bytes", chunk_bytes, 1)
    check_annealing(annealing, start)
    if not isinstance(tolerance, Real) or not tolerance > 0:
        raise ConfigError(f"tolerance is a positive number of nats, got {tolerance!r}")
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide):
        x, z = simulate(model, guide, x, args, derive(seed, 0))
        target = Target(model, guide, x, args)
        if method == "is":
            sampler = Sampler(target, num_samples, seed, chunk_bytes, Proposal(share=0.0))
            parts = [_planted(sampler, rows, z) for rows in sampler.chunks()]
        else:
            annealer = Annealer(target, annealing or Annealing(), seed, chunk_bytes, start)
            parts = [_both_ways(annealer, rows, z) for rows in annealer.chunks()]
    lower, upper = (torch.cat(bound).numpy() for bound in zip(*parts, strict=True))
    return Sandwich(lower, upper, method, tolerance)


def simulate(
    model: Program, guide: Program, x: Tensor, args: tuple[Any, ...], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Data from the model, like `x`, and the latents that made them, `(1, *batch, *event)`."""
    target = Target(model, guide, x, args)
    if len(target.observed) != 1:
        raise SiteError(
            f"data are simulated for a model that observes one site, this one has "
            f"{sorted(target.observed)}"
        )
    (name,) = target.observed
    with seeded(seed):
        free = poutine.uncondition(model)
        sites = programs.Pair(free, guide, (x, *args)).sites_at(free, {})
    simulated = sites[name]["value"]
    if simulated.shape != x.shape:
        raise SiteError(
            f'the model\'s site "{name}" has values of shape {tuple(simulated.shape)}, and its '
            f"argument {tuple(x.shape)}: only models that observe their argument can be simulated"
        )
    z = {n: sites[n]["value"].unsqueeze(0) for n in target.guide_sites if n in sites}
    return simulated.to(x.dtype), z


def _planted(sampler: Sampler, rows: range, z: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Lower bound of K weights, and upper bound with one of them taken at the posterior draw."""
    target = sampler.target
    log_w = sampler.weights(rows).log_w
    true = target.select(z, slice(rows.start, rows.stop), slice(0, 1))
    pair = target.pair(rows, 1)
    guide = pair.sites_at(target.guide, {n: v.squeeze(0) for n, v in true.items()})
    log_q = sum(target.within(programs.log_prob(site)) for site in guide.values())
    planted = (target.log_joint(rows, true) - log_q).double().cpu().T
    K = log_w.shape[1]
    with_planted = torch.cat([log_w[:, 1:], planted], 1)
    return log_w.logsumexp(1) - math.log(K), with_planted.logsumexp(1) - math.log(K)


def _both_ways(annealer: Annealer, rows: range, z: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Lower bound of forward chains, upper bound of backward ones."""
    true = annealer.target.select(z, slice(rows.start, rows.stop), slice(0, 1))
    forward, backward = annealer.both_ways(rows, true)
    chains = math.log(forward.shape[1])
    return forward.logsumexp(1) - chains, chains - backward.logsumexp(1)
