"""What is at many places now, read all at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem, is_
from typing import Any

from pyro.params.param_store import ParamStoreDict

from pyro_vae.compiled.places import AnyPlace, Moment
from pyro_vae.held import Item, Place, Size


class Look:
    """Reads places, a hundred or more at every step, and so without a call of Python for each.

    Args:
        places: what to read.

    Attributes:
        order: the numbers of the places, in the order in which they are read.
    """

    def __init__(self, places: Sequence[AnyPlace]) -> None:
        sizes: list[int] = []
        entries: list[int] = []
        others: list[int] = []
        self._sized: list[Any] = []
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        tables: dict[tuple[int, str], Place] = {}
        for n, place in enumerate(places):
            entry = _entry(place)
            if isinstance(place, Size):
                sizes.append(n)
                self._sized.append(place.container)
            elif entry is not None:
                entries.append(n)
                self._containers.append(entry[0])
                self._keys.append(entry[1])
                if isinstance(place, Place) and isinstance(entry[0], dict):
                    tables[id(place.owner), place.table] = place
            else:
                others.append(n)
        self._others = [places[n].get for n in others]
        self.order = sizes + entries + others
        self._owners = [place.owner for place in tables.values()]
        self._tables = [place.table for place in tables.values()]
        self._kept = [*map(getattr, self._owners, self._tables)]

    def __call__(self) -> list[Any] | None:
        """What is there, in `order`; None where an entry has gone, or an object has exchanged the
        dictionary that held it."""
        try:
            if not all(map(is_, map(getattr, self._owners, self._tables), self._kept)):
                return None
            return [
                *map(len, self._sized),
                *map(getitem, self._containers, self._keys),
                *(get() for get in self._others),
            ]
        except (LookupError, AttributeError):
            return None


def _entry(place: AnyPlace) -> tuple[Any, Any] | None:
    """Container and key of a place that can be read by them from now on."""
    if isinstance(place, Item):
        container, key = place.container, place.key
    elif isinstance(place, Moment):
        container, key = place.state, place.position
    # a store may exchange its dictionaries
    elif isinstance(place, Place) and not isinstance(place.owner, ParamStoreDict):
        container, key = getattr(place.owner, place.table), place.key
    else:
        return None
    if hasattr(type(container), "__missing__"):  # what is missing would be made
        return None
    try:
        getitem(container, key)
    except LookupError:  # what is not there may come
        return None
    return container, key
