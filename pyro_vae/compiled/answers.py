"""What a program gets to hear that asks for a tensor's value while it is traced.

Pyro and torch ask in places where the answer is known, or matters to a report or a check only. The
others ask for what a graph cannot know, and are refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

from pyro_vae.compiled import indexing
from pyro_vae.compiled.indexing import is_mask
from pyro_vae.compiled.where import REMEDY, caller, calling_frame, where_now
from pyro_vae.errors import CompileError

ASKED = "get value out of a tracing tensor"  # what torch says
UNKNOWN = "it asks for the value of a tensor, which is known only when the program runs"


class Interpreted(TorchFunctionMode):
    """Watches the calls by which values leave a tensor, which a graph cannot follow.

    Pyro's own losses take numbers out of tensors only to report them: those calls get the detached
    tensor instead. Its warnings about NaN and the validation of distributions are left out, and its
    enumeration sums over values of no probability as well, see `_expectation`.

    Args:
        chosen: the truth values by which the recorded run chose, all of what does not vary.

    Attributes:
        refused: what was refused first. The program may have caught it, and gone another way.
    """

    def __init__(self, chosen: Sequence[bool] = ()) -> None:
        super().__init__()
        self._chosen = iter(chosen)
        self.refused: Exception | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._answer(func, args, kwargs or {})
        except RuntimeError as error:  # a CompileError is one
            if isinstance(error, CompileError) or ASKED in str(error):
                self.refused = self.refused or error
            raise

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _ANSWERED:
            answer = _ANSWERS.get((func, *caller()))
            if answer is not None:
                return answer(*args)
        if func in _REPLACED:
            return _REPLACED[func](*args, **kwargs)
        if func is Tensor.__bool__ and (choice := next(self._chosen, None)) is not None:
            return choice
        if func in _ESCAPES:
            name = getattr(func, "__name__", str(func))
            raise CompileError(
                f"{where_now()} cannot be compiled: {name}() takes a tensor's values out of "
                f"torch. {REMEDY}."
            )
        return func(*args, **kwargs)


def is_answered(func: Any) -> bool:
    """Whether the one who calls this function of a tensor is told something else."""
    return (func, *caller()) in _ANSWERS


def _expectation(probability: Tensor, cost: Tensor) -> Tensor:
    """The sum over what is enumerated; a cost of no probability does not count, infinite or not.

    `TraceEnum_ELBO` selects the others instead, so that shapes would depend on values.
    """
    return (probability * torch.where(probability > 0, cost, 0.0)).sum()


def _row(index: Tensor) -> Any:
    """A row of a plate that is gone through one by one, if it takes all rows."""
    plate = calling_frame().f_locals["self"]
    if getattr(plate, "subsample_size", plate.size) != plate.size:
        return index.item()  # drawn: refused
    with disable_proxy_modes_tracing():
        return index.item()


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
    changed = _sources(chain.from_iterable(map(written_by, comparison.graph.nodes)))
    if changed & _sources(comparison.args) or not _same_node(*comparison.args):
        raise CompileError(
            f"{where_now()} cannot be compiled: whether two scales or masks are the same is known "
            f"only when the program runs. Make them in the same way, or as one tensor. {REMEDY}."
        )
    return True


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node that it writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    # beyond the end of `args` they are given by name, if at all
    values = {**dict(zip(_names(node.target), node.args, strict=False)), **node.kwargs}
    written = [
        values.get(a.name) for a in node.target._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]  # fmt: skip
    return [value for value in tree_leaves(written) if isinstance(value, fx.Node)]


def _names(operation: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in operation._schema.arguments]


def is_alias(node: fx.Node) -> bool:
    """Whether what a node returns shares memory with its first argument: a view, or what was
    written to; or one of several views."""
    if node.target is operator.getitem:
        return is_alias(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None


def root(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows or writes to."""
    while is_alias(node):
        node = node.all_input_nodes[0]
    return node


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


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """`torch.nn.functional.one_hot`, which looks at the values to check them."""
    if num_classes < 0:
        raise CompileError(
            f"{where_now()} cannot be compiled: one_hot() looks for the largest value. Give it "
            "num_classes"
        )
    classes = torch.arange(num_classes, device=tensor.device)
    # looked up, so that a class that there is not is out of bounds
    return (torch.embedding(classes[:, None], tensor) == classes).long()


def _outside(tensor: Tensor, index: Any) -> Tensor:
    """In a spline, what lies outside of its bounds: all, of which `_write_outside` will choose."""
    return tensor if is_mask(index) else indexing.get(tensor, index)


def _write_outside(tensor: Tensor, index: Any, value: Any) -> None:
    if is_mask(index) and isinstance(value, Tensor):
        value, index = torch.where(index, value, tensor), ...
    tensor[index] = value


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.one_hot: _one_hot,
    **indexing.REPLACED,
}
_ESCAPES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}


ENUMERATION = ("pyro.infer.util", "compute_expectation")
SPLINE = ("pyro.distributions.transforms.spline", "_monotonic_rational_spline")
# they select by value, which an answer here does without
SELECTING = (ENUMERATION, SPLINE)
# by function, and by module and name of who calls it
_ANSWERS: dict[tuple[Any, str, str], Callable[..., Any]] = {
    (Tensor.item, "pyro.infer.util", "torch_item"): Tensor.detach,
    (Tensor.item, "pyro.poutine.indep_messenger", "__iter__"): _row,
    (Tensor.register_hook, "pyro.util", "warn_if_nan"): lambda *_: None,
    (Tensor.__bool__, *ENUMERATION): lambda _: True,
    (torch.tensordot, "pyro.infer.util", "_fulldot"): _expectation,
    (Tensor.__getitem__, *SPLINE): _outside,
    (Tensor.__setitem__, *SPLINE): _write_outside,
    (Tensor.__bool__, *SPLINE): lambda _: True,  # an assertion
    (Tensor.__bool__, "pyro_vae.programs", "equal"): _alike,
    (Tensor.__bool__, "pyro.util", "warn_if_nan"): lambda _: False,
    # whether the stability of any is so near to one that it takes the long way, which all may take
    (Tensor.__bool__, "pyro.distributions.stable", "_standard_stable"): lambda _: True,
    (Tensor.__bool__, "pyro.infer.reparam.stable", "_safe_shift"): lambda _: True,
    (Tensor.__bool__, "pyro.infer.reparam.stable", "apply"): lambda _: True,  # an assertion
    # distributions that check or warn as they are made
    (Tensor.__bool__, "pyro.distributions.sine_skewed", "__init__"): lambda _: False,
    (Tensor.__bool__, "torch.distributions.wishart", "__init__"): lambda _: False,
    # distributions made with validate_args=True
    (Tensor.__bool__, "torch.distributions.distribution", "__init__"): lambda _: True,
    (Tensor.__bool__, "torch.distributions.distribution", "_validate_sample"): lambda _: True,
}
_ANSWERED = {function for function, *_ in _ANSWERS}
