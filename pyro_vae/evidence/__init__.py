"""log p(x) of any (model, guide): estimates that know their own error."""

from pyro_vae.evidence import exact
from pyro_vae.evidence.ais import Annealing
from pyro_vae.evidence.bounds import Sandwich, sandwich
from pyro_vae.evidence.comparison import Comparison, Difference, compare, difference
from pyro_vae.evidence.marginal import log_marginal
from pyro_vae.evidence.posterior import posterior_draws
from pyro_vae.evidence.result import Evidence

__all__ = [
    "Annealing",
    "Comparison",
    "Difference",
    "Evidence",
    "Sandwich",
    "compare",
    "difference",
    "exact",
    "log_marginal",
    "posterior_draws",
    "sandwich",
]
