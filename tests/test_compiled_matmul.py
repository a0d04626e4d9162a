"""Products through oneDNN: the same numbers, in a step's layouts, and only where faster."""

import shutil
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import backend, conventions, elementary, in_memory, matmul
from pyro_vae.compiled.backend import inductor

pytestmark = pytest.mark.skipif(not matmul.available(), reason="this PyTorch has no oneDNN")

PRODUCT = torch.ops.pyro_vae.product.default
SINGLE, LESS = torch.float32, torch.bfloat16
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no products in bfloat16"
)


def step(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """A linear layer, forward and backward: a step's three layouts."""
    out = torch.addmm(bias, x, weight.t())
    return [out, out @ weight, out.t() @ x]


def graph_of(function: Any, *args: Tensor) -> fx.GraphModule:
    graph = make_fx(function, tracing_mode="fake")(*args)
    for node in graph.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta
    return graph


def layer(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype) for s in ((rows, 120), (90, 120), (90,))]


def num_products(graph: fx.GraphModule) -> int:
    matmul.FasterProducts()(graph.graph)
    graph.recompile()
    return sum(node.target is PRODUCT for node in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [SINGLE, pytest.param(LESS, marks=needs_bfloat16)])
@pytest.mark.parametrize("always", [True, False])
def test_the_faster_way_computes_the_same(
    always: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_WORTHWHILE", float("inf") if always else 0.0)
    args = layer(128, dtype)
    graph = graph_of(step, *args)
    assert num_products(graph) == (3 if always else 0)
    for got, expected, exact in zip(
        graph(*args), step(*args), step(*(a.double() for a in args)), strict=True
    ):
        error, its_error = ((v.double() - exact).norm() for v in (got, expected))
        assert error <= 2 * its_error + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (layer(4), "small"),
        (layer(128, torch.float64), "more than single"),
        (layer(128, torch.float16), "of a precision that is timed nowhere"),
    ],
    ids=["small", "double", "half"],
)
def test_other_products_stay(args: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_WORTHWHILE", float("inf"))
    assert num_products(graph_of(step, *args)) == 0, why


def test_a_refused_layout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(matmul, "_WORTHWHILE", float("inf"))
    monkeypatch.setattr(matmul, "_onednn", refuse)
    assert num_products(graph_of(step, *layer(128))) == 0


@pytest.mark.parametrize("dtype", [SINGLE, pytest.param(LESS, marks=needs_bfloat16)])
@pytest.mark.parametrize(("units", "taken"), [(0.0, 3), (1.0, 3), (100.0, 0)])
def test_a_way_that_computes_something_else_is_not_taken(
    units: float, taken: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else is more than what rounding may change."""
    factor = 1 + units * (torch.finfo(dtype).eps if dtype is LESS else 1e-5)
    monkeypatch.setattr(matmul, "_WORTHWHILE", float("inf"))
    monkeypatch.setattr(
        matmul, "_onednn", lambda a, b, bias: (factor * matmul._aten(a, b, bias)).to(dtype)
    )
    assert num_products(graph_of(step, *layer(128, dtype))) == taken


def test_a_bias_that_stays_is_added_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_WORTHWHILE", 0.0)
    for args, moved in (
        (layer(128), True),
        (layer(4), True),
        (layer(128, torch.float64), False),
        (layer(128, LESS), False),  # it would be rounded twice
    ):
        graph = graph_of(step, *args)
        matmul.FasterProducts()(graph.graph)
        graph.recompile()
        targets = [node.target for node in graph.graph.nodes]
        assert (torch.ops.aten.addmm.default not in targets) == moved
        assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
        for got, expected in zip(graph(*args), step(*args), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@needs_bfloat16
def test_each_precision_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[Any, ...]] = []

    def note(*layouts: Any) -> bool:
        timed.append(layouts)
        return False

    monkeypatch.setattr(matmul, "_faster", note)
    for dtype in (SINGLE, LESS):
        num_products(graph_of(step, *layer(128, dtype)))
    assert [{layout[2] for layout in layouts if layout} for layouts in timed] == (
        [{SINGLE}] * 3 + [{LESS}] * 3
    )
    assert matmul._example(*timed[-1][0]).dtype is LESS


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
@pytest.mark.parametrize(("worthwhile", "rows", "onednn"), [(float("inf"), 128, 3), (0.0, 129, 0)])
def test_generated_code_calls_it(
    worthwhile: float, rows: int, onednn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the three layouts, with a bias and without; and not by way of Python."""
    sources: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", sources.append)
    monkeypatch.setattr(matmul, "_WORTHWHILE", worthwhile)
    args = layer(rows)
    compiled = inductor(make_fx(step)(*args), args)
    (source,) = sources  # of what is found in the cache as well
    assert source.count("aoti_torch_cpu__linear_pointwise(") == onednn
    assert source.count("aoti_torch_cpu_mm_out(") == 3 - onednn
    assert "addmm_out(" not in source
    assert "pyro_vae.product" not in source
    for got, expected in zip(compiled(*args), step(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [backend, conventions, elementary, in_memory, matmul])
def test_what_torch_knows_nothing_of_is_part_of_its_cache_key(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which it keeps code on disk, and finds it again: not that of another release of ours."""
    now = matmul.FasterProducts().uuid()
    read = matmul.get_hash_for_files

    def edited(files: tuple[str, ...], extra: str = "") -> bytes:
        return read(files, extra + ("edited" if module.__file__ in files else ""))

    monkeypatch.setattr(matmul, "get_hash_for_files", edited)
    assert matmul.FasterProducts().uuid() != now


def test_its_choices_are_part_of_torchs_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    now = matmul.FasterProducts().uuid()
    assert matmul.FasterProducts().uuid() == now
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # by which they may differ
    assert matmul.FasterProducts().uuid() != now
