"""Draws from the guide that depend on the seed and the row alone, not on how work is divided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vae import programs
from pyro_vae.evidence.pushforward import is_pushforward, log_normal, noise, push, streams
from pyro_vae.evidence.sites import check_point_masses, check_same_sites, told_of_nan
from pyro_vae.evidence.target import Target
from pyro_vae.programs import Site
from pyro_vae.seeding import generators_put_back, seeded

Noise = Callable[[str, Any], Tensor]


@dataclass(frozen=True)
class Draws:
    """Draws of the latent variables of some rows.

    Attributes:
        values: by site, `(num_draws, *batch, *event)`.
        log_q: log-density of the guide, `(num_draws, rows)`.
        log_wide: log-density of the inflated guide, or None where the guide is no map of noise.
    """

    values: dict[str, Tensor]
    log_q: Tensor
    log_wide: Tensor | None


class Guide:
    """The guide of a target, as a source of draws.

    Where all its distributions are maps of normal noise z = T(u), the guide runs once for all
    rows, and each row's noise comes from a stream of its own. Any other guide runs row by row.

    Args:
        target: whose guide it is.

    Attributes:
        is_map: whether all its distributions are such maps.

    Raises:
        SiteError: a site is a point mass.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        with generators_put_back(), torch.no_grad():
            sites = target.pair(range(1), 2).sites_at(target.guide, {})
        check_point_masses(sites)
        self.is_map = all(
            is_pushforward(site["fn"]) and not site["is_observed"] for site in sites.values()
        )

    def on(self, target: Target) -> Guide:
        """The same guide on other data."""
        other = copy.copy(self)
        other.target = target
        return other

    def draw(
        self, rows: range, num_draws: int, seeds: list[int], scales: Tensor, inflation: float
    ) -> Draws:
        """Draws for every row, each from its own seed.

        Args:
            scales: `(num_draws,)`: what the noise is multiplied with, 1 or `inflation`. Guides
                that are no maps take 1 only.
            inflation: scale of the noise in `log_wide`.
        """
        if not self.is_map:
            parts = [
                self._draw_row(row, num_draws, seed) for row, seed in zip(rows, seeds, strict=True)
            ]
            return _join(parts, self.target)
        fresh = FreshNoise(streams(seeds, scales.device), self.target.plate, scales)
        return self.place(rows, num_draws, fresh, inflation)

    def place(self, rows: range, num_draws: int, noise: Noise, inflation: float = 1.0) -> Draws:
        """Run the guide with the noise given, by the name and distribution of a site."""
        target = self.target
        pair = target.pair(rows, num_draws)
        placed = Place(noise)
        with told_of_nan("guide", pair.args[0], rows), placed:
            sites = pair.sites_at(target.guide, {})
        check_same_sites(sites, target.guide_sites, "guide", rows)

        def log_density(name: str, site: Site, scale: float) -> Tensor:
            squares, log_det = placed.squares[name], placed.log_det[name]
            size = site["fn"].event_shape.numel()
            log_q = log_normal(squares, size, scale) - log_det
            return target.within(programs.masked(site, log_q))

        log_q, log_wide = (
            torch.as_tensor(sum(log_density(name, site, scale) for name, site in sites.items()))
            for scale in (1.0, inflation)
        )
        return Draws(_leading(sites, num_draws), log_q, log_wide)

    def _draw_row(self, row: int, num_draws: int, seed: int) -> Draws:
        rows = range(row, row + 1)
        pair = self.target.pair(rows, num_draws)
        with told_of_nan("guide", pair.args[0], rows), seeded(seed):
            sites = pair.sites_at(self.target.guide, {})
        check_same_sites(sites, self.target.guide_sites, "guide", rows)
        log_q = sum(self.target.within(programs.log_prob(site)) for site in sites.values())
        return Draws(_leading(sites, num_draws), torch.as_tensor(log_q), None)


class Place(Messenger):
    """Draw every latent site of a program by pushing given noise through its distribution.

    Attributes:
        squares: by site, sum of u² over the event.
        log_det: by site, log |dT/du|.
    """

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise
        self.squares: dict[str, Tensor] = {}
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or isinstance(msg["fn"], _Subsample):
            return
        name, fn = msg["name"], msg["fn"]
        u = self.noise(name, fn)
        msg["value"], self.log_det[name] = push(fn, u)
        event = tuple(range(-len(fn.event_shape), 0))
        self.squares[name] = (
            torch.linalg.vector_norm(u, dim=event).square() if event else u.square()
        )
        msg["done"] = True


class FreshNoise:
    """Noise for the sites of a program, with a stream for every row.

    Args:
        streams: one a row; the sites take from them in the program's order.
        plate: the dimension of the batch, from the right, that is indexed by row.
        scales: `(num_draws,)`: what the noise is multiplied with.
    """

    def __init__(self, streams: list[torch.Generator], plate: int, scales: Tensor) -> None:
        self.streams, self.plate, self.scales = streams, plate, scales

    def __call__(self, name: str, fn: Any) -> Tensor:
        axis = self.plate - len(fn.event_shape)
        u = noise(fn.shape(), axis, self.streams, _location(fn).dtype)
        scales = self.scales.to(u.dtype)  # the data may be whole numbers
        if len(scales) == 1:
            return u * scales
        return u * scales.reshape(-1, *(1,) * (u.dim() - 1))


def _location(fn: Any) -> Tensor:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.loc


def _leading(sites: dict[str, Site], num_draws: int) -> dict[str, Tensor]:
    """The sites' values with draws as the first dimension, also where there is one draw only."""
    values = {name: site["value"] for name, site in sites.items()}
    return values if num_draws > 1 else {name: v.unsqueeze(0) for name, v in values.items()}


def _join(parts: list[Draws], target: Target) -> Draws:
    values = {
        name: torch.cat([part.values[name] for part in parts], target.axis(name))
        for name in parts[0].values
    }
    return Draws(values, torch.cat([part.log_q for part in parts], 1), None)
