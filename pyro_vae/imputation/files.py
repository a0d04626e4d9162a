"""Data with holes from a file, and imputations into one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.datasets.formats import npz_names, read_npy, read_npz
from pyro_vae.errors import DataError, UnknownNameError
from pyro_vae.imputation.result import Imputations


def read_holes(path: Path) -> tuple[Tensor, Tensor | None]:
    """Data and mask: `x` (or the only other array) and, if there, `mask` of an `.npz`; an `.npy`.

    Raises:
        DataError: there is no such array, or it does not hold numbers, a datum a row.
        CorruptFileError: a damaged file.
        UnknownNameError: another ending.
    """
    mask = None
    if path.suffix == ".npy":
        x = read_npy(path)
    elif path.suffix == ".npz":
        names = npz_names(path)
        others = [name for name in names if name != "mask"]
        name = "x" if "x" in others or len(others) != 1 else others[0]
        if name not in names:
            raise DataError(f'{path}: save the data as "x"; it has {names}')
        arrays = read_npz(path, [name, "mask"] if "mask" in names else [name])
        x, mask = arrays[name], arrays.get("mask")
    else:
        raise UnknownNameError(f"{path}: data with holes are read from .npz and .npy")
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise DataError(f"{path}: a datum a row is needed, got {x.dtype} of shape {x.shape}")
    return torch.as_tensor(x.astype(np.float64)), None if mask is None else torch.as_tensor(mask)


def write_imputations(path: Path, found: Imputations, probability: float = 0.9) -> None:
    """`values`, `mean`, `observed`, `ess`, `acceptance`, `flagged` as `.npz`; and `low` and `high`
    of the central interval where there are imputations enough for one."""
    arrays = {
        name: getattr(found, name)
        for name in ("values", "mean", "observed", "ess", "acceptance", "flagged")
    }
    if len(found.values) >= round(2 / (1 - probability) - 1):
        arrays["low"], arrays["high"] = found.interval(probability)
    np.savez(path, **{name: array.cpu().numpy() for name, array in arrays.items()})
