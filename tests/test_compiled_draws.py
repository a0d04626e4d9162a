"""Draws in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.compiled.backend import inductor
from pyro_vae.compiled.draws import draw_at_once
from pyro_vae.errors import CompileError

RANDN = torch.ops.aten.randn.default


def of_torch_distributions(x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, x.exp(), validate_args=False).rsample((3,))


def with_what_is_drawn_used_twice(x: Tensor) -> Tensor:
    noise = torch.empty(x.shape, dtype=x.dtype)
    noise.normal_()
    return noise + noise.sin()


def of_another_scale(x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_(1.0, 2.0) + torch.empty(4).normal_(std=2.0)


def used_before(x: Tensor) -> Tensor:
    noise = torch.empty(4)
    zero = noise.zero_() + 0
    return x + noise.normal_() + zero


def into_a_part(x: Tensor) -> Tensor:
    noise = torch.empty(5, 4).zero_()
    noise[1:].normal_()
    return x + noise


@pytest.mark.parametrize(
    ("function", "at_once"),
    [
        (of_torch_distributions, True),
        (with_what_is_drawn_used_twice, True),
        (of_another_scale, False),
        (used_before, False),
        (into_a_part, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_the_same_draws(
    function: Callable[[Tensor], Tensor], at_once: bool, dtype: torch.dtype
) -> None:
    x = torch.linspace(-1, 1, 4, dtype=dtype)
    graph = make_fx(function)(x)
    draw_at_once(graph)
    assert (RANDN in {node.target for node in graph.graph.nodes}) == at_once
    torch.manual_seed(3)
    found = graph(x)
    torch.manual_seed(3)
    assert torch.equal(found, function(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_drawn_in_the_order_in_which_tensors_lie(dtype: torch.dtype) -> None:
    """As layers make them that put the batch first."""

    def masks(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = F.linear(x, weight)
        dropped = F.dropout(out.transpose(0, 1), 0.4)
        (gradient,) = torch.autograd.grad(dropped.sin().sum(), weight)
        return (
            dropped, gradient, torch.empty_like(x.permute(2, 0, 1)).bernoulli_(0.3),
            torch.empty_like(x[:1]).bernoulli_(0.3), F.alpha_dropout(out.transpose(1, 2), 0.4),
            torch.empty(6, 8, dtype=dtype)[:, 1:].bernoulli_(0.3), F.dropout(x[0].mT, 0.4),
        )  # fmt: skip

    x = torch.linspace(-1, 1, 60, dtype=dtype).view(4, 3, 5)
    weight = torch.linspace(-1, 2, 35, dtype=dtype).view(7, 5).requires_grad_()
    run = inductor(make_fx(masks)(x, weight), [x, weight])
    for seed in range(2):
        torch.manual_seed(seed)
        wanted = masks(x, weight)
        torch.manual_seed(seed)
        for found, want in zip(run(x, weight), wanted, strict=True):
            torch.testing.assert_close(found, want)


def test_what_is_drawn_lies_in_rows_however_its_parameters_lie() -> None:
    def draws(x: Tensor) -> Tensor:
        rates = x.exp().t()
        drawn = (
            torch.poisson(rates), torch.binomial(rates.ceil(), x.t().sigmoid()),
            torch.bernoulli(x.t().sigmoid()), torch.normal(x.t(), rates), torch.normal(x.t(), 2.0),
            torch.normal(0.0, rates), torch._standard_gamma(rates), torch._sample_dirichlet(rates),
            torch.poisson(rates[:, 1:]), torch.poisson(rates[:, :1].expand(4, 6)),
        )  # fmt: skip
        return torch.stack([(draw * x.t()[:, : draw.shape[1]]).sum() for draw in drawn])

    x = torch.linspace(-1, 2, 24, dtype=torch.float64).view(6, 4)
    run = inductor(make_fx(lambda x: (draws(x),))(x), [x])
    for seed in range(2):
        torch.manual_seed(seed)
        wanted, state = draws(x), torch.get_rng_state()
        torch.manual_seed(seed)
        torch.testing.assert_close(run(x)[0], wanted)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("drawn", [4, 3])
def test_rows_in_the_order_of_a_permutation(drawn: int) -> None:
    """As those who train against a product of marginals draw from it (Kim & Mnih 2018)."""

    def shuffled(x: Tensor) -> tuple[Tensor, ...]:
        columns = [column[torch.randperm(drawn)] for column in x.unbind(1)]
        permuted = torch.stack(columns, 1)
        (gradient,) = torch.autograd.grad(permuted.sin().sum() + x[torch.randperm(4)[:2]].sum(), x)
        return permuted, gradient

    x = torch.linspace(-1, 1, 8).view(4, 2).requires_grad_()
    run = inductor(make_fx(shuffled)(x), [x])
    for seed in range(2):
        torch.manual_seed(seed)
        wanted = shuffled(x)
        torch.manual_seed(seed)
        for found, want in zip(run(x), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", ["uniform_", "normal_"])
def test_a_draw_into_a_part_with_gaps_is_refused(name: str) -> None:
    def model(x: Tensor) -> None:
        noise = torch.zeros(6, 4)
        getattr(noise[1:], name)()
        getattr(noise.t(), name)()
        getattr(noise[:, 1:], name)()
        pyro.factor("x", (x * noise).sum())

    with pytest.raises(CompileError, match=rf"getattr\(noise\[:, 1:\].*{name} draws into a part"):
        pv.compile(pv.ELBO()(model, lambda _: None), torch.zeros(4), backend="eager")


def test_a_mask_is_drawn_before_it_is_read() -> None:
    """TorchInductor would have put what attention's weights are made of before the draw."""
    attention = torch.nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True).double()

    def attend(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        out, weights = attention(x, x, x)
        loss = out.sum() + weights.square().sum()
        return (loss, *torch.autograd.grad(loss, [*attention.parameters()]))

    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(2, 5, 4)
    inputs = [x, *attention.parameters()]
    graph = make_fx(attend)(*inputs)
    for seed in range(2):
        torch.manual_seed(seed)
        wanted = attend(x)
        torch.manual_seed(seed)
        for found, want in zip(inductor(graph, inputs)(*inputs), wanted, strict=True):
            torch.testing.assert_close(found, want)


def test_a_mask_of_a_softmax() -> None:
    """PyTorch 2.11 would have read it as it was before the draw."""

    def compute(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        dropped = F.dropout(z.softmax(-1), 0.2)
        loss = (dropped @ weight).log_softmax(-1).sum()
        return (loss, *torch.autograd.grad(loss, z))

    z = torch.linspace(-1, 2, 28, dtype=torch.float64).view(7, 4).requires_grad_()
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).sin()
    run = inductor(make_fx(compute)(z, weight), [z, weight])
    torch.manual_seed(0)
    wanted = compute(z, weight)
    torch.manual_seed(0)
    for found, want in zip(run(z, weight), wanted, strict=True):
        torch.testing.assert_close(found, want)
