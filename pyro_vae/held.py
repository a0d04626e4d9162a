"""Where Python keeps things, and how to look there again."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, call, getitem
from types import CellType, MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device,
)  # fmt: skip
# what is at a place where nothing is; a None there is something
ABSENT: Any = object()
# a function of C and its arguments: what `get` does, for who does it at every step
Reading = tuple[Callable[..., Any], tuple[Any, ...]]
_CONTENTS = attrgetter("cell_contents")


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
        """What is there now; `ABSENT` where there is no such entry."""
        return getattr(self.owner, self.table).get(self.key, ABSENT)

    def reading(self) -> Reading:
        """`get`, for as long as the owner keeps its dictionary; a LookupError once an entry that is
        there now has gone."""
        return _entry(getattr(self.owner, self.table), self.key)


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

    def reading(self) -> Reading:
        """`get`; of a variable that is bound now, a ValueError once it is not."""
        try:
            _CONTENTS(self.cell)
        except ValueError:
            return call, (self.get,)
        return _CONTENTS, (self.cell,)


class Item(NamedTuple):
    """An entry of a list or a dictionary."""

    container: Any
    key: Any
    label: str

    def get(self) -> Any:
        """What is there now; `ABSENT` where the entry has gone."""
        if isinstance(self.container, dict):  # of which one may make what is missing
            return dict.get(self.container, self.key, ABSENT)
        try:
            return self.container[self.key]
        except LookupError:
            return ABSENT

    def reading(self) -> Reading:
        """`get`; a LookupError once the entry has gone."""
        return _entry(self.container, self.key)


class Summary(NamedTuple):
    """What a function of C tells of a thing: how many entries it has, its members, its numbers."""

    function: Callable[[Any], Any]
    thing: Any
    label: str

    def get(self) -> Any:
        """What it tells now."""
        return self.function(self.thing)

    def reading(self) -> Reading:
        """`get`."""
        return self.function, (self.thing,)


class Slot(NamedTuple):
    """An attribute that is kept in no dictionary."""

    owner: Any
    key: str
    label: str

    def get(self) -> Any:
        """What is there now; None where the attribute has gone."""
        return getattr(self.owner, self.key, None)

    def reading(self) -> Reading:
        """`get`."""
        return getattr, (self.owner, self.key, None)


AnyPlace = Place | CellPlace | Item | Summary | Slot


def _entry(container: Any, key: Any) -> Reading:
    """`get` of an entry; of one that is there now, a LookupError once it has gone."""
    for kind in (dict, MappingProxyType):
        if isinstance(container, kind) and not (key in container and _is_plain(container, kind)):
            return kind.get, (container, key, ABSENT)
    return getitem, (container, key)


def _is_plain(container: Any, kind: type[Any]) -> bool:
    """Whether asking for an entry neither makes it nor makes something else of it."""
    cls = type(container)
    return cls.__getitem__ is kind.__getitem__ and not hasattr(cls, "__missing__")
