"""Models whose evidence is known: to check an evaluation, or one's own code, against."""

from __future__ import annotations

import math

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.evidence.grid import Grid, quadrature

__all__ = ["Grid", "linear_gaussian", "linear_gaussian_posterior", "quadrature", "weight_variance"]


def linear_gaussian(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | float) -> Tensor:
    """log p(x) where z ~ N(0, I) and x ~ N(Wz + b, scale² I): probabilistic PCA.

    That is log N(x; b, WWᵀ + scale² I) (Tipping & Bishop 1999, eq. 3), computed in the latent
    dimension by the matrix inversion lemma; nats.

    Args:
        x: `(..., D)`.
        weight: `(D, d)`.
        bias: `(D,)`.
        scale: positive, `()`.

    Raises:
        ShapeError: the shapes do not fit.
        ConfigError: the scale is not positive.
    """
    centred, factor, scale = _prepare(x, weight, bias, scale)
    D, d = weight.shape
    half = torch.linalg.solve_triangular(factor, (centred @ weight).unsqueeze(-1), upper=False)
    squares = (centred.square().sum(-1) - half.square().sum((-2, -1))) / scale**2
    log_det = 2 * factor.diagonal().log().sum() + 2 * (D - d) * scale.log()
    return -0.5 * (squares + log_det + D * math.log(2 * math.pi))


def linear_gaussian_posterior(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | float
) -> MultivariateNormal:
    """p(z|x) of the same model: N(M⁻¹Wᵀ(x - b), scale² M⁻¹), M = WᵀW + scale² I.

    Args and raises: as `linear_gaussian`. Batch shape `x.shape[:-1]`, event shape `(d,)`.
    """
    centred, factor, scale = _prepare(x, weight, bias, scale)
    loc = torch.cholesky_solve((centred @ weight).unsqueeze(-1), factor).squeeze(-1)
    covariance = scale**2 * torch.cholesky_inverse(factor)
    return MultivariateNormal(loc, covariance)


def weight_variance(
    loc: Tensor, covariance: Tensor, guide_loc: Tensor, guide_covariance: Tensor
) -> Tensor:
    """cv² of the importance weights p(x, z)/q(z), z ~ q, for a Gaussian posterior and guide.

    With posterior N(m, P) and guide N(n, Q), E[w²]/E[w]² is the integral of p²/q: finite exactly
    where 2P⁻¹ - Q⁻¹ is positive definite, infinity otherwise.

    Args:
        loc, guide_loc: `(d,)`.
        covariance, guide_covariance: `(d, d)`.
    """
    P, Q = torch.linalg.inv(covariance), torch.linalg.inv(guide_covariance)
    A = 2 * P - Q
    if torch.linalg.eigvalsh(A).min() <= 0:
        return covariance.new_tensor(math.inf)
    b = 2 * P @ loc - Q @ guide_loc
    c = 2 * loc @ P @ loc - guide_loc @ Q @ guide_loc
    log_dets = 2 * torch.logdet(P) - torch.logdet(Q) - torch.logdet(A)
    return torch.expm1(0.5 * (log_dets + b @ torch.linalg.solve(A, b) - c))


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """x - b, the Cholesky factor of M, and the scale as a tensor."""
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or x.shape[-1:] != weight.shape[:1]:
        raise ShapeError(
            f"weight is (D, d), bias (D,) and x (..., D); got {tuple(weight.shape)}, "
            f"{tuple(bias.shape)} and {tuple(x.shape)}"
        )
    scale = torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)
    if scale.dim() or not scale > 0:
        raise ConfigError(f"the scale is one positive number, got {scale.tolist()}")
    M = weight.mT @ weight + scale**2 * torch.eye(weight.shape[1]).to(weight)
    return x - bias, torch.linalg.cholesky(M), scale
