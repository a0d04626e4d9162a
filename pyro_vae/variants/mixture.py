"""A VAE whose prior is a mixture, the component a latent class of its own: clustering."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae.errors import ConfigError, DataError
from pyro_vae.networks import MLP
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.programs import evaluating
from pyro_vae.typing import Conditional, Distribution
from pyro_vae.vae import VAE
from pyro_vae.variants.parts import Responsibilities, Unconditional
from pyro_vae.variants.semi_supervised import SemiSupervisedVAE


class GaussianMixtureVAE(SemiSupervisedVAE):
    """p(y) N(z; m_y, diag(s_y^2)) p(x|z) with q(y|x) and q(z|x) or q(z|x, y): a cluster y each.

    The cluster is summed over exactly. Some may be known, as labels. There are two guides:

    - with a `classifier`, q(y|x) q(z|x, y), that of Shu 2016 (simpler than Dilokthanakul et al.
      2016, which has a second continuous latent);
    - without one, q(z|x) and the q(y|x) that is best for it, which costs no network and cannot
      lag behind (Jiang et al. 2017, VaDE).

    From random weights most clusters die early, whichever it is. What works is to train the parts
    as a plain VAE first, and to place the components where its data then are:

        pv.fit(vae.plain(), data, ...)
        vae.place(data.train.x)
        pv.fit(vae, data, ...)

    Args:
        likelihood: maps z to p(x|z); it does not see the cluster, so z must tell it.
        posterior: maps x to q(z|x), or x and the cluster, one-hot, where there is a classifier.
        num_classes: clusters.
        latent: dimension of z.
        classifier: maps x to q(y|x), a `Categorical`: see `posteriors.Classifier`.
        label_weight, name: see `SemiSupervisedVAE`.

    Raises:
        AnalyticKLError: when run, without a classifier, where q(z|x) has no analytic KL to a
            Normal.
    """

    def __init__(
        self,
        likelihood: nn.Module,
        posterior: nn.Module,
        num_classes: int,
        latent: int,
        classifier: Conditional | None = None,
        label_weight: float = 0.0,
        name: str | None = None,
    ) -> None:
        prior = DiagonalNormal(MLP(num_classes, [], 2 * latent))
        if classifier is None:
            classifier = Responsibilities(prior, posterior, num_classes)
            posterior = Unconditional(posterior)
        likelihood = Unconditional(likelihood)
        super().__init__(
            prior, likelihood, posterior, classifier, num_classes, label_weight, name
        )  # fmt: skip
        self.latent = latent

    def decode(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z)."""
        return self.model.likelihood(z)

    def plain(self) -> VAE:
        """The same likelihood and posterior under N(0, I), to be trained first.

        Raises:
            ConfigError: there is a classifier, whose posterior asks for a cluster.
        """
        posterior = self.guide.posterior
        if not isinstance(posterior, Unconditional):
            raise ConfigError("a posterior that is given the cluster makes no plain VAE")
        like = self.model.one_hot
        prior = StandardNormal(self.latent).to(like.device, like.dtype)
        return VAE(prior, self.model.likelihood.part, posterior.part)

    @torch.no_grad()
    def place(self, x: Tensor, seed: int = 0) -> None:
        """Put the components where q(z|x) has these data, by expectation maximisation
        (scikit-learn's, the best of ten starts).

        The mixture is fitted to the means of q(z|x), each blurred by the mean variance of q, so
        that a dimension which the VAE has switched off, where means hardly vary and q is as wide
        as the prior, tells no clusters apart.

        Args:
            x: data `(N, features)`, as the model sees them; a few thousand do.
            seed: of the starts.

        Raises:
            DataError, SupportError: the likelihood does not take these data, or there are fewer
                than clusters.
            ConfigError: see `plain`.
        """
        from sklearn.mixture import GaussianMixture

        clusters, like = len(self.model.one_hot), self.model.one_hot
        self.check(x)
        if len(x) < clusters:
            raise DataError(f"{clusters} components cannot be placed by {len(x)} data")
        plain = self.plain()
        with evaluating(plain):
            q = plain.encode(x.to(like))
        unit = q.variance.mean(0).sqrt()  # q's variance is 1 in this unit: what reg_covar adds
        fitted = GaussianMixture(
            clusters, covariance_type="diag", n_init=10, reg_covar=1.0, random_state=seed
        )
        fitted.fit((q.mean / unit).double().cpu().numpy())
        means, variances = (torch.as_tensor(a).to(like)
                            for a in (fitted.means_, fitted.covariances_))  # fmt: skip
        log_variances = (variances * unit**2).log()
        layer = self.model.prior.network.layers[-1]
        layer.weight.copy_(torch.cat([means * unit, log_variances], 1).T)
        layer.bias.zero_()
