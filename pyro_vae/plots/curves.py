"""How training went, and which latent dimensions it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from pyro_vae.errors import DataError
from pyro_vae.plots import style

Columns = dict[str, NDArray[Any]]
Metrics: TypeAlias = str | Path | Sequence[Mapping[str, float]] | Mapping[str, ArrayLike]

PANELS = (
    ("loss", "Loss"),
    ("elbo", "ELBO"),
    ("reconstruction", r"Reconstruction, $\mathbb{E}_{q}[\log p(x\,|\,z)]$"),
    ("kl", r"KL to the prior, $\mathrm{KL}(q(z\,|\,x)\,\|\,p(z))$"),
)
BURN_IN = 0.05  # part of the epochs whose values may leave the frame


def training_curves(metrics: Metrics) -> Figure:
    """Loss, ELBO and the ELBO's two terms by epoch, in nats per datum.

    The best epoch is that of the smallest validation loss (where that was not taken, of the
    largest validation ELBO), what early stopping goes by. The vertical range is that of
    the curves after the first twentieth of the epochs, so that the fall from an untrained model
    does not flatten the rest; a value that is missing or not finite leaves a gap in its curve.

    Args:
        metrics: path of a `metrics.csv`, the rows of one (`Run.metrics`), or columns by name
            (a dict of arrays, a pandas table): `epoch`, `train_loss`, `train_elbo`,
            `train_reconstruction`, `train_kl`, and where taken their `valid_` fellows,
            `valid_log_px` (an estimate of log p(x)) and `kl_weight`, shown where it is not
            always 1.

    Raises:
        DataError: the file is not there, there is no epoch, or a column of training is missing.
    """
    columns = _columns(metrics)
    figure = style.figure(7.0, 4.8)
    for axes, (term, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        _curve(axes, columns, f"train_{term}", "train", style.BLUE)
        _curve(axes, columns, f"valid_{term}", "validation", style.VERMILION)
        if term == "elbo":
            label = r"validation $\log \hat p(x)$"
            _curve(axes, columns, "valid_log_px", label, style.GREEN, marker="o")
        _focus(axes, columns["epoch"])
        last_row = term in ("reconstruction", "kl")
        style.dress(axes, title, "Epoch" if last_row else "", "nats per datum")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=style.PALE, linewidth=0.5)
        if term == "kl":
            _weight(axes, columns)
    _mark_best(figure, columns)
    handles = {
        str(line.get_label()): line
        for axes in figure.axes for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }  # fmt: skip
    figure.legend(
        handles=list(handles.values()), labels=list(handles), loc="outside lower center",
        ncols=len(handles), frameon=False, fontsize=style.LABEL,
    )  # fmt: skip
    return figure


def kl_per_dimension(values: ArrayLike, threshold: float = 0.01) -> Figure:
    """KL(q(z|x) || p(z)) of every latent dimension, largest first; collapsed ones are grey.

    A dimension whose KL is zero on average carries nothing about x: its posterior is the prior.
    (`pv.active_units` counts by another measure, how far the posterior's mean moves with x.)

    Args:
        values: `Terms.kl_per_dimension` of a site divided by the number of data: `(latent,)`,
            means over data, nats per datum.
        threshold: nats up to which a dimension is drawn as collapsed.

    Raises:
        DataError: not a vector of finite numbers.
    """
    kl = np.asarray(values, dtype=float)
    if kl.ndim != 1 or kl.size == 0 or not np.isfinite(kl).all():
        raise DataError(
            f"KL per dimension is a vector of finite numbers, one a latent dimension; got shape "
            f"{kl.shape} with {int((~np.isfinite(kl)).sum())} values that are not finite"
        )
    order = np.argsort(-kl, kind="stable")
    above = kl[order] > threshold
    figure = style.figure(min(7.0, max(3.4, 1.4 + 0.16 * len(kl))), 2.8)
    axes = figure.subplots()
    axes.bar(np.arange(len(kl)), kl[order], color=np.where(above, style.BLUE, "#AAAAAA"))
    few = len(kl) <= 20
    label = "Latent dimension" if few else "Latent dimensions by rank"
    title = f"{above.sum()} of {len(kl)} dimensions above {threshold:g} nats"
    style.dress(axes, title, label, "KL (nats per datum)")
    if few:
        axes.set_xticks(np.arange(len(kl)), [str(i) for i in order])
    axes.set_xlim(-0.8, len(kl) - 0.2)
    return figure


def _columns(metrics: Metrics) -> Columns:
    if isinstance(metrics, str | Path):
        from pyro_vae.training.metrics import read_metrics

        if not Path(metrics).is_file():
            raise DataError(f"there are no metrics at {metrics}")
        metrics = read_metrics(metrics)
    if hasattr(metrics, "keys"):  # a pandas table is no Mapping, but has them too
        table: Any = metrics
        columns = {str(name): np.asarray(table[name], dtype=float) for name in table}
    else:
        names = dict.fromkeys(name for row in metrics for name in row)
        columns = {n: np.array([row.get(n, np.nan) for row in metrics], float) for n in names}
    needed = ["epoch", *(f"train_{term}" for term, _ in PANELS)]
    if missing := [name for name in needed if name not in columns]:
        raise DataError(f"metrics lack the columns {missing}; they have {sorted(columns)}")
    if len(columns["epoch"]) == 0:
        raise DataError("metrics hold no epoch")
    return columns


def _curve(
    axes: Axes, columns: Columns, name: str, label: str, colour: str, marker: str = ""
) -> None:
    """A column over the epochs; one taken only now and then is joined through its gaps."""
    if name not in columns:
        return
    values = np.where(np.isfinite(columns[name]), columns[name], np.nan)
    taken = ~np.isnan(values) if marker else np.ones(len(values), bool)
    single = "o" if len(values) == 1 else ""
    axes.plot(
        columns["epoch"][taken], values[taken], color=colour, label=label, linewidth=1.4,
        marker=marker or single, markersize=3.5,
    )  # fmt: skip


def _focus(axes: Axes, epochs: NDArray[Any]) -> None:
    """Choose the vertical range by the epochs after the burn-in."""
    start = epochs[int(BURN_IN * len(epochs))]
    kept = [
        np.asarray(line.get_ydata(), float)[np.asarray(line.get_xdata()) >= start]
        for line in axes.get_lines()
    ]
    values = np.concatenate(kept)
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) > 0:
        margin = 0.06 * np.ptp(values)
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _weight(axes: Axes, columns: Columns) -> None:
    weight = columns.get("kl_weight", np.ones(1))
    if (weight == 1).all():
        return
    twin = axes.twinx()
    twin.plot(
        columns["epoch"], weight, color=style.GREY, linestyle=":", linewidth=1.2, label="KL weight"
    )
    style.dress(twin, y="KL weight")
    twin.spines["left"].set_visible(False)
    twin.set_ylim(0, 1.08 * float(np.nanmax(weight)))


def _mark_best(figure: Figure, columns: Columns) -> None:
    loss = columns.get("valid_loss", -columns.get("valid_elbo", np.array([np.nan])))
    if not np.isfinite(loss).any():
        return
    best = columns["epoch"][np.nanargmin(np.where(np.isfinite(loss), loss, np.nan))]
    for axes in figure.axes[: len(PANELS)]:
        axes.axvline(
            best, color=style.INK, linestyle="--", linewidth=0.9, zorder=1,
            label=f"best epoch ({best:.0f})",
        )  # fmt: skip
