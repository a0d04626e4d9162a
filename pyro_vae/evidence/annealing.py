"""log p(x) of rows by annealed importance sampling: bases, budget, the two rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence import ais, kernels
from pyro_vae.evidence.ais import Position, Settings, Space, State
from pyro_vae.evidence.draws import FreshNoise, Guide, Place
from pyro_vae.evidence.pushforward import is_pushforward, noise, pull, streams
from pyro_vae.evidence.target import Target

Start = Literal["guide", "prior"]
ROUND_ONE, ROUND_TWO, BACKWARD = 1, 2, 3


def check_annealing(settings: Any, start: Any) -> None:
    """Raise `ConfigError` unless these say how to anneal and from where."""
    if settings is not None and not isinstance(settings, Settings):
        raise ConfigError(f"annealing takes pyro_vae.evidence.Settings(...), got {settings!r}")
    if start not in get_args(Start):
        raise ConfigError(f'start is "guide" or "prior", got {start!r}')


class Annealer:
    """Chains from a base to the posterior of every row.

    Args:
        target: its latent sites are maps of normal noise, in the guide or in the model's prior.
        start: the base: the guide, inflated, or the prior. From the guide fewer temperatures are
            needed (Wu et al. 2017); the prior also finds what the guide misses altogether.

    Raises:
        SiteError: a distribution of the base is no map of normal noise (a discrete site, say).
    """

    def __init__(
        self, target: Target, settings: Settings, seed: int, chunk_bytes: int, start: Start
    ) -> None:
        self.target, self.settings, self.seed, self.start = target, settings, seed, start
        self.guide = Guide(target)
        self._check_maps()
        self.betas = ais.schedule(settings.temperatures)
        # a gradient keeps about four times what one evaluation holds
        self.step = max(1, chunk_bytes // (4 * target.bytes_per_pair * settings.chains))

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
        fresh = self._fresh(rows, BACKWARD)
        space = self._space(rows)
        u = self._coordinates(rows, z)
        back = [*steps[-2::-1], steps[0]]
        backward = ais.anneal(
            space, space.state(u), self.betas[::-1], back, self.settings.leapfrogs, fresh
        )
        return forward.T.cpu(), backward.T.cpu()

    def _tuned(self, rows: range) -> list[Tensor]:
        fresh, space = self._fresh(rows, ROUND_ONE), self._space(rows)
        state = self._initial(space, rows, ROUND_ONE)
        return ais.tune(space, state, self.betas, self.settings, fresh)

    def _forward(self, rows: range, steps: list[Tensor]) -> Tensor:
        fresh, space = self._fresh(rows, ROUND_TWO), self._space(rows)
        state = self._initial(space, rows, ROUND_TWO)
        return ais.anneal(space, state, self.betas, steps, self.settings.leapfrogs, fresh)

    def _initial(self, space: Space, rows: range, key: int) -> State:
        """Chains drawn from the base."""
        x = self.target.arguments[0]
        generators = streams(self.target.seeds(rows, self.seed, key, 0), x.device)
        unit = torch.ones(1, device=x.device, dtype=x.dtype)
        fresh, u = FreshNoise(generators, self.target.plate, unit), {}

        def draw(name: str, fn: Any) -> Tensor:
            u[name] = fresh(name, fn)
            return u[name]

        self._place(rows, draw)
        return space.state(u)

    def _fresh(self, rows: range, key: int) -> ais.Fresh:
        """Momentum and uniforms with a stream for every row."""
        x = self.target.arguments[0]
        generators = streams(self.target.seeds(rows, self.seed, key, 1), x.device)

        def fresh(state: State) -> tuple[Position, Tensor]:
            momentum = {
                name: noise(u.shape, self._axes[name], generators, u.dtype)
                for name, u in sorted(state.u.items())
            }
            uniform = torch.empty(len(rows), len(state.tilt), dtype=torch.float64, device=x.device)
            for row, generator in zip(uniform, generators, strict=True):
                row.uniform_(generator=generator)
            return momentum, uniform.T

        return fresh

    def _space(self, rows: range) -> Space:
        if self.start == "prior":
            return Space(self._axes, lambda u: self._likelihood(rows, lambda name, _: u[name]))
        scale = self.settings.inflation

        def tilt(u: Position) -> Tensor:
            draws = self._place(rows, lambda name, _: scale * u[name])
            return self.target.log_joint(rows, draws.values) - draws.log_wide

        return Space(self._axes, tilt)

    @property
    def _axes(self) -> dict[str, int]:
        target = self.target
        names = (
            target.guide_sites if self.start == "guide" else target.model_sites - target.observed
        )
        return {name: target.axis(name) for name in names}

    def _place(self, rows: range, noise_of: Callable[[str, Any], Tensor]) -> Any:
        if self.start == "prior":
            return self._likelihood(rows, noise_of)
        return self.guide.place(rows, self.settings.chains, noise_of, self.settings.inflation)

    def _likelihood(self, rows: range, noise_of: Callable[[str, Any], Tensor]) -> Tensor:
        """log p(x|z) at z from the prior's map, `(chains, rows)`."""
        chains = self.settings.chains
        pair = self.target.pair(rows, chains)
        with Place(noise_of):
            sites = pair.sites_at(self.target.model, {})
        self.target.evaluations += chains * len(rows)
        terms = (self.target.within(kernels.log_prob(sites[n])) for n in self.target.observed)
        return torch.as_tensor(sum(terms))

    def _coordinates(self, rows: range, z: Mapping[str, Tensor]) -> Position:
        """u with T(u) = z for every chain."""
        chains = self.settings.chains
        copies = {name: value.expand(chains, *value.shape[1:]) for name, value in z.items()}
        program = self.target.guide if self.start == "guide" else self.target.model
        sites = self.target.pair(rows, chains).sites_at(program, copies)
        scale = self.settings.inflation if self.start == "guide" else 1.0
        return {name: pull(sites[name]["fn"], copies[name]) / scale for name in copies}

    def _check_maps(self) -> None:
        target = self.target
        if self.start == "guide":
            sites = target.pair(range(1), 1).sites_at(target.guide, {})
        else:
            model = target.pair(range(1), 1).sites_at(target.model, {})
            sites = {name: s for name, s in model.items() if not s["is_observed"]}
        for name, site in sites.items():
            if not is_pushforward(site["fn"]):
                raise SiteError(
                    f'site "{name}" is drawn from {type(site["fn"]).__name__}, which is no map of '
                    f"normal noise, so annealing cannot start from the {self.start}: use "
                    'method="is"' + (' or start="guide"' if self.start == "prior" else "")
                )
