"""Numeric tables in text: a header or none, and an error that names the line and the column."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyro_vae.datasets.formats import reading
from pyro_vae.errors import DataError


@dataclass(frozen=True)
class Table:
    """A numeric table.

    Args:
        values: `(rows, columns)`, float64.
        columns: their names, from the header, or their numbers from 0 as text.
    """

    values: np.ndarray
    columns: list[str]


def read_csv(path: Path) -> Table:
    """A comma-separated table of numbers.

    The first line is a header if none of its cells is a number.

    Raises:
        DataError: no rows, a row of another length, or a cell that is no number; the message
            names the line (from 1), the column and what stands there. The same for a number
            that is not finite, by its row (from 0).
    """
    with reading(path, "UTF-8 text"), open(path, encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream)
        first = next((cells for cells in rows if cells), [])
        header = all(_number(cell) is None for cell in first)
        columns = [cell.strip() if header else str(i) for i, cell in enumerate(first)]
        skip = rows.line_num if header else 0
        stream.seek(0)
        try:
            values = _parse(stream, skip)
            if values.size and values.shape[1] != len(columns):
                raise ValueError(f"{values.shape[1]} cells a row, {len(columns)} in the header")
        except ValueError as error:
            stream.seek(0)
            raise DataError(f"{path}: {_first_fault(stream, columns, skip) or error}") from error
    if values.size == 0:
        raise DataError(f"{path}: no rows of data{' below the header' if header else ''}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"{path}: value {values[row, column]} at row {row} (from 0, blank lines and header not "
            f"counted), column {columns[column]!r} is not finite"
        )
    return Table(values, columns)


def _parse(stream: Iterable[str], skip: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        return np.loadtxt(
            stream,
            delimiter=",",
            skiprows=skip,
            ndmin=2,
            comments=None,
            quotechar='"',
        )


def _first_fault(stream: Iterable[str], columns: list[str], skip: int) -> str | None:
    """Where the table stops being one, in words."""
    rows = csv.reader(stream)
    for cells in rows:
        if not cells or rows.line_num <= skip:
            continue
        if len(cells) != len(columns):
            return f"line {rows.line_num} has {len(cells)} cells, expected {len(columns)}"
        for name, cell in zip(columns, cells, strict=True):
            if _number(cell) is None:
                return f"line {rows.line_num}, column {name!r}: {cell!r} is not a number"
    return None


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
