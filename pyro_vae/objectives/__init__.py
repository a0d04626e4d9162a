"""Objectives for any Pyro (model, guide): the ELBO with its KL estimators, and importance bounds.

Each is a `pyro.infer.ELBO`: `SVI(model, guide, optim, loss=objective)` trains with it, and
`objective(model, guide)` is an `nn.Module` whose forward is the differentiable loss. All figures
are in nats, summed over the data of a call (and scaled where a plate is subsampled).
"""

from pyro_vae.objectives.base import Objective, Terms
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.objectives.importance import IWAE, MIWAE
from pyro_vae.objectives.wake_sleep import WakeSleep

__all__ = ["ELBO", "IWAE", "MIWAE", "Objective", "Terms", "WakeSleep"]
