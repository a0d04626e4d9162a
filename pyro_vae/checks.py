"""Options checked: what means nothing is refused by name and value."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from torch import Tensor

from pyro_vae.errors import ConfigError


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
