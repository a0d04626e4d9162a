"""What the figures ask of a VAE: means of q(z|x), of p(x|z), and draws, as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_vae import programs
from pyro_vae.errors import DataError
from pyro_vae.seeding import seeded
from pyro_vae.typing import Distribution
from pyro_vae.vae import VAE

CHUNK = 4096  # rows through a network at once
DRAWS = 256  # per datum, where a posterior's mean has no closed form


@contextmanager
def looking(vae: VAE, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, draws from `seed`; everything as it was afterwards."""
    with programs.evaluating(vae), torch.no_grad(), seeded(seed):
        yield


def as_input(vae: VAE, rows: ArrayLike | Tensor) -> Tensor:
    """Rows on the device and in the precision of the VAE's parameters.

    Raises:
        DataError: there is no row, or a row is not a vector.
    """
    like = next(vae.parameters(), torch.empty(0))
    x = rows if isinstance(rows, Tensor) else torch.as_tensor(np.asarray(rows))
    if x.dim() != 2 or len(x) == 0:
        raise DataError(f"x needs one row a datum, (N, features), got shape {tuple(x.shape)}")
    return x.to(device=like.device, dtype=like.dtype)


def posterior_means(vae: VAE, x: Tensor) -> Tensor:
    """Means of q(z|x), `(N, latent)`: exact, or over draws for a flow that states no mean."""
    return torch.cat([_mean(vae.encode(chunk)) for chunk in x.split(CHUNK)])


def likelihood_means(vae: VAE, z: Tensor) -> NDArray[Any]:
    """E[x|z], `(N, features)`."""
    return np.concatenate([flat(vae.decode(chunk).mean) for chunk in z.split(CHUNK)])


def flat(x: Tensor) -> NDArray[Any]:
    """A datum a row, on the CPU."""
    return x.flatten(1).double().cpu().numpy()


def _mean(q: Distribution) -> Tensor:
    try:
        return q.mean
    except NotImplementedError:
        return q.sample(torch.Size([DRAWS])).mean(0)
