"""log p(x) by the trapezoid rule, for one or two latent dimensions and any decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence.ground import refuse_nan
from pyro_vae.evidence.sites import REAL, plain_support
from pyro_vae.evidence.target import PROBE_ROWS, Target
from pyro_vae.programs import Site
from pyro_vae.seeding import seeded

FIRST = 65
LARGEST = {1: 2**16 + 1, 2: 2**10 + 1}
TOLERANCE = 1e-3
POINTS_AT_ONCE = 4096
DRAWS = 50_000
WIDENINGS = 6


@dataclass(frozen=True)
class Grid:
    """The values of an integral on a grid, and how far they moved at the last doubling.

    Attributes:
        log_px: log p(x), `(N,)`.
        change: |change| of `log_px` at the last doubling of the points, `(N,)`.
        points: of the last grid.
    """

    log_px: Tensor
    change: Tensor
    points: int


def quadrature(
    log_joint: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    tolerance: float = TOLERANCE,
    first: int = FIRST,
) -> Grid:
    """log of the integral of exp(log_joint(z)) over a box, by a trapezoid rule that doubles.

    On smooth functions that vanish at the ends the rule converges faster than any power of the
    step (Trefethen & Weideman 2014), so the change at the last doubling bounds the error well.

    Args:
        log_joint: maps `(G, d)` to `(G, N)`, float64.
        low, high: ends of the box, `(d,)` with d 1 or 2.
        tolerance: the points are doubled until no value moves by more, nats, or the grid has
            65,537 points on a line or 1,025 a side.
        first: points a side to begin with.

    Raises:
        ConfigError: the box has another number of dimensions, or no volume.
    """
    d = len(low)
    if d not in LARGEST:
        raise ConfigError(f"a grid takes 1 or 2 latent dimensions, got {d}")
    if not (low < high).all() or first < 2:
        raise ConfigError(
            f"a grid takes ends low < high and at least 2 points a side, got {low.tolist()}, "
            f"{high.tolist()} and {first}"
        )
    side, before, change = first, None, None
    while True:
        log_px = _trapezoid(log_joint, low, high, side)
        if before is not None:
            # minus infinity on both grids has not moved
            change = torch.where(log_px == before, 0.0, (log_px - before).abs())
            if not (change > tolerance).any() or 2 * side - 1 > LARGEST[d]:
                return Grid(log_px, change, side**d)
        before, side = log_px, 2 * side - 1


def _trapezoid(
    log_joint: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, side: int
) -> Tensor:
    ends = torch.zeros(side, dtype=torch.float64)
    ends[[0, -1]] = -math.log(2)
    log_weight = _mesh([ends] * len(low)).sum(1)
    log_step = ((high - low).double() / (side - 1)).log().sum()
    total = None
    parts = (part.split(POINTS_AT_ONCE) for part in (_points(low, high, side), log_weight))
    for points, weight in zip(*parts, strict=True):
        part = (log_joint(points) + weight[:, None]).logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total + log_step


def _points(low: Tensor, high: Tensor, side: int) -> Tensor:
    """The points of a grid, `(side**d, d)`."""
    ends = zip(low, high, strict=True)
    return _mesh([torch.linspace(a, b, side, dtype=torch.float64) for a, b in ends])


def _mesh(axes: list[Tensor]) -> Tensor:
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


class LatentBox:
    """A box that holds the mass of prior and guide in one or two latent dimensions.

    Args:
        target: its latent sites have 1 or 2 real dimensions together.
        rows: those whose guide's mass the box is to hold.
        seed: of the draws that show where the mass is.
        chunk_bytes: budget for the intermediate results of drawing.

    Attributes:
        low, high: its ends, `(d,)`.

    Raises:
        SiteError: a site is discrete or bounded, or there are more dimensions.
    """

    def __init__(self, target: Target, rows: range, seed: int, chunk_bytes: int) -> None:
        self.target = target
        if target.latent_size not in LARGEST:
            raise SiteError(
                f'method="grid" takes 1 or 2 latent dimensions, sites {sorted(target.guide_sites)} '
                f'have {target.latent_size}: use "is" or "ais"'
            )
        self.names = sorted(target.guide_sites)
        num = max(64, DRAWS // len(rows))
        at_once = min(num, max(2, chunk_bytes // (target.bytes_per_pair * len(rows))))
        pair, free = target.pair(rows, at_once), poutine.uncondition(target.model)
        ends = []
        with seeded(seed):
            for _ in range(0, num, at_once):
                self.like = pair.sites_at(target.guide, {})
                self._check_real()
                for sites in (self.like, pair.sites_at(free, {})):
                    draws = refuse_nan(self._flat(sites), rows).flatten(0, 1)
                    ends.append(torch.stack([draws.min(0).values, draws.max(0).values]))
        low, high = torch.stack(ends)[:, 0].min(0).values, torch.stack(ends)[:, 1].max(0).values
        # 50,000 normal draws reach about 4.3 sd; a quarter more at each end, 6.4
        self.low, self.high = low - (high - low) / 4, high + (high - low) / 4

    def widen(self) -> None:
        """Twice as far from the middle."""
        half = (self.high - self.low) / 2
        self.low, self.high = self.low - half, self.high + half

    def values(self, z: Tensor, num_rows: int) -> dict[str, Tensor]:
        """Points `(G, d)` as values of the sites, the same for `num_rows` rows."""
        values, taken = {}, 0
        for name in self.names:
            like = self.like[name]["value"]
            shape = list(like.shape)
            shape[0], shape[self.target.axis(name)] = len(z), 1
            size = math.prod(shape[1:])
            part = z[:, taken : taken + size].to(like.device, like.dtype).reshape(shape)
            shape[self.target.axis(name)] = num_rows
            values[name] = part.expand(shape)
            taken += size
        return values

    def _check_real(self) -> None:
        for name in self.names:
            if plain_support(self.like[name]["fn"]) not in REAL:
                raise SiteError(
                    f'method="grid" takes real latent sites, "{name}" is in '
                    f'{self.like[name]["fn"].support}: use "is"'
                )

    def _flat(self, sites: Mapping[str, Site]) -> Tensor:
        """The draws of all rows, `(rows, draws, d)`."""
        parts = []
        for name in self.names:
            value = sites[name]["value"]
            axis = self.target.axis(name) + value.dim()
            parts.append(value.movedim(axis, 0).unsqueeze(-1).flatten(2))
        return torch.cat(parts, 2).double().cpu()


def real_sites(target: Target) -> bool:
    """Whether all latent sites take real values."""
    sites = target.pair(range(1), 1).sites_at(target.guide, {})
    return all(plain_support(site["fn"]) in REAL for site in sites.values())


class GridIntegrator:
    """log p(x) of rows of a target on a grid in latent space.

    A grid is decoded once for all rows where the model takes z without a copy for each row (its
    decoder sees nothing but z), and once a row otherwise.
    """

    def __init__(self, target: Target, seed: int, chunk_bytes: int) -> None:
        self.target, self.seed, self.chunk_bytes = target, seed, chunk_bytes
        self.shared = self._shares()
        per_row = 32 if self.shared else target.bytes_per_pair
        self.step = max(1, chunk_bytes // (POINTS_AT_ONCE * per_row))

    def chunks(self) -> list[range]:
        """The rows, divided to keep the budget."""
        N = self.target.size
        return [range(start, min(start + self.step, N)) for start in range(0, N, self.step)]

    def integrate(self, rows: range) -> Grid:
        """log p(x) of the rows, over a box that is widened until nothing is left beyond it.

        `change` holds the share of the integral that may be beyond the box, if that is larger.

        Raises:
            NonFiniteError: the integral of a row is NaN.
        """
        box = LatentBox(self.target, rows, self.seed, self.chunk_bytes)
        copies = 1 if self.shared else len(rows)

        def log_joint(z: Tensor) -> Tensor:
            return self.target.log_joint(rows, box.values(z, copies)).cpu()

        for _ in range(WIDENINGS):
            about = _trapezoid(log_joint, box.low, box.high, FIRST)
            if not (share_beyond(log_joint, box.low, box.high, about) > TOLERANCE).any():
                break
            box.widen()
        grid = quadrature(log_joint, box.low, box.high)
        refuse_nan(grid.log_px[:, None], rows)
        beyond = share_beyond(log_joint, box.low, box.high, grid.log_px)
        return replace(grid, change=torch.maximum(grid.change, beyond))

    def _shares(self) -> bool:
        rows = range(min(self.target.size, PROBE_ROWS))
        box = LatentBox(self.target, rows, self.seed, self.chunk_bytes)
        z = torch.stack([box.low, box.high, (box.low + box.high) / 2])
        apart = self.target.log_joint(rows, box.values(z, len(rows)))
        try:
            together = self.target.log_joint(rows, box.values(z, 1))
        except (RuntimeError, ValueError):
            return False
        return torch.allclose(apart, together, rtol=1e-4)


def share_beyond(
    log_joint: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, log_px: Tensor
) -> Tensor:
    """About what share of an integral is beyond a box: the largest value on its faces, times the
    volume of the box, `(N,)`. That is too much where the integrand falls off within a box's width.
    """
    axes = [
        torch.linspace(a, b, FIRST, dtype=torch.float64) for a, b in zip(low, high, strict=True)
    ]
    z = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    faces = z[((z == z.min(0).values) | (z == z.max(0).values)).any(1)]
    log_share = log_joint(faces).max(0).values + (high - low).log().sum() - log_px
    return log_share.exp().nan_to_num(0.0)  # nothing in the box and nothing on its faces
