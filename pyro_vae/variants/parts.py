"""Parts that the variants put between the others: contexts withheld, classes told and guessed."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.data import UNKNOWN
from pyro_vae.errors import AnalyticKLError
from pyro_vae.likelihoods import check_finite
from pyro_vae.typing import Conditional, Distribution


def known_or(q: Distribution, labels: Tensor | None) -> Distribution:
    """A Categorical that gives a known label all the probability, and is `q` elsewhere."""
    if labels is None:
        return q
    classes = torch.arange(q.logits.shape[-1], device=labels.device)
    excluded = (labels != UNKNOWN).unsqueeze(-1) & (classes != labels.unsqueeze(-1))
    return dist.Categorical(logits=q.logits.masked_fill(excluded, float("-inf")))


class Responsibilities(nn.Module):
    """q(y|x) = softmax_y(-KL(q(z|x) || p(z|y))), the maximum of the bound over all q(y|x) where
    p(y) is uniform and neither q(z|x) nor p(x|z) sees y.

    Args:
        prior: maps the cluster, one-hot, to p(z|y).
        posterior: maps x to q(z|x).
        num_classes: clusters.
    """

    one_hot: Tensor

    def __init__(self, prior: nn.Module, posterior: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """q(y|x).

        Raises:
            AnalyticKLError: there is no analytic KL.
        """
        q, p = self.posterior(x.unsqueeze(-2)), self.prior(self.one_hot)
        try:
            return dist.Categorical(logits=-kl_divergence(q, p))
        except NotImplementedError as error:
            raise AnalyticKLError(
                f"the best q(y|x) follows from an analytic KL, and {type(q).__name__} has none to "
                "a Normal: take another posterior, or give a classifier"
            ) from error


class Unconditional(nn.Module):
    """A part that is not told its context, and is otherwise the part that it holds."""

    def __init__(self, part: Conditional) -> None:
        super().__init__()
        self.part = part

    def forward(self, value: Tensor, context: Tensor | None = None) -> Distribution:
        return self.part(value)

    def check(self, x: Tensor) -> None:
        """See `Likelihood.check`."""
        getattr(self.part, "check", check_finite)(x)

    def initialize(self, train_mean: Tensor) -> None:
        """See `Likelihood.initialize`."""
        getattr(self.part, "initialize", lambda _: None)(train_mean)
