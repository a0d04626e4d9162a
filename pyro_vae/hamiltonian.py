"""Hamiltonian moves of the latent variables, every datum by itself and all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.evidence.ais import Position, Space, transition
from pyro_vae.evidence.sites import plain_support


def move(
    log_p: Callable[[Position], Tensor],
    axes: Mapping[str, int],
    z: Mapping[str, Tensor],
    step: Tensor | float,
    num_leapfrog: int,
) -> tuple[Position, Tensor]:
    """One transition of every row that leaves exp(log_p) as it is (Neal 2011, fig. 2).

    Args:
        log_p: maps values of the sites to `(rows,)`, differentiable; up to a constant of the row.
        axes: by site, the dimension of its value that is indexed by row, from the right.
        z: by site, real numbers.
        step: size of a leapfrog step, one or `(rows,)`.

    Returns:
        The values afterwards, and the probability with which each row was to move, `(rows,)`.
    """

    def densities(u: Position) -> tuple[Tensor, Tensor]:
        value = log_p({name: v.squeeze(0) for name, v in u.items()}).unsqueeze(0)
        return value, torch.zeros_like(value)

    space = Space(dict(axes), densities)
    state = space.state({name: v.unsqueeze(0) for name, v in z.items()})
    momentum = {name: torch.randn_like(v) for name, v in state.u.items()}
    sizes = torch.as_tensor(step, dtype=state.tilt.dtype, device=state.tilt.device)
    state, accepted = transition(
        space, state, momentum, torch.rand_like(state.tilt), 1.0, sizes.expand_as(state.tilt),
        num_leapfrog,
    )  # fmt: skip
    return {name: u.squeeze(0) for name, u in state.u.items()}, accepted.squeeze(0)


def is_real(fn: Any) -> bool:
    """Whether a distribution is over vectors of unconstrained numbers."""
    return plain_support(fn) is constraints.real
