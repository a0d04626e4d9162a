"""Memory that a program writes, and that only one of its inputs may show.

Generated code reads and writes its inputs in an order of its own, as if each had its own memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from pyro_vae.compiled.answers import root, written_by
from pyro_vae.errors import CompileError


def written(graph: fx.GraphModule) -> list[int]:
    """The numbers of the graph's inputs that it writes to, as far as its operations say: batch
    norm does not."""
    roots = {root(each) for node in graph.graph.nodes for each in written_by(node)}
    return [n for n, node in enumerate(graph.graph.find_nodes(op="placeholder")) if node in roots]


def shared(inputs: Sequence[Tensor], written: Sequence[int]) -> list[tuple[int, int]]:
    """The inputs that are written to, each with another that shows some of the same memory."""
    if not written:
        return []
    pieces = [
        tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
        for tensor in inputs
    ]
    return [
        (n, m) for n in written if pieces.count(pieces[n]) > 1
        for m, piece in enumerate(pieces)
        if piece == pieces[n] and m != n and _meet(_extent(inputs[n]), _extent(inputs[m]))
    ]  # fmt: skip


def refuse_shared(inputs: Sequence[Tensor], labels: Sequence[str], written: Sequence[int]) -> None:
    """Refuse two inputs over the same memory, if one is written to.

    Raises:
        CompileError: it names both.
    """
    for n, m in shared(inputs, written):
        raise CompileError(
            f"{labels[m]} shares memory with {labels[n]}, which the program changes, so that "
            "what it reads depends on when: keep a copy (clone()) in one of the two places"
        )


def _meet(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def _extent(tensor: Tensor) -> range:
    """The bytes from its first to its last entry, counted from the beginning of its memory."""
    if not tensor.numel():
        return range(0)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset()
    return range(start * tensor.itemsize, (start + last + 1) * tensor.itemsize)
