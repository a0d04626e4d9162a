"""Weights of the KL over training: callables from the step to the weight.

    warm_up = Warmup(10_000)
    objective.kl_weight = warm_up(step)

The weight of `ELBO` is a tensor, so that a change needs no new trace, and it may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from pyro_vae.checks import at_least, nonnegative, positive
from pyro_vae.errors import ConfigError

Schedule: TypeAlias = Callable[[int], float]


@dataclass(frozen=True)
class Warmup:
    """From `start` to `end` in a straight line over `steps` steps, and `end` from then on
    (Bowman et al. 2016; Sønderby et al. 2016, sec. 2.3).

    Args:
        steps: until `end` is reached, at least 1.
        start, end: weights, finite and not negative.

    Raises:
        ConfigError: an argument is not as above.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self.steps, self.start, self.end)

    def __call__(self, step: int) -> float:
        """The weight at a step, counted from 0."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Cyclical:
    """A warm-up that starts anew every `steps` steps (Fu et al. 2019, eq. 6 and 7).

    Args:
        steps: length of a cycle, at least 1.
        ramp: share of a cycle until `end` is reached, in (0, 1]; the rest of it stays there.
        cycles: how many before the weight stays at `end`; None goes on for ever.
        start, end: weights, finite and not negative.

    Raises:
        ConfigError: an argument is not as above.
    """

    steps: int
    ramp: float = 0.5
    cycles: int | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self.steps, self.start, self.end)
        if positive("ramp", self.ramp) > 1:
            raise ConfigError(f"ramp is a share in (0, 1], got {self.ramp!r}")
        if self.cycles is not None:
            at_least("cycles", self.cycles, 1)

    def __call__(self, step: int) -> float:
        """The weight at a step, counted from 0."""
        if self.cycles is not None and step >= self.cycles * self.steps:
            return self.end
        share = (step % self.steps) / (self.ramp * self.steps)
        return self.start + (self.end - self.start) * min(share, 1.0)


def _check(steps: int, start: float, end: float) -> None:
    if positive("steps", steps) < 1:
        raise ConfigError(f"steps must be at least 1, got {steps!r}")
    nonnegative("start", start)
    nonnegative("end", end)
