"""Indexing by tensors as a graph can follow it.

Where shapes or Python's numbers come from a tensor's values, these are taken as they are now. The
`Recorder` has refused tensors that may vary, and of the others a program knows when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing


def get(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`, with the places of a mask in its stead; torch would ask for the number that
    a tensor without dimensions holds."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(is_mask(part) or _is_number(part) for part in parts):
        return tensor[index]
    dims = _dimensions(tensor, parts)
    spread: list[Any] = []
    for part, dim in zip(parts, dims, strict=True):
        if _is_number(part):
            tensor, part = _select(tensor, dim, part), 0
        spread += _places(part) if is_mask(part) else [part]
    return tensor[tuple(spread)]


def put(tensor: Tensor, index: Any, value: Any) -> None:
    """`tensor[index] = value`, by a choice where the index says all or nothing; torch would ask
    which."""
    if isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == 0:
        new = value if isinstance(value, Tensor) else tensor.new_full((), value)
        index, value = ..., torch.where(index, new.to(tensor.dtype), tensor)
    tensor[index] = value


def is_mask(part: Any) -> bool:
    """Whether an index is of booleans, as many as there are numbers."""
    if isinstance(part, list):
        return bool(part) and all(isinstance(entry, bool | np.bool_) for entry in part)
    if isinstance(part, np.ndarray):
        return part.dtype == bool and part.ndim > 0
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) and part.dim() > 0


def _is_number(part: Any) -> bool:
    return (
        isinstance(part, Tensor)
        and part.dim() == 0
        and part.dtype not in (torch.bool, torch.uint8)
        and not part.is_floating_point()
    )


def _dimensions(tensor: Tensor, parts: tuple[Any, ...]) -> list[int]:
    """The first dimension of the tensor that each part of an index is about."""
    taken = [_taken(part) for part in parts]
    rest = tensor.dim() - sum(taken)
    dims, dim = [], 0
    for part, count in zip(parts, taken, strict=True):
        dims.append(dim)
        dim += rest if part is Ellipsis else count
    return dims


def _taken(part: Any) -> int:
    """How many dimensions a part of an index is about."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return np.ndim(part) if is_mask(part) else 1


def _select(tensor: Tensor, dim: int, number: Tensor) -> Tensor:
    """The one slice of a dimension, which stays, of length 1."""
    index: tuple[Any, ...] = (*[slice(None)] * dim, number.view(1))
    return tensor[index]


def _places(mask: Any) -> tuple[Tensor, ...]:
    return _nonzero(mask).unbind(1)


def _nonzero(tensor: Any, *, as_tuple: bool = False) -> Any:
    if as_tuple:
        return _places(torch.atleast_1d(tensor))
    with disable_proxy_modes_tracing():
        found = torch.as_tensor(tensor).nonzero()
    return torch.tensor(found.tolist(), dtype=torch.long, device=found.device).view(found.shape)


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    return get(*torch.broadcast_tensors(tensor, mask))


def _where(condition: Tensor, *choice: Any, **named: Any) -> Any:
    if choice or named:
        return torch.where(condition, *choice, **named)
    return _nonzero(condition, as_tuple=True)


def _number(tensor: Tensor) -> int:
    with disable_proxy_modes_tracing():
        return tensor.__index__()


REPLACED: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: get,
    Tensor.__setitem__: put,
    Tensor.__index__: _number,
    Tensor.masked_select: _masked_select,
    torch.masked_select: _masked_select,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    Tensor.argwhere: _nonzero,
    torch.argwhere: _nonzero,
    torch.where: _where,
}
