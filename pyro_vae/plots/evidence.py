"""What an evaluation of log p(x) found: values, whether they settled, the data that fare worst.

Flagged data are drawn in another colour everywhere: their log p(x) is a lower bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike, NDArray

from pyro_vae.errors import ConfigError, DataError
from pyro_vae.evidence import Evidence
from pyro_vae.evidence.diagnostics import MIN_ESS, khat_threshold
from pyro_vae.plots import style
from pyro_vae.plots.tiles import Shape, tile, value_limits

NATS = r"$\log \hat p(x)$ (nats)"
COLUMNS = 8


def evaluation(
    evidence: Evidence, x: ArrayLike | None = None, image_shape: Shape | None = None
) -> Figure:
    """All there is to see of an evaluation: the figures below, in one.

    Args:
        evidence: of `log_marginal`.
        x: the data, `(N, features)`; None where the evaluation still knows them, or to leave them
            out.
        image_shape: of a row, channels first; None where it is no image.

    Raises:
        DataError, ShapeError: `x` are not the data of this evaluation, or no such images.
    """
    rows = _rows(evidence, x)
    panels = [_histogram]
    if evidence.convergence:
        panels.append(_convergence)
    if _weighed(evidence).any():
        panels.append(_khat)
    lines = 0 if rows is None else math.ceil(min(len(rows), 2 * COLUMNS) / COLUMNS)
    height = 0.0 if image_shape is None else 0.9 * lines * image_shape[-2] / image_shape[-1]
    height = height or 0.6 * lines
    figure = style.figure(7.0, 2.6 + height + (0.4 if lines else 0))
    above, below = figure, None
    if rows is not None:
        above, below = figure.subfigures(2, 1, height_ratios=[2.6, height + 0.4])  # type: ignore
    for axes, draw in zip(np.atleast_1d(above.subplots(1, len(panels))), panels, strict=True):
        draw(axes, evidence)
    if rows is not None and below is not None:
        _worst(below.subplots(), evidence, rows, image_shape, 2 * COLUMNS)
    return figure


def log_px_histogram(evidence: Evidence) -> Figure:
    """log p(x) of the data, those flagged on top of the others, and their mean."""
    figure = style.figure(4.2, 2.8)
    _histogram(figure.subplots(), evidence)
    return figure


def convergence(evidence: Evidence) -> Figure:
    """Mean log p(x) from the first k draws, k = 1, 2, 4, ..., K, above the ELBO.

    The weights are the evaluation's own, so the points are not independent. A curve that still
    climbs at K is one whose end is a lower bound.

    Raises:
        ConfigError: not all of the data were evaluated by importance sampling.
    """
    if not evidence.convergence:
        raise ConfigError(
            "only an evaluation by importance sampling has draws to converge in; this one has "
            f"{', '.join(sorted(set(evidence.method.tolist())))}"
        )
    figure = style.figure(4.2, 2.8)
    _convergence(figure.subplots(), evidence)
    return figure


def khat(evidence: Evidence) -> Figure:
    """Pareto k-hat of every datum's weights over their effective sample size.

    Beyond either line (k-hat above its threshold, fewer than 100 effective draws) a datum is
    flagged. Data whose weights have no tail to fit (all alike, or no weights at all) are not shown.

    Raises:
        ConfigError: there is no datum to show.
    """
    if not _weighed(evidence).any():
        raise ConfigError("no datum of this evaluation has importance weights with a tail")
    figure = style.figure(4.2, 2.8)
    _khat(figure.subplots(), evidence)
    return figure


def worst_explained(
    evidence: Evidence,
    x: ArrayLike | None = None,
    image_shape: Shape | None = None,
    num: int = 2 * COLUMNS,
) -> Figure:
    """The data with the smallest log p(x), smallest first, each above its nats.

    Args:
        evidence, x, image_shape: as in `evaluation`; features of what is no image are lines.
        num: how many.

    Raises:
        ConfigError: `num` is not positive.
        DataError, ShapeError: `x` are not the data of this evaluation, or no such images.
    """
    if num < 1:
        raise ConfigError(f"num must be positive, got {num}")
    rows = _rows(evidence, x)
    if rows is None:
        raise DataError("an evaluation read from a file holds no data: give them as x")
    lines = math.ceil(min(num, len(rows)) / COLUMNS)
    ratio = 0.6 if image_shape is None else image_shape[-2] / image_shape[-1]
    figure = style.figure(6.5, 0.4 + 0.9 * lines * max(ratio, 0.5))
    _worst(figure.subplots(), evidence, rows, image_shape, num)
    return figure


def _histogram(axes: Axes, evidence: Evidence) -> None:
    finite, flagged = np.isfinite(evidence.log_px), evidence.flagged
    parts = [evidence.log_px[finite & ~flagged], evidence.log_px[finite & flagged]]
    counts, _, _ = axes.hist(
        parts, bins=min(40, max(5, len(evidence) // 5)), stacked=True,
        color=[style.BLUE, style.VERMILION], label=["sound", "flagged"],
    )  # fmt: skip
    if finite.all():
        axes.axvline(evidence.mean, color=style.INK, linewidth=1.0, linestyle="--")
        sign = r"\geq" if flagged.any() else "="
        title = f"mean ${sign} {evidence.mean:.2f}$"
    else:
        title = f"{(~finite).sum():,} of {len(evidence):,} are $-\\infty$"
    style.dress(axes, title, NATS, f"of {len(evidence):,} data")
    if flagged.any():
        axes.set_ylim(0, 1.35 * np.max(counts))  # room for the legend
        axes.legend(frameon=False, fontsize=style.TICK, ncols=2, loc="upper left")


def _convergence(axes: Axes, evidence: Evidence) -> None:
    k, mean = list(evidence.convergence), list(evidence.convergence.values())
    axes.plot(k, mean, color=style.BLUE, marker="o", markersize=3.5, linewidth=1.4)
    elbo = float(evidence.elbo.mean())
    if math.isfinite(elbo):
        axes.axhline(elbo, color=style.GREY, linestyle=":", linewidth=1.2, label="ELBO")
        axes.legend(frameon=False, fontsize=style.TICK)
    axes.set_xscale("log")
    style.dress(axes, "mean from the first $k$ draws", "$k$", NATS)


def _khat(axes: Axes, evidence: Evidence) -> None:
    shown = _weighed(evidence)
    for flagged, colour in ((False, style.BLUE), (True, style.VERMILION)):
        some = shown & (evidence.flagged == flagged)
        axes.plot(
            evidence.ess[some], evidence.khat[some], "o", color=colour, markersize=3, alpha=0.6
        )
    limit = khat_threshold(int(evidence.num_samples[shown].min()))
    axes.axhline(limit, color=style.INK, linewidth=0.9, linestyle="--")
    axes.axvline(MIN_ESS, color=style.INK, linewidth=0.9, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    title = f"{(~evidence.flagged[shown]).sum():,} of {shown.sum():,} sound"
    style.dress(axes, title, "effective sample size", r"Pareto $\hat k$")


def _worst(
    axes: Axes, evidence: Evidence, rows: NDArray[Any], image_shape: Shape | None, num: int
) -> None:
    order = np.argsort(evidence.log_px, kind="stable")[:num]
    columns = min(COLUMNS, len(order))
    tile(axes, rows[order], image_shape, columns, limits=value_limits(rows))
    for place, i in enumerate(order):
        axes.text(
            place % columns + 0.5, place // columns + 0.99, f"{evidence.log_px[i]:.1f}",
            color=style.VERMILION if evidence.flagged[i] else style.BLUE,
            fontsize=style.TICK - 1, ha="center", va="bottom",
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    axes.set_title(f"worst explained, {NATS}", fontsize=style.TITLE, loc="left")


def _weighed(evidence: Evidence) -> NDArray[np.bool_]:
    """Which data have weights with a tail."""
    return np.isfinite(evidence.khat)


def _rows(evidence: Evidence, x: ArrayLike | None) -> NDArray[Any] | None:
    """The data as flat rows: those given, or those that the evaluation knows."""
    if x is None and evidence.source is not None:
        x = evidence.source[2].cpu()
    if x is None:
        return None
    rows = np.asarray(x, dtype=float)
    if len(rows) != len(evidence):
        raise DataError(f"{len(rows)} rows of x for an evaluation of {len(evidence)} data")
    return rows.reshape(len(rows), -1)
