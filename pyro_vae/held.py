"""Where Python keeps things, and how to look there again."""

from __future__ import annotations

from types import CellType
from typing import Any, NamedTuple

import numpy as np
import torch

CONSTANTS = (bool, int, float, complex, str, type(None), np.generic, torch.dtype, torch.device)


def is_constant(value: Any) -> bool:
    """Whether this is a plain Python value, which programs can branch on or compute with."""
    return isinstance(value, CONSTANTS) or (
        isinstance(value, tuple | frozenset) and all(map(is_constant, value))
    )


class Place(NamedTuple):
    """One entry of one of an object's dictionaries: `getattr(owner, table)[key]`."""

    owner: Any
    table: str
    key: str
    label: str

    def get(self) -> Any:
        """What is there now; None where the entry has gone."""
        return getattr(self.owner, self.table).get(self.key)


class CellPlace(NamedTuple):
    """A variable that a function closes over."""

    cell: CellType
    label: str

    def get(self) -> Any:
        """What the variable holds now; None where it is not bound."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return None


class Item(NamedTuple):
    """An entry of a list or a dictionary."""

    container: Any
    key: Any
    label: str

    def get(self) -> Any:
        """What is there now; None where the entry has gone."""
        if isinstance(self.container, dict):  # of which one may make what is missing
            return dict.get(self.container, self.key)
        try:
            return self.container[self.key]
        except LookupError:
            return None


class Size(NamedTuple):
    """How many entries a list or a dictionary has."""

    container: Any
    label: str

    def get(self) -> Any:
        """The number now."""
        return len(self.container)


class Slot(NamedTuple):
    """An attribute of an object without a dictionary."""

    owner: Any
    key: str
    label: str

    def get(self) -> Any:
        """What is there now; None where the attribute has gone."""
        return getattr(self.owner, self.key, None)


AnyPlace = Place | CellPlace | Item | Size | Slot
