"""The log-density of a site for many draws at once: exact, with few and small temporaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import softplus

from pyro_vae import programs
from pyro_vae.evidence.pushforward import LOG_2PI, compact
from pyro_vae.programs import Site

SLICE_BYTES = 2**20


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
    """-sum_d softplus((1 - 2 x_d) l_d): the log-density of binary x at logits `(*batch, D)`.

    Works through the logits in slices that stay in the processor's cache. x may broadcast.
    """
    small = compact(logits)
    if small.dim() == 3 and small.shape[1] == 1 != logits.shape[1] and x.dim() == 2:
        # the same logits for every row (a grid): one matrix product for all pairs
        shared = small.squeeze(1)
        return shared @ x.T - softplus(shared).sum(-1, keepdim=True)
    sign = (1 - 2 * x).expand(logits.shape)
    if logits.requires_grad or logits.is_cuda:
        return -softplus(sign * logits).sum(-1)
    out = logits.new_empty(logits.shape[:-1])
    step = max(1, SLICE_BYTES // (logits[0].numel() * logits.element_size()))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        torch.sum(softplus(sign[part] * logits[part]), -1, out=out[part])
    return out.neg_()


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
