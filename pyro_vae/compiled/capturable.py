"""What keeps a program on a GPU from being captured as a CUDA graph, and what need not.

A captured graph repeats what the GPU did. What the CPU did meanwhile happened once, in the capture:
a number that it read is read no more, and to wait for a copy between the two is not allowed.
Neither is to look at values of the GPU, as a few operations do to check them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_RAISING = _aten._linalg_check_errors.default
_CHECKING = (_RAISING, _aten.normal.Tensor_Tensor, _aten.normal.float_Tensor)


def without_raising(graph: fx.GraphModule) -> None:
    """Have factorizations that fail (of what is not positive definite, say) return NaN, in the
    place of an error that a captured graph cannot raise."""
    for check in graph.graph.nodes:
        info: Any = check.args[0] if check.target is _RAISING else None
        if info is None or info.target is not operator.getitem:
            continue
        for value in [*info.args[0].users]:
            if value.meta["val"].is_floating_point():
                _be_nan_unless_zero(value, info)
        graph.graph.erase_node(check)
    graph.recompile()


def _be_nan_unless_zero(value: fx.Node, info: fx.Node) -> None:
    """Have the matrices or vectors `(..., *own)` of a node be NaN where their `info` `(...)`, which
    is computed beside them, is not zero."""
    users = [*value.users]
    shown, flags = value.meta["val"], info.meta["val"].bool()
    shape = [*flags.shape, *[1] * (shown.dim() - flags.dim())]
    graph = value.graph
    with graph.inserting_before(max(value, info).next):
        failed = graph.call_function(_aten.ne.Scalar, (info, 0))
        beside = graph.call_function(_aten.view.default, (failed, shape))
        instead = graph.call_function(_aten.masked_fill.Scalar, (value, beside, math.nan))
    failed.meta["val"], beside.meta["val"], instead.meta["val"] = flags, flags.view(shape), shown
    for user in users:
        user.replace_input_with(value, instead)


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
