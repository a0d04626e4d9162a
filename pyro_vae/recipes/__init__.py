"""A VAE described in words: what the command line builds, and a run folder builds again."""

from pyro_vae.recipes.build import (
    build_objective,
    build_vae,
    is_conditional,
    load_data,
    load_run,
    sample_context,
    start,
)
from pyro_vae.recipes.models import MODELS
from pyro_vae.recipes.parts import LIKELIHOODS, NETWORKS, OBJECTIVES, POSTERIORS, PRIORS
from pyro_vae.recipes.recipe import Recipe

__all__ = [
    "LIKELIHOODS",
    "MODELS",
    "NETWORKS",
    "OBJECTIVES",
    "POSTERIORS",
    "PRIORS",
    "Recipe",
    "build_objective",
    "build_vae",
    "is_conditional",
    "load_data",
    "load_run",
    "sample_context",
    "start",
]
