"""From numbers in a file to the rows a model sees: checked, scaled, and binarised as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import Data, Split, bernoulli_draw
from pyro_vae.datasets.splits import Part, Parts, look_up
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
    *,
    name: str,
    binarize: str | None,
    seed: int,
    dtype: torch.dtype,
    scale: float | None,
    image_shape: tuple[int, ...] | None,
    preparation: dict[str, Any],
) -> Data:
    """A `Data` of the parts `train`, `test` and perhaps `valid`.

    Args:
        parts: arrays `(N, ...)`, flattened to `(N, features)`.
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
    if scale is not None and not (scale > 0 and np.isfinite(scale)):
        raise ConfigError(f"scale {scale} is not a positive number")
    draw = None if binarize is None else look_up("binarisation", binarize, BINARIZATIONS, ", None")
    seeds = _part_seeds(seed)
    splits = {}
    for part in PART_NAMES:
        if part not in parts:
            continue
        x = rows_of(parts[part].x, f"{name}, {part}", dtype=dtype, scale=scale)
        split = Split(x, _labels(parts[part], f"{name}, {part}"), seed=seeds[part])
        if draw is not None:
            _check_unit_interval(x, f"{name}, {part}")
            split = draw(split, part)
        splits[part] = split
    _check_widths(name, {part: split.x.shape[1] for part, split in splits.items()}, image_shape)
    preparation = {**preparation, "binarize": binarize, "seed": seed, "scale": scale}
    return Data(
        splits["train"], splits.get("valid"), splits["test"], name, image_shape, preparation
    )


def rows_of(array: np.ndarray, where: str, *, dtype: torch.dtype, scale: float | None) -> Tensor:
    """An array `(N, ...)` as rows `(N, features)` of `dtype`, divided by `scale` and finite."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: values of type {array.dtype} are not real numbers")
    if array.size == 0:
        raise DataError(f"{where}: no data, the array has shape {array.shape}")
    rows = array.reshape(len(array), -1)
    with np.errstate(over="ignore"):
        values = rows.astype(np.float64 if dtype == torch.float64 else np.float32)
    x = torch.from_numpy(values)
    x = (x if scale is None else x / scale).to(dtype)
    if place := _first(~torch.isfinite(x)):
        raise DataError(
            f"{where}: value {rows[place]} at row {place[0]}, column {place[1]} (from 0) is not a "
            f"finite {str(dtype).removeprefix('torch.')}"
        )
    return x


def _check_unit_interval(x: Tensor, where: str) -> None:
    if place := _first((x < 0) | (x > 1)):
        raise SupportError(
            f"{where}: value {x[place].item():g} at row {place[0]}, column {place[1]} (from 0) is "
            "outside [0, 1] and cannot be binarised; divide by the largest value with scale="
        )


def _check_widths(name: str, widths: dict[str, int], image_shape: tuple[int, ...] | None) -> None:
    if len(set(widths.values())) > 1:
        raise ShapeError(f"{name}: parts of different widths: {widths}")
    if image_shape is not None and int(np.prod(image_shape)) != widths["train"]:
        raise ShapeError(
            f"{name}: image_shape {image_shape} does not fit rows of {widths['train']} values"
        )


def _labels(part: Part, where: str) -> Tensor | None:
    """Labels `(N,)`: whole numbers as int64, others as float64."""
    if part.y is None:
        return None
    y = part.y
    if y.dtype.kind not in "biuf":
        raise DataError(f"{where}: labels of type {y.dtype} are not numbers")
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            row = int(np.argmin(np.isfinite(y)))
            raise DataError(f"{where}: label {y[row]} at row {row} (from 0) is not finite")
        if not (y == np.round(y)).all():
            return torch.from_numpy(y.astype(np.float64))
    return torch.from_numpy(y.astype(np.int64))


def _part_seeds(seed: int) -> dict[str, int]:
    """A seed a part, so that the draws of different parts have nothing in common."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigError(f"seed {seed!r} is not a whole number of 0 or more")
    states = np.random.SeedSequence(int(seed)).generate_state(len(PART_NAMES))
    return dict(zip(PART_NAMES, map(int, states), strict=True))


def _first(bad: Tensor) -> tuple[int, int] | None:
    """Row and column of the first True, or None."""
    if not bad.any():
        return None
    row, column = bad.nonzero()[0].tolist()
    return row, column
