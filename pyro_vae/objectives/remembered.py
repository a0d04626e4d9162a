"""What an objective found out about a pair, kept for as long as the pair lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import is_
from types import MethodType
from typing import Any, Generic, TypeVar

from pyro_vae.typing import Program

T = TypeVar("T")
Holder = Callable[[], Any]


class Remembered(Generic[T]):
    """A value for each (model, guide), held by weak references; a copy begins with none.

    It compares identities: programs need be neither hashable nor comparable.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[list[Holder], T]] = []

    def get(self, model: Program, guide: Program) -> T | None:
        """The pair's value; None where there is none."""
        pair = _parts(model, guide)
        for holders, value in self._kept:
            if all(hold() is part for hold, part in zip(holders, pair, strict=True)):
                return value
        return None

    def keep(self, model: Program, guide: Program, value: T) -> None:
        """Set the pair's value, and forget the pairs that are no more."""
        pair = _parts(model, guide)
        others = []
        for holders, kept in self._kept:
            parts = [hold() for hold in holders]
            gone = any(part is None for part in parts)
            if not gone and not all(map(is_, parts, pair)):
                others.append((holders, kept))
        self._kept = [*others, ([_hold(part) for part in pair], value)]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _parts(*programs: Program) -> list[Any]:
    """Each as an object and a function: a method is made anew whenever it is looked up."""
    parts: list[Any] = []
    for program in programs:
        if isinstance(program, MethodType):
            parts += [program.__self__, program.__func__]
        else:
            parts += [program, program]
    return parts


def _hold(part: Any) -> Holder:
    try:
        return weakref.ref(part)
    except TypeError:  # of a class with __slots__
        return lambda: part
