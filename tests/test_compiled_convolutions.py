"""Graphs with convolutions made faster, held against PyTorch's own operations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv_transpose2d

from pyro_vae.compiled import convolutions
from pyro_vae.compiled.backend import inductor
from pyro_vae.compiled.convolutions import lay_out, multiply_out, transposed_convolution

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


def encode(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.silu(torch.conv2d(x, weight, stride=2)).flatten(1)


def relu_of_the_flat(x: Tensor, weight: Tensor) -> Tensor:
    maps = torch.conv2d(x, weight, stride=2)
    return torch.cat([maps.flatten(1).relu_(), maps.mean((2, 3))], 1)


def maps_written_later(x: Tensor, weight: Tensor) -> Tensor:
    maps = torch.conv2d(x, weight)
    flat = maps.flatten(1)
    maps.relu_()
    return flat.sum(1)


def part_of_the_flat(x: Tensor, weight: Tensor) -> Tensor:
    maps = torch.conv2d(x, weight)
    first, _ = maps.flatten(1).split([81, 567], 1)
    first.zero_()
    return maps.sum((2, 3))


def rows(x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight).flatten(2).sum(2)


def one_place_each(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.silu(torch.conv2d(x, weight).mean((2, 3), True)).flatten(1)


IMAGES, FILTERS = torch.randn(4, 1, 12, 12), torch.randn(8, 1, 4, 4)


@pytest.mark.parametrize(
    ("function", "laid_out"),
    [
        (encode, True),
        (relu_of_the_flat, False),
        (maps_written_later, False),
        (part_of_the_flat, False),
        (rows, False),
        (one_place_each, False),
    ],
)
def test_what_is_flattened_is_laid_out(function: Callable[..., Tensor], laid_out: bool) -> None:
    graph = make_fx(function, tracing_mode="fake")(IMAGES, FILTERS)
    lay_out(graph)
    assert any(n.target is convolutions._LAID_OUT for n in graph.graph.nodes) == laid_out
    torch.testing.assert_close(graph(IMAGES, FILTERS), function(IMAGES, FILTERS))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
def test_generated_code_computes_the_same_and_is_kept_on_disk() -> None:
    from torch._dynamo.utils import counters

    bypassed = counters["inductor"]["fxgraph_cache_bypass"]
    graph = make_fx(lambda *inputs: [encode(*inputs)], tracing_mode="fake")(IMAGES, FILTERS)
    compiled = inductor(graph, [IMAGES, FILTERS])
    torch.testing.assert_close(compiled(IMAGES, FILTERS)[0], encode(IMAGES, FILTERS))
    assert counters["inductor"]["fxgraph_cache_bypass"] == bypassed
