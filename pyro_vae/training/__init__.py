"""Training: `fit`, its run folder, and checkpoints without code in them."""

from pyro_vae.training.checkpoint import load_weights, save_weights
from pyro_vae.training.job import Run, fit
from pyro_vae.training.metrics import read_metrics
from pyro_vae.training.trackers import track_log_px

__all__ = ["Run", "fit", "load_weights", "read_metrics", "save_weights", "track_log_px"]
