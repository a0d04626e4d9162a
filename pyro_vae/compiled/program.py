"""One compiled graph and how it is made: recorded, traced, fused, held against the eager run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from pyro_vae.compiled.capturable import obstacle
from pyro_vae.compiled.guard import check_agreement, check_changes, coarsest, comparable
from pyro_vae.compiled.look import Look
from pyro_vae.compiled.places import AnyPlace, Moment, Territory, same, tensors
from pyro_vae.compiled.record import (
    Recording,
    Run,
    gradients_of,
    preserved,
    record,
    rerun,
    without_hooks,
)
from pyro_vae.compiled.trace import trace
from pyro_vae.errors import CompileError

# turns a graph and its inputs into something that computes the same, faster
Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]


@dataclass(frozen=True)
class Argument:
    """The graph's input that is the program's n-th tensor argument."""

    index: int


class Results(NamedTuple):
    """What one call computed: outputs, and the first one's gradient for each `wanted` tensor."""

    outputs: list[Tensor]
    wanted: list[Tensor]
    gradients: list[Tensor]
    static: Any


class Program:
    """A compiled graph with the places of its inputs.

    Attributes:
        arguments: which of the graph's inputs are arguments of the call; `handed`, which arguments.
        static: what the program returned besides tensors, where a tensor among it stands for the
            number of the graph's input that it is, or for the place where it is found.
        device: of the inputs, a GPU if any is there.
        obstacle: what keeps it from being captured on a GPU, see `capturable.obstacle`.
        checked: whether it could be held against the eager run: whether that was finite, or
            infinite alike.
        seconds: how long tracing and compiling took.
    """

    def __init__(self, run: Run, arguments: list[Tensor], territory: Territory, backend: Backend):
        start = time.perf_counter()
        recording = record(run, arguments, territory)
        inputs = [*arguments, *(t for t, _ in recording.captured)]
        sources = [*map(Argument, range(len(arguments))), *(p for _, p in recording.captured)]
        differentiated = [i for i, g in enumerate(recording.gradients) if g is not None]
        wanted = [recording.wanted[i] for i in differentiated]
        self.static: Any = None

        def joint() -> list[Tensor]:
            outputs, self.static = run()
            gradients = gradients_of(outputs[0], wanted)
            return _owned([*(o.detach() for o in outputs), *gradients], like=wanted, inputs=inputs)

        with preserved(territory, inputs), without_hooks(inputs):
            graph = trace(joint, inputs)
        used = _prune(graph)
        self._sources: list[Argument | AnyPlace] = [sources[i] for i in used]
        self.arguments = [n for n, s in enumerate(self._sources) if isinstance(s, Argument)]
        self.handed = [s.index for s in self._sources if isinstance(s, Argument)]
        devices = [inputs[i].device for i in used]
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        labels = ["an argument" if isinstance(s, Argument) else None for s in self._sources]
        self.obstacle = None if self.device.type == "cpu" else obstacle(graph, labels)
        granted = [(p, v) for p, v in recording.frozen if not isinstance(v, Tensor)]
        self._look = Look([place for place, _ in granted])
        self._granted = [granted[n][1] for n in self._look.order]
        self._aside = _Aside(recording)
        self._values = _Values(recording.granted)
        self._look_up = _LookUp(self._sources, [inputs[i] for i in used])
        positions = {id(inputs[i]): n for n, i in enumerate(used)}
        found = tensors(territory.places())
        self.static = tree_map_only(
            Tensor, lambda t: positions.get(id(t), found.get(id(t))), self.static
        )
        self._wanted = [positions[id(t)] for t in wanted]
        self._num_outputs = len(recording.outputs)
        traced = time.perf_counter()
        with torch.no_grad(), torch._C._DisableAutocast():  # the graph carries its casts
            self._call = backend(graph, [inputs[i] for i in used])
        again = partial(rerun, run, arguments, territory, recording)
        self._check(recording, [inputs[i] for i in used], territory, again, coarsest(graph))
        self.seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}

    def inputs(self, arguments: Sequence[Tensor]) -> list[Tensor] | None:
        """The graph's inputs as they are now, or None if it was made for others."""
        now = self._look()
        if now is None:
            return None
        # first, all at once, whether they are the objects
        if not all(map(is_, now, self._granted)) and not all(map(same, now, self._granted)):
            return None
        if not (self._aside.stand() and self._values.stand()):
            return None
        return self._look_up(arguments)

    def __call__(self, inputs: list[Tensor]) -> Results:
        """Run the graph on what `inputs` returned."""
        with torch.no_grad(), torch._C._DisableAutocast():
            values = self._call(*inputs)
        return Results(
            list(values[: self._num_outputs]),
            [inputs[i] for i in self._wanted],
            list(values[self._num_outputs :]),
            self.static,
        )

    def _check(
        self,
        eager: Recording,
        inputs: list[Tensor],
        territory: Territory,
        again: Callable[[], Recording],
        coarse: torch.dtype,
    ) -> None:
        """Hold the graph against the recorded run: the same draws, so the same numbers."""
        with preserved(territory, inputs) as changes:
            results = self(inputs)
            changed = changes.found()
        moved = territory.update.moved() if territory.update else {}

        def compare(outputs: Any = None, gradients: Any = None, changes: Any = None) -> None:
            check_agreement("outputs", results.outputs, eager.outputs, outputs, coarse)
            check_agreement("gradients", results.gradients, eager.found, gradients, coarse)
            check_changes(changed, eager.changed, moved, changes, coarse)

        try:
            compare()
        except CompileError:  # of rounding, where a small difference of large numbers is left?
            nudged = again()
            compare(nudged.outputs, nudged.found, nudged.changed)
        pairs = zip(
            (*results.outputs, *results.gradients), (*eager.outputs, *eager.found), strict=True
        )
        self.checked = all(bool(comparable(f, e)[1].isfinite().all()) for f, e in pairs)


