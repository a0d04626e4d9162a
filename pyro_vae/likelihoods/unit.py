"""Likelihoods of values in {0, 1} and in [0, 1], from logits."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import distributions
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.typing import Distribution


class Bernoulli(Likelihood):
    """Binary data, from logits. No probability is clamped: log p(x|z) is exact in the logits."""

    support = constraints.boolean
    takes = "the values 0 and 1"
    advice = (
        'Binarize the data (binarize="dynamic", "fixed" or "threshold"), '
        "or use the continuous Bernoulli for grey values in [0, 1]."
    )

    def distribution(self, *parameters: Tensor) -> Distribution:
        (logits,) = parameters
        return dist.Bernoulli(logits=logits)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        # a pixel that is always 0 would ask for minus infinity; 1e-3 is one stray count in 1000
        return torch.logit(mean, eps=1e-3)


class ContinuousBernoulli(Likelihood):
    """Grey values in [0, 1], with the normaliser that a Bernoulli of them lacks
    (Loaiza-Ganem & Cunningham 2019, eq. 8).

    log p(x|z) is a density and may be positive. The logits may be anything: the removable
    singularity at probability 1/2 is taken by its series.
    """

    support = constraints.unit_interval
    takes = "values in [0, 1]"
    advice = "Divide grey values by their maximum (255)."

    def distribution(self, *parameters: Tensor) -> Distribution:
        (logits,) = parameters
        return distributions.ContinuousBernoulli(logits)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        """The logit of this mean, by bisection; means within 1e-2 of 0 or 1 count as that."""
        low, high = torch.full_like(mean, -100.0), torch.full_like(mean, 100.0)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = distributions.ContinuousBernoulli(middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)
