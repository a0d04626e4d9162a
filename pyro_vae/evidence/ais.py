"""Annealed importance sampling (Neal 2001) by Hamiltonian Monte Carlo, in unbounded coordinates.

The latent variables are written as z = T(u), and the path from a base f_0 to the posterior is

    log f_b(u) = log f_0(u) + b l(u),   0 <= b <= 1,

where f_0 is a normalised density that is drawn from exactly and f_1(u) = p(x, T(u)) |dT/du|; so l
is the log importance weight of a draw of the base (`bases` has the two: guide and prior). The log
weight of a chain is the sum of (b_t - b_(t-1)) l(u_(t-1)), in which every term is taken **before**
the transition that leaves f_(b_t) invariant; the mean of the weights over chains estimates p(x)
without bias, whatever the transitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from pyro_vae.errors import ConfigError

Position = dict[str, Tensor]


@dataclass(frozen=True)
class Annealing:
    """How long and how finely to anneal.

    Attributes:
        chains: independent chains a datum.
        temperatures: number of transitions from base to posterior.
        leapfrogs: leapfrog steps in one transition.
        acceptance: that the step size is tuned to in the first round.
        inflation: of the guide's noise in the base distribution.
    """

    chains: int = 16
    temperatures: int = 200
    leapfrogs: int = 5
    acceptance: float = 0.65
    inflation: float = 1.5

    def __post_init__(self) -> None:
        counts = (self.chains, self.temperatures, self.leapfrogs)
        whole = all(isinstance(count, Integral) for count in counts)
        if not whole or self.chains < 2 or self.temperatures < 1 or self.leapfrogs < 1:
            raise ConfigError(
                "annealing takes at least 2 chains, 1 temperature and 1 leapfrog step; got "
                "{!r}, {!r} and {!r}".format(*counts)
            )
        if not 0 < self.acceptance < 1 or not self.inflation > 0:
            raise ConfigError(
                "annealing is tuned to an acceptance between 0 and 1 and starts from noise with a "
                f"positive inflation; got {self.acceptance!r} and {self.inflation!r}"
            )


@dataclass(frozen=True)
class State:
    """Where the chains are.

    Attributes:
        u: by site, `(chains, *batch, *event)`.
        log_base: log f_0(u) up to a constant, `(chains, rows)`.
        tilt: l(u), `(chains, rows)`.
        base_slope, slope: d log f_0/du and dl/du, by site, as `u`.
    """

    u: Position
    log_base: Tensor
    tilt: Tensor
    base_slope: Position
    slope: Position


class Space:
    """Sums and broadcasts between sites and `(chains, rows)`.

    Args:
        axes: by site, the dimension that is indexed by row, from the right.
        densities: l(u) and log f_0(u), `(chains, rows)`, differentiable; None stands for the
            log-density of N(0, I).

    Attributes:
        evaluate: `differentiated`, or what computes the same faster.
    """

    def __init__(
        self, axes: dict[str, int], densities: Callable[[Position], tuple[Tensor, Tensor | None]]
    ) -> None:
        self.axes, self.densities = axes, densities
        self.evaluate: Callable[[Position], Sequence[Tensor]] = self.differentiated

    def state(self, u: Position) -> State:
        """Evaluate l and f_0 and their gradients."""
        log_base, tilt, *slopes = self.evaluate(u)
        base_slope, slope = slopes[: len(u)], slopes[len(u) :]
        return State(
            u, log_base, tilt, dict(zip(u, base_slope, strict=True)),
            dict(zip(u, slope, strict=True)),
        )  # fmt: skip

    def differentiated(self, u: Position) -> list[Tensor]:
        """log f_0 and l at u; d log f_0/du of every site, and dl/du. NaN counts as minus infinity,
        and as no slope."""
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in u.items()}
            tilt, log_base = self.densities(leaves)
            slope = _gradient(tilt, leaves, retain=log_base is not None)
            if log_base is not None:
                base_slope = _gradient(log_base, leaves)
                return [_finite(log_base), _finite(tilt), *base_slope, *slope]
        base_slope = [-value for value in u.values()]
        return [-0.5 * self.squares(u), _finite(tilt), *base_slope, *slope]

    def squares(self, v: Position) -> Tensor:
        """Sum of v² of each chain and row, `(chains, rows)`, float64."""
        total: Tensor | float = 0.0
        for name, value in v.items():
            row_axis = value.dim() + self.axes[name]
            others = [d for d in range(1, value.dim()) if d != row_axis]
            squares = value.double().square()
            total = total + (squares.sum(others) if others else squares)
        return torch.as_tensor(total)

    def spread(self, by_row: Tensor, like: Tensor, name: str) -> Tensor:
        """`(chains or 1, rows)` in a shape that broadcasts with a site's value."""
        shape = [1] * like.dim()
        shape[0], shape[self.axes[name]] = by_row.shape
        return by_row.reshape(shape).to(like.dtype)


