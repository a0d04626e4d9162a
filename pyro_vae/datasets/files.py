"""`load_file`: your own arrays, from .npz, .npy, .mat or .csv."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pyro_vae.checks import look_up
from pyro_vae.data import Data
from pyro_vae.datasets.binarization import PART_NAMES, assemble
from pyro_vae.datasets.formats import mat_names, npz_names, read_mat, read_npy, read_npz
from pyro_vae.datasets.splits import Part, Parts, Rule, as_filed, cut_by_fraction
from pyro_vae.datasets.tables import read_csv
from pyro_vae.errors import ConfigError, DataError

FRACTIONS = (0.8, 0.1, 0.1)

Reader = Callable[[Path, str | None, str | None], Parts]


def load_file(
    path: str | os.PathLike[str],
    *,
    binarize: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    key: str | None = None,
    label_key: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> Data:
    """Your own data, as rows `(N, features)`.

    - `.npz`, `.mat`: either arrays `train`, `test` and perhaps `valid`, with labels `y_train`, ...
      if present; or one array (`key`, or `x`, or the only one), with labels `y` if present. Arrays
      of Python objects are refused: nothing is ever unpickled.
    - `.npy`: one array.
    - `.csv`: numbers, with or without a header line.

    Args:
        path: of the file; its ending says the format.
        binarize: None, `"dynamic"`, `"fixed"` or `"threshold"`, as in `load`.
        fractions: (train, valid, test) of a file that has one array; default 0.8, 0.1, 0.1. A
            validation fraction of 0 makes none. The rows are shuffled first, by `seed`.
        seed: of the shuffle and of the draws.
        dtype: of the rows; floating point.
        key: name of the array in an `.npz` or `.mat` file.
        label_key: name of the labels there, `y` by default (`{label_key}_train`, ... beside
            `train`); in a `.csv`, the column of the labels, by name or by number from 0.
        image_shape: of a row seen as an image; default: the shape of a datum that has two or
            three dimensions.
        scale: what every value is divided by, such as 255.

    Raises:
        DataError: a file that can't be read or holds no data, a value that is not finite or not a
            number (named with its place), or an array that is not there.
        CorruptFileError: a damaged file.
        ShapeError: shapes that don't fit each other.
        SupportError: a value outside [0, 1] that was to be binarised.
        ConfigError: options that mean nothing together.
        UnknownNameError: an ending without a reader.
    """
    path = Path(path)
    read = look_up("file format", path.suffix.lower(), READERS)
    parts = read(path, key, label_key)
    preparation: dict[str, object] = {"source": str(path)}
    rule: Rule = as_filed
    if "all" in parts:
        fractions = FRACTIONS if fractions is None else fractions
        rule = cut_by_fraction(tuple(fractions), str(path), seed)
        preparation["fractions"] = tuple(fractions)
    elif fractions is not None:
        raise ConfigError(f"{path} has its own train and test: fractions {fractions} mean nothing")
    datum = next(iter(parts.values())).x.shape[1:]
    if image_shape is None and len(datum) in (2, 3):
        image_shape = datum
    return assemble(
        parts,
        rule,
        name=path.stem,
        binarize=binarize,
        seed=seed,
        dtype=dtype,
        scale=scale,
        image_shape=None if image_shape is None else tuple(image_shape),
        preparation=preparation,
    )


def _read_npz(path: Path, key: str | None, label_key: str | None) -> Parts:
    return _named_parts(path, npz_names(path), read_npz, key, label_key)


def _read_mat(path: Path, key: str | None, label_key: str | None) -> Parts:
    return _named_parts(path, mat_names(path), read_mat, key, label_key)


def _read_npy(path: Path, key: str | None, label_key: str | None) -> Parts:
    if key is not None or label_key is not None:
        raise ConfigError(f"{path} holds one array without a name: key and label_key mean nothing")
    return {"all": Part.of(read_npy(path), None, str(path))}


def _read_csv(path: Path, key: str | None, label_key: str | None) -> Parts:
    if key is not None:
        raise ConfigError(f"{path} is one table: key {key!r} means nothing")
    table = read_csv(path)
    if label_key is None:
        return {"all": Part.of(table.values, None, str(path))}
    column = _column(path, table.columns, label_key)
    rest = np.delete(table.values, column, axis=1)
    return {"all": Part.of(rest, table.values[:, column], str(path))}


READERS: dict[str, Reader] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".mat": _read_mat,
    ".csv": _read_csv,
}
"""How a file is read, by its ending."""


def _named_parts(
    path: Path,
    names: list[str],
    read: Callable[[Path, Sequence[str]], dict[str, np.ndarray]],
    key: str | None,
    label_key: str | None,
) -> Parts:
    wanted = _choose(path, names, key, label_key)
    arrays = read(path, [name for pair in wanted.values() for name in pair if name is not None])
    return {
        part: Part.of(arrays[x], None if y is None else arrays[y], f"{path}, {x!r}")
        for part, (x, y) in wanted.items()
    }


def _choose(
    path: Path, names: list[str], key: str | None, label_key: str | None
) -> dict[str, tuple[str, str | None]]:
    """Which arrays are the data and which their labels, by part."""
    label = "y" if label_key is None else label_key

    def labels(name: str) -> str | None:
        if name in names:
            return name
        if label_key is None:
            return None
        raise DataError(f"{path}: no labels {name!r} among {names}")

    if key is None and ("train" in names or "test" in names):
        missing = [part for part in ("train", "test") if part not in names]
        if missing:
            raise DataError(f"{path}: has {names}, but no {missing[0]!r} beside them")
        return {p: (p, labels(f"{label}_{p}")) for p in PART_NAMES if p in names}
    candidates = [name for name in names if name != label]
    if key is None:
        key = "x" if "x" in names else candidates[0] if len(candidates) == 1 else None
        if key is None:
            raise DataError(
                f"{path}: name one of its arrays {names} by key=, or save one as 'x', or save "
                "'train' and 'test'"
            )
    if key not in names:
        raise DataError(f"{path}: no array {key!r} among {names}")
    return {"all": (key, None if key == label else labels(label))}


def _column(path: Path, columns: list[str], name: str) -> int:
    if name in columns:
        return columns.index(name)
    if name.isdecimal() and int(name) < len(columns):
        return int(name)
    raise DataError(f"{path}: no column {name!r} among {columns}")
