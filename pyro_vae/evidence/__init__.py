"""log p(x) of any (model, guide): estimates that know their own error."""

from pyro_vae.evidence import exact
from pyro_vae.evidence.comparison import Comparison, Difference, compare, difference
from pyro_vae.evidence.marginal import log_marginal
from pyro_vae.evidence.result import Evidence

__all__ = [
    "Comparison",
    "Difference",
    "Evidence",
    "compare",
    "difference",
    "exact",
    "log_marginal",
]
