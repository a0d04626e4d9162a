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
from pyro_vae.data import as_tensor
from pyro_vae.distributions import stated_mean
from pyro_vae.errors import DataError, ShapeError
from pyro_vae.seeding import seeded
from pyro_vae.typing import Distribution
from pyro_vae.vae import Generative

CHUNK = 4096  # rows through a network at once
DRAWS = 256  # per datum, where a posterior's mean has no closed form


@contextmanager
def looking(vae: Generative, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, draws from `seed`; everything as it was afterwards."""
    with programs.evaluating(vae), torch.no_grad(), seeded(seed):
        yield


def as_input(vae: Generative, rows: ArrayLike | Tensor) -> Tensor:
    """Rows on the device and in the precision of the VAE's parameters.

    Raises:
        DataError: they are no array, there is no row, or a row is not a vector.
    """
    like = next(vae.parameters(), torch.empty(0))
    x = as_tensor(rows)
    if x.dim() != 2 or len(x) == 0:
        raise DataError(f"x needs one row a datum, (N, features), got shape {tuple(x.shape)}")
    return x.to(device=like.device, dtype=like.dtype)


def as_context(vae: Any, x: Tensor, context: ArrayLike | Tensor | None) -> Tensor | None:
    """The context of some rows, on the device and real numbers in the precision of the data.

    Of a model that has classes of its own, those that are not known are its most probable ones.

    Raises:
        ShapeError: there is not one context a row.
    """
    if context is not None:
        context = as_tensor(context)
        if context.dim() == 0 or len(context) != len(x):
            raise ShapeError(f"{len(x)} data need as many contexts, got {tuple(context.shape)}")
        context = context.to(x.device, x.dtype if context.is_floating_point() else None)
    return vae.classify(x, context).probs.argmax(-1) if hasattr(vae, "classify") else context


def posterior_means(vae: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Means of q(z|x), `(N, latent)`: exact, or over draws for a flow that states no mean."""
    return torch.cat([_mean(vae.encode(*chunk)) for chunk in _chunks(x, context)])


def likelihood_means(vae: Any, z: Tensor, context: Tensor | None = None) -> NDArray[Any]:
    """E[x|z], `(N, features)`."""
    return np.concatenate([flat(vae.decode(*chunk).mean) for chunk in _chunks(z, context)])


def _chunks(rows: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    if context is None:
        return zip(rows.split(CHUNK), strict=True)
    return zip(rows.split(CHUNK), context.split(CHUNK), strict=True)


def flat(x: Tensor) -> NDArray[Any]:
    """A datum a row, on the CPU."""
    return x.flatten(1).double().cpu().numpy()


def _mean(q: Distribution) -> Tensor:
    mean = stated_mean(q)
    return q.sample(torch.Size([DRAWS])).mean(0) if mean is None else mean
