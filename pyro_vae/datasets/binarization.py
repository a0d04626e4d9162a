"""From numbers in a file to the rows a model sees: checked, scaled, and binarised as asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyro_vae.checks import at_least, look_up, positive
from pyro_vae.data import Data, Split, bernoulli_draw
from pyro_vae.datasets.splits import Part, Parts, Rule
from pyro_vae.errors import ConfigError, DataError, ShapeError, SupportError

PART_NAMES = ("train", "valid", "test")

Binarization = Callable[[Split, str], Split]


def _dynamic(split: Split, part: str) -> Split:
    """Train drawn anew at every visit; validation and test drawn once, so they can be compared."""
    if part != "train":
        return _fixed(split, part)
    return Split(split.x, split.y, bernoulli_draw, split.seed)


def _fixed(split: Split, part: str) -> Split:
    """Drawn once, at float32 whatever the data's type: one seed makes one set at any precision."""
    once = Split(split.x.float(), None, bernoulli_draw, split.seed).fixed()
    return Split(once.x.to(split.x.dtype), split.y, seed=split.seed)


def _threshold(split: Split, part: str) -> Split:
    return Split((split.x > 0.5).to(split.x.dtype), split.y, seed=split.seed)


BINARIZATIONS: dict[str, Binarization] = {
    "dynamic": _dynamic,
    "fixed": _fixed,
    "threshold": _threshold,
}
"""What `binarize` may be, besides None."""


def assemble(
    parts: Parts,
    rule: Rule,
    *,
    name: str,
    binarize: str | None,
    seed: int,
    dtype: torch.dtype,
    scale: float | None,
    image_shape: tuple[int, ...] | None,
    preparation: dict[str, Any],
) -> Data:
    """A `Data` of what files hold, checked in the files' order, divided, and binarised.

    Args:
        parts: arrays `(N, ...)`, flattened to `(N, features)`.
        rule: divides them into `train`, `test` and perhaps `valid`.
        scale: what every value is divided by; None leaves it as it is.

    Raises:
        ConfigError: `dtype` is not floating point, or `scale` or `seed` makes no sense.
        UnknownNameError: no such binarisation.
        DataError: an empty or non-numeric part, or a value that is not finite in `dtype`.
        ShapeError: parts of different widths, or an `image_shape` that does not fit them.
        SupportError: a value outside [0, 1] that was to be binarised.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype {dtype} is not floating point")
    scale = None if scale is None else positive("scale", scale)
    draw = None if binarize is None else look_up("binarisation", binarize, BINARIZATIONS, ", None")
    seeds = _part_seeds(seed)
    checked = {}
    for label, part in parts.items():
        where = name if label == "all" else f"{name}, {label}"
        x = _rows(part.x, where, dtype, scale)
        if draw is not None:
            _check_unit_interval(x, where)
        checked[label] = Part(x, None if part.y is None else _labels(part.y, where))
    _check_widths(name, {label: part.x.shape[1] for label, part in checked.items()}, image_shape)
    splits = {}
    for label, part in rule(checked).items():
        y = None if part.y is None else torch.from_numpy(part.y)
        split = Split(torch.from_numpy(part.x).to(dtype), y, seed=seeds[label])
        splits[label] = split if draw is None else draw(split, label)
    return Data(
        splits["train"],
        splits.get("valid"),
        splits["test"],
        name,
        image_shape,
        {**preparation, "binarize": binarize, "seed": seed, "scale": scale},
    )


def _rows(array: np.ndarray, where: str, dtype: torch.dtype, scale: float | None) -> np.ndarray:
    """An array `(N, ...)` as rows `(N, features)`, divided by `scale`, finite in `dtype`.

    They are float64 for float64 and float32 for anything less precise.
    """
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: values of type {array.dtype} are not real numbers")
    if array.size == 0:
        raise DataError(f"{where}: no data, the array has shape {array.shape}")
    rows = array.reshape(len(array), -1)
    precision = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):
        x: np.ndarray = rows.astype(precision)
        if scale is not None:
            x = x / precision(scale)
    if place := _first(~(np.abs(x) <= torch.finfo(dtype).max)):
        raise DataError(
            f"{where}: value {rows[place]} at row {place[0]}, column {place[1]} (from 0) is not a "
            f"finite {str(dtype).removeprefix('torch.')}"
        )
    return x


def _check_unit_interval(x: np.ndarray, where: str) -> None:
    if place := _first((x < 0) | (x > 1)):
        raise SupportError(
            f"{where}: value {x[place]:g} at row {place[0]}, column {place[1]} (from 0) is "
            "outside [0, 1] and cannot be binarised: divide by the largest value (scale= of "
            "load_file, --divide-by of the command line)"
        )


def _check_widths(name: str, widths: dict[str, int], image_shape: tuple[int, ...] | None) -> None:
    width = next(iter(widths.values()))
    if len(set(widths.values())) > 1:
        raise ShapeError(f"{name}: parts of different widths: {widths}")
    if image_shape is not None and math.prod(image_shape) != width:
        raise ShapeError(f"{name}: image_shape {image_shape} does not fit rows of {width} values")


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    """Labels `(N,)`: whole numbers as int64, others as float64."""
    if y.dtype.kind not in "biuf":
        raise DataError(f"{where}: labels of type {y.dtype} are not numbers")
    if not np.isfinite(y).all():
        row = int(np.argmin(np.isfinite(y)))
        raise DataError(f"{where}: label {y[row]} at row {row} (from 0) is not finite")
    return y.astype(np.int64 if (y == np.round(y)).all() else np.float64)


def _part_seeds(seed: int) -> dict[str, int]:
    """A seed a part, so that the draws of different parts have nothing in common."""
    states = np.random.SeedSequence(at_least("seed", seed, 0)).generate_state(len(PART_NAMES))
    return dict(zip(PART_NAMES, map(int, states), strict=True))


def _first(bad: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first True, or None."""
    if not bad.any():
        return None
    row, column = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(row), int(column)
