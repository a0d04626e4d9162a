"""The slow operations of a decoder by faster ways to the same float32 numbers, on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 256
SLICE_BYTES = 2**20  # of intermediate results, to stay in a core's cache


class FastArithmetic(TorchFunctionMode):
    """Affine maps and tanh of large float32 tensors on the CPU, without gradients.

    PyTorch's products (MKL) run at about half of oneDNN's speed on processors of other makers than
    Intel; on Intel's they are kept. The maker decides and not a stopwatch, so that one machine
    always gives the same bits. PyTorch's tanh takes three times as long as an exponential; here it
    is expm1(2x) / (expm1(2x) + 2), right to three units in the last place.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func in _FASTER and _suits(args[0]):
            return _FASTER[func](*args)
        return func(*args, **(kwargs or {}))


def _suits(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 0
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype != torch.float32 or not _onednn_is_faster():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out.unflatten(0, x.shape[:-1])


def _tanh(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for part, result in slices(x, out):
        # above 20 both are 1, and the exponential would overflow
        e = part.clamp(max=20.0).mul_(2).expm1_()
        torch.div(e, e + 2, out=result)
    return out


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut alike along their first dimension, about `SLICE_BYTES` of the first each."""
    row = tensors[0][:1]
    step = max(1, SLICE_BYTES // max(1, row.numel() * row.element_size()))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


@functools.cache
def _onednn_is_faster() -> bool:
    info = Path("/proc/cpuinfo")
    made_by_intel = not info.exists() or "GenuineIntel" in info.read_text()
    return torch.backends.mkldnn.is_available() and not made_by_intel


_FASTER: dict[Any, Callable[..., Tensor]] = {
    torch._C._nn.linear: _linear,
    torch.tanh: _tanh,
    torch.Tensor.tanh: _tanh,
}
