"""How the parts of a VAE are called: with a context where they take one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pyro.distributions import Distribution as PyroDistribution
from torch import Tensor, nn

from pyro_vae.errors import ConfigError
from pyro_vae.typing import Conditional, Distribution


def condition(part: Conditional, *args: Tensor, context: Tensor | None) -> Distribution:
    """The distribution that a part returns.

    Raises:
        ConfigError: it returns something else.
    """
    found = call(part, *args, context=context)
    if not isinstance(found, PyroDistribution):
        name = getattr(part, "__qualname__", type(part).__name__)
        hint = ""
        if isinstance(part, PyroDistribution):
            hint = ": a part is a function that returns a distribution, such as `lambda: p`"
        raise ConfigError(
            f"a part of a VAE returns one of pyro.distributions, but {name} returned a "
            f"{type(found).__module__}.{type(found).__qualname__}{hint}"
        )
    return found


def call(function: Callable[..., Any], *args: Tensor, context: Tensor | None) -> Any:
    """Call a part or program; one that knows nothing of contexts is not troubled with one."""
    if context is None or not takes(function, len(args) + 1):
        return function(*args)
    return function(*args, context)


def takes(function: Callable[..., Any], number: int) -> bool:
    """Whether it can be called with so many positional arguments."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every callable tells
        return True
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True
