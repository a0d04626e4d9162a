"""Models beyond p(z) p(x|z), each a composition of the same parts.

Every one has a `model` and a `guide` that go to SVI, `fit`, `log_marginal` and the rest. A
conditional VAE needs nothing new: it is a `VAE` whose parts take a context.
"""

from pyro_vae.variants.hierarchical import HierarchicalVAE
from pyro_vae.variants.mixture import GaussianMixtureVAE
from pyro_vae.variants.parts import Unconditional
from pyro_vae.variants.semi_supervised import SemiSupervisedVAE
from pyro_vae.variants.stacked import StackedVAE, encoded

__all__ = [
    "GaussianMixtureVAE",
    "HierarchicalVAE",
    "SemiSupervisedVAE",
    "StackedVAE",
    "Unconditional",
    "encoded",
]
