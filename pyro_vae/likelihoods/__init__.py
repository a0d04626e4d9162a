"""p(x|z): modules that map latent vectors to a distribution over data, the decoder inside.

Contract: `forward(z, context=None) -> Distribution` with batch shape `z.shape[:-1]` and the datum's
event shape. A likelihood owns its network and how the network's outputs become parameters.
`support` says which data it takes, `check` refuses the rest by value and row, and
`outputs_per_feature` says how many network outputs it needs for one value of a datum.
"""

from pyro_vae.likelihoods.base import Likelihood, check_finite
from pyro_vae.likelihoods.columns import Columns
from pyro_vae.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyro_vae.likelihoods.discrete import Binomial, Categorical, DiscretizedLogistic
from pyro_vae.likelihoods.incomplete import Incomplete
from pyro_vae.likelihoods.real import Laplace, LikelihoodScale, Normal, StudentT
from pyro_vae.likelihoods.unit import Bernoulli, ContinuousBernoulli

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Incomplete",
    "Laplace",
    "Likelihood",
    "LikelihoodScale",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "check_finite",
]
