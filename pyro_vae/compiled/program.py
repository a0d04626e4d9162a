"""One compiled graph and how it is made: recorded, traced, fused, held against the eager run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from pyro_vae.compiled.capturable import obstacle, without_raising
from pyro_vae.compiled.guard import check_agreement, check_changes, coarsest, comparable
from pyro_vae.compiled.inputs import Argument, Inputs
from pyro_vae.compiled.places import Territory, tensors
from pyro_vae.compiled.record import (
    Recording,
    Run,
    gradients_of,
    preserved,
    record,
    renew,
    rerun,
    without_hooks,
)
from pyro_vae.compiled.sharing import refuse_shared, written
from pyro_vae.compiled.trace import trace
from pyro_vae.errors import CompileError

# turns a graph and its inputs into something that computes the same, faster
Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]


class Results(NamedTuple):
    """What one call computed: outputs, and the first one's gradient for each `wanted` tensor."""

    outputs: list[Tensor]
    wanted: list[Tensor]
    gradients: list[Tensor]
    static: Any


class Program:
    """A compiled graph with the places of its inputs.

    Attributes:
        inputs: finds the graph's inputs as they are now, or None if it was made for others.
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
        recorded = [*arguments]
        renew(arguments)
        new = dict(zip(map(id, recorded), arguments, strict=True))
        inputs = [*arguments, *(t for t, _ in recording.captured)]
        sources = [*map(Argument, range(len(arguments))), *(p for _, p in recording.captured)]
        differentiated = [i for i, g in enumerate(recording.gradients) if g is not None]
        wanted = [new.get(id(t), t) for t in map(recording.wanted.__getitem__, differentiated)]
        self.static: Any = None

        def joint() -> list[Tensor]:
            outputs, self.static = run()
            gradients = gradients_of(outputs[0], wanted)
            return _owned([*(o.detach() for o in outputs), *gradients], like=wanted, inputs=inputs)

        with preserved(territory, inputs), without_hooks(inputs):
            graph = trace(joint, inputs, recording.chosen)
        used = _prune(graph)
        used_sources = [sources[i] for i in used]
        self.arguments = [n for n, s in enumerate(used_sources) if isinstance(s, Argument)]
        self.handed = [s.index for s in used_sources if isinstance(s, Argument)]
        devices = [inputs[i].device for i in used]
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        labels = ["an argument" if isinstance(s, Argument) else None for s in used_sources]
        if self.device.type != "cpu" and territory.update:  # a step, which will be captured
            without_raising(graph)
        self.obstacle = None if self.device.type == "cpu" else obstacle(graph, labels)
        examples = [inputs[i] for i in used]
        apart = _to_be_apart(graph, examples, recording, territory)
        refuse_shared(examples, [getattr(s, "label", "an argument") for s in used_sources], apart)
        self.inputs = Inputs(recording, used_sources, examples, apart)
        positions = {id(inputs[i]): n for n, i in enumerate(used)}
        found = tensors(territory.places())
        self.static = tree_map_only(
            Tensor, lambda t: positions.get(id(t), found.get(id(t))), self.static
        )
        self._wanted = [positions[id(t)] for t in wanted]
        self._num_outputs = len(recording.outputs)
        traced = time.perf_counter()
        with torch.no_grad(), torch._C._DisableAutocast():  # the graph carries its casts
            self._call = backend(graph, examples)
        again = partial(rerun, run, arguments, territory, recording)
        self._check(recording, examples, territory, again, coarsest(graph))
        self.seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}

    def __call__(self, inputs: list[Tensor]) -> Results:
        """Run the graph on what `inputs` returned.

        Raises:
            IndexError: an index is out of bounds.
            torch.linalg.LinAlgError: as the program itself does, of a matrix without a Cholesky
                factor or an inverse.
        """
        try:
            with torch.no_grad(), torch._C._DisableAutocast():
                values = self._call(*inputs)
        except RuntimeError as error:  # which generated code makes of all
            if str(error).startswith(("linalg.", "torch.linalg.")):
                raise torch.linalg.LinAlgError(str(error).splitlines()[0]) from error
            if "index out of bounds" not in str(error):
                raise
            bounds = str(error).rsplit("index out of bounds: ", 1)[-1].splitlines()[0]
            raise IndexError(
                f"an index is out of bounds ({bounds}): the eager loss tells in which line"
            ) from error
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


def _to_be_apart(
    graph: fx.GraphModule, inputs: Sequence[Tensor], recording: Recording, territory: Territory
) -> list[int]:
    """The numbers of the inputs that the program writes to while others are still to be read: not
    those of an update, which comes last."""
    changed = {id(change.tensor) for change in recording.changed}
    changed |= {id(inputs[n]) for n in written(graph)}
    if territory.update is not None:
        changed -= territory.update.written()
    return [n for n, tensor in enumerate(inputs) if id(tensor) in changed]


def _owned(
    values: Sequence[Tensor | None], like: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The values as tensors of their own: none shares memory with another or with an input, and
    each gradient is laid out as its parameter."""
    taken = {t.untyped_storage()._cdata for t in inputs}
    # as autograd lays out gradients: overlapping entries each have their own
    layouts = [torch.empty_like(t, device="meta").stride() for t in like]
    strides = [None] * (len(values) - len(like)) + layouts
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
