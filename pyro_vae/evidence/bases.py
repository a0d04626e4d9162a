"""Where annealing starts: the guide with its noise inflated, or the prior."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.errors import SiteError
from pyro_vae.evidence.ais import Position
from pyro_vae.evidence.draws import FreshNoise, Guide
from pyro_vae.evidence.pushforward import is_pushforward, pull, streams
from pyro_vae.evidence.sites import plain_support
from pyro_vae.evidence.target import Target
from pyro_vae.seeding import seeded

# continuous, and the same for every datum; what else there is may depend on other sites
UNBOUNDED = {
    constraints.real, constraints.real_vector, constraints.positive, constraints.nonnegative,
    constraints.unit_interval, constraints.simplex,
}  # fmt: skip


class Base(Protocol):
    """A density that is drawn from exactly, in coordinates u without bounds.

    Attributes:
        axes: by site, the dimension of u that is indexed by row, from the right.
    """

    axes: dict[str, int]

    def on(self, target: Target) -> Base:
        """The same base of other data."""

    def draw(self, rows: range, chains: int, seeds: list[int]) -> Position:
        """Draws for every row, each from its own seed: by site, `(chains, *batch, *event)`."""

    def densities(self, rows: range, u: Position) -> tuple[Tensor, Tensor | None]:
        """log p(x, z) |dz/du| over the base's density, and the log of that; None: N(0, I)'s."""

    def coordinates(self, rows: range, z: Mapping[str, Tensor]) -> Position:
        """u at values z of the latent sites, `(chains, *batch, *event)`."""


class GuideBase:
    """u ~ N(0, I), z = T(s u): the guide's map T of noise that is inflated by s.

    The encoder's own scales precondition the dynamics.

    Raises:
        SiteError: a distribution of the guide is no map of normal noise.
    """

    def __init__(self, target: Target, inflation: float) -> None:
        self.target, self.guide, self.inflation = target, Guide(target), inflation
        self.axes = {name: target.axis(name) for name in target.guide_sites}
        for name, site in target.pair(range(1), 1).sites_at(target.guide, {}).items():
            if not is_pushforward(site["fn"]):
                raise SiteError(
                    f'site "{name}" is drawn from {type(site["fn"]).__name__}, which is no map of '
                    "normal noise, so annealing cannot start from the guide: use "
                    'start="prior", or method="is"'
                )

    def on(self, target: Target) -> GuideBase:
        """The same base of other data."""
        other = copy.copy(self)
        other.target, other.guide = target, self.guide.on(target)
        return other

    def draw(self, rows: range, chains: int, seeds: list[int]) -> Position:
        """Standard normal noise."""
        device = self.target.arguments[0].device
        unit = torch.ones(1, device=device)
        fresh, u = FreshNoise(streams(seeds, device), self.target.plate, unit), {}

        def keep(name: str, fn: Any) -> Tensor:
            u[name] = fresh(name, fn)
            return u[name]

        self.guide.place(rows, chains, keep)
        return u

    def densities(self, rows: range, u: Position) -> tuple[Tensor, None]:
        """log p(x, z) - log q(z), q being inflated."""
        chains = len(next(iter(u.values())))
        draws = self.guide.place(
            rows, chains, lambda name, _: self.inflation * u[name], self.inflation
        )
        assert draws.log_wide is not None
        return self.target.log_joint(rows, draws.values) - draws.log_wide, None

    def coordinates(self, rows: range, z: Mapping[str, Tensor]) -> Position:
        """The noise that makes z."""
        chains = len(next(iter(z.values())))
        sites = self.target.pair(rows, chains).sites_at(self.target.guide, z)
        return {name: pull(sites[name]["fn"], z[name]) / self.inflation for name in z}


class PriorBase:
    """z ~ p(z), whatever it is: only draws and log p(z) are asked for. u is z where z is real.

    Discrete sites that the guide leaves to the model are summed over, in p(z) as in p(x, z).

    Raises:
        SiteError: a latent site is discrete and in the guide, or its bounds may change.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        model = target.pair(range(1), 1).sites_at(target.model, {})
        names = target.model_sites - target.observed - target.supports.keys()
        self.axes = {name: target.axis(name) for name in sorted(names)}
        self.maps = {}
        for name in self.axes:
            support = plain_support(model[name]["fn"])
            if support not in UNBOUNDED:
                raise SiteError(
                    f'latent site "{name}" is in {support}, and annealing from the prior takes '
                    'real, positive, unit-interval and simplex sites: use method="is"'
                )
            self.maps[name] = biject_to(support)

    def on(self, target: Target) -> PriorBase:
        """The same base of other data."""
        other = copy.copy(self)
        other.target = target
        return other

    def draw(self, rows: range, chains: int, seeds: list[int]) -> Position:
        """Draws from the prior, row by row."""
        parts = []
        for row, seed in zip(rows, seeds, strict=True):
            with seeded(seed):
                pair = self.target.pair(range(row, row + 1), chains)
                sites = pair.sites_at(self.target.model, {})
            parts.append({name: self.maps[name].inv(sites[name]["value"]) for name in self.axes})
        return {name: torch.cat([p[name] for p in parts], axis) for name, axis in self.axes.items()}

    def densities(self, rows: range, u: Position) -> tuple[Tensor, Tensor]:
        """log p(x|z), and log p(z) |dz/du|."""
        z = {name: self.maps[name](value) for name, value in u.items()}
        log_prior, log_joint = self.target.log_prior_and_joint(rows, z)
        return log_joint - log_prior, log_prior + sum(self._log_det(n, u[n], z[n]) for n in u)

    def coordinates(self, rows: range, z: Mapping[str, Tensor]) -> Position:
        """z without bounds."""
        return {name: self.maps[name].inv(z[name]) for name in self.axes}

    def _log_det(self, name: str, u: Tensor, z: Tensor) -> Tensor:
        step = self.maps[name].log_abs_det_jacobian(u, z)
        event = step.dim() - (z.dim() - self.target.event_dims[name])
        return self.target.within(step.sum(tuple(range(-event, 0))) if event else step)
