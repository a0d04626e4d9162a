"""Data with holes from a file, and imputations into one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.datasets.formats import npz_names, read_npy, read_npz
from pyro_vae.datasets.tables import read_csv
from pyro_vae.errors import DataError, UnknownNameError
from pyro_vae.imputation.result import Imputations


def read_holes(path: Path) -> tuple[Tensor, Tensor | None]:
    """Data and mask: `x` (or the only other array) and, if there, `mask` of an `.npz`; an `.npy`; a
    `.csv`, whose empty cells are holes.

    Raises:
        DataError: there is no such array, or it does not hold numbers, a datum a row; a mask is
            not boolean.
        CorruptFileError: a damaged file.
        UnknownNameError: another ending.
    """
    mask = None
    if path.suffix == ".npy":
        x = read_npy(path)
    elif path.suffix == ".csv":
        x = read_csv(path, holes=True).values
    elif path.suffix == ".npz":
        names = npz_names(path)
        others = [name for name in names if name != "mask"]
        name = "x" if "x" in others or len(others) != 1 else others[0]
        if name not in names:
            raise DataError(f'{path}: save the data as "x"; it has {names}')
        arrays = read_npz(path, [name, "mask"] if "mask" in names else [name])
        x, mask = arrays[name], arrays.get("mask")
    else:
        raise UnknownNameError(f"{path}: data with holes are read from .npz, .npy and .csv")
    if x.ndim < 2 or len(x) == 0 or x.dtype.kind not in "biuf":
        raise DataError(f"{path}: a datum a row is needed, got {x.dtype} of shape {x.shape}")
    if mask is None:
        return torch.as_tensor(x.astype(np.float64)), None
    if mask.dtype != np.bool_:
        raise DataError(f"{path}: a mask is boolean, True where observed, got {mask.dtype}")
    return torch.as_tensor(x.astype(np.float64)), torch.as_tensor(mask)


def write_imputations(path: Path, found: Imputations, probability: float = 0.9) -> None:
    """`values`, `mean`, `observed`, `ess`, `acceptance`, `rhat`, `flagged` as `.npz`; and `low` and
    `high` of the central interval where there are imputations enough for one."""
    arrays = {
        name: getattr(found, name)
        for name in ("values", "mean", "observed", "ess", "acceptance", "rhat", "flagged")
    }
    if len(found.values) >= round(2 / (1 - probability) - 1):
        arrays["low"], arrays["high"] = found.interval(probability)
    np.savez(path, **{name: array.cpu().numpy() for name, array in arrays.items()})
