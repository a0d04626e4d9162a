"""Inputs of a program over the same memory, which it writes to."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_helpers import assert_same, loss_and_grads, program, programs
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import CompileError

X = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)


class Averaged(nn.Module):
    """Reads averages that it has moved first."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        self.first.mul_(0.5).add_(1.0)
        self.second.mul_(0.5).add_(2.0)
        return (self.weight * x).exp() * self.first.clone() + self.second.clone()


def losses(first: Tensor, second: Tensor, backend: str = "eager") -> tuple[Averaged, Any, Any]:
    module = Averaged(first, second)
    loss = program(module)
    return module, loss, pv.compile(loss, X, backend=backend)


def assert_alike(module: Averaged, loss: nn.Module, run: nn.Module, x: Tensor) -> None:
    """From the same buffers, and to the same."""
    found = []
    for each in (loss, run):
        module.first.fill_(0.3)
        module.second.fill_(-0.6)
        results = loss_and_grads(each, (x,), [*module.parameters()], 5)
        found.append([*results, *(buffer.clone() for buffer in module.buffers())])
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "view", [lambda first: first, lambda first: first[1:2].expand(4)], ids=["whole", "part"]
)
def test_an_argument_that_is_a_buffer_is_refused_at_any_call(backend: str, view: Any) -> None:
    module, loss, run = losses(torch.zeros(4).double(), torch.zeros(4).double(), backend)
    for _ in range(2):
        before = module.first.clone()
        with pytest.raises(CompileError, match=r"an argument .*shares (its )?memory"):
            run(view(module.first))
        assert torch.equal(module.first, before)
    assert_alike(module, loss, run, X.exp())
    assert programs(run) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_averages_of_batch_norm(backend: str) -> None:
    """Whose operation does not say that it writes."""
    norm = nn.BatchNorm1d(3, track_running_stats=True)
    del norm.num_batches_tracked  # which is written to as well
    norm.num_batches_tracked = None
    target = torch.zeros(3)

    def model(x: Tensor, target: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(norm(x) - target).square().sum())

    def guide(x: Tensor, target: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    run = pv.compile(pv.ELBO("monte_carlo")(model, guide), backend=backend)
    run(torch.randn(5, 3), target)
    for shared in (norm.running_mean, norm.running_var):
        with pytest.raises(CompileError, match=r"shares (its )?memory"):
            run(torch.randn(5, 3), shared)
    norm.eval()
    run(torch.randn(5, 3), norm.running_mean)


def test_buffers_that_are_tied_later_are_refused() -> None:
    module, _, run = losses(torch.zeros(4).double(), torch.zeros(4).double())
    module.second = module.first[:]
    with pytest.raises(CompileError, match=r"second shares memory with .*first, which the prog"):
        run(X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_parts_of_one_piece_of_memory_that_do_not_meet(backend: str) -> None:
    flat = torch.zeros(8, dtype=torch.float64)
    module, loss, run = losses(flat[:4], flat[4:], backend)
    for x in (X, -X, X.flip(0)):
        assert_alike(module, loss, run, x)
    assert programs(run) == 1
    module.second = flat[3:7]
    with pytest.raises(CompileError, match="shares memory"):
        run(X)


def test_an_argument_that_is_changed_by_its_data_is_named() -> None:
    def body(x: Tensor) -> Tensor:
        x.data.add_(1)
        return x

    with pytest.raises(CompileError, match="changes an argument while it runs"):
        pv.compile(program(body), X.clone(), backend="eager")


def test_places_in_the_memory_of_an_argument_are_refused() -> None:
    strided = lambda x: x[1:].as_strided((2,), (1,), 0)  # noqa: E731
    with pytest.raises(CompileError, match="as_strided with an offset"):
        pv.compile(program(strided), X, backend="eager")
