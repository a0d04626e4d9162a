"""A step of training as one graph: loss, gradient and Adam's update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyro_vae.compiled.backend import resolve
from pyro_vae.compiled.fused import Call, Computation, Fused, flatten
from pyro_vae.compiled.inputs import signatures
from pyro_vae.compiled.places import Territory
from pyro_vae.compiled.program import Backend
from pyro_vae.compiled.record import gradients_of
from pyro_vae.compiled.replay import Replayed
from pyro_vae.compiled.update import AdamUpdate, Decay, Pending
from pyro_vae.errors import ConfigError

NOTHING_TO_TRAIN = "the loss depends on no parameter that the optimizer trains"


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
    made_by = resolve(backend, roots.get("objective"))
    return Step(computation, roots, AdamUpdate(optimizer), made_by, gradient_clip)


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


@dataclass
class _Last:
    """The step that was taken last, to be taken `again`.

    Attributes:
        numbers: of the update.
        args: that model and guide were called with; `kwargs` too.
    """

    numbers: Tensor
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def kinds(self) -> list[Any] | None:
        """What the graph assumes of the arguments; None where they are not tensors by position."""
        return _kinds(self.args) if not self.kwargs else None


class Step:
    """Takes steps: computes, differentiates the first output, and updates the parameters.

    Where the loss or its gradient is not finite, parameters, moments and the modules' buffers stay
    as they are. On a GPU the graph is captured and replayed as one launch.

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
        # by what a graph holds on to: the parameters in their order, and how each decays
        self._fused: dict[Any, Fused] = {}
        self._graph_of: tuple[Pending, Fused] | None = None
        self._replayed = Replayed()
        self._last: _Last | None = None

    @property
    def seconds(self) -> list[dict[str, float]]:
        """See `Fused.seconds`."""
        return [seconds for fused in self._fused.values() for seconds in fused.seconds]

    def __call__(self, *args: Any, **kwargs: Any) -> Taken | None:
        """Take a step; None where the optimizer has to take it by itself (`AdamUpdate.begin`), an
        argument wants a gradient too, or the optimizer holds a parameter that the computation does
        not use any more."""
        self._last = None
        pending = self._update.begin()
        if pending is None:
            return None
        leaves, _ = flatten(args, kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return None
        with torch.enable_grad():
            call = self._graph(pending).prepare(pending.numbers, *args, **kwargs)
        _, updated = call.program.static
        if any(call.inputs[place] is not pending.parameters[i] for i, place in updated):
            return None
        self._last = _Last(pending.numbers, call, args, kwargs)
        return self._taken(self._replayed(call), call)

    def again(self, *args: Tensor) -> Taken | None:
        """The step that was taken last, on other tensors.

        For a caller who has changed nothing else since but tensors in place: nothing else is
        looked at.
        """
        last = self._last
        if last is None or last.kinds is None or last.kinds != _kinds(args):
            return self(*args)
        arguments = (last.numbers, *args)
        call = last.call.given([arguments[i] for i in last.call.program.handed])
        if not call.program.inputs.hold(call.inputs):
            return self(*args)
        return self._taken(self._replayed.again(call), call)

    def _taken(self, outputs: list[Tensor], call: Call) -> Taken:
        self._update.finish()
        finite, *outputs = outputs
        return Taken(outputs, finite, call.program.static[0])

    def _graph(self, pending: Pending) -> Fused:
        if self._graph_of is None or self._graph_of[0] is not pending:
            key = (tuple(map(id, pending.parameters)), pending.decays)
            if key not in self._fused:
                whole = partial(self._whole, pending.decays)
                self._fused[key] = Fused(whole, self._territory, self._backend)
            self._graph_of = pending, self._fused[key]
        return self._graph_of[1]

    def _whole(
        self, decays: tuple[Decay, ...], numbers: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor], Any]:
        before = [(buffer, buffer.clone()) for buffer in self._territory.changed_buffers()]
        outputs, static = self._computation(*args, **kwargs)
        parameters = self._update.parameters()
        gradients = gradients_of(outputs[0], parameters)
        if all(g is None for g in gradients):
            raise ConfigError(NOTHING_TO_TRAIN)
        outputs = [output.detach() for output in outputs]
        with torch.no_grad():
            found = [g for g in gradients if g is not None]
            finite = torch.stack([_is_finite(value) for value in (outputs[0], *found)]).all()
            if self._gradient_clip is not None:
                norm = get_total_norm(found)
                finite = finite & norm.isfinite()
                factor = (self._gradient_clip / (norm + 1e-6)).clamp(max=1.0)
                gradients = [None if g is None else factor * g for g in gradients]
            self._update.apply(gradients, numbers, decays, finite)
            for buffer, held in before:
                buffer.copy_(torch.where(finite, buffer, held))
        pairs = zip(parameters, gradients, strict=True)
        updated = [(i, parameter) for i, (parameter, g) in enumerate(pairs) if g is not None]
        return [finite, *outputs], (static, updated)


def _is_finite(value: Tensor) -> Tensor:
    # also where it is NaN; `isfinite` would compare twice
    return (value.abs() < math.inf).all()


def _kinds(args: tuple[Any, ...]) -> list[Any] | None:
    """What a graph assumes of the arguments; None where they are not all tensors, each another."""
    if len({*map(id, args)}) < len(args) or not all(isinstance(each, Tensor) for each in args):
        return None
    return signatures(args)
