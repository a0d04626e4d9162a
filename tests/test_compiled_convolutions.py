"""Graphs with convolutions made faster, held against PyTorch's own operations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv2d, conv_transpose2d

import pyro_vae.compiled.in_memory as operator
from pyro_vae.compiled import biases, convolutions, matmul, one_channel
from pyro_vae.compiled.backend import inductor
from pyro_vae.compiled.biases import add_up_biases
from pyro_vae.compiled.convolutions import lay_out, multiply_out
from pyro_vae.compiled.in_memory import in_memory

CONVOLUTION = torch.ops.aten.convolution.default
BACKWARD = torch.ops.aten.convolution_backward.default

SETTINGS = [
    (kernel, stride, padding)
    for kernel, stride, padding in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2))
    if 4 * stride - 2 * padding + kernel > 0
]
KINDS: list[tuple[Callable[..., Tensor], Callable[..., Tensor], Any]] = [
    (conv2d, one_channel.convolution, one_channel.convolution_backward),
    (conv_transpose2d, one_channel.transposed_convolution,
     one_channel.transposed_convolution_backward),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "padding"), SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("torchs", "ours", "backward"), KINDS, ids=["plain", "transposed"])
def test_products_are_the_convolution_and_its_gradients(
    kernel: int,
    stride: int,
    padding: int,
    bias: bool,
    torchs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    backward: Any,
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    transposed = torchs is conv_transpose2d
    inputs = draw(2, 6 if transposed else 1, 5, 7, requires_grad=True)
    weight = draw(6, 1, kernel, kernel + 1, requires_grad=True)
    added = draw(1 if transposed else 6, requires_grad=True) if bias else None
    how = [stride, stride + 1], [padding, 0]
    expected = torchs(inputs, weight, added, *how)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(ours(inputs, weight, added, *how), expected)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    wanted = [tensor for tensor in (inputs, weight, added) if tensor is not None]
    found = backward(gradient, inputs, weight, *how, [True, True, bias])
    for one, other in zip(found, torch.autograd.grad(expected, wanted, gradient), strict=False):
        close(one, other)
    assert backward(gradient, inputs, weight, *how, [False] * 3) == (None, None, None)


def replaced(
    convolve: Any = conv_transpose2d,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> bool:
    """Whether a graph of this convolution and its gradients has become products, all of it; it
    computes the same."""
    fine, coarse = channels * options.get("groups", 1), 6
    transposed = convolve is conv_transpose2d
    inputs = torch.randn(2, coarse if transposed else fine, 5, 5).to(dtype)
    weight = torch.randn(6, channels, 4, 4).to(dtype)
    bias = torch.randn(fine if transposed else coarse).to(dtype)

    def run(*inputs: Tensor) -> list[Tensor]:
        differentiable = [tensor.detach().requires_grad_() for tensor in inputs]
        output = convolve(*differentiable, **options)
        gradients = torch.autograd.grad(output.sin().sum(), differentiable)
        return [output, *gradients, *(found.view(-1) for found in (output, *gradients))]

    graph = make_fx(run)(inputs, weight, bias)
    multiply_out(graph)
    torch.testing.assert_close(graph(inputs, weight, bias), run(inputs, weight, bias))
    left = {node.target for node in graph.graph.nodes} & {CONVOLUTION, BACKWARD}
    assert len(left) in (0, 2)
    return not left


def test_only_what_products_compute_is_replaced() -> None:
    assert replaced(stride=2, padding=1)
    assert replaced(conv2d, stride=2, padding=1)
    assert replaced(conv2d, stride=(2, 3))
    assert not replaced(conv2d)
    assert not replaced(conv2d, stride=(2, 1))
    assert not replaced()
    assert replaced(stride=2, dtype=torch.float64)
    assert not replaced(stride=2, channels=2)
    assert not replaced(conv2d, stride=2, channels=2)
    assert not replaced(stride=2, output_padding=1)
    assert not replaced(stride=2, dilation=2)
    assert not replaced(conv2d, stride=2, padding=2, dilation=2)
    assert not replaced(stride=2, groups=2)
    assert not replaced(conv2d, stride=2, groups=2)
    assert not replaced(stride=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_biases_are_sums(dims: int, transposed: bool, dtype: torch.dtype) -> None:
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    convolve = getattr(torch.nn.functional, name)
    shapes = (3, 4, *(5,) * dims), (4, 4, *(2,) * dims), (4,)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]

    def run(*inputs: Tensor) -> list[Tensor]:
        differentiable = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(convolve(*differentiable).sin().sum(), differentiable))

    graph = make_fx(run)(*inputs)
    add_up_biases(graph)
    torch.testing.assert_close(graph(*inputs), run(*inputs))
    (node,) = (node for node in graph.graph.nodes if node.target is BACKWARD)
    assert node.args[-1] == [True, True, False]
    assert biases.bias_gradient in {node.target for node in graph.graph.nodes}


def side_by_side(images: Tensor, weight: Tensor) -> Tensor:
    """Relies on how channels_last maps lie in memory."""
    maps = conv2d(images.to(memory_format=torch.channels_last), weight, stride=2)
    return maps.permute(0, 2, 3, 1).view(-1)


def test_layouts_are_kept() -> None:
    images = torch.randn(2, 1, 9, 9)
    weight = torch.randn(6, 1, 3, 3).to(memory_format=torch.channels_last)
    graph = make_fx(side_by_side)(images, weight)
    multiply_out(graph)
    assert CONVOLUTION not in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(images, weight), side_by_side(images, weight))


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


def two_layers_in_place(x: Tensor, weight: Tensor) -> Tensor:
    maps = torch.conv2d(x, weight, stride=2).relu_()
    return torch.conv2d(maps, weight.expand(-1, 8, -1, -1)).relu_().flatten(1).relu_()


def decode(x: Tensor, weight: Tensor) -> Tensor:
    maps = x.repeat(1, 8, 1, 1).flatten(1).relu_().view(4, 8, 12, 12)
    return torch.conv_transpose2d(maps, weight, stride=2).flatten(1)


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
        (two_layers_in_place, False),
        (decode, False),
        (one_place_each, False),
    ],
)
def test_what_is_flattened_is_laid_out(function: Callable[..., Tensor], laid_out: bool) -> None:
    graph = make_fx(function, tracing_mode="fake")(IMAGES, FILTERS)
    lay_out(graph)
    assert any(n.target is in_memory for n in graph.graph.nodes) == laid_out
    torch.testing.assert_close(graph(IMAGES, FILTERS), function(IMAGES, FILTERS))
    multiply_out(graph)
    torch.testing.assert_close(graph(IMAGES, FILTERS), function(IMAGES, FILTERS))


def from_a_row(x: Tensor, weight: Tensor) -> Tensor:
    maps = torch.nn.functional.silu(x.flatten(1).view(4, 9, 4, 4))
    return torch.conv_transpose2d(maps, weight.repeat(2, 1, 1, 1)[:9], stride=2).flatten(1)


def from_a_row_to_maps_in_view(x: Tensor, weight: Tensor) -> Tensor:
    maps = x.flatten(1).sin().view(4, 9, 4, 4)
    return torch.conv2d(maps, weight.expand(8, 9, 4, 4), padding=2).view(4, 4, 2, 25)


def from_a_row_written_to(x: Tensor, weight: Tensor) -> Tensor:
    row = x.flatten(1).sin()
    maps = row.view(4, 9, 4, 4)
    return torch.conv2d(maps.relu_(), weight.expand(8, 9, 4, 4)).mean() + row.sum()


def from_a_row_partly_strided(x: Tensor, weight: Tensor) -> Tensor:
    maps = x.flatten(1).sin().view(4, 9, 4, 4)
    part = maps[:, :1].as_strided((4, 16), (144, 1))
    return torch.conv2d(maps, weight.expand(8, 9, 4, 4)).flatten(1) + part.sum(1, keepdim=True)


def from_a_row_of_bits(x: Tensor, weight: Tensor) -> Tensor:
    maps = x.flatten(1).sin().view(4, 9, 4, 4)
    bits = maps.view(torch.int16).long().sum((1, 2, 3))
    return torch.conv2d(maps, weight.expand(8, 9, 4, 4)).sum((1, 2, 3)) + bits


@pytest.mark.parametrize(
    ("function", "laid_out"),
    [
        (from_a_row, True),
        (from_a_row_to_maps_in_view, False),
        (from_a_row_written_to, False),
        (from_a_row_partly_strided, False),
        (from_a_row_of_bits, False),
    ],
)
def test_what_is_made_of_a_row_is_laid_out(function: Callable[..., Tensor], laid_out: bool) -> None:
    graph = make_fx(function, tracing_mode="fake")(IMAGES, FILTERS)
    lay_out(graph)
    put = (node for node in graph.graph.nodes if node.target is convolutions._CONTIGUOUS)
    assert any(node.kwargs["memory_format"] is torch.channels_last for node in put) == laid_out
    torch.testing.assert_close(graph(IMAGES, FILTERS), function(IMAGES, FILTERS))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
def test_what_lies_in_memory_is_computed_once() -> None:
    def results(function: Callable[[Tensor], list[Tensor]]) -> int:
        """That TorchInductor computes, before it fuses them."""
        metrics.reset()
        inductor(make_fx(function, tracing_mode="fake")(IMAGES), [IMAGES])
        return metrics.ir_nodes_pre_fusion

    assert results(lambda x: [x.sin() + 1]) == 1
    assert results(lambda x: [in_memory(x.sin()) + 1]) == 2


@pytest.mark.parametrize(
    ("function", "maps", "count"),
    [
        (one_channel.convolution, IMAGES, 1),  # the images with their frame
        (one_channel.transposed_convolution, torch.randn(4, 8, 5, 5), 2),  # rows, then images
    ],
)
def test_what_is_read_again_lies_in_memory(
    function: Callable[..., Tensor], maps: Tensor, count: int
) -> None:
    graph = make_fx(lambda x, weight: function(x, weight, None, [2, 2], [1, 1]))(maps, FILTERS)
    assert sum(node.target is in_memory for node in graph.graph.nodes) == count


def halve(x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight, stride=2).flatten(1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
@pytest.mark.parametrize("function", [encode, halve])
def test_generated_code_computes_the_same_and_is_kept_on_disk(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our own operator in the graph, until its source changes."""
    from torch._dynamo.utils import counters
    from torch._inductor import custom_graph_pass

    def not_found() -> list[int]:
        return [counters["inductor"][f"fxgraph_cache_{how}"] for how in ("miss", "bypass")]

    def is_made() -> bool:
        """Whether torch makes the code rather than find it."""
        before = not_found()
        graph = make_fx(lambda *inputs: [function(*inputs)], tracing_mode="fake")(IMAGES, FILTERS)
        run = inductor(graph, [IMAGES, FILTERS])
        torch.testing.assert_close(run(IMAGES, FILTERS)[0], function(IMAGES, FILTERS))
        return before != not_found()

    is_made()  # or was, by another run of the tests
    assert not is_made()
    read, edited = custom_graph_pass.get_hash_for_files, uuid4().hex

    def changed(files: tuple[str, ...], extra: str = "") -> bytes:
        return read(files, extra + (edited if operator.__file__ in files else ""))

    monkeypatch.setattr(matmul, "get_hash_for_files", changed)
    assert is_made()
