"""Figures of experiments: imputations beside their data, posteriors, densities, measured lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_vae.errors import DataError, ShapeError
from pyro_vae.imputation import Imputations
from pyro_vae.plots import style
from pyro_vae.plots.reading import flat
from pyro_vae.plots.tiles import Shape, state_limits, tile, value_limits

WIDTH = 6.5  # inches, the text width of a page
GRID = 120  # cells along each side of a density


def imputations(
    found: Imputations, image_shape: Shape, truth: ArrayLike | None = None, draws: int = 4
) -> Figure:
    """Images with holes, several imputations of each, their mean, and the truth if there is one.

    Args:
        found: of `impute`; an image a column, so give a dozen.
        image_shape: of a datum.
        truth: `(N, features)`.
        draws: how many of the imputations are shown.

    Raises:
        ShapeError: the truth is of another shape than the data.
    """
    lines = {"observed": flat(torch.where(found.observed, found.values[0], torch.nan))}
    lines |= {f"draw {i + 1}": flat(x) for i, x in enumerate(found.values[:draws])}
    lines["mean"] = flat(found.mean)
    if truth is not None:
        lines["truth"] = np.asarray(truth, dtype=float)
    return image_rows(lines, image_shape)


def image_rows(lines: Mapping[str, ArrayLike | Tensor], image_shape: Shape) -> Figure:
    """Images side by side, a line of them under a name each; NaN is missing, and blue.

    Args:
        lines: by name, `(N, features)`, as many of each.
        image_shape: of a datum.

    Raises:
        DataError: there is no line, or no image in it.
        ShapeError: the lines are of different shapes, or no images of this one.
    """
    arrays = {
        name: (rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows))
        for name, rows in lines.items()
    }
    if not arrays:
        raise DataError("there is no line to draw")
    (first, shape), *others = ((name, array.shape) for name, array in arrays.items())
    for name, other in others:
        if other != shape:
            raise ShapeError(f"{name} has shape {other}, {first} has {shape}")
    height = WIDTH / (shape[0] + 1) * image_shape[-2] / image_shape[-1]
    figure = style.figure(WIDTH, 0.4 + len(arrays) * height)
    axes = figure.subplots()
    known = np.concatenate([array[~np.isnan(array)] for array in arrays.values()])
    limits = value_limits(known) if known.size else (0.0, 1.0)
    tile(axes, np.concatenate(list(arrays.values())), image_shape, shape[0], limits=limits)
    axes.set_yticks(np.arange(len(arrays)) + 0.5, list(arrays))
    axes.tick_params(length=0, labelsize=style.LABEL)
    state_limits(figure, limits)
    return figure


def posteriors(exact: Tensor, approximate: Tensor, columns: int = 4) -> Figure:
    """Draws of two posteriors over a plane, a panel a datum: where an approximation is wrong.

    Args:
        exact: `(draws, N, 2)`, such as those of `nuts`.
        approximate: `(draws, N, 2)`, such as those of q(z|x).
        columns: panels in a line.

    Raises:
        ShapeError: the latent space is no plane, or the numbers of data differ.
    """
    if exact.shape[1:] != approximate.shape[1:] or exact.shape[2:] != (2,):
        raise ShapeError(
            "draws are (draws, N, 2) of the same data, got "
            f"{tuple(exact.shape)} and {tuple(approximate.shape)}"
        )
    number = exact.shape[1]
    lines = -(-number // columns)
    figure = style.figure(WIDTH, 0.5 + lines * WIDTH / columns)
    panels = figure.subplots(lines, columns, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= number:
            axes.set_axis_off()
            continue
        for draws, colour, name in (
            (exact, style.BLUE, "exact"), (approximate, style.VERMILION, "approximate"),
        ):  # fmt: skip
            x, y = draws[:1000, i].double().cpu().numpy().T
            axes.scatter(x, y, s=2, linewidths=0, alpha=0.4, color=colour, label=name)
        style.dress(axes, f"datum {i}")
        axes.set_aspect("equal", adjustable="datalim")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
        frameon=False, fontsize=style.LABEL, markerscale=5,
    )  # fmt: skip
    return figure


def densities(
    panels: Mapping[str, Callable[[Tensor], Tensor] | ArrayLike | Tensor],
    extent: float,
    columns: int = 4,
) -> Figure:
    """Densities over the square of this half-width around 0, or points in it, a panel each.

    Args:
        panels: by title, a log-density, which maps `(n, 2)` to `(n,)`; or points `(n, 2)`.
        extent: half of the square's side.
        columns: panels in a line.

    Raises:
        DataError: there is no panel.
    """
    if not panels:
        raise DataError("there is no density to draw")
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure = style.figure(WIDTH, lines * (0.35 + WIDTH / columns))
    cells = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, panel) in zip(cells, panels.items(), strict=False):
        if callable(panel) and not isinstance(panel, Tensor):
            height = np.exp(_on_grid(panel, extent))
            axes.imshow(height, origin="lower", extent=(-extent, extent, -extent, extent),
                        cmap="Blues", vmin=0)  # fmt: skip
        else:
            x, y = np.asarray(panel, dtype=float).T
            axes.scatter(x, y, s=2, linewidths=0, color=style.BLUE, alpha=0.5)
        axes.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[])
        axes.set_aspect("equal")
        wide = round(WIDTH / columns * 72 / (0.7 * style.LABEL))  # letters that a panel holds
        axes.set_title(fill(title, wide), fontsize=style.LABEL, loc="left")
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    return figure


def series(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]],
    x: str,
    y: str,
    title: str = "",
    log: bool = False,
) -> Figure:
    """Measured lines with their standard errors.

    Args:
        lines: by name, the places, the values, and where known their standard errors.
        x, y: labels of the axes.
        log: whether both axes are logarithmic.

    Raises:
        DataError: there is no line.
    """
    if not lines:
        raise DataError("there is no line to draw")
    figure = style.figure(4.6, 3.2)
    axes = figure.subplots()
    for (name, line), colour in zip(lines.items(), style.class_colours(len(lines)), strict=True):
        places, values, *error = (np.asarray(part, dtype=float) for part in line)
        axes.errorbar(places, values, yerr=error[0] if error else None, marker="o", markersize=3,
                      linewidth=1.2, capsize=2, color=colour, label=name)  # fmt: skip
    if log:
        axes.set(xscale="log", yscale="log")
    style.dress(axes, title, x, y)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=style.TICK)
    return figure


def _on_grid(log_density: Callable[[Tensor], Tensor], extent: float) -> NDArray[Any]:
    """`(GRID, GRID)`, the first coordinate to the right and the second upwards."""
    side = torch.linspace(-extent, extent, GRID)
    points = torch.cartesian_prod(side, side).flip(-1)
    with torch.no_grad():
        return log_density(points).reshape(GRID, GRID).double().cpu().numpy()
