"""Affine maps through the faster of two libraries, in full single precision."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 256


class FastProducts(TorchFunctionMode):
    """Send large float32 affine maps on the CPU through oneDNN, without gradients.

    PyTorch's own choice, MKL, runs at about half of oneDNN's speed on processors of other makers
    than Intel; on Intel's it is kept. Both accumulate in float32, so results agree to rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn.linear and not kwargs and _gains(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _gains(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _onednn_is_faster()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out.unflatten(0, x.shape[:-1])


@functools.cache
def _onednn_is_faster() -> bool:
    info = Path("/proc/cpuinfo")
    made_by_intel = not info.exists() or "GenuineIntel" in info.read_text()
    return torch.backends.mkldnn.is_available() and not made_by_intel
