"""The inner loop of an evaluation from compiled graphs, one for each number of rows and draws."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.errors import CompileError, ConfigError, PyroVAEError
from pyro_vae.evidence.sites import outside_observed

if TYPE_CHECKING:
    from pyro_vae.evidence.target import Target

Function = Callable[["Target", range, Mapping[str, Tensor]], Sequence[Tensor]]

# calls of one size that run eagerly: a graph saves milliseconds a call, and takes seconds to make
FEW = 100


class InnerLoop:
    """A function of some rows and their latent variables, eager at first and then compiled.

    Sizes that come up seldom (the last rows, say) stay eager. How often decides, and no stopwatch,
    so that the same evaluation always gives the same numbers.

    Args:
        function: of a target, rows, and values by site; its tensors are detached.
        target: any that shares the programs of those it will be called with.
        strict: raise `CompileError` rather than warn once and run eagerly.
    """

    def __init__(self, function: Function, target: Target, strict: bool) -> None:
        from pyro_vae.compiled.backend import resolve
        from pyro_vae.compiled.fused import Fused
        from pyro_vae.compiled.places import Territory

        self._function, self._target, self._strict = function, target, strict
        territory = Territory({"model": target.model, "guide": target.guide})
        self._fused = Fused(self._computation, territory, resolve("inductor"))
        self._calls: Counter[Any] = Counter()
        self._evaluations: dict[Any, int] = {}
        self._refused = False

    def __call__(
        self, target: Target, rows: range, values: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        size = (len(rows), *((name, value.shape) for name, value in values.items()))
        self._calls[size] += 1
        found = None
        if self._calls[size] > FEW and not self._refused:
            found = self._compiled(target, rows, values)
        if found is None:
            before = target.evaluations
            found = self._function(target, rows, values)
            self._evaluations[size] = target.evaluations - before
        else:
            target.evaluations += self._evaluations[size]
        return found

    def _compiled(
        self, target: Target, rows: range, values: Mapping[str, Tensor]
    ) -> Sequence[Tensor] | None:
        """What the graph computes; None where the eager function has to tell what is wrong."""
        try:
            dense = {name: value.contiguous() for name, value in values.items()}
            call = self._fused.prepare(target.arguments_of(rows), dense)
        except (CompileError, ConfigError) as error:
            if self._strict:
                raise
            self._refused = True
            warnings.warn(f"evaluating without compiling: {error}", stacklevel=3)
            return None
        except PyroVAEError:
            return None
        try:
            outside, *found = call.run().outputs
        except (RuntimeError, IndexError):
            return None
        return None if outside.any() else found

    def _computation(
        self, arguments: tuple[Any, ...], values: dict[str, Tensor]
    ) -> tuple[list[Tensor], None]:
        """Whether observed values are outside their support, and the function's tensors."""
        outside: list[Tensor] = []
        target = copy.copy(self._target)
        target.arguments = arguments
        # noted, not refused: a graph cannot raise
        target.check_support = lambda name, site, *_: outside.append(outside_observed(site).any())
        # operations out of place, as gradients need them, are those that a graph fuses
        with torch.enable_grad():
            found = self._function(target, range(len(arguments[0])), values)
            found = [tensor.detach() for tensor in found]
        return [torch.stack(outside), *found], None
