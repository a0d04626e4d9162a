"""Parts that the variants put between the others: contexts withheld, classes told and guessed."""

from __future__ import annotations

from collections.abc import Iterable

import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.data import UNKNOWN, check_classes
from pyro_vae.errors import AnalyticKLError, DataError, ShapeError
from pyro_vae.likelihoods import check_finite
from pyro_vae.typing import Conditional, Distribution


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise unless these are labels, known or not.

    Raises:
        DataError: they are not `(N,)` whole numbers below `num_classes`, or -1 for unknown.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype is torch.bool:
        raise DataError(
            "labels are (N,) whole numbers, -1 where the class is not known; got shape "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    check_classes(labels.where(labels != UNKNOWN, 0), num_classes)


def known_or(q: Distribution, labels: Tensor | None, num_classes: int) -> Distribution:
    """A Categorical that gives a known label all the probability, and is `q` elsewhere.

    Raises:
        ShapeError: `q` is not over `num_classes` classes.
        DataError: where Pyro's validation is on, these are no labels.
    """
    if q.logits.shape[-1] != num_classes:
        raise ShapeError(
            f"the classifier is over {q.logits.shape[-1]} classes, the model has {num_classes}"
        )
    if labels is None:
        return q
    if is_validation_enabled():  # a look at values, which waits for a GPU: `fit` has had one
        check_labels(labels, num_classes)
    classes = torch.arange(num_classes, device=labels.device)
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


def modules(parts: Iterable[Conditional]) -> nn.ModuleList:
    """Parts in a list that PyTorch knows, any callable among them."""
    return nn.ModuleList(p if isinstance(p, nn.Module) else Unconditional(p) for p in parts)
