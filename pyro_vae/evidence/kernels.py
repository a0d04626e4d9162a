"""log p(x|z) of an observed site for many z: exact, and without large temporaries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import softplus

from pyro_vae import programs
from pyro_vae.programs import Site

SLICE_BYTES = 2**20


def observed_log_prob(site: Site) -> Tensor:
    """What `programs.log_prob` returns, masked and unscaled; nats, in the site's batch shape."""
    fn = site["fn"]
    base = fn.base_dist if isinstance(fn, td.Independent) else None
    plain = base is not None and fn.reinterpreted_batch_ndims == 1
    if plain and isinstance(base, td.Bernoulli) and "logits" in base.__dict__:
        return programs.masked(site, _bernoulli(base.logits, site["value"]))
    return programs.log_prob(site)


def _bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """-sum_d softplus((1 - 2 x_d) l_d): the log-density of binary x at logits `(*batch, D)`.

    Works through the logits in slices that stay in the processor's cache. x may broadcast.
    """
    sign = (1 - 2 * x).expand(logits.shape)
    if logits.requires_grad or logits.is_cuda:
        return -softplus(sign * logits).sum(-1)
    out = logits.new_empty(logits.shape[:-1])
    step = max(1, SLICE_BYTES // (logits[0].numel() * logits.element_size()))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        torch.sum(softplus(sign[part] * logits[part]), -1, out=out[part])
    return out.neg_()
