"""The first call of a compiled graph is compared with the eager run on the same draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pyro_vae import precision
from pyro_vae.compiled.answers import is_alias
from pyro_vae.compiled.record import STANDS_STILL, Change
from pyro_vae.errors import CompileError

_COPIES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.lift_fresh_copy.default,
)
_CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)


def check_agreement(
    what: str,
    fused: Sequence[Tensor],
    eager: Sequence[Tensor],
    nudged: Sequence[Tensor] | None = None,
    coarse: torch.dtype = torch.float64,
) -> None:
    """Raise unless both lists hold the same numbers up to rounding.

    The difference of each pair, in Euclidean norm, may be at most sqrt(eps) times the tensor's
    norm plus 100 eps times the norm of the whole list (a tensor whose true value is zero holds
    nothing but the rounding of the others), with eps that of the coarsest arithmetic in use. Near a
    minimum that is too strict, as a gradient's terms cancel. There 100 times of what rounding the
    parameters does is allowed as well. Where both hold the same infinity they agree; a tensor with
    other infinities, or with NaN, is not compared.

    Args:
        nudged: the eager numbers at parameters moved by about their rounding.
        coarse: what the numbers are made of, see `coarsest`.

    Raises:
        CompileError: they differ; the message names the worst of them.
    """
    if len(fused) != len(eager):
        raise CompileError(
            f"the compiled program returns {len(fused)} {what}, the eager one {len(eager)}"
        )
    total = _together([_norm(comparable(f, e)[1]) for f, e in zip(fused, eager, strict=True)
                       if f.shape == e.shape])  # fmt: skip
    for i, (f, e) in enumerate(zip(fused, eager, strict=True)):
        if f.shape != e.shape or f.dtype != e.dtype:
            raise CompileError(
                f"{what}[{i}] is {f.dtype} of shape {tuple(f.shape)} compiled, "
                f"but {e.dtype} of shape {tuple(e.shape)} eagerly"
            )
        eps = _resolution(e.dtype, coarse)
        f, held = comparable(f, e)
        distance, allowed = _norm(f - held), eps**0.5 * _norm(held) + 100 * eps * total
        if nudged is not None:
            other, own = comparable(nudged[i], e)
            allowed = allowed + 100 * _norm(other - own)
        if _norm(held).isfinite() and not distance <= allowed:
            raise CompileError(
                f"compiled and eager {what} differ on the same draws: number {i}, of shape "
                f"{tuple(e.shape)}, by {distance.item():.3g} where {allowed.item():.3g} is "
                f"rounding. {STANDS_STILL}"
            )


def check_changes(
    fused: Sequence[Change],
    eager: Sequence[Change],
    moved: Mapping[int, Tensor],
    nudged: Sequence[Change] | None = None,
    coarse: torch.dtype = torch.float64,
) -> None:
    """Raise unless both runs changed the same tensors to the same values, up to rounding.

    Adam moves a parameter by about its step size however small the gradient, so where the true
    gradient is zero its rounding decides which way. A parameter's difference is therefore weighed
    by its first moment, and allowed in proportion to its move, to the rounding of all moves, and to
    that of the result.

    Args:
        moved: the first moment of each parameter that an update moves, by the identity of the
            parameter.
        nudged, coarse: see `check_agreement`.

    Raises:
        CompileError: they differ.
    """
    before = {id(c.tensor): c.before for c in (*eager, *fused)}
    ours = before | {id(c.tensor): c.after for c in fused}
    theirs = before | {id(c.tensor): c.after for c in eager}
    about = None if nudged is None else before | {id(c.tensor): c.after for c in nudged}
    others = [key for key in before if key not in moved]
    check_agreement(
        "buffers",
        [ours[key] for key in others],
        [theirs[key] for key in others],
        None if about is None else [about[key] for key in others],
        coarse,
    )
    weighed = [
        (ours[key], theirs[key], before[key], _weight(id(moved[key]), moved[key], theirs, about))
        for key in before
        if key in moved
    ]
    moves = [_norm((e - b) * weight) for _, e, b, weight in weighed]
    total = _together(moves)
    for (f, e, _, weight), move in zip(weighed, moves, strict=True):
        eps = _resolution(weight.dtype, coarse)
        distance = _norm((f - e) * weight)
        allowed = eps**0.5 * move + 100 * eps * (total + _norm(e * weight))
        if move.isfinite() and not distance <= allowed:
            raise CompileError(
                "compiled and eager updates differ on the same draws: a parameter of shape "
                f"{tuple(weight.shape)}, by {distance.item():.3g} where {allowed.item():.3g} is "
                f"rounding (weighed by its first moment). {STANDS_STILL}"
            )


def _weight(
    key: int, held: Tensor, theirs: Mapping[int, Tensor], about: Mapping[int, Tensor] | None
) -> Tensor:
    """The size of a first moment, as far as it is more than rounding."""
    moment = theirs.get(key, held)
    if about is None:
        return moment.abs()
    rounding = (about.get(key, held) - moment).square().mean().sqrt()
    return (moment.abs() - 100 * rounding).clamp(min=0)


def comparable(f: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in double precision, with zeros where both hold the same infinity."""
    f, e = _double(f), _double(e)
    same = (f == e) & e.isinf()
    return f.masked_fill(same, 0.0), e.masked_fill(same, 0.0)


def _together(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all that are finite: beside one that is not, the others are no coarser."""
    finite = [norm for norm in norms if norm.isfinite()]
    return torch.stack(finite).norm() if finite else torch.zeros(())


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(tensor: Tensor) -> Tensor:
    return _double(tensor).cpu().norm().abs()


def coarsest(graph: fx.GraphModule) -> torch.dtype:
    """The coarsest arithmetic of a graph, which may add up in float64 what it made in float32.

    How an input is stored does not count, and single numbers (a literal, a count of steps) neither.
    Where products of float32 may be less than that, as torch is told, all float32 counts as such.
    """
    computed = [node for node in graph.graph.nodes if _computes(node)]
    values = tree_leaves([node.meta.get("val") for node in computed])
    made = [v for v in values if isinstance(v, Tensor) and v.dim() and _is_rounded(v.dtype)]
    used = {value.dtype for value in made}
    convolved = any(node.target in _CONVOLUTIONS for node in computed)
    if torch.float32 in used and any(
        precision.is_reduced(device, convolutions)
        for device in {value.device for value in made}
        for convolutions in {False, convolved}
    ):
        used.add(torch.bfloat16)
    return max(used, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _computes(node: fx.Node) -> bool:
    """Whether a node makes new numbers, rather than cast, copy or show those there are."""
    return node.op == "call_function" and not is_alias(node) and node.target not in _COPIES


def _is_rounded(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _resolution(dtype: torch.dtype, coarse: torch.dtype) -> float:
    if not _is_rounded(dtype):
        return 0.0
    if torch.finfo(dtype).eps > torch.finfo(coarse).eps:
        coarse = dtype
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        coarse = torch.bfloat16
    return torch.finfo(coarse).eps
