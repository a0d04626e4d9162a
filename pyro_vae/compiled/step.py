"""A step of training as one graph: loss, gradient and Adam's update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyro_vae.compiled.backend import resolve
from pyro_vae.compiled.fused import Computation, Fused
from pyro_vae.compiled.places import Territory
from pyro_vae.compiled.program import Backend
from pyro_vae.compiled.replay import Replayed
from pyro_vae.compiled.update import AdamUpdate, Options


def fuse_step(
    computation: Computation,
    roots: Mapping[str, Any],
    optimizer: Any,
    backend: str | Backend = "inductor",
    gradient_clip: float | None = None,
) -> Step | None:
    """Loss, gradient and update as one graph; None for an optimizer that has to step by itself."""
    if not AdamUpdate.supports(optimizer):
        return None
    return Step(computation, roots, AdamUpdate(optimizer), resolve(backend), gradient_clip)


class Taken(NamedTuple):
    """A step that was taken, or was not where its loss or gradient is not finite.

    Attributes:
        outputs: of the computation, the loss first, before the update.
        finite: whether loss and gradient are; a tensor, which a GPU need not be waited for.
        static: the computation's static rest.
    """

    outputs: list[Tensor]
    finite: Tensor
    static: Any


class Step:
    """Takes steps: computes, differentiates the first output, and updates the parameters.

    Where the loss or its gradient is not finite, parameters and moments stay as they are. On a GPU
    the graph is captured and replayed as one launch.

    Args:
        computation: the loss first, and other tensors to report.
        roots: what it uses, see `Territory`.
        update: of the parameters.
        backend: compiles a graph.
        gradient_clip: largest norm of the gradient.
    """

    def __init__(
        self,
        computation: Computation,
        roots: Mapping[str, Any],
        update: AdamUpdate,
        backend: Backend,
        gradient_clip: float | None = None,
    ) -> None:
        self._computation = computation
        self._update = update
        self._territory = Territory(roots, update)
        self._backend = backend
        self._gradient_clip = gradient_clip
        # by the options that a graph holds on to
        self._fused: dict[tuple[Options, ...], Fused] = {}
        self._replayed = Replayed()

    @property
    def seconds(self) -> list[dict[str, float]]:
        """See `Fused.seconds`."""
        return [seconds for fused in self._fused.values() for seconds in fused.seconds]

    def __call__(self, *args: Any, **kwargs: Any) -> Taken | None:
        """Take a step; None where the optimizer has to take it by itself (`AdamUpdate.begin`), or
        holds a parameter that the computation does not use any more."""
        pending = self._update.begin()
        if pending is None:
            return None
        with torch.enable_grad():
            call = self._graphs(pending.options).prepare(pending.numbers, *args, **kwargs)
        static, updated = call.program.static
        inputs = set(map(id, call.inputs))
        if any(id(pending.parameters[i]) not in inputs for i in updated):
            return None
        finite, *outputs = self._replayed(call)
        if finite.is_cuda or finite:  # a GPU is not waited for: there the count may run ahead
            self._update.finish(pending, updated)
        return Taken(outputs, finite, static)

    def _graphs(self, options: tuple[Options, ...]) -> Fused:
        if options not in self._fused:
            whole = partial(self._whole, options)
            self._fused[options] = Fused(whole, self._territory, self._backend)
        return self._fused[options]

    def _whole(
        self, options: tuple[Options, ...], numbers: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor], Any]:
        outputs, static = self._computation(*args, **kwargs)
        parameters = self._update.parameters()
        gradients = torch.autograd.grad(outputs[0], parameters, allow_unused=True)
        outputs = [output.detach() for output in outputs]
        with torch.no_grad():
            found = [g for g in gradients if g is not None]
            finite = torch.stack([value.isfinite().all() for value in (outputs[0], *found)]).all()
            if self._gradient_clip is not None:
                norm = get_total_norm(found)
                finite = finite & norm.isfinite()
                factor = (self._gradient_clip / (norm + 1e-6)).clamp(max=1.0)
                gradients = tuple(None if g is None else factor * g for g in gradients)
            self._update.apply(gradients, numbers, options, finite)
        updated = tuple(i for i, g in enumerate(gradients) if g is not None)
        return [finite, *outputs], (static, updated)
