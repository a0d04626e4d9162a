"""Draws from p(z|x): the guide's, resampled by their importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checks import at_least
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
    """Draws of every latent site from p(z|x), `(num_draws, *batch, *event)`.

    Sampling importance resampling (Rubin 1987): `num_samples` draws a datum from the guide, of
    which `num_draws` are chosen with replacement in proportion to their weights p(x, z)/q(z|x). The
    result is the model's posterior as far as the weights reach (see `Evidence.flagged`), not the
    guide's approximation of it. Discrete sites that the guide leaves to the model are drawn given
    the others.

    Args and raises: as `log_marginal`; `num_draws` is at least 1.
    """
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide):
        target = Target(model, guide, x, args)
        sampler = Sampler(target, num_samples, seed, chunk_bytes, Proposal(defensive))
        return resample(sampler, num_draws)


def resample(sampler: Sampler, num_draws: int) -> dict[str, Tensor]:
    """What `posterior_draws` returns, from the weighted draws of a sampler.

    Raises:
        ConfigError: `num_draws` or the sampler's number of draws is less than 1.
    """
    at_least("num_draws", num_draws, 1)
    at_least("num_samples", sampler.num_samples, 1)
    target, seed, parts = sampler.target, sampler.seed, []
    for rows in sampler.chunks():
        log_w, values = sampler.weighted_draws(rows)
        chosen = [_choose(log_w[i], num_draws, derive(seed, row)) for i, row in enumerate(rows)]
        taken = torch.stack(chosen, 1).to(target.arguments[0].device)
        z = {name: take(v, taken, target.axis(name)) for name, v in values.items()}
        parts.append({**z, **_discrete(target, rows, z, seed)})
    return {name: torch.cat([p[name] for p in parts], target.axis(name)) for name in parts[0]}


def _choose(log_w: Tensor, num_draws: int, seed: int) -> Tensor:
    """Indices of draws in proportion to their weights: `(num_draws,)`."""
    generator = _generator(seed)
    cumulative = log_w.softmax(0).cumsum(0).cpu()
    uniform = torch.rand(num_draws, generator=generator, dtype=torch.float64, device="cpu")
    return torch.searchsorted(cumulative, uniform).clamp_max(len(log_w) - 1)


def _discrete(target: Target, rows: range, z: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draws of the discrete sites c that the guide lacks from p(c|x, z), in proportion to
    p(x, z, c)."""
    if not target.supports:
        return {}
    states, _, log_joint = zip(*target.by_state(rows, z), strict=True)
    cumulative = torch.stack(log_joint).double().softmax(0).cumsum(0).cpu()
    uniform = torch.stack(
        [
            torch.rand(
                cumulative.shape[1],
                generator=_generator(derive(s, 1)),
                dtype=torch.float64,
                device="cpu",
            )
            for s in target.seeds(rows, seed)
        ],
        1,
    )
    chosen = (cumulative[:-1] < uniform).sum(0)  # (num_draws, rows)
    draws = {}
    for name in target.supports:
        values = torch.stack([state[name] for state in states])[chosen.to(states[0][name].device)]
        # (num_draws, rows, *event), in the shape of the site's batch
        shape = [values.shape[0], *[1] * target.nesting, *values.shape[2:]]
        shape[target.axis(name)] = len(rows)
        draws[name] = values.reshape(shape)
    return draws


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take(value: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """The chosen draws `(num_draws, rows)` of a site's value, whose rows are along `axis`."""
    rows_second = value.movedim(axis, 1)
    picked = rows_second[chosen, torch.arange(chosen.shape[1], device=chosen.device)]
    return picked.movedim(1, axis + value.dim())
