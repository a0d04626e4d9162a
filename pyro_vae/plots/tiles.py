"""Flat rows of data drawn side by side: as images, or as lines where they are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, DataError, ShapeError
from pyro_vae.plots.style import BLUE, GREY, PALE, SKY, TICK

Shape = tuple[int, ...]
Limits = tuple[float, float]

MISSING = -1.0  # what stands for a missing value among those from 0, black, to 1, white
INSET = 0.1  # empty edge of a cell that holds a line, as a part of the cell


def tile(
    axes: Axes,
    rows: ArrayLike,
    image_shape: Shape | None,
    columns: int,
    *,
    limits: Limits | None = None,
    gap: bool = True,
    colour: str = BLUE,
) -> None:
    """Draw rows from left to right, then downwards; row `i` fills one unit square of the axes.

    Its centre is at `(i % columns + 0.5, i // columns + 0.5)`, with y downwards.

    Args:
        rows: `(N, features)`; NaN, what is missing, is drawn in a colour that no grey value has.
        image_shape: `(height, width)`, `(1, height, width)` or `(3, height, width)` of a row; None
            draws the features as a line.
        columns: cells in a line of cells.
        limits: the values drawn black and white (or at the bottom and the top of a cell); by
            default those of `value_limits(rows)`.
        gap: leave white between images.
        colour: of the lines.

    Raises:
        DataError: there is no row.
        ShapeError: a row has not as many values as an image of this shape.
        ConfigError: the shape is not as above, or `columns` is not positive.
    """
    values = np.asarray(rows, dtype=float)
    if values.ndim != 2 or values.size == 0:
        raise DataError(f"tiles need one row a datum, (N, features), got shape {values.shape}")
    at_least("columns", columns, 1)
    low, high = value_limits(values) if limits is None else limits
    scaled = (values - low) / (high - low)
    if image_shape is None:
        _lines(axes, scaled, columns, colour)
    else:
        _images(axes, _as_images(scaled, image_shape), columns, gap)
    axes.set(xlim=(0, columns), ylim=(math.ceil(len(values) / columns), 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def value_limits(*arrays: ArrayLike) -> Limits:
    """(0, 1) where all values are in it, and otherwise the smallest and the largest of them."""
    values = [np.asarray(array, dtype=float) for array in arrays]
    low = min(float(v.min()) for v in values)
    high = max(float(v.max()) for v in values)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def state_limits(figure: Figure, limits: Limits) -> None:
    """Say below the images which values are black and white, unless they are 0 and 1."""
    if limits != (0.0, 1.0):
        figure.supxlabel(f"black {limits[0]:.3g}, white {limits[1]:.3g}", fontsize=TICK, color=GREY)


def _as_images(rows: NDArray[Any], image_shape: Shape) -> NDArray[Any]:
    """`(N, height, width, channels)` from flat rows, whose channels come first."""
    *channels, height, width = image_shape if len(image_shape) >= 2 else (0, 0, 0)
    if len(channels) > 1 or (channels and channels[0] not in (1, 3)) or height * width == 0:
        raise ConfigError(
            "image_shape is (height, width) or (1 or 3, height, width), got "
            f"{tuple(image_shape)}; None draws the features as lines"
        )
    if rows.shape[1] != math.prod(image_shape):
        raise ShapeError(
            f"a row of {rows.shape[1]} values is no image of shape {tuple(image_shape)}, "
            f"which has {math.prod(image_shape)}"
        )
    return rows.reshape(len(rows), *(channels or [1]), height, width).transpose(0, 2, 3, 1)


def _images(axes: Axes, images: NDArray[Any], columns: int, gap: bool) -> None:
    """One mosaic of all images: hundreds of them cost no more than one."""
    edge = max(1, round(images.shape[2] / 28)) if gap else 0
    images = np.where(np.isnan(images), MISSING, images.clip(0, 1))
    lines = math.ceil(len(images) / columns)
    missing = lines * columns - len(images)
    cells = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=np.nan)
    cells = np.pad(cells, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
    _, height, width, channels = cells.shape
    mosaic = (
        cells.reshape(lines, columns, height, width, channels)
        .transpose(0, 2, 1, 3, 4)
        .reshape(lines * height, columns * width, channels)
    )
    extent = (0, columns, lines, 0)
    aspect = height / width
    if channels == 3:
        paper = np.nan_to_num(mosaic.clip(0, 1), nan=1.0)
        paper = np.where(mosaic == MISSING, to_rgb(SKY), paper)
        axes.imshow(paper, extent=extent, aspect=aspect, interpolation="nearest")
    else:
        gray = colormaps["gray"].with_extremes(bad="white", under=SKY)
        axes.imshow(
            np.ma.masked_invalid(mosaic[..., 0]), cmap=gray, vmin=0, vmax=1,
            extent=extent, aspect=aspect, interpolation="nearest",
        )  # fmt: skip


def _lines(axes: Axes, rows: NDArray[Any], columns: int, colour: str) -> None:
    index = np.arange(len(rows))
    across = INSET + (1 - 2 * INSET) * np.linspace(0, 1, rows.shape[1])
    x = (index % columns)[:, None] + across
    y = (index // columns)[:, None] + 1 - INSET - (1 - 2 * INSET) * rows
    frame = [[(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1), (i, j)]
             for i, j in zip(index % columns, index // columns, strict=True)]  # fmt: skip
    paths = list(np.stack([x, y], -1))
    axes.add_collection(LineCollection(paths, colors=colour, linewidths=1.0))
    frames = LineCollection(frame, colors=PALE, linewidths=0.6, zorder=0, clip_on=False)
    axes.add_collection(frames)
