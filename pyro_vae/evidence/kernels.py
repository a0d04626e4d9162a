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

# of numbers from 1/2 to 1, far from the smallest float32; an odd number of them adds some more
LARGEST_PRODUCT = 16


def log_prob(site: Site) -> Tensor:
    """What `programs.log_prob` returns: nats, in the site's batch shape, masked and unscaled."""
    fn = site["fn"]
    if isinstance(fn, td.Independent) and fn.reinterpreted_batch_ndims == 1:
        base, value = fn.base_dist, site["value"]
        if isinstance(base, td.Bernoulli) and "logits" in base.__dict__:
            return programs.masked(site, _bernoulli(base.logits, value))
        if isinstance(base, td.Normal) and not base.loc.requires_grad:
            return programs.masked(site, _normal(base, value))
    return programs.log_prob(site)


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
        shared = small.squeeze(1)
        return logsigmoid(shared) @ x.T + logsigmoid(-shared) @ (1 - x).T
    sign = (2 * x - 1).expand(logits.shape)
    if logits.requires_grad or logits.is_cuda:
        return logsigmoid(sign * logits).sum(-1)
    out = logits.new_empty(logits.shape[:-1])
    for part, signs, result in slices(logits, sign, out):
        t = signs * part
        negative = t.clamp(max=0.0).sum(-1)
        factors = _fold(t.abs_().sigmoid_()).log_()
        torch.add(negative, factors.sum(-1), out=result)
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
    log_scale = scale.log()
    features = base.loc.shape[-1]
    log_det = log_scale.sum(-1) * (features if log_scale.shape[-1] == 1 else 1)
    squares = torch.linalg.vector_norm(standardized, dim=-1).square()
    log_density = -0.5 * squares - log_det - 0.5 * LOG_2PI * features
    return log_density.expand(base.batch_shape[:-1])
