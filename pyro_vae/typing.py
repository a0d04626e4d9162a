"""Names for what the annotations speak of."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

# Pyro's distributions are torch's with a mixin: no base class that a type checker sees has both
Distribution: TypeAlias = Any

# a part of a VAE: a module or any callable that returns a distribution
Conditional: TypeAlias = Callable[..., Distribution]

# a Pyro program: a callable with sample statements
Program: TypeAlias = Callable[..., Any]

# whether to compile: or be told why not; "auto" warns instead, and goes on without
Compile: TypeAlias = bool | Literal["auto"]
