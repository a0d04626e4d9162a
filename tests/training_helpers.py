"""Small models, small structured data, and exact comparison, for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data import bernoulli_draw
from pyro_vae.seeding import seeded
from pyro_vae.training.checkpoint import copy_weights, load_tree
from pyro_vae.training.folder import CHECKPOINT

FEATURES = 12


def intensities(n: int, seed: int = 0) -> Tensor:
    """Grey values in (0, 1): a mixture of four patterns, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(4, FEATURES, generator=generator)
    noise = torch.rand(n, FEATURES, generator=generator)
    return 0.9 * patterns[torch.arange(n) % 4] + 0.1 * noise


def binary(n: int, seed: int = 0) -> Tensor:
    """One binary draw of `intensities`."""
    return bernoulli_draw(intensities(n, seed), torch.Generator().manual_seed(seed + 1))


def binary_data(n: int = 48, *, dynamic: bool = False) -> pv.Data:
    """Training and validation data, fixed or binarised anew at every visit."""
    make = intensities if dynamic else binary
    draw = bernoulli_draw if dynamic else None
    train, valid, test = (pv.Split(make(m, s), draw=draw) for s, m in enumerate((n, 20, 20)))
    return pv.Data(train, valid, test)


def small_vae(
    seed: int = 0, features: int = FEATURES, latent: int = 2, hidden: int = 8, dropout: float = 0.0
) -> pv.VAE:
    """A Bernoulli VAE with a handful of weights, drawn from the seed."""
    with seeded(seed):
        encoder: nn.Module = pv.networks.MLP(features, [hidden], 2 * latent)
        decoder = pv.networks.MLP(latent, [hidden], features)
        if dropout:
            encoder = nn.Sequential(encoder, nn.Dropout(dropout))
        return pv.VAE(
            pv.priors.StandardNormal(latent),
            pv.likelihoods.Bernoulli(decoder),
            pv.posteriors.DiagonalNormal(encoder),
        )


def normal_vae(seed: int = 0, features: int = FEATURES, scale: Any = 1.0) -> pv.VAE:
    """A VAE for real data."""
    with seeded(seed):
        return pv.VAE(
            pv.priors.StandardNormal(2),
            pv.likelihoods.Normal(pv.networks.MLP(2, [8], features), scale),
            pv.posteriors.DiagonalNormal(pv.networks.MLP(features, [8], 4)),
        )


def identical(a: Mapping[str, Tensor] | nn.Module, b: Mapping[str, Tensor] | nn.Module) -> bool:
    """Whether all weights agree, bit for bit."""
    a, b = (copy_weights(w) if isinstance(w, nn.Module) else w for w in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of metrics without the one column that no seed fixes."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def in_training() -> bool:
    """Whether `fit` is at its steps, where Pyro's validation is off, and no longer at its checks,
    which ask a `kl_schedule` too."""
    return not is_validation_enabled()


def saved_state(folder: Path) -> dict[str, Any]:
    """The state in a run folder's checkpoint."""
    return load_tree(folder / CHECKPOINT)["state"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see that nothing was overwritten."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
