"""Convolutions on a CPU: what makes their graphs slow without need.

Transposed convolutions to one channel, as a decoder of grey images ends with: PyTorch's kernel pads
the output's channels to a vector register, and computes sixteen for one. A product of matrices
whose results are added where they overlap computes what is asked for. From two channels on it is no
faster.

Maps that are flattened, as an encoder ends with: TorchInductor has the channels of a convolution's
output lie side by side, and would compute an activation in the order of the flat vector, one number
at a time. So what is flattened is laid out first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.ir import ExternKernel
from torch._inductor.lowering import register_lowering
from torch.nn.functional import pad

from pyro_vae.compiled.answers import is_alias, is_in_place

_FLATTENS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)

_library = torch.library.Library("pyro_vae", "FRAGMENT")
_library.define("laid_out(Tensor maps) -> Tensor")
_library.impl("laid_out", lambda maps: maps.clone(), "CPU")
_LAID_OUT = torch.ops.pyro_vae.laid_out.default


@torch.library.register_fake("pyro_vae::laid_out", lib=_library)
def _like(maps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.contiguous_format)


@register_lowering(_LAID_OUT, type_promotion_kind=None)
def _in_memory(maps: Any) -> Any:
    return ExternKernel.require_contiguous(maps)


def lay_out(graph: fx.GraphModule) -> None:
    """Have maps that are about to be flattened in memory; not those that anything writes to, in
    which case maps and flat vector are one."""
    written = {_root(node) for node in graph.graph.nodes if is_in_place(node)}
    for node in graph.graph.nodes:
        if node.target in _FLATTENS and _merges_channels(node) and _root(node) not in written:
            maps: Any = node.args[0]
            with graph.graph.inserting_before(node):
                laid_out = graph.graph.call_function(_LAID_OUT, (maps,))
            laid_out.meta.update(maps.meta)
            node.replace_input_with(maps, laid_out)
    graph.recompile()


def _merges_channels(node: fx.Node) -> bool:
    """Whether channels are put in a row with the places of two-dimensional maps."""
    maps: Any = node.args[0]
    before, after = maps.meta["val"], node.meta["val"]
    return (
        before.device.type == "cpu"
        and before.dim() == 4
        and after.dim() < 4
        and after.shape[:2] != before.shape[:2]
        and before.shape[1] > 1
        and before.shape[2:].numel() > 1
        and maps.op == "call_function"
    )


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows or writes to."""
    while is_alias(node):
        node = node.all_input_nodes[0]
    return node


def multiply_out(graph: fx.GraphModule) -> None:
    """Replace the transposed convolutions to one channel by products."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.convolution.default and _is_for_product(*node.args):
            maps, weight, bias, stride, padding, *_ = node.args
            node.target, node.args = transposed_convolution, (maps, weight, bias, stride, padding)
    graph.recompile()


def _is_for_product(
    maps: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> bool:  # fmt: skip
    value, shape = maps.meta["val"], weight.meta["val"].shape
    return (
        transposed
        and value.device.type == "cpu"
        # in lower precision the products would be rounded before they are added
        and value.dtype in (torch.float32, torch.float64)
        and len(shape) == 4
        and shape[1] == 1
        and len(stride) == len(padding) == 2
        and (set(dilation), set(output_padding), groups) == ({1}, {0}, 1)
    )


def transposed_convolution(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`, as a product.

    Args:
        maps: `(batch, channels, height, width)`.
        weight: `(channels, 1, kernel height, kernel width)`.
        bias: `(1,)`.
    """
    batch, channels, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    spread = (rows @ weight.flatten(1)).view(batch, height, width, *weight.shape[2:])
    spread = spread.transpose(2, 3)  # batch, height, kernel height, width, kernel width
    output = _overlapped(_overlapped(spread, stride[1], padding[1], 3), stride[0], padding[0], 1)
    return output[:, None] if bias is None else output[:, None] + bias


def _overlapped(spread: Tensor, stride: int, padding: int, dim: int) -> Tensor:
    """Add up along `dim`, places `stride` apart, what each spreads over the kernel, `dim + 1`."""
    places, kernel = spread.shape[dim : dim + 2]
    overlaps = -(-kernel // stride)
    behind = spread.dim() - dim - 1  # dimensions
    spread = pad(spread, (0, 0) * (behind - 1) + (0, overlaps * stride - kernel))
    parts = spread.unflatten(dim + 1, (overlaps, stride)).unbind(dim + 1)
    shifted = [pad(part, (0, 0) * behind + (i, overlaps - 1 - i)) for i, part in enumerate(parts)]
    whole = sum(shifted[1:], shifted[0]).flatten(dim, dim + 1)
    return whole.narrow(dim, padding, (places - 1) * stride - 2 * padding + kernel)
