"""Figures: each a function from arrays, a VAE or an evaluation to a matplotlib `Figure`.

Nothing here shows, writes, or touches pyplot's state; `figure.savefig(path)` writes one. All
log-densities are in nats.
"""

from pyro_vae.plots.curves import active_units, training_curves
from pyro_vae.plots.evidence import (
    convergence,
    evaluation,
    khat,
    log_px_histogram,
    worst_explained,
)
from pyro_vae.plots.latent import latent_map
from pyro_vae.plots.pictures import manifold, reconstructions, samples
from pyro_vae.plots.tiles import tile

__all__ = [
    "active_units",
    "convergence",
    "evaluation",
    "khat",
    "latent_map",
    "log_px_histogram",
    "manifold",
    "reconstructions",
    "samples",
    "tile",
    "training_curves",
    "worst_explained",
]
