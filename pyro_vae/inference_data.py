"""The bridge to ArviZ, version 0.23 and 1.x alike."""

from __future__ import annotations

from typing import Any

import numpy as np


def psis_khat(log_w: np.ndarray) -> np.ndarray:
    """ArviZ's own Pareto k-hat of log weights `(N, K)`, whichever version is installed."""
    import arviz

    if _major(arviz) < 1:
        _, khat = arviz.psislw(log_w, reff=1.0)
        return np.atleast_1d(khat)
    from arviz_stats.base import array_stats

    # from 1.0 on, ArviZ takes log importance ratios with the other sign
    _, khat = array_stats.psislw(-log_w, r_eff=1.0, axis=-1)
    return np.atleast_1d(khat)


def _major(package: Any) -> int:
    return int(package.__version__.split(".")[0])
