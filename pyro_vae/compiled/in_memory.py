"""A result that lies in memory, once and row by row.

TorchInductor computes what is cheap anew wherever it is read. Read in another order, with a border
or several times over, this is number by number and not a vector at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.ir import ExternKernel
from torch._inductor.lowering import register_lowering

_library = torch.library.Library("pyro_vae", "FRAGMENT")
_library.define("in_memory(Tensor value) -> Tensor")
_library.impl(
    "in_memory",
    lambda value: value.clone(memory_format=torch.contiguous_format),
    "CompositeExplicitAutograd",
)

in_memory = torch.ops.pyro_vae.in_memory.default


@torch.library.register_fake("pyro_vae::in_memory", lib=_library)
def _like(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@register_lowering(in_memory, type_promotion_kind=None)
def _realized(value: Any) -> Any:
    return ExternKernel.require_contiguous(value)
