"""Readers of binary files: idx, npz, npy, mat, amat. What they can't read is a typed error."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyro_vae.errors import CorruptFileError, DataError, PyroVAEError

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Type codes of the idx format, which stores its numbers big-endian."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises on damaged bytes into a `CorruptFileError` naming the file.

    Raises:
        DataError: the file is missing, a folder, unreadable, or holds pickled Python objects.
        CorruptFileError: anything else went wrong inside.
    """
    try:
        yield
    except PyroVAEError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        if "Object arrays cannot be loaded" in str(error):
            raise DataError(
                f"{path}: holds Python objects, which would have to be unpickled and could run "
                "code; save a numeric array instead"
            ) from error
        raise CorruptFileError(
            f"{path}: expected {expected}, but reading it failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def read_idx(path: Path) -> np.ndarray:
    """An array in LeCun's idx format, gzipped or plain.

    Returns:
        An array of the shape and type that the header states, in native byte order.

    Raises:
        CorruptFileError: the header is no idx header, or the data is shorter or longer than the
            header says; the message gives both.
    """
    with reading(path, "a gzipped or plain idx file"):
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise CorruptFileError(f"{path}: expected an idx header 00 00, found {raw[:4].hex(' ')!r}")
    code, dims = raw[2], raw[3]
    if code not in IDX_DTYPES:
        known = ", ".join(f"0x{known:02x}" for known in IDX_DTYPES)
        raise CorruptFileError(f"{path}: expected an idx type code of {known}; found 0x{code:02x}")
    start = 4 + 4 * dims
    if dims == 0 or len(raw) < start:
        raise CorruptFileError(
            f"{path}: expected an idx header of {dims} sizes (1 or more) in {start} bytes; "
            f"the file has {len(raw)}"
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dims, 4))
    dtype = np.dtype(IDX_DTYPES[code])
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) - start != expected:
        raise CorruptFileError(
            f"{path}: expected {expected} bytes of data for shape {shape}, found {len(raw) - start}"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_amat(path: Path, features: int) -> np.ndarray:
    """A text table of 0 and 1 separated by blanks, a row a line: `(N, features)` of uint8.

    Raises:
        CorruptFileError: a line holds another number of values, or something else than 0 and 1;
            the message names the line.
    """
    with reading(path, "text"):
        raw = path.read_bytes().translate(None, b" \t\r").rstrip(b"\n") + b"\n"
    table = np.frombuffer(raw, np.uint8)
    width = features + 1
    if len(raw) % width == 0:
        rows = table.reshape(-1, width)
        if (rows[:, -1] == ord("\n")).all() and (rows[:, :-1] >> 1 == ord("0") >> 1).all():
            return rows[:, :-1] - np.uint8(ord("0"))
    for number, line in enumerate(raw.splitlines(), 1):
        odd = line.translate(None, b"01")
        if len(line) != features or odd:
            found = f"{len(line)} characters" + (f", {odd[:8]!r} among them" if odd else "")
            raise CorruptFileError(
                f"{path}: line {number}: expected {features} values 0 or 1, found {found}"
            )
    raise CorruptFileError(f"{path}: expected lines of {features} values 0 or 1")


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an `.npz` archive."""
    with reading(path, "an .npz archive"), open(path, "rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise CorruptFileError(f"{path}: expected an .npz archive, found a single array")
        with archive:
            return list(archive.files)


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an `.npz` archive, by name; nothing is ever unpickled.

    Raises:
        CorruptFileError: the archive is damaged or lacks a name; the message lists what it has.
        DataError: an array of Python objects.
    """
    _need(path, names, npz_names(path))
    with (
        reading(path, "an .npz archive of numeric arrays"),
        open(path, "rb") as stream,
        np.load(stream, allow_pickle=False) as archive,
    ):
        return {name: archive[name] for name in names}


def read_npy(path: Path) -> np.ndarray:
    """The array of an `.npy` file; nothing is ever unpickled."""
    with reading(path, "an .npy file"), open(path, "rb") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def mat_names(path: Path) -> list[str]:
    """Names of the variables in a Matlab file."""
    from scipy.io import whosmat

    with _opened_mat(path) as stream:
        return [name for name, _, _ in whosmat(stream)]


def read_mat(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Variables of a Matlab file (version 7.2 or older), by name; sparse ones made dense.

    Raises:
        CorruptFileError: the file is damaged or lacks a name; the message lists what it has.
        DataError: a version 7.3 file, which is HDF5.
    """
    from scipy.io import loadmat
    from scipy.sparse import issparse

    _need(path, names, mat_names(path))
    with _opened_mat(path) as stream:
        read = loadmat(stream, variable_names=list(names))
        arrays = {name: read[name] for name in names}
    return {name: a.toarray() if issparse(a) else np.asarray(a) for name, a in arrays.items()}


@contextmanager
def _opened_mat(path: Path) -> Iterator[BinaryIO]:
    with reading(path, "a Matlab file"), open(path, "rb") as stream:
        try:
            yield stream
        except NotImplementedError as error:
            raise DataError(f"{path}: save this Matlab file with -v7 ({error})") from error


def _need(path: Path, names: Sequence[str], present: list[str]) -> None:
    for name in names:
        if name not in present:
            raise CorruptFileError(f"{path}: expected an array {name!r}, found {present}")
