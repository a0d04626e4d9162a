"""Matrix products on a CPU through oneDNN, where it is the faster.

PyTorch sends fp32 products to its BLAS (MKL, on x86). On some machines oneDNN, which PyTorch
carries as well, is about twice as fast at the same precision; on others it is not. So every large
product of a compiled graph is timed both ways, on its own shape and layout, and takes the faster.
The choice is part of what torch keeps in its compilation cache. A bias that is left to the BLAS is
added afterwards, by the kernel that goes on with the result: the BLAS would have it copied into
every row first. Products in bfloat16 are oneDNN's either way: which of PyTorch's two paths to it is
the shorter depends on the layout, so they are timed too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.ir import ExternKernel, FixedLayout, TensorBox
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.mkldnn_ir import LinearUnary, _create_output_node

from pyro_vae.compiled import backend, conventions, elementary, in_memory

# below this many multiplications a call's overhead counts for more than the arithmetic
_SMALLEST = 1_000_000
_ROUNDS = 15
_WORTHWHILE = 0.9
_PERMUTE = torch.ops.aten.permute.default
_MM, _ADD = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor
# how far apart two results may be, relatively, that are equally right
_APART = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _aten(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


_library = torch.library.Library("pyro_vae", "DEF")
_library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_library.impl("product", _onednn, "CPU")


_PRODUCT = torch.ops.pyro_vae.product.default


@torch.library.register_fake("pyro_vae::product", lib=_library)
def _shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@register_lowering(_PRODUCT, type_promotion_kind=None)
def _call(a: Any, b: Any, bias: Any) -> Any:
    """The call in generated code: of oneDNN itself, which takes any layout; of the operator above
    it would be a call of Python."""
    inputs = [ExternKernel.realize_input(x) for x in (a, lowerings[_PERMUTE](b, [1, 0]))]
    rest: list[Any] = ["none", [-1], ""]
    if bias is None:
        rest.insert(0, None)
    else:
        inputs.append(ExternKernel.realize_input(bias))
    size = [a.get_size()[0], b.get_size()[1]]
    layout = FixedLayout(a.get_device(), a.get_dtype(), size)
    return TensorBox.create(_create_output_node(LinearUnary(layout, inputs, rest)))


class FasterProducts(CustomGraphPass):
    """Replaces the products of a graph that oneDNN computes faster, and takes the bias out of the
    others."""

    def __call__(self, graph: fx.Graph) -> None:
        if not available():
            return
        choices: dict[Any, bool] = {}
        for node in list(graph.nodes):
            operands = _operands(node)
            if operands is None:
                continue
            key = tuple(_layout(operand) for operand in operands)
            if key not in choices:
                choices[key] = _is_large(*key) and _faster(*key)
            *factors, bias = operands
            with graph.inserting_before(node):
                if choices[key]:
                    new = graph.call_function(_PRODUCT, operands)
                elif bias is not None and bias.meta["val"].dtype is torch.float32:
                    new = graph.call_function(_MM, tuple(factors))
                    new.meta.update(node.meta)
                    new = graph.call_function(_ADD, (new, bias))
                else:
                    continue
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        # with what else of ours torch's key knows nothing of: what an operator becomes, and into
        # what one of torch's is taken apart
        ours = (backend, conventions, elementary, in_memory)
        files = (__file__, *(str(module.__file__) for module in ours))
        return get_hash_for_files(files, f"{torch.get_num_threads()}, {available()}")


def available() -> bool:
    """Whether this PyTorch has oneDNN and may use it."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[return-value]


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """`(a, b, bias)` if the node is a product on the CPU that oneDNN could take."""
    if node.target is _MM:
        a, b = node.args
        bias = None
    elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
        bias, a, b = node.args
    else:
        return None
    given = [operand for operand in (a, b, bias) if operand is not None]
    values = [operand.meta["val"] for operand in given if isinstance(operand, fx.Node)]
    if len(values) < len(given) or any(
        v.dtype not in _APART or v.device.type != "cpu" for v in values
    ):
        return None
    if bias is not None and values[2].dim() != 1:
        return None
    return a, b, bias  # type: ignore[return-value]


def _layout(operand: fx.Node | None) -> _Layout | None:
    if operand is None:
        return None
    value = operand.meta["val"]
    return value.shape, value.stride(), value.dtype


def _is_large(a: Any, b: Any, bias: Any) -> bool:
    """Whether the arithmetic counts for more than a call's overhead."""
    (rows, inner), columns = a[0], b[0][1]
    return rows * inner * columns >= _SMALLEST


def _example(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this layout whose values are all about, made without drawing from a generator."""
    values = (torch.arange(shape.numel(), dtype=torch.float32) % 17 / 8 - 1).view(shape)
    return torch.empty_strided(shape, stride, dtype=dtype).copy_(values)


def _faster(*layouts: _Layout | None) -> bool:
    """Whether oneDNN takes operands of these layouts, and is the faster at them."""
    operands = [None if layout is None else _example(*layout) for layout in layouts]
    ways: tuple[Callable[..., Tensor], ...] = (_aten, _onednn)
    try:
        expected, got = (way(*operands) for way in ways)
    except RuntimeError:  # a layout that oneDNN refuses, or a precision that the CPU has not
        return False
    if not torch.allclose(expected, got, rtol=_APART[expected.dtype]):
        return False
    fastest = [float("inf")] * 2
    for _ in range(_ROUNDS):  # in turns, so that a busy moment hits both; the best round counts
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way(*operands)
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest[1] < _WORTHWHILE * fastest[0]
