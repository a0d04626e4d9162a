"""What torch says of zeros and of indices, where TorchInductor takes something else for granted.

The product with an integer 0, and 0 / x, it takes for 0 whatever the other factor is, which would
hide a NaN. An index below zero it counts from the end, also where torch counts from the start alone
(of `gather` and `embedding` it does so before PyTorch 2.13). And rows in the order of a permutation
it looks for with a pattern of its own, which is at fault. What goes into a part of a tensor that
nothing else reads it writes in place, also where the whole is one number in memory, as the gradient
of a sum is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_aten = torch.ops.aten
_PRODUCTS = (_aten.mul.Tensor, _aten.mul.Scalar)
# by operation: which of its arguments is the index
_INDEX = {_aten.gather.default: 2, _aten.embedding.default: 1}
_PART = (
    _aten.index_put.default, _aten._unsafe_index_put.default, _aten.slice_scatter.default,
    _aten.select_scatter.default, _aten.diagonal_scatter.default,
)  # fmt: skip
# those that it takes apart into others, see `from_the_start`
TAKEN_APART = (_aten.index_select.default, _aten.index_add.default)


def as_strided_scatter(
    whole: Tensor, part: Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Tensor:
    """What autograd makes of a part that was written over: each number of the whole is looked up.

    TorchInductor would write the part into a copy, and may have what reads that go before.
    """
    order = sorted(range(whole.dim()), key=whole.stride, reverse=True)
    lying = whole.permute(order)
    beside = torch.empty(size, device="meta").stride()
    # from the widest steps to the narrowest, which are to stay within one of the wider
    dims = sorted((d for d in zip(stride, size, beside, strict=True) if d[1] > 1), reverse=True)
    reaches = [sum((n - 1) * step for step, n, _ in dims[i:]) for i in range(1, len(dims) + 1)]
    nested = all(reach < step for reach, (step, *_) in zip(reaches, dims, strict=True))
    if not (nested and lying.is_contiguous()):
        return NotImplemented  # leave it as it is
    rest = torch.arange(whole.numel(), device=whole.device) - (offset or 0)
    within, place = rest >= 0, torch.zeros_like(rest)
    for step, count, own in dims:
        at = rest // step
        within, place, rest = within & (at < count), place + at * own, rest % step
    within = within & (rest == 0)
    found = part.reshape(-1)[torch.where(within, place, 0)]
    written = torch.where(within, found, lying.reshape(-1)).view(lying.shape)
    return written.permute(sorted(range(whole.dim()), key=order.__getitem__))


class Conventions(CustomGraphPass):
    """Writes the Python 0 in a product of floats as 0.0, has indices below zero be beyond, those
    of a permutation be taken as they are, within bounds, and what is written to have room."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _PRODUCTS and not _is_integer(node.meta["val"]):
                node.args = tuple(_as_float(factor) for factor in node.args)
            elif node.target in _INDEX:
                _see_that_it_counts_from_the_start(node, _INDEX[node.target])
            elif node.target is _aten.index.Tensor and _permutes(*node.args):
                node.target = _aten._unsafe_index.Tensor
            elif node.target in _PART and 0 in node.args[0].meta["val"].stride():
                _give_room(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def from_the_start(decomposition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of a tensor, a dimension and an index, of which none below zero is within bounds."""

    @wraps(decomposition)
    def strict(tensor: Tensor, dim: int, index: Tensor, *rest: Any, **options: Any) -> Tensor:
        return decomposition(tensor, dim, index & _all_but_sign(index), *rest, **options)

    return strict


def _give_room(node: fx.Node) -> None:
    """Have each number of what a node writes to, its first argument, in a place of its own."""
    whole: Any = node.args[0]
    with node.graph.inserting_before(node):
        roomy = node.graph.call_function(
            _aten.clone.default, (whole,), {"memory_format": torch.contiguous_format}
        )  # fmt: skip
    roomy.meta["val"] = whole.meta["val"].clone(memory_format=torch.contiguous_format)
    node.update_arg(0, roomy)


def _see_that_it_counts_from_the_start(node: fx.Node, position: int) -> None:
    index: Any = node.args[position]
    value = index.meta["val"]
    with node.graph.inserting_before(node):
        unsigned = node.graph.call_function(
            _aten.bitwise_and.Scalar, (index, _all_but_sign(value))
        )  # fmt: skip
    unsigned.meta["val"] = torch.empty_like(value)
    node.update_arg(position, unsigned)


def _all_but_sign(index: Tensor) -> int:
    """The bits without which a number below zero is beyond all others."""
    return torch.iinfo(index.dtype).max


def _permutes(indexed: Any, indices: Any) -> bool:
    """Whether the indices are permutations of what there is, or of less."""
    return all(
        index is None or (index.target is _aten.randperm.default and index.args[0] <= size)
        for index, size in zip(indices, indexed.meta["val"].shape, strict=False)
    )


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _as_float(factor: Any) -> Any:
    return 0.0 if isinstance(factor, int) and factor == 0 else factor
