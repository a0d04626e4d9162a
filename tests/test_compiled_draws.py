"""Standard normal draws in a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.draws import draw_at_once

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
