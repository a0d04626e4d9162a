"""Numeric tables in text: a header or none, and an error that names the line and the column."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyro_vae.datasets.formats import reading
from pyro_vae.errors import DataError

Number = Callable[[str], float]  # or a ValueError


@dataclass(frozen=True)
class Table:
    """A numeric table.

    Args:
        values: `(rows, columns)`, float64.
        columns: their names, from the header, or their numbers from 0 as text.
    """

    values: np.ndarray
    columns: list[str]


def read_csv(path: Path, holes: bool = False) -> Table:
    """A comma-separated table of numbers.

    The first line is a header if none of its cells is a number.

    Args:
        holes: take empty cells, and `nan`, as NaN.

    Raises:
        DataError: no rows, a row of another length, or a cell that is no number; the message
            names the line (from 1), the column and what stands there. The same for a number
            that is not finite, by its row (from 0).
    """
    number = _number_or_hole if holes else float
    with reading(path, "UTF-8 text"), open(path, encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream)
        first = next((cells for cells in rows if cells), [])
        blank = holes and not any(cell.strip() for cell in first)
        header = not blank and not any(map(_is_number, first))
        columns = [cell.strip() if header else str(i) for i, cell in enumerate(first)]
        skip = rows.line_num if header else 0
        stream.seek(0)
        try:
            values = _parse(stream, skip, number)
            if values.size and values.shape[1] != len(columns):
                raise ValueError(f"{values.shape[1]} cells a row, {len(columns)} in the header")
        except ValueError as error:
            stream.seek(0)
            raise DataError(
                f"{path}: {_first_fault(stream, columns, skip, number) or error}"
            ) from error
    if values.size == 0:
        raise DataError(f"{path}: no rows of data{' below the header' if header else ''}")
    odd = np.isinf(values) if holes else ~np.isfinite(values)
    if odd.any():
        row, column = np.argwhere(odd)[0]
        raise DataError(
            f"{path}: value {values[row, column]} at row {row} (from 0, blank lines and header not "
            f"counted), column {columns[column]!r} is not finite"
        )
    return Table(values, columns)


def _parse(stream: Iterable[str], skip: int, number: Number) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loadtxt: input contained no data")
        return np.loadtxt(
            stream,
            delimiter=",",
            skiprows=skip,
            ndmin=2,
            comments=None,
            quotechar='"',
            converters=None if number is float else number,
        )


def _first_fault(
    stream: Iterable[str], columns: list[str], skip: int, number: Number
) -> str | None:
    """Where the table stops being one, in words."""
    rows = csv.reader(stream)
    for cells in rows:
        if not cells or rows.line_num <= skip:
            continue
        if len(cells) != len(columns):
            return f"line {rows.line_num} has {len(cells)} cells, expected {len(columns)}"
        for name, cell in zip(columns, cells, strict=True):
            try:
                number(cell)
            except ValueError:
                return f"line {rows.line_num}, column {name!r}: {cell!r} is not a number"
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number_or_hole(cell: str) -> float:
    return float(cell) if cell.strip() else np.nan
