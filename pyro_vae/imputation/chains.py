"""Chains over the latent and the missing values of every datum, and whether they agree."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.imputation.holes import Holes, State

LEAPFROGS, ACCEPTANCE, ADAPTATION = 5, 0.65, 0.4


def run_chains(
    holes: Holes, state: State, num_sweeps: int, correct: bool
) -> tuple[State, Tensor, Tensor]:
    """Sweeps of M chains a datum, from M states each.

    Args:
        correct: accept or refuse the guide's proposals, and move along the gradient as well;
            otherwise every proposal is taken, and there is nothing else.

    Returns:
        The last states; the share of the guide's proposals that was accepted, `(rows,)`; and R-hat
        of E[x|z], the largest over the holes of a row, `(rows,)`: infinite where nothing moved.
    """
    shape = state.x.shape[:2]
    chains, state = holes.repeat(shape[0]), state.flatten(holes)
    size = sum(chains.real_sizes(state).values())
    step = torch.full(shape[1:], 0.5 * max(size, 1) ** -0.25, device=state.x.device).double()
    accepted, gone = torch.zeros(2, *shape, dtype=torch.float64, device=state.x.device)
    means = SplitMeans(state.mean, num_sweeps)
    for sweep in range(num_sweeps):
        state, moved = chains.sweep(state, correct)
        accepted += moved.unflatten(0, shape)
        if correct and size:
            state, rate = chains.move(state, step.repeat(shape[0]), LEAPFROGS)
            gone += rate.unflatten(0, shape)
            if sweep < num_sweeps // 2:  # the second half of the chain has one step size
                rate = rate.unflatten(0, shape).mean(0)
                step = (step * (1 + ADAPTATION * (rate - ACCEPTANCE))).clamp(1e-6, 2.0)
        means.add(sweep, state.mean)
    rhat = means.rhat(shape).masked_fill(holes.observed, 1.0).flatten(1).amax(1)
    stuck = (accepted + gone).sum(0) == 0
    rhat[stuck & ~holes.observed.flatten(1).all(1)] = torch.inf
    return state.unflatten(shape), accepted.mean(0) / num_sweeps, rhat


class SplitMeans:
    """Means and variances of the halves of many chains, taken as they run.

    Args:
        like: what is observed of all chains, `(chains, ...)`.
        num_sweeps: length of the chains; of an odd one the middle is left out.
    """

    def __init__(self, like: Tensor, num_sweeps: int) -> None:
        self.num_sweeps, self.size = num_sweeps, num_sweeps // 2
        self.origin = like.double()  # differences from it lose no digits
        self.sums, self.squares = torch.zeros(2, 2, *like.shape, device=like.device).double()

    def add(self, sweep: int, value: Tensor) -> None:
        """What the chains are at after a sweep, numbered from 0."""
        difference = value.double() - self.origin
        for half, first in enumerate((0, self.num_sweeps - self.size)):
            if first <= sweep < first + self.size:
                self.sums[half] += difference
                self.squares[half] += difference.square()

    def rhat(self, shape: torch.Size) -> Tensor:
        """Split R-hat (Gelman et al. 2013, sec. 11.4) over the M chains of `shape`, `(M, rows)`.

        1 where nothing varies; NaN where halves of fewer than two sweeps tell nothing.
        """
        n = self.size
        if n < 2:
            return torch.full_like(self.origin.unflatten(0, shape)[0], torch.nan)
        means = (self.sums / n).unflatten(1, shape)
        squares = (self.squares / n).unflatten(1, shape)
        within = (squares - means.square()).clamp_min(0).flatten(0, 1).mean(0) * n / (n - 1)
        between = (means + self.origin.unflatten(0, shape)).flatten(0, 1).var(0)
        rhat = ((n - 1) / n + between / within).sqrt()
        return torch.where((within == 0) & (between == 0), 1.0, rhat)
