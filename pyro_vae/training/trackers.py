"""Figures that `fit` records beside its own: log p(x) of held-out data as training goes on."""

from __future__ import annotations

from typing import Any

from pyro_vae.training.loop import Tracker
from pyro_vae.training.metrics import Row


def track_log_px(
    vae: Any, x: Any, every: int = 10, num_samples: int = 200, seed: int = 0
) -> Tracker:
    """A tracker for `fit(..., trackers=[...])`: importance-sampled log p(x) of fixed data.

    Args:
        vae: whose `model` and `guide` are evaluated, as they stand at that epoch.
        x: the data, e.g. a few hundred rows of the validation split.
        every: how many epochs lie between two evaluations.
        num_samples: draws a datum; the same draws at every evaluation.
        seed: of the draws.

    Returns:
        A tracker that adds `valid_log_px` and its Monte Carlo standard error `valid_log_px_se`, in
        nats a datum, to the metrics of every `every`-th epoch.

    Raises:
        ConfigError: `every` or `num_samples` is no whole number, or less than 1.
    """
    from pyro_vae.checks import at_least
    from pyro_vae.evidence import log_marginal

    at_least("every", every, 1)
    at_least("num_samples", num_samples, 1)

    def track(epoch: int) -> Row:
        if epoch % every:
            return {}
        found = log_marginal(
            vae.model, vae.guide, x, num_samples=num_samples, seed=seed, progress=False
        )
        return {"valid_log_px": found.mean, "valid_log_px_se": found.se_mc}

    return track