def _gradient(value: Tensor, leaves: Position, retain: bool = False) -> list[Tensor]:
    by = list(leaves.values())
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in by]
    found = torch.autograd.grad(value.sum(), by, allow_unused=True, retain_graph=retain)
    return [
        torch.zeros_like(leaf) if d is None else d.nan_to_num(0.0, 0.0, 0.0)
        for leaf, d in zip(by, found, strict=True)
    ]


def _finite(value: Tensor) -> Tensor:
    value = value.detach()
    return torch.where(value.isnan(), -math.inf, value).double()


def leapfrog(
    space: Space, state: State, momentum: Position, beta: float, step: Tensor, count: int
) -> tuple[State, Position]:
    """Half a kick, then drifts and full kicks in turn, and half a kick: reversible, volume kept.

    Args:
        step: step size of each row, `(1, rows)`.
    """

    def kick(momentum: Position, state: State, part: float) -> Position:
        return {
            name: p
            + part
            * space.spread(step, p, name)
            * (beta * state.slope[name] + state.base_slope[name])
            for name, p in momentum.items()
        }

    momentum = kick(momentum, state, 0.5)
    for i in range(count):
        u = {n: value + space.spread(step, value, n) * momentum[n] for n, value in state.u.items()}
        state = space.state(u)
        momentum = kick(momentum, state, 1.0 if i < count - 1 else 0.5)
    return state, momentum


def transition(
    space: Space,
    state: State,
    momentum: Position,
    uniform: Tensor,
    beta: float,
    step: Tensor,
    count: int,
) -> tuple[State, Tensor]:
    """One Hamiltonian Monte Carlo move that leaves f_beta invariant.

    Args:
        momentum: fresh, standard normal.
        uniform: for the acceptance, `(chains, rows)`.

    Returns:
        The new state, and the probability of acceptance, `(chains, rows)`.
    """

    def energy(state: State, momentum: Position) -> Tensor:
        # 0 * minus infinity is not wanted at the base
        tilted = beta * state.tilt if beta > 0 else torch.zeros_like(state.tilt)
        return 0.5 * space.squares(momentum) - state.log_base - tilted

    end, end_momentum = leapfrog(space, state, momentum, beta, step, count)
    log_ratio = energy(state, momentum) - energy(end, end_momentum)
    accept = uniform.log() < log_ratio  # false where the ratio is NaN

    def choose(new: Position, old: Position) -> Position:
        return {
            n: torch.where(space.spread(accept.double(), new[n], n) > 0, new[n], old[n])
            for n in old
        }

    moved = State(
        u=choose(end.u, state.u),
        log_base=torch.where(accept, end.log_base, state.log_base),
        tilt=torch.where(accept, end.tilt, state.tilt),
        base_slope=choose(end.base_slope, state.base_slope),
        slope=choose(end.slope, state.slope),
    )
    return moved, log_ratio.clamp_max(0).exp().nan_to_num(0.0)


def schedule(temperatures: int, sharpness: float = 4.0) -> list[float]:
    """0 = b_0 < ... < b_T = 1 along a sigmoid, dense at both ends (Wu et al. 2017)."""
    t = torch.linspace(-sharpness, sharpness, temperatures + 1, dtype=torch.float64).sigmoid()
    return ((t - t[0]) / (t[-1] - t[0])).tolist()


Fresh = Callable[[State], tuple[Position, Tensor]]


def anneal(
    space: Space, state: State, betas: Sequence[float], steps: Sequence[Tensor], count: int,
    fresh: Fresh,
) -> Tensor:  # fmt: skip
    """Log weights of the chains, `(chains, rows)`: from base to posterior, or back.

    Args:
        state: drawn from f at `betas[0]`.
        betas: rising from 0 to 1, or falling from 1 to 0.
        steps: frozen step size for each transition, `(1, rows)`.
        fresh: draws momentum and uniforms.

    Returns:
        Forward: E[w] = p(x). Backward, from an exact posterior draw: E[w] = 1/p(x).
    """
    log_w = torch.zeros_like(state.tilt)
    for (before, beta), step in zip(pairwise(betas), steps, strict=True):
        log_w = log_w + (beta - before) * state.tilt
        momentum, uniform = fresh(state)
        state, _ = transition(space, state, momentum, uniform, beta, step, count)
    return log_w


def tune(
    space: Space, state: State, betas: Sequence[float], settings: Annealing, fresh: Fresh
) -> list[Tensor]:
    """A first round, thrown away, that finds the step size of each row at each temperature.

    The step size follows the mean acceptance of the row's chains towards `settings.acceptance`.
    """
    dimensions = space.squares({n: torch.ones_like(v) for n, v in state.u.items()})[:1]
    step = 0.5 * dimensions.clamp_min(1).pow(-0.25)
    steps = []
    for beta in betas[1:]:
        momentum, uniform = fresh(state)
        state, accepted = transition(
            space, state, momentum, uniform, beta, step, settings.leapfrogs
        )
        rate = accepted.mean(0, keepdim=True)
        step = (step * (1.0 + 0.2 * (rate - settings.acceptance))).clamp(1e-5, 2.0)
        steps.append(step)
    return steps
