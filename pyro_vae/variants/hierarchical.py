"""Several layers of latent vectors, each drawn given the one above."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor

from pyro_vae.errors import ConfigError
from pyro_vae.typing import Conditional, Distribution
from pyro_vae.vae import Generative, ProgramModule
from pyro_vae.variants.parts import modules


class HierarchicalVAE(Generative):
    """p(z_L) p(z_{L-1}|z_L) ... p(x|z_1) with q(z_1|x) q(z_2|z_1) ... (Burda et al. 2015).

    The KL of the top layer may be analytic; those of the others depend on layers that the guide
    draws later, so `ELBO(kl="auto")` takes Monte Carlo there, and says so.

    Args:
        prior: p(z_L) of the top layer.
        layers: map z_{l+1} to p(z_l|z_{l+1}), from the top down: l = L-1, ..., 1.
        likelihood: maps z_1 to p(x|z_1).
        posteriors: map x to q(z_1|x), and z_l to q(z_{l+1}|z_l), from the data up: L of them.
        name: see `VAE`.

    Raises:
        ConfigError: there is not one posterior more than layers.
    """

    def __init__(
        self,
        prior: Conditional,
        layers: Sequence[Conditional],
        likelihood: Conditional,
        posteriors: Sequence[Conditional],
        name: str | None = None,
    ) -> None:
        super().__init__()
        if len(posteriors) != len(layers) + 1:
            raise ConfigError(
                f"a prior and {len(layers)} layers below it need {len(layers) + 1} posteriors, "
                f"got {len(posteriors)}"
            )
        self.model = HierarchicalModel(prior, layers, likelihood, name and f"{name}.model")
        self.guide = HierarchicalGuide(posteriors, name and f"{name}.guide")

    def encode(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """q(z_1|x), of the layer next to the data."""
        return self.guide.posteriors[0](x)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z_1)."""
        return self.model.likelihood(z)


class HierarchicalModel(ProgramModule):
    """z_L ~ p(z_L), z_l ~ p(z_l|z_{l+1}), x ~ p(x|z_1)."""

    def __init__(
        self,
        prior: Conditional,
        layers: Sequence[Conditional],
        likelihood: Conditional,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.prior, self.likelihood = prior, likelihood
        self.layers = modules(layers)

    def forward(self, x: Tensor) -> None:
        """Run the model with data `x`, `(N, features)`, observed."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(f"z{len(self.layers) + 1}", self.prior())
            for level, layer in zip(range(len(self.layers), 0, -1), self.layers, strict=True):
                z = pyro.sample(f"z{level}", layer(z))
            pyro.sample("x", self.likelihood(z), obs=x)


class HierarchicalGuide(ProgramModule):
    """z_1 ~ q(z_1|x), z_{l+1} ~ q(z_{l+1}|z_l)."""

    def __init__(self, posteriors: Sequence[Conditional], name: str | None) -> None:
        super().__init__(name)
        self.posteriors = modules(posteriors)

    def forward(self, x: Tensor) -> None:
        """Run the guide on data `x`, `(N, features)`."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = x
            for level, posterior in enumerate(self.posteriors, 1):
                z = pyro.sample(f"z{level}", posterior(z))
