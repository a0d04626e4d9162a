"""A distribution as a map from standard normal noise: z = T(u), u ~ N(0, I).

Most guides are such maps (normals, full-rank normals, flows over them, AutoGuide-like stacks of
these). The map gives draws from noise that the caller chose, and the density
log q(z) = log N(u; 0, I) - log |dT/du|, so the same code draws, weighs and inflates any of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributions as td

from pyro_vae.typing import Distribution

LOG_2PI = math.log(2 * math.pi)


def is_pushforward(fn: Distribution) -> bool:
    """Whether `push` knows the distribution."""
    shape = fn.shape()
    if isinstance(fn, td.Independent | td.TransformedDistribution):
        # a transform that changes the number of dimensions has no density of this form
        base: Distribution = fn.base_dist
        return base.shape().numel() == shape.numel() and is_pushforward(base)
    return isinstance(fn, td.Normal | td.MultivariateNormal)


def push(fn: Distribution, u: Tensor) -> tuple[Tensor, Tensor]:
    """z = T(u) and log |dT/du| of a distribution that `is_pushforward` accepts.

    Args:
        fn: with batch shape B and event shape E.
        u: `(*B, *E)`.

    Returns:
        z, `(*B, *E)`, and the log-determinant, `B`.
    """
    if isinstance(fn, td.Normal):
        return torch.addcmul(fn.loc, fn.scale, u), compact(fn.scale).log().expand(u.shape)
    if isinstance(fn, td.MultivariateNormal):
        factor = fn.scale_tril
        z = fn.loc + (factor @ u.unsqueeze(-1)).squeeze(-1)
        log_det = compact(factor).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return z, log_det.expand(u.shape[:-1])
    if isinstance(fn, td.Independent):
        z, log_det = push(fn.base_dist, u)
        return z, _sum_last(log_det, fn.reinterpreted_batch_ndims)
    z, log_det = push(fn.base_dist, u)
    event_dim = len(fn.event_shape)
    log_det = _sum_last(log_det, log_det.dim() - (u.dim() - event_dim))
    for transform in fn.transforms:
        image = transform(z)
        step = transform.log_abs_det_jacobian(z, image)
        log_det = log_det + _sum_last(step, step.dim() - (u.dim() - event_dim))
        z = image
    return z, log_det


def pull(fn: Distribution, z: Tensor) -> Tensor:
    """u with T(u) = z, of a distribution that `is_pushforward` accepts; `(*B, *E)`, as z."""
    if isinstance(fn, td.Normal):
        return (z - fn.loc) / fn.scale
    if isinstance(fn, td.MultivariateNormal):
        centred = (z - fn.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(fn.scale_tril, centred, upper=False).squeeze(-1)
    for transform in reversed(getattr(fn, "transforms", [])):
        z = transform.inv(z)
    return pull(fn.base_dist, z)


def log_normal(squares: Tensor, size: Tensor | float, scale: float = 1.0) -> Tensor:
    """log N(u; 0, scale² I) from sum(u²) and the number of dimensions."""
    return -0.5 * squares / scale**2 - size * (0.5 * LOG_2PI + math.log(scale))


def noise(
    shape: torch.Size, axis: int, streams: list[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """Standard normal noise in which every index along `axis` has a stream of its own.

    Args:
        shape: of the result.
        axis: counted from the right (negative).
        streams: one for each index along `axis`; they go on from where they are.
    """
    axis += len(shape)
    rest = [size for i, size in enumerate(shape) if i != axis]
    u = torch.empty(len(streams), *rest, dtype=dtype, device=streams[0].device)
    for row, stream in zip(u, streams, strict=True):
        row.normal_(generator=stream)
    return u.movedim(0, axis)


def streams(seeds: list[int], device: torch.device) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _sum_last(value: Tensor, dims: int) -> Tensor:
    return value.sum(tuple(range(-dims, 0))) if dims > 0 else value


def compact(value: Tensor) -> Tensor:
    """The tensor without the copies that a plate expanded it to."""
    return value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
