"""From a Pyro program to a graph of ATen operations, gradients included.

A run is recorded first, to learn which tensors the program uses and what it changes. Then
`make_fx` runs it once more with these very tensors as the graph's inputs: the effect handlers, the
parameter store and autograd do their work in Python for the last time, and what is left is the
arithmetic. Because the gradients are taken inside the run, everything autograd knows (detached
values, no_grad blocks, hooks within the program, a nested `torch.autograd.grad`) is in the graph as
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.answers import ASKED, UNKNOWN, Interpreted
from pyro_vae.compiled.where import REMEDY, where
from pyro_vae.errors import CompileError, PyroVAEError


def trace(
    function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], chosen: Sequence[bool] = ()
) -> fx.GraphModule:
    """The operations by which `function` computes its results from `inputs`, as a graph.

    Args:
        function: uses the tensors in `inputs`, those objects themselves, and no others.
        chosen: see `Recording`.

    Raises:
        CompileError: the function asks for the value of a tensor (an `if`, `.item()`, `.numpy()`),
            or uses a tensor that is neither an input nor made by an operation. It names the line.
        PyroVAEError: as the program itself raises them.
    """

    def program(*_: Tensor) -> tuple[Tensor, ...]:
        with Interpreted(chosen) as answers:
            found = tuple(function())
        if answers.refused is not None:
            raise answers.refused
        return found

    # or every tensor would be described to the graph in a world of its own, half of tracing's time
    described = tracing(TracingContext(FakeTensorMode()))
    # which would look at the values of gradients
    unwatched = torch.autograd.set_detect_anomaly(False)
    with (
        tracing_errors(), pyro.validation_enabled(False), described, unwatched, _without_onednn()
    ):  # fmt: skip
        graph = make_fx(program)(*inputs)
    _check_constants(graph)
    return graph


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Or an LSTM on a CPU is one operation, whose gradient TorchInductor cannot compile."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def tracing_errors() -> Iterator[None]:
    """Turn whatever tracing trips over into a `CompileError` that names the line."""
    try:
        yield
    except PyroVAEError:
        raise
    except Exception as error:
        raise CompileError(
            f"{where(error)} cannot be compiled: {_why(error)}. {REMEDY}."
        ) from error


def _check_constants(graph: fx.GraphModule) -> None:
    """Refuse tensors that would be frozen into the graph, other than literals: `tensor(2.0)`."""
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        for user in node.users:
            if user.target is not torch.ops.aten.lift_fresh_copy.default:
                value = getattr(graph, str(node.target))
                if isinstance(value, torch.Generator):
                    raise CompileError(
                        "the program draws from a generator of its own, which would stand still: "
                        "draw from torch's (torch.manual_seed)"
                    )
                raise CompileError(
                    f"a tensor of shape {tuple(value.shape)} comes from nowhere that could be "
                    "found, so that its value would be frozen: pass it as an argument, or make it "
                    "a buffer"
                )


def _why(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if ASKED in text:
        return UNKNOWN
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
