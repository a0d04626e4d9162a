"""q(z|x): modules that map data to a distribution over their latent vectors, the encoder inside.

Contract: `forward(x, context=None) -> Distribution` with the batch shape of `x`, event shape
`(latent,)` and `rsample`. Any callable that returns such a distribution serves in their place.
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.networks import concatenate
from pyro_vae.typing import Distribution


class DiagonalNormal(nn.Module):
    """A Normal with independent dimensions (Kingma & Welling 2013, eq. 9).

    The network's outputs are the means and the log-variances. The log-variance passes through a
    smooth bound: it is the identity well inside `log_variance_range` and saturates towards its
    ends, so that no weights, however far astray, make a scale of zero or infinity, and the gradient
    never dies at a hard edge. The default range holds scales between 6e-4 and 150.

    Args:
        network: maps `(..., features)` to `(..., 2 * latent)`.
        log_variance_range: the bounds.
    """

    def __init__(
        self, network: nn.Module, log_variance_range: tuple[float, float] = (-15.0, 10.0)
    ) -> None:
        super().__init__()
        self.network = network
        self.log_variance_range = log_variance_range

    def forward(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        loc, log_variance = self.network(concatenate(x, context)).chunk(2, dim=-1)
        scale = (0.5 * smooth_clamp(log_variance, *self.log_variance_range)).exp()
        return dist.Normal(loc, scale).to_event(1)


def smooth_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """The identity well inside `[low, high]`, bent into the bounds by one softplus at each end."""
    bounded_below = low + softplus(x - low)
    return high - softplus(high - bounded_below)
