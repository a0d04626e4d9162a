"""Options checked: what means nothing is refused by name and value."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from pyro_vae.errors import ConfigError


def at_least(name: str, value: Any, least: int) -> None:
    """Raise `ConfigError` unless an option is a whole number and large enough."""
    if not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
