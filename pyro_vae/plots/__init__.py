"""Figures: each a function from arrays, a VAE or an evaluation to a matplotlib `Figure`.

Nothing here shows, writes, or touches pyplot's state; `figure.savefig(path)` writes one. All
log-densities are in nats.
"""

from pyro_vae.plots.classes import analogies, class_grid
from pyro_vae.plots.curves import kl_per_dimension, training_curves
from pyro_vae.plots.evidence import (
    convergence,
    evaluation,
    khat,
    log_px_histogram,
    worst_explained,
)
from pyro_vae.plots.experiments import densities, image_rows, imputations, posteriors, series
from pyro_vae.plots.latent import latent_map, latent_maps
from pyro_vae.plots.pictures import manifold, reconstructions, samples
from pyro_vae.plots.tiles import tile

__all__ = [
    "analogies",
    "class_grid",
    "convergence",
    "densities",
    "evaluation",
    "image_rows",
    "imputations",
    "khat",
    "kl_per_dimension",
    "latent_map",
    "latent_maps",
    "log_px_histogram",
    "manifold",
    "posteriors",
    "reconstructions",
    "samples",
    "series",
    "tile",
    "training_curves",
    "worst_explained",
]
