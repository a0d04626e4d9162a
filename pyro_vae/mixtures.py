"""A mixture of many diagonal Normals whose density costs one matrix product."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.distributions import EMPTY


class NormalMixture(TorchDistribution):
    """sum_k w_k N(m_k, diag(s_k^2)) over vectors.

    Without batch dimensions of its own, the squares in the exponents are expanded, so that S points
    under K components of D dimensions cost a product of `(S, 2 D)` and `(2 D, K)` and no array of
    `S K D` numbers. The expansion cancels where scales are small beside the means, so this one
    product is taken in float64 whatever the precision of the rest.

    Args:
        logits: log w_k up to a constant, `(K,)`.
        loc, scale: `(*batch, K, D)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same mixture with other batch dimensions: its components are not copied."""
        new = NormalMixture(self.logits, self.loc, self.scale, validate_args=self._validate_args)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        exponents = self._expanded(value) if self.loc.dim() == 2 else self._broadcast(value)
        normalisers = self.scale.log().sum(-1) + 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        log_joint = self.logits.log_softmax(-1) - normalisers + exponents
        return log_joint.logsumexp(-1).expand(
            torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        )

    def _expanded(self, value: Tensor) -> Tensor:
        """-1/2 sum_d ((z_d - m_kd) / s_kd)^2, `(*value's batch, K)`, by one product."""
        z, m, precision = value.double(), self.loc.double(), self.scale.double() ** -2
        centre = m.detach().mean(0)
        z, m = z - centre, m - centre
        powers = torch.cat([z**2, z], -1)
        factors = torch.cat([-0.5 * precision, m * precision], -1)
        constants = -0.5 * (m**2 * precision).sum(-1)
        return (powers @ factors.mT + constants).to(value.dtype)

    def _broadcast(self, value: Tensor) -> Tensor:
        return -0.5 * (((value.unsqueeze(-2) - self.loc) / self.scale) ** 2).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        shape = self._extended_shape(sample_shape)[:-1]
        chosen = torch.multinomial(self.logits.softmax(-1), shape.numel(), replacement=True).view(
            shape
        )
        if self.loc.dim() == 2:
            loc, scale = self.loc[chosen], self.scale[chosen]
        else:
            index = chosen[..., None, None].expand(*shape, 1, self.loc.shape[-1])
            loc, scale = (
                p.expand(*shape, *p.shape[-2:]).gather(-2, index).squeeze(-2)
                for p in (self.loc, self.scale)
            )
        return loc + scale * torch.randn_like(loc)

    @property
    def mean(self) -> Tensor:
        weights = self.logits.softmax(-1).unsqueeze(-1)
        return (weights * self.loc).sum(-2).expand(*self.batch_shape, -1)
