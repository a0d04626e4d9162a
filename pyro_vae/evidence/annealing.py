"""log p(x) of rows by annealed importance sampling: budget, streams, the two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_vae.errors import ConfigError
from pyro_vae.evidence import ais
from pyro_vae.evidence.ais import Annealing, Position, Space, State
from pyro_vae.evidence.bases import Base, GuideBase, PriorBase
from pyro_vae.evidence.ground import refuse_nan
from pyro_vae.evidence.pushforward import noise, streams
from pyro_vae.evidence.target import Target

Start = Literal["guide", "prior"]
ROUND_ONE, ROUND_TWO, BACKWARD = 1, 2, 3


def check_annealing(settings: Any, start: Any) -> None:
    """Raise `ConfigError` unless these say how to anneal and from where."""
    if settings is not None and not isinstance(settings, Annealing):
        raise ConfigError(f"annealing takes pyro_vae.evidence.Annealing(...), got {settings!r}")
    if start not in get_args(Start):
        raise ConfigError(f'start is "guide" or "prior", got {start!r}')


class Annealer:
    """Chains from a base to the posterior of every row.

    Args:
        target: whose latent sites are continuous.
        start: the base: the guide, inflated, or the prior. From the guide fewer temperatures are
            needed (Wu et al. 2017); the prior also finds what the guide misses altogether.

    Raises:
        SiteError: the base cannot be annealed from; see `bases`.
    """

    def __init__(
        self, target: Target, settings: Annealing, seed: int, chunk_bytes: int, start: Start
    ) -> None:
        self.target, self.settings, self.seed = target, settings, seed
        self.base: Base = (
            GuideBase(target, settings.inflation) if start == "guide" else PriorBase(target)
        )
        self.betas = ais.schedule(settings.temperatures)
        # a gradient keeps about four times what one evaluation holds
        self.step = max(1, chunk_bytes // (4 * target.bytes_per_pair * settings.chains))
        self._evaluate = target.looped(
            lambda target, rows, u: self._eager(target, rows).evaluate(dict(u))
        )

    def chunks(self) -> list[range]:
        """The rows, divided to keep the budget."""
        N = self.target.size
        return [range(start, min(start + self.step, N)) for start in range(0, N, self.step)]

    def log_weights(self, rows: range) -> Tensor:
        """Log weights `(rows, chains)`, float64: one round tunes, a fresh one counts."""
        return self._forward(rows, self._tuned(rows)).T.cpu()

    def both_ways(self, rows: range, z: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log weights of the forward chains, and of chains back from exact posterior draws.

        Args:
            z: one posterior draw a row, `(1, *batch, *event)`.

        Returns:
            Both `(rows, chains)`; E[forward w] = p(x), E[backward w] = 1/p(x).
        """
        steps = self._tuned(rows)
        forward = self._forward(rows, steps)
        chains, space = self.settings.chains, self._space(rows)
        copies = {name: value.expand(chains, *value.shape[1:]) for name, value in z.items()}
        state = space.state(self.base.coordinates(rows, copies))
        back, fresh = [*steps[-2::-1], steps[0]], self._fresh(rows, BACKWARD)
        backward = ais.anneal(space, state, self.betas[::-1], back, self.settings.leapfrogs, fresh)
        return forward.T.cpu(), backward.T.cpu()

    def _tuned(self, rows: range) -> list[Tensor]:
        space, state, fresh = self._begin(rows, ROUND_ONE)
        return ais.tune(space, state, self.betas, self.settings, fresh)

    def _forward(self, rows: range, steps: list[Tensor]) -> Tensor:
        space, state, fresh = self._begin(rows, ROUND_TWO)
        return ais.anneal(space, state, self.betas, steps, self.settings.leapfrogs, fresh)

    def _begin(self, rows: range, key: int) -> tuple[Space, State, ais.Fresh]:
        """Chains drawn from the base.

        Raises:
            NonFiniteError: the density is NaN there; where it is further on, moves are rejected.
        """
        space = self._space(rows)
        seeds = self.target.seeds(rows, self.seed, key, 0)
        u = self.base.draw(rows, self.settings.chains, seeds)
        refuse_nan(self.base.densities(rows, u)[0].T, rows)
        return space, space.state(u), self._fresh(rows, key)

    def _space(self, rows: range) -> Space:
        space = self._eager(self.target, rows)
        space.evaluate = lambda u: self._evaluate(self.target, rows, u)
        return space

    def _eager(self, target: Target, rows: range) -> Space:
        base = self.base.on(target)
        return Space(base.axes, lambda u: base.densities(rows, u))

    def _fresh(self, rows: range, key: int) -> ais.Fresh:
        """Momentum and uniforms with a stream for every row."""
        x = self.target.arguments[0]
        generators = streams(self.target.seeds(rows, self.seed, key, 1), x.device)

        def fresh(state: State) -> tuple[Position, Tensor]:
            momentum = {
                name: noise(u.shape, self.base.axes[name], generators, u.dtype)
                for name, u in sorted(state.u.items())
            }
            uniform = torch.empty(len(rows), len(state.tilt), dtype=torch.float64, device=x.device)
            for row, generator in zip(uniform, generators, strict=True):
                row.uniform_(generator=generator)
            return momentum, uniform.T

        return fresh
