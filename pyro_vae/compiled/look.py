"""What is at many places now, read all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

from pyro_vae.compiled.places import AnyPlace
from pyro_vae.held import Place


class Look:
    """Reads places, a hundred or more at every step, and so without a call of Python for each.

    Args:
        places: what to read.

    Attributes:
        order: the numbers of the places, in the order in which they are read.
    """

    def __init__(self, places: Sequence[AnyPlace]) -> None:
        alike: dict[Callable[..., Any], list[tuple[Any, ...]]] = {}
        numbers: dict[Callable[..., Any], list[int]] = {}
        for n, place in enumerate(places):
            function, arguments = place.reading()
            alike.setdefault(function, []).append(arguments)
            numbers.setdefault(function, []).append(n)
        self.order = [*chain.from_iterable(numbers.values())]
        self._readings = [(f, tuple(zip(*rows, strict=True))) for f, rows in alike.items()]
        # a class keeps its dictionary, and shows it anew each time
        held = [p for p in places if isinstance(p, Place) and not isinstance(p.owner, type)]
        tables = {(id(place.owner), place.table): place for place in held}.values()
        self._owners = [place.owner for place in tables]
        self._tables = [place.table for place in tables]
        self._kept = [*map(getattr, self._owners, self._tables)]

    def __call__(self) -> list[Any] | None:
        """What is there, in `order`; None where an entry has gone, or an object has exchanged the
        dictionary that held it."""
        try:
            if not all(map(is_, map(getattr, self._owners, self._tables), self._kept)):
                return None
            return [*chain.from_iterable(map(f, *columns) for f, columns in self._readings)]
        except (LookupError, AttributeError, ValueError):
            return None
