"""Transposed convolutions to one channel as products, held against PyTorch's own."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv_transpose2d

from pyro_vae.compiled.convolutions import multiply_out, transposed_convolution

SETTINGS = [
    (kernel, stride, padding)
    for kernel, stride, padding in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2))
    if 4 * stride - 2 * padding + kernel > 0
]


@pytest.mark.parametrize(("kernel", "stride", "padding"), SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_transposed_convolution(
    kernel: int, stride: int, padding: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    maps, weight = draw(2, 6, 5, 7), draw(6, 1, kernel, kernel + 1)
    added = draw(1) if bias else None
    strides, paddings = [stride, stride + 1], [padding, 0]
    torch.testing.assert_close(
        transposed_convolution(maps, weight, added, strides, paddings),
        conv_transpose2d(maps, weight, added, strides, paddings),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


def replaced(channels: int = 1, dtype: torch.dtype = torch.float32, **options: object) -> bool:
    """Whether a graph of this convolution has become a product; the graph computes the same."""
    groups = options.get("groups", 1)
    maps = torch.randn(2, 6, 5, 5).to(dtype)
    weight = torch.randn(6, channels, 4, 4).to(dtype)
    convolve = lambda maps, weight: conv_transpose2d(maps, weight, **options)  # type: ignore[arg-type]  # noqa: E731
    graph = make_fx(convolve)(maps, weight)
    multiply_out(graph)
    expected = convolve(maps, weight)
    assert expected.shape[1] == channels * groups  # type: ignore[operator]
    torch.testing.assert_close(graph(maps, weight), expected)
    return any(node.target is transposed_convolution for node in graph.graph.nodes)


def test_only_what_a_product_computes_is_replaced() -> None:
    assert replaced(stride=2, padding=1)
    assert replaced(stride=2, dtype=torch.float64)
    assert not replaced(stride=2, channels=2)
    assert not replaced(stride=2, output_padding=1)
    assert not replaced(dilation=2)
    assert not replaced(groups=2)
    assert not replaced(stride=2, dtype=torch.bfloat16)


def test_a_convolution_is_left_as_it_is() -> None:
    maps, weight = torch.randn(2, 6, 5, 5), torch.randn(1, 6, 3, 3)
    graph = make_fx(torch.nn.functional.conv2d)(maps, weight)
    multiply_out(graph)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.convolution.default
    ]
