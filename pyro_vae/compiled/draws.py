"""Draws as the eager run makes them: in one go, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch._inductor.ir import ExternKernel, FallbackKernel, TensorBox
from torch._inductor.lowering import lowerings
from torch.utils._ordered_set import OrderedSet

from pyro_vae.compiled.in_memory import in_memory

_FILL = torch.ops.aten.normal_.default
_EMPTY = torch.ops.aten.empty.memory_format
_DRAW = torch.ops.aten.randn.default
_FLIP = torch.ops.aten.bernoulli_.float
_MASK = torch.ops.aten.bernoulli.p
# they return a row after a row however their parameters lie; TorchInductor takes the draws of most
# to lie as the parameters do
_OF_PARAMETERS = (
    torch.ops.aten.poisson.default,
    torch.ops.aten.binomial.default,
    torch.ops.aten.bernoulli.default,
    torch.ops.aten.normal.Tensor_Tensor,
    torch.ops.aten.normal.Tensor_float,
    torch.ops.aten.normal.float_Tensor,
    torch.ops.aten._standard_gamma.default,
    torch.ops.aten._sample_dirichlet.default,
)


def draw_at_once(graph: fx.GraphModule) -> None:
    """Replace `empty(...).normal_()` by `randn(...)`, which draws the same.

    torch's distributions write standard normal draws as an empty tensor that is then filled; in
    generated code it would be copied in between.
    """
    for node in graph.graph.nodes:
        if node.target is _FILL and _is_standard(*node.args[1:], **node.kwargs):
            empty: fx.Node = node.args[0]
            # a graph as it was recorded has the users in the order of their calls
            is_new = empty.target is _EMPTY and next(iter(empty.users)) is node
            if is_new and "memory_format" not in empty.kwargs:
                node.target, node.args, node.kwargs = _DRAW, empty.args, empty.kwargs
                empty.replace_all_uses_with(node)
                graph.graph.erase_node(empty)
    graph.recompile()


def draw_as_it_lies(graph: fx.GraphModule) -> None:
    """Have `bernoulli_`, as dropout draws its masks, fill a transposed tensor in the order in which
    it lies in memory. What TorchInductor makes of it draws in the order of the dimensions."""
    for node in graph.graph.nodes:
        if node.target is not _FLIP:
            continue
        drawn: Any = node.args[0]
        value = drawn.meta["val"]
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        if value.is_contiguous() or not value.permute(order).is_contiguous():
            continue
        with graph.graph.inserting_before(node):
            lying = graph.graph.call_function(torch.ops.aten.permute.default, (drawn, order))
        lying.meta["val"] = value.permute(order)
        node.meta["val"] = lying.meta["val"]
        node.replace_all_uses_with(drawn)
        node.replace_input_with(drawn, lying)
    graph.recompile()


def draw_row_by_row(graph: fx.GraphModule) -> None:
    """Have the parameters of draws lie in memory as the draws do."""
    for node in graph.graph.nodes:
        if node.target not in _OF_PARAMETERS:
            continue
        for parameter in node.all_input_nodes:
            value = parameter.meta["val"]
            if value.is_contiguous():
                continue
            with graph.graph.inserting_before(node):
                lying = graph.graph.call_function(in_memory, (parameter,))
            lying.meta["val"] = value.contiguous()
            node.replace_input_with(parameter, lying)
    graph.recompile()


class InOrder(CustomGraphPass):
    """Has each draw wait for the one before: they advance the same generator.

    Before PyTorch 2.13 TorchInductor orders by what is computed from what, and by nothing else.
    """

    def __call__(self, graph: fx.Graph) -> None:
        drawing = [
            node for node in graph.nodes
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        ]  # fmt: skip
        after = {later: OrderedSet([draw]) for draw, later in pairwise(drawing)}
        preserve_node_ordering(graph, after)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


@contextmanager
def masks_in_new_memory() -> Iterator[None]:
    """Have TorchInductor draw each mask into memory of its own. Before PyTorch 2.13 it fills one in
    place, and may put what reads it before."""
    before = lowerings[_MASK]
    lowerings[_MASK] = _draw_mask
    try:
        yield
    finally:
        lowerings[_MASK] = before


def _draw_mask(like: Any, p: float) -> Any:
    return TensorBox.create(FallbackKernel.create(_MASK, ExternKernel.require_contiguous(like), p))


def _is_standard(mean: float = 0.0, std: float = 1.0, generator: object = None) -> bool:
    return (mean, std, generator) == (0.0, 1.0, None)
