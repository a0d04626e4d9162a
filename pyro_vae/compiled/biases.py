"""Gradients of convolutions' biases on a CPU.

Where the channels lie side by side, PyTorch's kernel adds up number by number. A product with ones
is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_BACKWARD = torch.ops.aten.convolution_backward.default
# in lower precision products would be rounded before they are added
PRECISE = (torch.float32, torch.float64)


def add_up_biases(graph: fx.GraphModule) -> None:
    """Have the gradients of biases on their own."""
    for node in graph.graph.nodes:
        if node.target is not _BACKWARD:
            continue
        gradient, *between, wanted = node.args
        value = gradient.meta["val"]
        if not wanted[2] or value.device.type != "cpu":
            continue
        node.args = gradient, *between, [*wanted[:2], False]
        for user in list(node.users):
            if user.args[1] == 2:
                user.target, user.args = bias_gradient, (gradient,)
    graph.recompile()


def bias_gradient(gradient: Tensor) -> Tensor:
    """The gradient of a convolution's bias for that of its maps: their sum for each channel."""
    if gradient.dim() != 4 or gradient.dtype not in PRECISE:
        return gradient.sum((0, *range(2, gradient.dim())))
    rows = rows_of(gradient)
    return (rows.new_ones(1, len(rows)) @ rows)[0]


def rows_of(maps: Tensor) -> Tensor:
    """The channels of each place: `(places, channels)`."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
