"""Arguments that are alike and not the same, and the same that are handed over twice."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_helpers import agree, assert_same, loss_and_grads, program, programs
from torch import Tensor, nn
from torch.optim import Adam

import pyro_vae as pv
from pyro_vae.compiled.step import fuse_step
from pyro_vae.errors import CompileError


def test_keys_that_are_equal_but_not_the_same() -> None:
    weights = {int: 5.0, bool: 2.0, float: 3.0}

    def body(given: Any) -> Tensor:
        return torch.stack([weights[type(k)] * v.sum() for k, v in given.items()])

    loss = program(body)
    run = pv.compile(loss, backend="eager")
    for key in (1, True, 1.0, 1):
        agree(loss, run, {key: torch.ones(3)})
    assert programs(run) == 3


def test_one_tensor_handed_over_twice() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", (2 * x).sum() + (5 * y).sin().sum() * (7.0 if x is y else 1.0))

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    loss = pv.ELBO("monte_carlo")(model, guide)
    run = pv.compile(loss, backend="eager")
    for twice in (True, False, True):
        for x in (torch.ones(3), torch.linspace(0, 1, 3)):
            x.requires_grad_()
            args = (x, x if twice else x.detach().clone().requires_grad_())
            expected = loss_and_grads(loss, args, [*args], 5)
            assert_same(loss_and_grads(run, args, [*args], 5), expected, 1e-10)
    assert programs(run) == 2


def test_a_step_again_of_one_tensor_twice() -> None:
    weight = nn.Parameter(torch.ones(3))
    step = fuse_step(
        lambda x, y: ([(weight * x).sum() * (7.0 if x is y else 1.0) + y.sum()], None),
        {"weight": nn.ParameterList([weight])}, Adam([weight], lr=0.0), backend="eager",
    )  # fmt: skip
    assert step is not None
    for x, y in ((1, 1), (1, 2), (2, 2), (3, 1), (2, 2)):
        tensors = {n: torch.full((3,), float(n)) for n in (x, y)}
        for take in (step, step.again):
            taken = take(tensors[x], tensors[y])
            assert taken is not None
            assert taken.outputs[0] == 3 * x * (7 if x == y else 1) + 3 * y


def test_gradients_of_several_factors_at_once() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    run = pv.compile(program(lambda x: (weight * x).sum()), backend="eager")
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)
    (one,) = torch.autograd.grad(run(x), [weight])
    factors = torch.tensor([1.0, 2.0, -3.0])
    (found,) = torch.autograd.grad(run(x), [weight], factors, is_grads_batched=True)
    torch.testing.assert_close(found, factors[:, None] * one)


def test_an_argument_is_a_leaf_as_it_was() -> None:
    loss = program(lambda x: x.sum() * (2 if x.is_leaf else 1) * (3 if x._base is None else 1))
    run = pv.compile(loss, backend="eager")
    for wants in (True, False):
        agree(loss, run, torch.linspace(0, 1, 3).requires_grad_(wants))


def test_a_conjugate_handed_over_twice() -> None:
    loss = program(lambda pair: (pair[0] * pair[1]).real * (2.0 if pair[0] is pair[1] else 1.0))
    run = pv.compile(loss, backend="eager")
    x = torch.tensor([1.0 + 2.0j, 0.5j]).conj()
    for pair in ([x, x], [x, x.clone().conj()]):
        agree(loss, run, pair)


def test_a_write_that_changes_nothing_is_a_write() -> None:
    with pytest.raises(CompileError, match="changes an argument while it runs"):
        pv.compile(program(lambda x: x.clamp_(min=0)), torch.ones(3), backend="eager")


def test_steps_again_see_a_flag_that_changes_in_between() -> None:
    weight, flag = nn.Parameter(torch.ones(3)), torch.tensor(False)
    module = nn.ParameterList([weight])
    module.register_buffer("flag", flag)
    step = fuse_step(
        lambda x: ([(weight * x).sum() * (7.0 if flag else 1.0)], None),
        {"module": module}, Adam([weight], lr=0.0), backend="eager",
    )  # fmt: skip
    assert step is not None
    for value in (False, True, False):
        flag.fill_(value)
        for _ in range(2):
            taken = step.again(torch.ones(3))
            assert taken is not None
            assert taken.outputs[0] == (21 if value else 3)
