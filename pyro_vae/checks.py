"""Options checked: what means nothing is refused by name and value, what has no such name by both
that and the names that there are."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

from pyro_vae.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's included, as an int; True is none.

    Raises:
        ConfigError: it is none.
    """
    number = _index(value)
    if number is None:
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    return number


def at_least(name: str, value: Any, least: int) -> int:
    """A whole number that is large enough, as an int.

    Raises:
        ConfigError: it is none.
    """
    number = _index(value)
    if number is None or number < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0, numpy's or a tensor's included, as a float.

    Raises:
        ConfigError: it is none.
    """
    number = _real(value)
    if not 0 < number < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value!r}")
    return number


def nonnegative(name: str, value: Any) -> float:
    """A finite number of 0 or more, numpy's or a tensor's included, as a float.

    Raises:
        ConfigError: it is none.
    """
    number = _real(value)
    if not 0 <= number < math.inf:
        raise ConfigError(f"{name} must be finite and not negative, got {value!r}")
    return number


def check_compile(value: Any) -> None:
    """Raise `ConfigError` unless this says whether to compile."""
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f'compile is True, False or "auto", got {value!r}')


def look_up(kind: str, name: Any, table: Mapping[str, T], also: str = "") -> T:
    """The entry of a registry.

    Args:
        kind: what it is a registry of, for the message.
        also: what else could have been given.

    Raises:
        UnknownNameError: there is none; the message lists the known and the nearest.
    """
    check_known(kind, name, table, also)
    return table[name]


def check_known(kind: str, name: Any, names: Iterable[str], also: str = "") -> None:
    """Raise `UnknownNameError` unless a name is one of these; see `look_up`."""
    known = list(names)
    if isinstance(name, str) and name in known:
        return
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(map(repr, known))
    raise UnknownNameError(f"no {kind} named {name!r}; {hint}known: {listed}{also}")


def _index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(value: Any) -> float:
    """A real number as a float; NaN where it is none, as no comparison holds of that."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
