"""The log-density of a site for many draws at once: exact, with few and small temporaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import logsigmoid

from pyro_vae import programs
from pyro_vae.evidence.arithmetic import slices
from pyro_vae.evidence.pushforward import LOG_2PI, compact
from pyro_vae.programs import Site
from pyro_vae.typing import Distribution

# of numbers from 1/2 to 1, far from the smallest float32; an odd number of them adds some more
LARGEST_PRODUCT = 16
PARTS = 16  # of a sum, each in the precision of its terms


def log_prob(site: Site) -> Tensor:
    """What `programs.log_prob` returns: nats, in the site's batch shape, masked and unscaled.

    Sums over features are float64: thousands of nats in float32 have steps of a thousandth.
    """
    fn = site["fn"]
    if isinstance(fn, td.Independent) and fn.reinterpreted_batch_ndims:
        return programs.masked(site, _independent(fn, site["value"]))
    return programs.log_prob(site)


def _independent(fn: Distribution, value: Tensor) -> Tensor:
    """The log-density of independent features."""
    base, dims = fn.base_dist, fn.reinterpreted_batch_ndims
    if dims == 1 and isinstance(base, td.Bernoulli) and "logits" in base.__dict__:
        return _bernoulli(base.logits, value)
    if dims == 1 and isinstance(base, td.Normal) and not base.loc.requires_grad:
        return _normal(base, value)
    return total(base.log_prob(value).flatten(-dims))


def total(terms: Tensor) -> Tensor:
    """Sum over the last dimension, float64: partial sums of `PARTS` terms, which are fast in the
    terms' own precision, are added up in float64."""
    width = terms.shape[-1] // PARTS
    parts = terms[..., : width * PARTS].unflatten(-1, (PARTS, width)).sum(-2)
    rest = terms[..., width * PARTS :]
    return parts.sum(-1, dtype=torch.float64) + rest.sum(-1, dtype=torch.float64)


def _bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """sum_d log sigmoid(t_d), t_d = (2 x_d - 1) l_d: the log-density of binary x at logits l.

    As min(t, 0) + log sigmoid(|t|), the last summed as the log of a product: its factors are
    between 1/2 and 1, so many of them fit in a number, and one logarithm serves them all.

    Args:
        logits: `(*batch, D)`.
        x: 0 and 1, broadcasting to `logits`.
    """
    small = compact(logits)
    if small.dim() == 3 and small.shape[1] == 1 != logits.shape[1] and x.dim() == 2:
        # the same logits for every row (a grid): two matrix products for all pairs
        shared, x = small.squeeze(1), x.double()
        return logsigmoid(shared).double() @ x.T + logsigmoid(-shared).double() @ (1 - x).T
    sign = (2 * x - 1).expand(logits.shape)
    if torch.is_grad_enabled() or logits.is_cuda:
        return total(logsigmoid(sign * logits))
    out = torch.empty(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    for part, signs, result in slices(logits, sign, out):
        t = signs * part
        negative = total(t.clamp(max=0.0))
        factors = _fold(t.abs_().sigmoid_()).log_()
        torch.add(negative, factors.sum(-1, dtype=torch.float64), out=result)
    return out


def _fold(factors: Tensor) -> Tensor:
    """Products along the last dimension of up to `LARGEST_PRODUCT` factors each."""
    size = 1
    while size < LARGEST_PRODUCT and factors.shape[-1] > 1:
        half = factors.shape[-1] // 2
        folded = factors[..., :half] * factors[..., half : 2 * half]
        if factors.shape[-1] % 2:
            folded[..., 0] *= factors[..., -1]
        factors, size = folded, 2 * size
    return factors


def _normal(base: td.Normal, value: Tensor) -> Tensor:
    """sum_d log N(x_d; loc_d, scale_d), whose scales are seldom as many as the draws."""
    scale = compact(base.scale)
    standardized = (value - compact(base.loc)) / scale
    features = base.loc.shape[-1]
    # a scale that serves many features or draws would have its logarithm rounded alike in all
    log_scale = (scale.double() if scale.numel() < base.loc.numel() else scale).log()
    log_det = total(log_scale) * (features if scale.shape[-1] == 1 else 1)
    log_density = -0.5 * total(standardized.square()) - log_det - 0.5 * LOG_2PI * features
    return log_density.expand(base.batch_shape[:-1])
