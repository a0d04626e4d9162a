"""What the tests of the compiled objective do again and again."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv


def parameters(*modules: Any) -> list[Tensor]:
    """Every parameter of the modules and of Pyro's store, once."""
    found = [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
    found += [p for _, p in pyro.get_param_store().named_parameters()]
    return list({id(p): p for p in found}.values())


def loss_and_grads(
    loss: Callable[..., Tensor], args: Any, params: list[Tensor], seed: int
) -> list[Tensor | None]:
    pyro.set_rng_seed(seed)
    for p in params:
        p.grad = None
    value = loss(*args)
    value.backward()
    return [value.detach(), *(None if p.grad is None else p.grad.clone() for p in params)]


def assert_same(got: list[Tensor | None], wanted: list[Tensor | None], rtol: float) -> None:
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert (g - w).norm() <= rtol * w.norm() + 1e-14


def programs(compiled: Any) -> int:
    """How many graphs were compiled."""
    return sum(map(len, compiled._fused._programs.values()))


def agree(loss: nn.Module, compiled: nn.Module, *args: Any) -> None:
    """Hold loss and gradients against the eager ones, on the same draws."""
    params = parameters(loss)
    expected = loss_and_grads(loss, args, params, 5)
    assert_same(loss_and_grads(compiled, args, params, 5), expected, 1e-10)


def program(body: Callable[[Tensor], Any]) -> nn.Module:
    """A loss whose model does `body`."""

    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("body", torch.as_tensor(body(x)).sum())

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    return pv.ELBO()(model, guide)
