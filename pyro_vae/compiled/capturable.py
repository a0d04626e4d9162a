"""What keeps a program on a GPU from being captured as a CUDA graph.

A captured graph repeats what the GPU did. What the CPU did meanwhile happened once, in the capture:
a number that it read is read no more, and to wait for a copy between the two is not allowed.
Neither is to look at values of the GPU, as a few operations do to check them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

_CHECKING = (
    torch.ops.aten._linalg_check_errors.default,
    torch.ops.aten.normal.Tensor_Tensor,
    torch.ops.aten.normal.float_Tensor,
)


def obstacle(graph: fx.GraphModule, labels: Sequence[str | None]) -> str | None:
    """Why the graph cannot be captured; None where it can be.

    Single numbers of the CPU are no obstacle where an operation of the GPU takes them as they are:
    whoever replays the graph watches their values.

    Args:
        labels: of the graph's inputs, of those that must not be on the CPU even as single numbers.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, label in zip(inputs, labels, strict=True):
        if _is_on_cpu(node) and (label or node.meta["val"].dim()):
            shape = tuple(node.meta["val"].shape)
            return f"{label or 'a tensor'} of shape {shape} is on the CPU: put it on the GPU"
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _CHECKING:
            return f"{node.target} waits for values of the GPU, to check them"
        numbers_do = torch.Tag.pointwise in getattr(node.target, "tags", ())
        for given in node.all_input_nodes:
            taken = _is_on_cpu(given) and not (numbers_do and not given.meta["val"].dim())
            if (taken and _has_other(node)) or (_is_on_cpu(node) and _has_other(given)):
                return f"{node.target} moves a tensor between CPU and GPU: make it on the GPU"
    return None


def _is_on_cpu(node: fx.Node) -> bool:
    return "cpu" in _devices(node)


def _has_other(node: fx.Node) -> bool:
    return bool(_devices(node) - {"cpu"})


def _devices(node: fx.Node) -> set[Any]:
    values = tree_leaves(node.meta.get("val"))
    return {value.device.type for value in values if isinstance(value, Tensor)}
