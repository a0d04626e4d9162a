"""Functions by faster formulas: exact to a few last places, and put only where they are meant."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled import elementary
from pyro_vae.compiled.backend import inductor

EPS = torch.finfo(torch.float32).eps
UNIT = torch.cat([torch.linspace(1e-3, 1, 200_001), torch.logspace(-30, 0, 50_001)]).float()
REALS = torch.cat([-30 * UNIT, 30 * UNIT])


def relative_error(function: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor) -> float:
    """The largest, in units of the last place."""
    assert x.dtype == torch.float32
    assert exact.dtype == torch.float64
    return float(((function(x).double() - exact) / exact).abs().max()) / EPS


def test_tanh() -> None:
    assert relative_error(elementary.tanh, REALS, REALS.double().tanh()) < 4
    assert elementary.tanh(REALS).abs().max() <= 1


def test_log_one_plus() -> None:
    assert relative_error(elementary.log_one_plus, UNIT, UNIT.double().log1p()) < 2
    assert elementary.log_one_plus(torch.zeros(())) == 0


def test_softplus() -> None:
    exact = torch.logaddexp(REALS.double(), torch.zeros((), dtype=torch.float64))
    few = REALS > -80  # where exp is no denormal number
    assert relative_error(elementary.softplus, REALS[few], exact[few]) < 4


def test_sigmoid() -> None:
    exact = REALS.double().sigmoid()
    assert relative_error(elementary.sigmoid, REALS, exact) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("function", "torchs"),
    [
        (elementary.tanh, torch.tanh),
        (elementary.softplus, F.softplus),
        (elementary.sigmoid, torch.sigmoid),
    ],
)
def test_less_than_single_is_rounded_once(
    function: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = REALS.to(dtype).unique()
    got, want = function(x), torchs(x)
    assert got.dtype is dtype
    # half a unit from what is right, as torch's is; of computing in `dtype` it would be several
    exact = torchs(x.double())
    unit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - exact).abs() / unit).max() < 0.51
    assert (got != want).sum() <= len(x) // 1000


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_cross_entropy(target: float) -> None:
    logits = REALS[REALS.abs() < 80]
    want = F.binary_cross_entropy_with_logits(
        logits.double(), torch.full((), target, dtype=torch.float64).expand(len(logits)),
        reduction="none",
    )  # fmt: skip
    got = elementary.cross_entropy_of_logits(logits, torch.tensor(target))
    # the terms may cancel, to their own rounding
    assert ((got - want).abs() / (1 + logits.abs())).max() < 2 * EPS


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf]).float()
    torch.testing.assert_close(elementary.tanh(x), x.tanh(), equal_nan=True)
    torch.testing.assert_close(elementary.softplus(x), F.softplus(x), equal_nan=True)
    torch.testing.assert_close(elementary.sigmoid(x), x.sigmoid(), equal_nan=True)
    for target in (torch.zeros_like(x), torch.ones_like(x)):
        want = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        got = elementary.cross_entropy_of_logits(x, target)
        torch.testing.assert_close(got, want, equal_nan=True)


def everything(x: Tensor) -> tuple[Tensor, ...]:
    target = (x > 0).to(x)
    return (
        x.tanh(),
        x.sigmoid(),
        F.softplus(x),
        F.softplus(x, beta=2.0),
        F.binary_cross_entropy_with_logits(x, target, reduction="none"),
        F.binary_cross_entropy_with_logits(x, target, target + 1, reduction="none"),
        F.binary_cross_entropy_with_logits(x, target),
        (x / 4).atanh(),
        x.erf(),
        (x / 4).erfinv(),
    )


def test_where_they_are_put() -> None:
    def number(x: Tensor, device: str = "cpu") -> int:
        graph = make_fx(everything)(x)
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = node.meta["val"].to(device)
        elementary.approximate(graph)
        for got, want in zip(graph(x), everything(x), strict=True):
            torch.testing.assert_close(got, want)
        return sum(node.target in vars(elementary).values() for node in graph.graph.nodes)

    x = torch.linspace(-3, 3, 7).float()
    assert number(x) == 7
    # not the cross entropy, of which torch rounds every term
    assert number(x.bfloat16()) == number(x.half()) == 6
    assert number(x.double()) == 2
    assert number(x, "meta") == 0  # no CPU


def test_in_generated_code() -> None:
    x = REALS[::101]
    graph = make_fx(everything)(x)
    for got, want in zip(inductor(graph, [x])(x), everything(x), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-12, equal_nan=True)


def test_in_generated_code_too_tanh_stays_within_one() -> None:
    graph = make_fx(lambda x: (x.tanh(),))(REALS)
    [found] = inductor(graph, [REALS])(REALS)
    assert found.abs().max() <= 1
    assert relative_error(lambda _: found, REALS, REALS.double().tanh()) < 4


def test_in_generated_code_tanh_reaches_one() -> None:
    """And so its gradient zero: of what is left of it Adam would make whole steps."""
    x = torch.cat([torch.linspace(9.02, 30, 1001), torch.tensor([1e4, math.inf])]).float()
    graph = make_fx(lambda x: (x.tanh(), (-x).tanh(), 1 - x.tanh() ** 2))(x)
    found, negative, gradient = inductor(graph, [x])(x)
    assert found.unique().tolist() == [1.0]
    assert negative.unique().tolist() == [-1.0]
    assert gradient.unique().tolist() == [0.0]


SMALL = torch.cat([torch.linspace(-1, 1, 20_001) * s for s in (1e-30, 1e-8, 1e-3, 0.5, 1, 20)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_minus_one(dtype: torch.dtype) -> None:
    x = SMALL[SMALL != 0].to(dtype)
    exact = np.expm1(x.numpy().astype(np.longdouble))
    graph = make_fx(lambda x: (x.expm1(), x.clone().expm1_()))(x)
    for found in (elementary.exp_minus_one(x), *inductor(graph, [x])(x)):
        error = np.abs((found.numpy() - exact) / exact).max() / torch.finfo(dtype).eps
        assert error < 2


def test_exp_minus_one_of_what_is_not_finite() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4, 0.0]).float()
    torch.testing.assert_close(elementary.exp_minus_one(x), x.expm1(), equal_nan=True)
    whole = torch.tensor([-2, 0, 3])
    torch.testing.assert_close(elementary.exp_minus_one(whole), whole.expm1())
    half = elementary.exp_minus_one(SMALL.bfloat16())
    torch.testing.assert_close(half, SMALL.bfloat16().expm1(), rtol=2**-7, atol=0)


def test_units_made_of_exp_minus_one() -> None:
    x = SMALL.float()
    graph = make_fx(lambda x: (F.elu(x), F.selu(x)))(x)
    exact = (F.elu(x.double()), F.selu(x.double()))
    for found, want in zip(inductor(graph, [x])(x), exact, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["atanh", "erf", "erfinv"])
def test_small_arguments_and_those_near_one(name: str, dtype: torch.dtype) -> None:
    near = 1 - torch.logspace(0, -6, 2001)
    x = torch.cat([SMALL[(SMALL != 0) & (SMALL.abs() < 1)], near[1:], -near[1:]]).to(dtype)
    graph = make_fx(lambda x: (getattr(x, name)(),))(x)
    function = np.arctanh if name == "atanh" else getattr(scipy.special, name)
    exact = function(x.double().numpy())
    [found] = inductor(graph, [x])(x)
    assert np.abs((found.numpy() - exact) / exact).max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["atanh", "erf", "erfinv"])
def test_small_arguments_of_sixteen_bits(name: str) -> None:
    x = SMALL[SMALL.abs() < 1].bfloat16()
    graph = make_fx(lambda x: (getattr(x, name)(),))(x)
    [found] = inductor(graph, [x])(x)
    exact = getattr(x.double(), name)().bfloat16()
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_ends_of_what_they_take(dtype: torch.dtype) -> None:
    x = torch.tensor([1, -1, 0, -0.0, 2, -2, math.inf, -math.inf, math.nan], dtype=dtype)
    graph = make_fx(lambda x: (x.atanh(), x.erfinv()))(x)
    expected = graph(x)
    for results in (inductor(graph, [x])(x), (elementary.artanh(x), elementary.erfinv(x))):
        for found, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(found, exact, equal_nan=True)
            # also the sign of zero
            torch.testing.assert_close(1 / found, 1 / exact, equal_nan=True)
    torch.testing.assert_close(elementary.erf(x.float()), x.float().erf(), equal_nan=True)


TENTHS = torch.cat([
    torch.arange(-40, 41, dtype=torch.float64) / 10,
    torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e-30], dtype=torch.float64),
])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_division_that_rounds_down_and_what_it_leaves(dtype: torch.dtype) -> None:
    def divided(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        whole = torch.arange(-20, 20)
        return (
            x // 0.1, x // -0.3, x // y, x // 0, 3.0 // x, x // math.inf,
            x.clone().floor_divide_(0.1), torch.div(x, 0.1, rounding_mode="floor"),
            torch.div(x, y, rounding_mode="trunc"), whole // 3, whole // 0.7,
            x % 0.1, x % -0.3, x % y, x % 0, 3.0 % x, x % math.inf, x.clone().remainder_(0.1),
            whole % 3, whole % 0.7,
        )  # fmt: skip

    x = TENTHS.to(dtype)
    y = 0.3 * x.flip(0)
    graph = make_fx(divided)(x, y)
    for found, want in zip(inductor(graph, [x, y])(x, y), divided(x, y), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_numbers_are_those_of_torch(dtype: torch.dtype) -> None:
    def rows(x: Tensor) -> tuple[Tensor, ...]:
        edges = torch.linspace(-4, 4, 81, dtype=dtype)
        return (
            edges, torch.linspace(0, 1, 1001, dtype=dtype).mul_(2),
            torch.logspace(-3, 3, 61, dtype=dtype), torch.arange(-4, 4, 0.1, dtype=dtype),
            torch.arange(9, dtype=dtype), torch.arange(2, 9),
            torch.bucketize(x, edges),
        )  # fmt: skip

    x = TENTHS.to(dtype)
    run = inductor(make_fx(rows)(x), [x])
    for _ in range(2):  # nothing of the first call is left in the second
        for found, want in zip(run(x), rows(x), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_times_what_is_not_finite_hides_nothing(dtype: torch.dtype) -> None:
    def products(x: Tensor) -> tuple[Tensor, ...]:
        whole = x.isfinite().long()
        return (
            0 * x, x * 0, x * False, 0 / x, False / x, 1 - 0 * x, (x * 0).sum(), x.exp().mul_(0),
            0 * whole, 0 / whole, torch.rsub(x, 1, alpha=0), torch.addcmul(x * 0, x, x, value=0),
            *torch._foreach_mul([x], 0),
        )  # fmt: skip

    x = torch.tensor([1.0, 0.0, -2.0, math.nan, math.inf, -math.inf], dtype=dtype)
    graph = make_fx(products)(x)
    for found, want in zip(inductor(graph, [x])(x), products(x), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_a_place_that_is_nan_is_sampled_as_nan() -> None:
    def sample(maps: Tensor, places: Tensor) -> list[Tensor]:
        return [F.grid_sample(maps, places, align_corners=False)]

    maps, places = torch.randn(1, 2, 5, 5), torch.rand(1, 3, 3, 2) - 0.5
    run = inductor(make_fx(sample)(maps, places), [maps, places])
    places[0, 1, 1] = math.nan
    (found,), (want,) = run(maps, places), sample(maps, places)
    assert want.isnan().any()
    torch.testing.assert_close(found, want, equal_nan=True)


def test_gradients_in_generated_code() -> None:
    """Against float64: near one artanh and erfinv make more of an argument's rounding."""

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        target = 0.3 * torch.ones_like(x)
        unit = x.tanh() * 0.99
        values = (
            x.tanh(), x.sigmoid(), F.softplus(x), x.erf(), x.expm1(), unit.atanh(), unit.erfinv(),
            F.binary_cross_entropy_with_logits(x, target, reduction="none"),
        )  # fmt: skip
        return tuple(torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in values)

    x = torch.cat([3 * UNIT[::97], -3 * UNIT[::89]]).requires_grad_()
    exact = gradients(x.detach().double().requires_grad_())
    for found, want in zip(inductor(make_fx(gradients)(x), [x])(x), exact, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
