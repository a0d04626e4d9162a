"""Draws as the eager run makes them, in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_FILL = torch.ops.aten.normal_.default
_EMPTY = torch.ops.aten.empty.memory_format
_DRAW = torch.ops.aten.randn.default
_FLIP = torch.ops.aten.bernoulli_.float


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


def _is_standard(mean: float = 0.0, std: float = 1.0, generator: object = None) -> bool:
    return (mean, std, generator) == (0.0, 1.0, None)
