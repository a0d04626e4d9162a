"""Draws from p(z|x): the guide's, resampled by their importance weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.ground import CHUNK_BYTES, prepare, undisturbed
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.target import Target
from pyro_vae.seeding import derive
from pyro_vae.typing import Program


def posterior_draws(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_draws: int = 100,
    num_samples: int = 5000,
    seed: int = 0,
    defensive: float = 0.1,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Tensor]:
    """Draws of every latent site of the guide from p(z|x), `(num_draws, *batch, *event)`.

    Sampling importance resampling (Rubin 1987): `num_samples` draws a datum from the guide, of
    which `num_draws` are chosen with replacement in proportion to their weights p(x, z)/q(z|x). The
    result is the model's posterior as far as the weights reach (see `Evidence.flagged`), not the
    guide's approximation of it.

    Args and raises: as `log_marginal`.
    """
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide):
        target = Target(model, guide, x, args)
        sampler = Sampler(target, num_samples, seed, chunk_bytes, Proposal(defensive))
        parts = []
        for rows in sampler.chunks():
            log_w, values = sampler.weighted_draws(rows)
            chosen = [_choose(log_w[i], num_draws, derive(seed, row)) for i, row in enumerate(rows)]
            taken = torch.stack(chosen, 1).to(x.device)
            parts.append({name: _take(v, taken, target.axis(name)) for name, v in values.items()})
    return {name: torch.cat([p[name] for p in parts], target.axis(name)) for name in parts[0]}


def _choose(log_w: Tensor, num_draws: int, seed: int) -> Tensor:
    """Indices of draws in proportion to their weights: `(num_draws,)`."""
    generator = torch.Generator().manual_seed(seed)
    cumulative = log_w.softmax(0).cumsum(0)
    uniform = torch.rand(num_draws, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform).clamp_max(len(log_w) - 1)


def _take(value: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """The chosen draws `(num_draws, rows)` of a site's value, whose rows are along `axis`."""
    rows_second = value.movedim(axis, 1)
    picked = rows_second[chosen, torch.arange(chosen.shape[1], device=chosen.device)]
    return picked.movedim(1, axis + value.dim())
