"""A VAE whose prior is a mixture, the component a latent class of its own: clustering."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_vae.likelihoods import check_finite
from pyro_vae.networks import MLP
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.typing import Conditional, Distribution
from pyro_vae.variants.semi_supervised import SemiSupervisedVAE


class GaussianMixtureVAE(SemiSupervisedVAE):
    """p(y) N(z; m_y, diag(s_y^2)) p(x|z) with q(y|x) q(z|x, y): a cluster y for every datum.

    The factorisation is that of Shu 2016 (simpler than Dilokthanakul et al. 2016, which has a
    second continuous latent). The cluster is summed over exactly. Some labels may be known.

    Clusters die where q(y|x) settles before the decoder has learned anything: warm the KL up.

    Args:
        likelihood: maps z to p(x|z); it does not see the cluster, so z must tell it.
        posterior: maps x and the cluster, one-hot, to q(z|x, y).
        classifier: maps x to q(y|x), a `Categorical`: see `posteriors.Classifier`.
        num_classes: clusters.
        latent: dimension of z.
        label_weight, name: see `SemiSupervisedVAE`.
    """

    def __init__(
        self,
        likelihood: Conditional,
        posterior: Conditional,
        classifier: Conditional,
        num_classes: int,
        latent: int,
        label_weight: float = 0.0,
        name: str | None = None,
    ) -> None:
        prior = DiagonalNormal(MLP(num_classes, [], 2 * latent))
        super().__init__(
            prior, Unconditional(likelihood), posterior, classifier, num_classes, label_weight, name
        )

    def decode(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z)."""
        return self.likelihood(z)


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
