"""A (model, guide) pair at data with holes: draws, weights and moves of its latent variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae import hamiltonian, programs
from pyro_vae.distributions import stated_mean
from pyro_vae.errors import ShapeError, SiteError
from pyro_vae.evidence.posterior import take
from pyro_vae.evidence.sites import check_support
from pyro_vae.evidence.target import Target
from pyro_vae.hamiltonian import is_real
from pyro_vae.likelihoods.incomplete import by_value
from pyro_vae.programs import Pair, Site
from pyro_vae.typing import Program


@dataclass(frozen=True)
class State:
    """Latent variables, and data completed at them.

    Attributes:
        z: the values of the guide's sites, draws first.
        x: `(draws, rows, ...)`: x_mis ~ p(x_mis|z) in the holes.
        mean: E[x|z], of the same shape.
    """

    z: Mapping[str, Tensor]
    x: Tensor
    mean: Tensor

    def select(self, chosen: Tensor, holes: Holes) -> State:
        """The draws that `chosen`, `(M, rows)`, names for every row."""
        z = {name: take(value, chosen, holes.target.axis(name)) for name, value in self.z.items()}
        axis = 1 - self.x.dim()
        return State(z, take(self.x, chosen, axis), take(self.mean, chosen, axis))

    def flatten(self, holes: Holes) -> State:
        """Every draw of every row as a row of its own, draw by draw."""
        z = {}
        for name, value in self.z.items():
            axis = holes.target.axis(name)
            z[name] = value.movedim(0, axis - 1).flatten(axis - 1, axis)
        return State(z, self.x.flatten(0, 1), self.mean.flatten(0, 1))

    def unflatten(self, shape: torch.Size) -> State:
        """What `flatten` made of `(draws, rows)` states; without their latent variables."""
        return State({}, self.x.unflatten(0, shape), self.mean.unflatten(0, shape))


@dataclass(frozen=True)
class Holes:
    """A (model, guide) pair at rows with holes.

    Attributes:
        target: the checked pair, which knows where its sites keep the rows.
        site: the name of the observed site that holds the data.
        x: `(rows, ...)`, NaN in the holes.
        filled: what the guide draws from: with holes if it takes them.
        args: of these rows.
        rows: their numbers.
    """

    target: Target
    site: str
    x: Tensor
    filled: Tensor
    args: Sequence[Any]
    rows: range

    @classmethod
    def of(
        cls, model: Program, guide: Program, x: Tensor, args: Sequence[Any], site: str | None
    ) -> Holes:
        """Check the pair.

        Raises:
            SiteError, ShapeError: see `impute`.
        """
        means = x.nanmean(0).nan_to_num(0.0)  # 0 where a feature is never observed
        filled = torch.where(x.isnan(), means, x)
        target = Target(model, guide, filled, args)
        if target.supports:
            raise SiteError(
                f"the guide does not draw the latent sites {sorted(target.supports)}, which impute "
                "does not sum over: draw them there"
            )
        if extra := target.guide_sites - target.model_sites:
            raise SiteError(
                f"the guide draws {sorted(extra)}, which the model does not have, so that its "
                "draws of the others have no density to be weighed by"
            )
        name = _data_site(target, x, site)
        holes = cls(target, name, x, filled, args, range(len(x)))
        return replace(holes, filled=x) if holes._guide_takes_nan() else holes

    @property
    def observed(self) -> Tensor:
        """`(rows, ...)`."""
        return ~self.x.isnan()

    def take(self, rows: range) -> Holes:
        """Some of the rows."""
        part = slice(rows.start, rows.stop)
        args = [a[part] if _by_row(a, len(self.x)) else a for a in self.args]
        return Holes(self.target, self.site, self.x[part], self.filled[part], args, rows)

    def repeat(self, times: int) -> Holes:
        """All rows several times over."""

        def again(value: Tensor) -> Tensor:
            return value.repeat(times, *(1,) * (value.dim() - 1))

        args = [again(a) if _by_row(a, len(self.x)) else a for a in self.args]
        return replace(self, x=again(self.x), filled=again(self.filled), args=args)

    def draw(self, num_samples: int) -> tuple[State, Tensor]:
        """Draws, and the log of p(x_obs, z) over the density that they come from, both draws first.

        Half of them are the prior's (a single one is the guide's). So no weight exceeds
        2 p(x_obs|z), however little the guide knows of holes, and where the weights are uneven
        their effective number says so (defensive mixture: Hesterberg 1995).
        """
        pair, half = self._pair(self.filled, num_samples), num_samples // 2
        drawn = pair.sites_at(self.target.guide, {})
        if half:
            prior = pair.sites_at(self.target.model, {})
            z = {n: torch.cat([prior[n]["value"][:half], drawn[n]["value"][half:]]) for n in drawn}
            drawn = pair.sites_at(self.target.guide, z)
        z = {name: site["value"] for name, site in drawn.items()}
        sites = pair.sites_at(self.target.model, z)
        x, mean = self._complete(sites[self.site], (num_samples, *self.x.shape))
        seen = {**sites[self.site], "value": x[0]}
        check_support(self.site, seen, self.target.plate, self.rows)
        log_q = self._sum(drawn)
        if half:
            log_prior = self._sum({name: sites[name] for name in drawn})
            share = half / num_samples
            log_q = torch.logaddexp(log_q + math.log1p(-share), log_prior + math.log(share))
        if num_samples == 1:
            z = {name: value.unsqueeze(0) for name, value in z.items()}
        return State(z, x, mean), self._log_observed(sites, x) - log_q

    def sweep(self, state: State, correct: bool) -> tuple[State, Tensor]:
        """z given x, by the guide's proposal, then x_mis given z; and which rows moved.

        Args:
            correct: accept with the probability min(1, p(x, z') q(z|x) / p(x, z) q(z'|x)).
        """
        pair = self._pair(state.x, 1)
        proposed = pair.sites_at(self.target.guide, {})
        z = {name: site["value"] for name, site in proposed.items()}
        moved = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        if correct:
            there = self._sum(pair.sites_at(self.target.model, z)) - self._sum(proposed)
            here = self._sum(pair.sites_at(self.target.model, state.z)) - self._sum(
                pair.sites_at(self.target.guide, state.z)
            )
            ratio = (there - here).squeeze(0)
            moved = torch.rand_like(ratio).log() < ratio
            z = {name: self._where(name, moved, z[name], state.z[name]) for name in z}
        x, mean = self._complete(pair.sites_at(self.target.model, z)[self.site], self.x.shape)
        return State(z, x, mean), moved

    def move(self, state: State, step: Tensor, num_leapfrog: int) -> tuple[State, Tensor]:
        """A Hamiltonian move of the real latent sites towards p(z|x_obs), then x_mis given z.

        Args:
            step: size of a leapfrog step, `(rows,)`.

        Returns:
            The state, and the probability with which each row was to move, `(rows,)`.
        """
        pair = self._pair(state.x, 1)

        def log_p(z: Mapping[str, Tensor]) -> Tensor:
            sites = pair.sites_at(self.target.model, {**state.z, **z})
            return self._log_observed(sites, state.x).squeeze(0)

        real = {name: state.z[name] for name in self.real_sizes(state)}
        axes = {name: self.target.axis(name) for name in real}
        real, rate = hamiltonian.move(log_p, axes, real, step, num_leapfrog)
        z = {**state.z, **real}
        x, mean = self._complete(pair.sites_at(self.target.model, z)[self.site], self.x.shape)
        return State(z, x, mean), rate

    def real_sizes(self, state: State) -> dict[str, int]:
        """The latent sites that are vectors of unconstrained numbers, and how many of a row's."""
        sites = self._pair(state.x, 1).sites_at(self.target.model, state.z)
        return {
            name: value.numel() // len(self.x)
            for name, value in state.z.items()
            if is_real(sites[name]["fn"])
        }

    def draw_from_model(self, num_samples: int) -> State:
        """Whole data from the model itself, nothing observed; without their latent variables."""
        pair = self._pair(self.filled, num_samples)
        sites = pair.sites_at(poutine.uncondition(self.target.model), {})
        nothing = replace(self, x=torch.full_like(self.x, torch.nan))
        return State({}, *nothing._complete(sites[self.site], (num_samples, *self.x.shape)))

    def _pair(self, x: Tensor, num_particles: int) -> Pair:
        target = self.target
        return Pair(target.model, target.guide, (x, *self.args), {}, num_particles, target.nesting)

    def _complete(self, site: Site, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x with its holes drawn from p(x|z), and E[x|z], in this shape."""
        base = by_value(site["fn"])
        drawn = base.sample().reshape(shape)
        mean = stated_mean(base)
        expected = drawn if mean is None else mean.reshape(shape)
        return torch.where(self.observed, self.x, drawn), expected

    def _log_observed(self, sites: Mapping[str, Site], x: Tensor) -> Tensor:
        """log p(x_obs, z) at draws of the latents, and of x for what is missing."""
        site = sites[self.site]
        base = by_value(site["fn"])
        by_feature = base.log_prob(x.reshape(base.batch_shape))
        kept = torch.where(self.observed, by_feature.reshape(x.shape), 0.0).reshape(
            by_feature.shape
        )
        event = tuple(range(-len(site["fn"].event_shape), 0))
        log_px = programs.masked(site, kept.sum(event) if event else kept)
        others = {name: other for name, other in sites.items() if name != self.site}
        return self.target.within(log_px).double() + self._sum(others)

    def _sum(self, sites: Mapping[str, Site]) -> Tensor:
        """The log-densities of some sites, `(draws, rows)`."""
        logs = [self.target.within(programs.log_prob(s)).double() for s in sites.values()]
        return torch.as_tensor(sum(logs))

    def _where(self, name: str, moved: Tensor, new: Tensor, old: Tensor) -> Tensor:
        right = -1 - self.target.axis(name)
        return torch.where(moved.reshape(-1, *(1,) * right), new, old)

    def _guide_takes_nan(self) -> bool:
        row = self.take(range(1))
        pair = row._pair(torch.full_like(row.x, torch.nan), 1)
        try:
            drawn = pair.sites_at(self.target.guide, {})
        except (RuntimeError, ValueError):
            return False
        return all(bool(site["value"].isfinite().all()) for site in drawn.values())


def _data_site(target: Target, x: Tensor, site: str | None) -> str:
    """The observed site whose values are the data."""
    if site is None and len(target.observed) > 1:
        raise SiteError(
            f"the model observes {sorted(target.observed)}: say which of them holds x, by site="
        )
    name = site if site is not None else next(iter(target.observed))
    if name not in target.observed:
        raise SiteError(f'"{name}" is no observed site; they are {sorted(target.observed)}')
    rows = min(len(x), 2)
    found = target.pair(range(rows), 1).sites_at(target.model, {})[name]
    if found["value"].shape != x[:rows].shape:
        raise ShapeError(
            f'observed site "{name}" has values of shape {tuple(found["value"].shape)} where x '
            f"has {tuple(x[:rows].shape)}, so its holes cannot be told"
        )
    by_value(found["fn"])
    return name


def _by_row(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
