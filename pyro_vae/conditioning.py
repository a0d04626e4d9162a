"""How the parts of a VAE are called: with a context where they take one."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from pyro_vae.typing import Conditional, Distribution


def condition(part: Conditional, *args: Tensor, context: Tensor | None) -> Distribution:
    """Call a part; one that knows nothing of contexts is not troubled with one."""
    if context is None or not _takes(part, len(args) + 1):
        return part(*args)
    return part(*args, context)


def _takes(part: Conditional, number: int) -> bool:
    """Whether a part can be called with so many positional arguments."""
    function = part.forward if isinstance(part, nn.Module) else part
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not every callable tells
        return True
    try:
        signature.bind(*range(number))
    except TypeError:
        return False
    return True
