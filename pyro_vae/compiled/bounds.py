"""Indices below zero, where torch says that they are out of bounds.

TorchInductor takes these functions apart into ones that count such an index from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
COUNTED_FROM_THE_START = (
    _aten.index_select.default, _aten.index_add.default
)  # fmt: skip


def from_the_start(decomposition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of a tensor, a dimension and an index, where none below zero is within bounds."""

    @wraps(decomposition)
    def strict(tensor: Tensor, dim: int, index: Tensor, *rest: Any, **options: Any) -> Tensor:
        length = tensor.shape[dim] if tensor.dim() else 1
        return decomposition(tensor, dim, torch.where(index < 0, length, index), *rest, **options)

    return strict
