"""Numbers in a row, as torch rounds them: data may lie on them.

Generated code would round each once more or once less, so that it counts a datum on an edge to
another bin.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_ROWS = (aten.linspace.default, aten.logspace.default, aten.arange.start_step)


def make_rows(graph: fx.GraphModule) -> None:
    """Replace `linspace`, `logspace` and fractional `arange` by a copy of what they return."""
    for node in graph.graph.nodes:
        if node.target in _ROWS and not _is_exact(node):
            row: Tensor = node.target(*node.args, **node.kwargs)
            name = f"_row_{node.name}"
            graph.register_buffer(name, row)
            with graph.graph.inserting_before(node):
                held = graph.graph.get_attr(name)
            # the program may go on to change its own
            node.target, node.args, node.kwargs = aten.clone.default, (held,), {}
    graph.recompile()


def _is_exact(node: fx.Node) -> bool:
    """Whether it counts in whole numbers."""
    return node.target is _ROWS[-1] and all(isinstance(number, int) for number in node.args)
