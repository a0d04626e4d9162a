"""From a Pyro program to a graph of ATen operations, gradients included.

A run is recorded first, to learn which tensors the program uses and what it changes. Then
`make_fx` runs it once more with these very tensors as the graph's inputs: the effect handlers, the
parameter store and autograd do their work in Python for the last time, and what is left is the
arithmetic. Because the gradients are taken inside the run, everything autograd knows (detached
values, no_grad blocks, hooks within the program, a nested `torch.autograd.grad`) is in the graph as
it was.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.errors import CompileError, PyroVAEError

REMEDY = (
    "Compute with tensors instead (torch.where for a choice, a mask for a subset), pass a Python "
    "number as an argument, or run this program without compiling it"
)


class Recorder(TorchDispatchMode):
    """Lists the tensors that a program uses but did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._made = WeakTensorKeyDictionary()
        self._memory: set[int] = set()  # that operations allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            raise CompileError(
                f"{_where_now()} cannot be compiled: it draws from a generator of its own, which "
                "would stand still: draw from torch's (torch.manual_seed)"
            )
        if func is torch.ops.aten.lift_fresh.default:  # a literal: torch.tensor(2.0)
            self._made[args[0]] = True
        given = set()
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                given.add(_memory_of(value))
                # a new nn.Parameter is another object over memory that an operation allocated
                if value not in self._made and _memory_of(value) not in self._memory:
                    self.inputs.setdefault(id(value), value)
                    self._versions.setdefault(id(value), value._version)
        if (
            torch.Tag.dynamic_output_shape in func.tags
            and not _is_plain_indexing(func, args)
            and _caller() != _ENUMERATION  # traced without, see `_expectation`
        ):
            raise CompileError(
                f"{_where_now()} cannot be compiled: the shape of its result depends on the values "
                f"of a tensor. {REMEDY}."
            )
        out = func(*args, **kwargs)
        for value in tree_iter(out):
            # an in-place operation returns the tensor it was given
            if isinstance(value, Tensor) and id(value) not in self.inputs:
                self._made[value] = True
                if _memory_of(value) not in given:
                    self._memory.add(_memory_of(value))
        return out

    def changed(self, tensor: Tensor) -> bool:
        """Whether this input was changed in place."""
        return tensor._version != self._versions[id(tensor)]


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def trace(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operations by which `function` computes its results from `inputs`, as a graph.

    Args:
        function: uses the tensors in `inputs`, those objects themselves, and no others.

    Raises:
        CompileError: the function asks for the value of a tensor (an `if`, `.item()`, `.numpy()`),
            or uses a tensor that is neither an input nor made by an operation. It names the line.
        PyroVAEError: as the program itself raises them.
    """

    def program(*_: Tensor) -> tuple[Tensor, ...]:
        with _Interpreted():
            return tuple(function())

    with tracing_errors(), pyro.validation_enabled(False):
        graph = make_fx(program)(*inputs)
    _check_constants(graph)
    return graph


@contextmanager
def tracing_errors() -> Iterator[None]:
    """Turn whatever tracing trips over into a `CompileError` that names the line."""
    try:
        yield
    except PyroVAEError:
        raise
    except Exception as error:
        raise CompileError(
            f"{_where(error)} cannot be compiled: {_why(error)}. {REMEDY}."
        ) from error


class _Interpreted(TorchFunctionMode):
    """Watches the calls by which values leave a tensor, which a graph cannot follow.

    Pyro's own losses take numbers out of tensors only to report them: those calls get the detached
    tensor instead. Its warnings about NaN and the validation of distributions are left out, and its
    enumeration sums over values of no probability as well, see `_expectation`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERED:
            answer = _ANSWERS.get((func, *_caller()))
            if answer is not None:
                return answer(*args)
        if func in _REPLACED:
            return _REPLACED[func](*args, **(kwargs or {}))
        if func in _ESCAPES:
            name = getattr(func, "__name__", str(func))
            raise CompileError(
                f"{_where_now()} cannot be compiled: {name}() takes a tensor's values out of "
                f"torch. {REMEDY}."
            )
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """`torch.nn.functional.one_hot`, which looks at the values to check them."""
    if num_classes < 0:
        raise CompileError(
            f"{_where_now()} cannot be compiled: one_hot() looks for the largest value. Give it "
            "num_classes"
        )
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


_REPLACED = {torch.nn.functional.one_hot: _one_hot}
_ESCAPES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr}


def _is_plain_indexing(func: Any, args: Any) -> bool:
    """Whether this is `x[indices]` by numbers, whose shape is known, not by a mask."""
    return func is torch.ops.aten.index.Tensor and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


