"""Variational autoencoders for people who write Pyro."""

from pyro_vae import errors, likelihoods, networks, posteriors, priors
from pyro_vae.data import Data, Split
from pyro_vae.objectives import ELBO, IWAE, MIWAE
from pyro_vae.vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "MIWAE",
    "VAE",
    "Data",
    "Split",
    "errors",
    "likelihoods",
    "networks",
    "posteriors",
    "priors",
]
