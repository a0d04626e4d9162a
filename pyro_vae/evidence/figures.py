"""From weights to the columns of an `Evidence`."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from pyro_vae.evidence.diagnostics import is_flagged, running_log_mean, summarize
from pyro_vae.evidence.importance import Weights


def figures(weights: Weights) -> dict[str, np.ndarray]:
    """The columns of `Evidence` for some rows, and their estimates from the first k draws."""
    summary = weights.summary()
    num_samples = weights.log_w.shape[1]
    return {
        "log_px": summary.log_mean.numpy(),
        "se": summary.se.numpy(),
        "bias_est": summary.bias.numpy(),
        "log_px_jackknife": summary.jackknife.numpy(),
        "elbo": weights.elbo().numpy(),
        "ess": summary.ess.numpy(),
        "khat": summary.khat.numpy(),
        "max_weight": summary.max_weight.numpy(),
        "flagged": is_flagged(summary, num_samples).numpy(),
        "num_samples": np.full(len(weights.log_w), num_samples),
        "method": np.full(len(weights.log_w), "is"),
        "convergence": running_log_mean(weights.log_w).numpy(),
    }


def annealed_figures(log_w: Tensor) -> dict[str, np.ndarray]:
    """The columns for rows of chains' log weights `(rows, chains)`.

    Chains are few, so a datum is flagged where fewer than a quarter of them carry the mean, that
    is, where cv² of their weights exceeds 3.
    """
    summary, chains = summarize(log_w), log_w.shape[1]
    return {
        "log_px": summary.log_mean.numpy(),
        "se": summary.se.numpy(),
        "bias_est": summary.bias.numpy(),
        "log_px_jackknife": summary.jackknife.numpy(),
        "elbo": np.full(len(log_w), math.nan),
        "ess": summary.ess.numpy(),
        "khat": np.full(len(log_w), math.nan),
        "max_weight": summary.max_weight.numpy(),
        "flagged": ~(summary.ess >= chains / 4).numpy(),
        "num_samples": np.full(len(log_w), chains),
        "method": np.full(len(log_w), "ais"),
    }


def exact_figures(
    log_px: np.ndarray, error: np.ndarray, method: str, points: int, flagged: np.ndarray
) -> dict[str, np.ndarray]:
    """The columns where log p(x) is a sum over points: no draws, so nothing to say of weights."""
    unknown = np.full(len(log_px), math.nan)
    return {
        "log_px": log_px,
        "se": error,
        "bias_est": np.zeros(len(log_px)),
        "log_px_jackknife": log_px,
        "elbo": unknown,
        "ess": unknown,
        "khat": unknown,
        "max_weight": unknown,
        "flagged": flagged,
        "num_samples": np.full(len(log_px), points),
        "method": np.full(len(log_px), method),
    }