def _alike(flag: Tensor) -> bool:
    """Whether `(a == b).all()` holds whatever the values: both are made alike, of the same tensors.

    So the scale or mask that a model and its guide each work out of their arguments is one.

    Raises:
        CompileError: they are not, and only their values could tell.
    """
    mode = get_proxy_mode()
    assert mode is not None
    proxied: Any = get_proxy_slot(flag, mode.tracer)
    comparison = proxied.proxy.node.args[0]
    changed = _sources(n.args[0] for n in comparison.graph.nodes if _is_in_place(n))
    if changed & _sources(comparison.args) or not _same_node(*comparison.args):
        raise CompileError(
            f"{_where_now()} cannot be compiled: whether two scales or masks are the same is known "
            f"only when the program runs. Make them in the same way, or as one tensor. {REMEDY}."
        )
    return True


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _sources(values: Iterable[Any]) -> set[fx.Node]:
    """The nodes among these, and all that they are made of."""
    found: set[fx.Node] = set()
    waiting = [value for value in values if isinstance(value, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _same_node(a: Any, b: Any) -> bool:
    """Whether two values of a graph are equal for the way they are made; draws never are."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if a.op != "call_function" or a.op != b.op or a.target is not b.target:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    (left, shape), (right, other) = (tree_flatten((n.args, n.kwargs)) for n in (a, b))
    return shape == other and all(map(_same_node, left, right))


def _expectation(probability: Tensor, cost: Tensor) -> Tensor:
    """The sum over what is enumerated; a cost of no probability does not count, infinite or not.

    `TraceEnum_ELBO` selects the others instead, so that shapes would depend on values.
    """
    return (probability * torch.where(probability > 0, cost, 0.0)).sum()


def _row(index: Tensor) -> Any:
    """A row of a plate that is gone through one by one, if it takes all rows."""
    plate = _calling_frame().f_locals["self"]
    if getattr(plate, "subsample_size", plate.size) != plate.size:
        return index.item()  # drawn: refused
    with disable_proxy_modes_tracing():
        return index.item()


_ENUMERATION = ("pyro.infer.util", "compute_expectation")
# by function, and by module and name of who calls it
_ANSWERS: dict[tuple[Any, str, str], Callable[..., Any]] = {
    (Tensor.item, "pyro.infer.util", "torch_item"): Tensor.detach,
    (Tensor.item, "pyro.poutine.indep_messenger", "__iter__"): _row,
    (Tensor.register_hook, "pyro.util", "warn_if_nan"): lambda *_: None,
    (Tensor.__bool__, *_ENUMERATION): lambda _: True,
    (torch.tensordot, "pyro.infer.util", "_fulldot"): _expectation,
    (Tensor.__bool__, "pyro_vae.programs", "equal"): _alike,
    (Tensor.__bool__, "pyro.util", "warn_if_nan"): lambda _: False,
    # distributions made with validate_args=True
    (Tensor.__bool__, "torch.distributions.distribution", "__init__"): lambda _: True,
    (Tensor.__bool__, "torch.distributions.distribution", "_validate_sample"): lambda _: True,
}
# torch's own frames between the one who calls and us
_DISPATCHERS = (
    "torch.overrides", "torch._tensor", "torch.functional",
    "torch._compile", "torch._dynamo.eval_frame",
)  # fmt: skip
_ANSWERED = {function for function, *_ in _ANSWERS}


def _caller() -> tuple[str, str]:
    """Module and name of the function that made the call."""
    frame = _calling_frame()
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def _calling_frame() -> FrameType:
    """Of the function that made the call, outside of this file and of torch's own frames."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__") in (*_DISPATCHERS, __name__):
        frame = frame.f_back
    return frame


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
    if "get value out of a tracing tensor" in text:
        return "it asks for the value of a tensor, which is known only when the program runs"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: Exception) -> str:
    return _describe(traceback.extract_tb(error.__traceback__))


def _where_now() -> str:
    stack = traceback.extract_stack()
    entered = [
        i for i, frame in enumerate(stack) if frame.name in ("_run", "program")
        and frame.filename.endswith(("compiled/record.py", "compiled/trace.py"))
    ]  # fmt: skip
    return _describe(stack[max(entered, default=0) :])


def _describe(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that the user wrote; Pyro's or this library's, where there is none."""
    for libraries in (("torch", "pyro", "pyro_vae"), ("torch", "pyro_vae/compiled")):
        for frame in reversed(stack):
            foreign = any(f"/{library}/" in frame.filename for library in libraries)
            if frame.line and not foreign and frame.filename != contextlib.__file__:
                return f'"{frame.line}" ({frame.filename}, line {frame.lineno}, in {frame.name})'
    return "the program"
