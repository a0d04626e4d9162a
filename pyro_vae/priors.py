"""p(z): modules that return a distribution over one latent vector.

Contract: `forward(context=None) -> Distribution` with event shape `(latent,)` and batch shape `()`
(or the context's). Any callable that returns such a distribution serves in place of a module.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.typing import Distribution


class StandardNormal(nn.Module):
    """N(0, I), the prior of Kingma & Welling 2013.

    Args:
        latent: dimension of z.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int) -> None:
        super().__init__()
        # buffers, so that the distribution follows the module's device and precision
        self.register_buffer("loc", torch.zeros(latent), persistent=False)
        self.register_buffer("scale", torch.ones(latent), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