class _Aside:
    """Tensors at places that the graph does not read: those that the program asks for something
    else than their values (`len(self.data)`), and further places of those that are its inputs."""

    def __init__(self, recording: Recording) -> None:
        inputs = {id(tensor) for tensor, _ in recording.captured}
        tensors = [(place, v) for place, v in recording.frozen if isinstance(v, Tensor)]
        counts = Counter(id(value) for _, value in tensors)
        held = [(p, v) for p, v in tensors if id(v) not in inputs or counts[id(v)] > 1]
        self._look = Look([place for place, _ in held])
        values = [held[n][1] for n in self._look.order]
        first: dict[int, int] = {}
        self._first = [first.setdefault(id(value), n) for n, value in enumerate(values)]
        self._assumed = [*map(_ASSUMED, values)]

    def stand(self) -> bool:
        """Whether they are alike still, and one where they were one."""
        now = self._look()
        if now is None:
            return False
        tied = all(map(is_, now, map(now.__getitem__, self._first)))
        try:
            return tied and [*map(_ASSUMED, now)] == self._assumed
        except AttributeError:  # of what is no tensor any more
            return False


class _Values:
    """Tensors whose values are part of the graph: masks that decide shapes, numbers of places.

    Compared at every step: numpy, say, writes to memory that it shares with a tensor unseen.
    """

    def __init__(self, granted: Sequence[tuple[Tensor, AnyPlace]]) -> None:
        self._places = [place for _, place in granted]
        self._values = [tensor.clone() for tensor, _ in granted]

    def stand(self) -> bool:
        """Whether they hold what they held."""
        now = [place.get() for place in self._places]
        return all(
            isinstance(tensor, Tensor)
            and _ASSUMED(tensor) == _ASSUMED(value)
            and torch.equal(_bits(tensor), _bits(value))
            for tensor, value in zip(now, self._values, strict=True)
        )


def _bits(tensor: Tensor) -> Tensor:
    """A tensor as integers, of which NaN is equal to itself."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.itemsize])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _LookUp:
    """Finds the inputs of a graph, and sees that they are such as it was made for.

    At every step, and so without a loop of Python where nothing has changed.
    """

    def __init__(self, sources: Sequence[Argument | AnyPlace], examples: Sequence[Tensor]) -> None:
        found = [(n, s) for n, s in enumerate(sources) if not isinstance(s, Argument | Moment)]
        moments = [(n, s) for n, s in enumerate(sources) if isinstance(s, Moment)]
        self._places = Look([place for _, place in found])
        self._moments = Look([moment for _, moment in moments])
        order = [found[i][0] for i in self._places.order] + [n for n, _ in moments]
        self._held = [examples[n] for n in order]  # what was found last
        self._signatures = signatures(self._held)
        self._signatures_of_places = signatures(self._held[: len(found)])
        order_of = {n: i for i, n in enumerate(order)}
        self._order = [
            len(order) + s.index if isinstance(s, Argument) else order_of[n]
            for n, s in enumerate(sources)
        ]

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor] | None:
        """The inputs; None where one is not what it was."""
        places, moments = self._places(), self._moments()
        if places is None or moments is None:
            return None
        held = places + moments
        if not all(map(is_, held, self._held)):
            if not all(isinstance(value, Tensor) for value in held):
                return None
            if signatures(held) != self._signatures:
                return None
            self._held = held
        # a parameter may change its layout and stay the object it is, a moment does not
        elif signatures(places) != self._signatures_of_places:
            return None
        values = [*held, *arguments]  # the arguments' layouts are known by the kind of the call
        return [*map(values.__getitem__, self._order)]


_ASSUMED = attrgetter("shape", "dtype", "device", "requires_grad")


def signature(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph assumes of an input."""
    return *_ASSUMED(tensor), tensor.stride()


def signatures(tensors: Sequence[Tensor]) -> list[Any]:
    """What a graph assumes of its inputs."""
    return [*map(_ASSUMED, tensors), *map(Tensor.stride, tensors)]


def _owned(
    values: Sequence[Tensor | None], like: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The values as tensors of their own: none shares memory with another or with an input, and
    each gradient is laid out as its parameter."""
    taken = {t.untyped_storage()._cdata for t in inputs}
    strides = [None] * (len(values) - len(like)) + [t.stride() for t in like]
    owned = []
    for value, stride in zip(values, strides, strict=True):
        assert value is not None
        if value.layout is not torch.strided:
            raise CompileError(
                f"a gradient of layout {value.layout} cannot come from a compiled graph: build the "
                "module with sparse=False"
            )
        storage = value.untyped_storage()._cdata
        if storage in taken or (stride is not None and value.stride() != stride):
            copy = torch.empty_strided(
                value.shape, stride or value.stride(), dtype=value.dtype, device=value.device
            )
            value = copy.copy_(value)
        taken.add(storage)
        owned.append(value)
    return owned


def _prune(graph: fx.GraphModule) -> list[int]:
    """Drop the inputs that nothing uses; returns the numbers of those that stay."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = [i for i, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used
