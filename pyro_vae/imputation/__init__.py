"""Imputation: missing values drawn from p(x_mis|x_obs) under any (model, guide).

A value is missing where `x` is NaN or `mask` is False. The observed site must be a product over
single values (`.to_event(1)`, or a plate over features): its log-density is taken value by value,
and the missing ones are left out. Three ways to draw:

- "importance": z from the guide and from the prior, half of the draws each, resampled by
  p(x_obs, z) over the density of both, then x_mis ~ p(x_mis|z) (sampling importance resampling:
  Mattei & Frellsen 2019, sec. 4.2). Exact as `num_samples` grows.
- "metropolis": z ~ q(z|x_obs, x_mis) proposed and accepted or refused, then x_mis ~ p(x_mis|z), in
  turns (Metropolis within Gibbs: Mattei & Frellsen 2018, alg. 2). In between, what is real of z
  moves by Hamiltonian dynamics towards p(z|x_obs): x_mis is integrated out there, so these moves
  go on where the encoder's proposals are refused, or small because of the x_mis that they stand
  on. Exact as `num_sweeps` grows, whatever the guide.
- "gibbs": the encoder's proposals alone, all accepted (pseudo-Gibbs: Rezende et al. 2014, app. F).
  It draws from p(x_mis|x_obs) only if q(z|x) is the posterior.
"""

from pyro_vae.imputation.imputing import impute
from pyro_vae.imputation.result import Imputations

__all__ = ["Imputations", "impute"]
