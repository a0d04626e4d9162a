"""Standard normal draws, made in one go.

torch's distributions write them as an empty tensor that is then filled; in generated code it would
be copied in between.
"""

from __future__ import annotations

import torch
from torch import fx

_FILL = torch.ops.aten.normal_.default
_EMPTY = torch.ops.aten.empty.memory_format
_DRAW = torch.ops.aten.randn.default


def draw_at_once(graph: fx.GraphModule) -> None:
    """Replace `empty(...).normal_()` by `randn(...)`, which draws the same."""
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


def _is_standard(mean: float = 0.0, std: float = 1.0, generator: object = None) -> bool:
    return (mean, std, generator) == (0.0, 1.0, None)
