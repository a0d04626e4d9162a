"""What is at many places now, read all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from pyro_vae.compiled.places import AnyPlace
from pyro_vae.held import Place


class Look:
    """Reads places, a hundred or more at every step, and so without a call of Python for each.

    Args:
        places: what to read.
    """

    def __init__(self, places: Sequence[AnyPlace]) -> None:
        self._places = places
        self._readings = _Readings.of(places)

    @property
    def order(self) -> list[int]:
        """The numbers of the places, in the order in which they are read."""
        return self._readings.order

    def __call__(self) -> list[Any] | None:
        """What is there, in `order`; None where an entry has gone, or an object shows another
        dictionary at every look."""
        try:
            if not self._readings.hold():
                # an object has exchanged the dictionary that held it, as Pyro's store does wherever
                # it is put back to what it was
                found = _Readings.of(self._places)
                if found.order != self._readings.order or not found.hold():
                    return None
                self._readings = found
            columns = self._readings.columns
            return [*chain.from_iterable(map(f, *arguments) for f, arguments in columns)]
        except (LookupError, AttributeError, ValueError):
            return None


class _Readings(NamedTuple):
    """How to read places, those that are read alike together.

    Attributes:
        order: their numbers as they are read.
        columns: functions, and their arguments by position.
        owners: the objects that hold them in dictionaries, in which `tables`; and those, `kept`.
    """

    order: list[int]
    columns: list[tuple[Callable[..., Any], tuple[Any, ...]]]
    owners: list[Any]
    tables: list[str]
    kept: list[Any]

    @classmethod
    def of(cls, places: Sequence[AnyPlace]) -> _Readings:
        """Of what there is now."""
        alike: dict[Callable[..., Any], list[tuple[Any, ...]]] = {}
        numbers: dict[Callable[..., Any], list[int]] = {}
        for n, place in enumerate(places):
            function, arguments = place.reading()
            alike.setdefault(function, []).append(arguments)
            numbers.setdefault(function, []).append(n)
        # a class keeps its dictionary, and shows it anew each time
        held = [p for p in places if isinstance(p, Place) and not isinstance(p.owner, type)]
        tables = {(id(place.owner), place.table): place for place in held}.values()
        owners = [place.owner for place in tables]
        names = [place.table for place in tables]
        return cls(
            [*chain.from_iterable(numbers.values())],
            [(f, tuple(zip(*rows, strict=True))) for f, rows in alike.items()],
            owners,
            names,
            [*map(getattr, owners, names)],
        )

    def hold(self) -> bool:
        """Whether the objects keep the dictionaries that they kept."""
        return all(map(is_, map(getattr, self.owners, self.tables), self.kept))
