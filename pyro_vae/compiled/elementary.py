"""Functions that generated vector code on a CPU computes slowly, or wrongly, by other formulas.

The vector library that TorchInductor calls is right to one unit of the last place of float32, and
takes several times as long as a quotient of polynomials that is right to two or four. A sigmoid and
a cross entropy of the same logits share their exponential. What is of less than float32 is computed
in float32 and rounded once, as torch does. Wrong is what is a small difference, of which nothing is
left: artanh and the error function of small arguments, its inverse near one, and what a division
leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.inductor_prims import fma

_LESS_THAN_SINGLE = (torch.bfloat16, torch.float16)
# numerator (odd powers) and denominator (even powers), from the highest, of the approximation that
# Eigen (`generic_fast_tanh_float`) and XLA use, and how far it reaches: there it is one, if
# products and sums are one operation
_ODD = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_REACH = 7.99881172180175781
# of the series of artanh(s) / s in s squared, enough for s up to 1/3
_ARTANH = tuple(1 / k for k in range(17, 0, -2))
# of the series of (exp(x) - 1) / x, enough for x up to 1/2 in either precision
_EXPONENTIAL = {
    dtype: tuple(1 / math.factorial(k) for k in range(terms, 0, -1))
    for dtype, terms in ((torch.float32, 9), (torch.float64, 16))
}
# of the series of erf(x) / x in x squared, enough for x up to 1/2
_ERROR = tuple(
    2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(7, -1, -1)
)


def _at_least_single(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function computed in float32 of what is of less, and rounded once."""

    @wraps(function)
    def computed(x: Tensor) -> Tensor:
        return function(x.float()).to(x.dtype) if x.dtype in _LESS_THAN_SINGLE else function(x)

    return computed


@_at_least_single
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent, to four units of the last place of float32."""
    x = x.clamp(-_REACH, _REACH)
    square = x * x
    return x * _polynomial(_ODD, square) / _polynomial(_EVEN, square)


def log_one_plus(x: Tensor) -> Tensor:
    """log(1 + x) of what is between 0 and 1, to two units of the last place of float32: twice
    the artanh of x / (2 + x)."""
    s = x / (2 + x)
    return 2 * s * _polynomial(_ARTANH, s * s)


@_at_least_single
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return x.clamp(min=0) + log_one_plus((-x.abs()).exp())


@_at_least_single
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), by the exponential that the cross entropy of x needs as well."""
    small = (-x.abs()).exp()
    return torch.where(x < 0, small, 1.0) / (1 + small)


@_at_least_single
def exp_minus_one(x: Tensor) -> Tensor:
    """exp(x) - 1, to two units of the last place. Generated code takes the difference as it stands,
    which of a small x leaves nothing."""
    x = x + 0.0  # of whole numbers too
    small = x * _polynomial(_EXPONENTIAL[x.dtype], x)
    return torch.where(x.abs() < 0.5, small, x.exp() - 1)


@_at_least_single
def artanh(x: Tensor) -> Tensor:
    """The inverse of the hyperbolic tangent, to four units of the last place."""
    size = x.abs()
    return (0.5 * (2 * size / (1 - size)).log1p()).copysign(x)


@_at_least_single
def erf(x: Tensor) -> Tensor:
    """The error function, to two units of the last place of float32."""
    return torch.where(x.abs() < 0.5, x * _polynomial(_ERROR, x * x), x.erf())


@_at_least_single
def erfinv(x: Tensor) -> Tensor:
    """The inverse of the error function; of what is near one by what it lacks of one."""
    size = x.abs()
    tail = -torch.special.ndtri((1 - size) / 2) / math.sqrt(2)
    return torch.where(size < 0.5, x.erfinv(), tail.copysign(x))


def divide_and_round(a: Any, b: Any, *, rounding_mode: str | None) -> Tensor:
    """a / b rounded down, by the remainder, as torch does. Generated code rounds the quotient,
    which may be a whole number by rounding: -2.7 // 0.1 is -28."""
    if rounding_mode != "floor" or not torch.result_type(a, b).is_floating_point:
        return NotImplemented
    return torch._refs.floor_divide(a, b)


def remainder(a: Any, b: Any) -> Tensor:
    """a modulo b, exactly, as torch does; generated code subtracts b times a rounded quotient."""
    if not torch.result_type(a, b).is_floating_point:
        return NotImplemented
    left = torch.fmod(a, b) if isinstance(a, Tensor) else torch.fmod(torch.full_like(b, a), b)
    return torch.where((left != 0) & ((left < 0) ^ (b < 0)), left + b, left)


def cross_entropy_of_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The binary cross entropy of each element, as torch computes it."""
    log_sigmoid = logits.clamp(max=0) - log_one_plus((-logits.abs()).exp())
    return (1 - target) * logits - log_sigmoid


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule, the highest power first; each product and sum are one operation, half the
    time of two. (Of a user's own products and sums they are two: x * x - y * y is to be zero.)"""
    first, *rest = (x.new_full((), coefficient) for coefficient in coefficients)
    value = first
    for coefficient in rest:
        value = fma(value, x, coefficient)
    return value


_SINGLE = (torch.float32,)
_AT_MOST_SINGLE = (*_SINGLE, *_LESS_THAN_SINGLE)
_ANY = (*_AT_MOST_SINGLE, torch.float64)
# by operation: what stands for it where its arguments after the tensors are these, and of what
_INSTEAD: dict[Any, tuple[Callable[..., Tensor], tuple[Any, ...], tuple[torch.dtype, ...]]] = {
    torch.ops.aten.tanh.default: (tanh, (), _AT_MOST_SINGLE),
    torch.ops.aten.sigmoid.default: (sigmoid, (), _AT_MOST_SINGLE),
    torch.ops.aten.softplus.default: (softplus, (), _AT_MOST_SINGLE),
    torch.ops.aten.atanh.default: (artanh, (), _ANY),
    torch.ops.aten.erf.default: (erf, (), _AT_MOST_SINGLE),
    torch.ops.aten.erfinv.default: (erfinv, (), _ANY),
    # no weights, no reduction; of less than float32 torch rounds every term
    torch.ops.aten.binary_cross_entropy_with_logits.default: (
        cross_entropy_of_logits, (None, None, 0), _SINGLE
    ),
}  # fmt: skip


def approximate(graph: fx.GraphModule) -> None:
    """Replace these functions on a CPU, where they are of these precisions."""
    for node in graph.graph.nodes:
        if node.target not in _INSTEAD or node.kwargs:
            continue
        function, further, dtypes = _INSTEAD[node.target]
        tensors = node.all_input_nodes
        values = [tensor.meta["val"] for tensor in tensors]
        if node.args == (*tensors, *further) and all(
            value.dtype in dtypes and value.device.type == "cpu" for value in values
        ):
            node.target, node.args = function, tuple(tensors)
    graph.recompile()
