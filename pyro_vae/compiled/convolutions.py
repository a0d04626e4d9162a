"""Convolutions on a CPU: what makes their graphs slow without need.

Strided convolutions from one channel and transposed ones to one, as an encoder of grey images
begins with and a decoder ends with: products of matrices are faster, see `one_channel`. From two
channels on they are not.

Maps that are flattened, as an encoder ends with: TorchInductor has the channels of a convolution's
output lie side by side, and would compute an activation in the order of the flat vector, one number
at a time. So what is flattened is laid out first. And maps that are made of a flat vector, as a
decoder begins with, are laid out as convolutions take them: otherwise a convolution and its
gradient each have a copy made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiled import one_channel
from pyro_vae.compiled.answers import root, written_by
from pyro_vae.compiled.biases import PRECISE
from pyro_vae.compiled.in_memory import in_memory

_CONVOLUTION = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_CONTIGUOUS = torch.ops.aten.contiguous.default
_FLATTENS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_VIEWS = (*_FLATTENS, torch.ops.aten.as_strided.default, torch.ops.aten.view.dtype)

# by whether they are of the transposed one: the convolution, and its gradients
_PRODUCTS: dict[bool, tuple[Callable[..., Any], Callable[..., Any]]] = {
    False: (one_channel.convolution, one_channel.convolution_backward),
    True: (one_channel.transposed_convolution, one_channel.transposed_convolution_backward),
}


def lay_out(graph: fx.GraphModule) -> None:
    """Have maps that are about to be flattened in memory; not those that anything writes to, in
    which case maps and flat vector are one."""
    written = {root(each) for node in graph.graph.nodes for each in written_by(node)}
    shapes = _shapes_of_maps(graph)
    flattened = [
        node for node in graph.graph.nodes
        if node.target in _FLATTENS and root(node) not in written
    ]  # fmt: skip
    for node in flattened:
        if _merges_channels(node, shapes):
            maps: Any = node.args[0]
            with graph.graph.inserting_before(node):
                laid_out = graph.graph.call_function(in_memory, (maps,))
            laid_out.meta.update(maps.meta)
            node.replace_input_with(maps, laid_out)
    for node in flattened:
        if _parts_channels(node, shapes):
            _put_after(node, torch.channels_last)
    graph.recompile()


def _shapes_of_maps(graph: fx.GraphModule) -> set[torch.Size]:
    """Of what convolutions take and make: heads of attention have four dimensions as well."""
    return {
        maps.meta["val"].shape
        for node in graph.graph.nodes if node.target is _CONVOLUTION
        for maps in (node, node.args[0])
    }  # fmt: skip


def _merges_channels(node: fx.Node, shapes: set[torch.Size]) -> bool:
    """Whether channels are put in a row with the places of two-dimensional maps."""
    maps: Any = node.args[0]
    before, after = maps.meta["val"], node.meta["val"]
    return before.shape in shapes and _has_channels(before, after) and maps.op == "call_function"


def _parts_channels(node: fx.Node, shapes: set[torch.Size]) -> bool:
    """Whether two-dimensional maps are made of a row, in whose layout no view trusts."""
    row, maps = node.args[0], node.meta["val"]
    return (
        maps.shape in shapes
        and _has_channels(maps, row.meta["val"])  # type: ignore[union-attr]
        and all(map(_is_of_one_channel, _viewed(node)))
    )


def _has_channels(maps: Tensor, row: Tensor) -> bool:
    """Whether these are maps whose channels lie in the row with their places."""
    return (
        maps.device.type == "cpu"
        and maps.dim() == 4
        and row.dim() < 4
        and row.shape[:2] != maps.shape[:2]
        and maps.shape[1] > 1
        and maps.shape[2:].numel() > 1
    )


def multiply_out(graph: fx.GraphModule) -> None:
    """Replace the strided convolutions from one channel, and those to one, by products."""
    for node in graph.graph.nodes:
        if node.target is _CONVOLUTION and _is_for_product(*node.args):
            maps, weight, bias, stride, padding, _, transposed, *_ = node.args
            node.target, _ = _PRODUCTS[transposed]
            node.args = maps, weight, bias, stride, padding
            _keep_layout(node)
        elif node.target is _BACKWARD:
            gradient, maps, weight, _, *how, wanted = node.args
            if _is_for_product(maps, weight, None, *how):
                stride, padding, _, transposed, *_ = how
                _, node.target = _PRODUCTS[transposed]
                node.args = gradient, maps, weight, stride, padding, wanted
                for part in list(node.users):
                    _keep_layout(part)
    graph.recompile()


def _keep_layout(node: fx.Node) -> None:
    """Lay a result out as it was when the graph was recorded, where a view relies on it."""
    value = node.meta.get("val")  # of a gradient that nobody wants there is none
    if isinstance(value, Tensor) and value.dim() == 4 and any(_viewed(node)):
        channels_last = not value.is_contiguous()
        _put_after(node, torch.channels_last if channels_last else torch.contiguous_format)


def _put_after(node: fx.Node, layout: torch.memory_format) -> None:
    """Have a result laid out so for whatever uses it."""
    with node.graph.inserting_after(node):
        laid_out = node.graph.call_function(_CONTIGUOUS, (node,), {"memory_format": layout})
    laid_out.meta.update(node.meta)
    node.replace_all_uses_with(laid_out, lambda user: user is not laid_out)


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """Of a result, and what takes on its layout: those that there are views of."""
    seen, ahead = {node}, [node]
    while ahead:
        current = ahead.pop()
        if any(user.target in _VIEWS for user in current.users):
            yield current
        for user in current.users:
            if user not in seen and _may_take_on(user) and user.target is not in_memory:
                seen.add(user)
                ahead.append(user)


def _is_of_one_channel(node: fx.Node) -> bool:
    """Whether these are images of their own, which lie in memory the same in either layout."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return value.shape[1] == 1 and value.is_contiguous()


def _may_take_on(node: fx.Node) -> bool:
    """Whether a result may be laid out as what it is made of: maps are, of one image too."""
    value = node.meta.get("val")
    return value.dim() > 2 if isinstance(value, Tensor) else isinstance(value, tuple | list)


def _is_for_product(
    maps: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> bool:  # fmt: skip
    value, shape = maps.meta["val"], weight.meta["val"].shape
    return (
        value.device.type == "cpu"
        and value.dtype in PRECISE
        and len(shape) == 4
        and shape[1] == 1
        and len(stride) == len(padding) == 2
        # at stride 1 there is as much to lay out as to multiply
        and min(stride) > 1
        and (set(dilation), set(output_padding), groups) == ({1}, {0}, 1)
    )
