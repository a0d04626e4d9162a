"""The first call of a compiled graph is compared with the eager run on the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.errors import CompileError


def check_agreement(what: str, fused: Sequence[Tensor], eager: Sequence[Tensor]) -> None:
    """Raise unless both lists hold the same numbers up to rounding.

    The difference of each pair, in Euclidean norm, may be at most sqrt(eps) times the tensor's
    norm plus 100 eps times the norm of the whole list (a tensor whose true value is zero holds
    nothing but the rounding of the others), with eps that of the coarsest arithmetic in use.

    Raises:
        CompileError: they differ; the message names the worst of them.
    """
    if len(fused) != len(eager):
        raise CompileError(
            f"the compiled program returns {len(fused)} {what}, the eager one {len(eager)}"
        )
    total = torch.stack([_norm(e) for e in eager]).norm() if eager else torch.zeros(())
    for i, (f, e) in enumerate(zip(fused, eager, strict=True)):
        if f.shape != e.shape or f.dtype != e.dtype:
            raise CompileError(
                f"{what}[{i}] is {f.dtype} of shape {tuple(f.shape)} compiled, "
                f"but {e.dtype} of shape {tuple(e.shape)} eagerly"
            )
        eps = _resolution(e.dtype)
        distance, allowed = _norm(f - e), eps**0.5 * _norm(e) + 100 * eps * total
        if _norm(e).isfinite() and not distance <= allowed:
            raise CompileError(
                f"compiled and eager {what} differ on the same draws: number {i}, of shape "
                f"{tuple(e.shape)}, by {distance.item():.3g} where {allowed.item():.3g} is "
                "rounding. Run without compiling, and please report the model"
            )


def _norm(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64).norm()


def _resolution(dtype: torch.dtype) -> float:
    if not dtype.is_floating_point:
        return 0.0
    coarse = dtype
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        coarse = torch.bfloat16
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        coarse = torch.bfloat16
    return torch.finfo(coarse).eps
