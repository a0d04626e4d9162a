"""What is switched on around a compiled program: caches, hooks, modes, other processes."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from compiled_helpers import (
    agree,
    assert_same,
    loss_and_grads,
    parameters,
    program,
    programs,
)
from compiled_models import vae
from pyro.distributions import transforms
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import group
from torch.distributed._functional_collectives import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Adam
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pyro_vae as pv
from pyro_vae.errors import CompileError

X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def compiled(loss: Any) -> Any:
    return pv.compile(loss, backend="eager")


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grad", [True, False])
def test_what_parametrizations_cache_is_worked_out_anew(grad: bool) -> None:
    linear = weight_norm(nn.Linear(3, 3))
    loss = program(lambda x: linear(x).square().sum())
    fused = compiled(loss)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            found = []
            for each in (fused, loss):
                with parametrize.cached():
                    found.append(each(X))
            torch.testing.assert_close(*found)
            with torch.no_grad():
                for p in linear.parameters():
                    p += 0.1
    assert parametrize._cache_enabled == 0


def test_evaluation_with_cached_parametrizations() -> None:
    losses = []
    for kind in (pv.CompiledSVI, None):
        pyro.set_rng_seed(0)
        model, guide, (x,) = vae()
        for layer in [m for m in guide.modules() if isinstance(m, nn.Linear)]:
            weight_norm(layer)
        pair = nn.ModuleList([model, guide])
        optim = Adam(pair.parameters(), 0.01)
        svi = kind and kind(model, guide, optim, pv.ELBO(), backend="eager")
        row = []
        for step in range(4):
            pyro.set_rng_seed(step)
            with parametrize.cached():
                evaluate = svi.evaluate_loss if svi else partial(pv.ELBO().loss, model, guide)
                row.append(evaluate(x))
            if svi:
                svi.step(x)
            else:
                optim.zero_grad()
                pv.ELBO().differentiable_loss(model, guide, x).backward()
                optim.step()
        losses.append(row)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_tensor_that_hides_from_run_to_run_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    @cache
    def doubled() -> Tensor:
        return (2 * weight).detach()

    with pytest.raises(CompileError, match=r"keeps a tensor of shape \(3,\) that it has made"):
        compiled(program(lambda x: (weight * doubled() * x).sum()))(X)


def test_a_constant_that_hides_is_none_the_worse() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    @cache
    def constant() -> Tensor:
        return torch.arange(3.0).cumsum(0)

    loss = program(lambda x: (weight * constant() * x).sum())
    agree(loss, compiled(loss), X)


class FlowDensity(nn.Module):
    """A density by a transform that Pyro has remember its last value, by the object."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [self.flow]), obs=x)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: transforms.affine_coupling(3, [4]),
        lambda: transforms.Spline(3, 4),
        lambda: transforms.affine_autoregressive(3, [4]),
        lambda: transforms.matrix_exponential(3),
    ],
    ids=["coupling", "spline", "autoregressive", "matrix exponential"],
)
def test_what_pyros_transforms_remember_of_other_arguments_is_not_used(flow: Any) -> None:
    loss = pv.ELBO("monte_carlo")(
        FlowDensity(flow()), lambda x: pyro.sample("z", dist.Normal(0.0, 1.0))
    )
    run = pv.compile(loss, backend="eager")
    for seed in range(3):
        x = torch.randn(5, 3)
        wanted = loss_and_grads(loss, (x.clone(),), parameters(loss), seed)
        assert_same(loss_and_grads(run, (x,), parameters(loss), seed), wanted, 1e-10)
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    assert programs(run) == 1


def test_hooks_on_what_autograd_saves_stay_out() -> None:
    linear = nn.Linear(3, 3)
    loss = program(lambda x: linear(x).exp().sum())
    fused = compiled(loss)
    with saved_tensors_hooks(lambda t: t, lambda t: 0.5 * t):
        fused(X)
        held = torch._C._autograd._top_saved_tensors_default_hooks(False)
    assert held is not None
    agree(loss, fused, X)


def test_the_first_call_under_a_checkpoint() -> None:
    linear = nn.Linear(3, 3)
    loss = program(lambda x: linear(x).exp().sum())
    fused = compiled(loss)
    gradients = []
    for each in (fused, loss):
        linear.zero_grad()
        checkpoint(each, X, use_reentrant=False).backward()
        gradients.append([p.grad for p in linear.parameters()])
    torch.testing.assert_close(*gradients)


class Halved(TorchFunctionMode):
    """Halves what linear layers return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 0.5 * found if func is F.linear else found


def test_modes_around_a_call_are_seen() -> None:
    linear = nn.Linear(3, 3)
    loss = program(lambda x: linear(x).sum())
    fused = compiled(loss)
    mode = Halved()
    for _ in range(2):
        with mode:
            agree(loss, fused, X)
        agree(loss, fused, X)
        with torch.device("cpu"):
            agree(loss, fused, X)
    assert programs(fused) == 3


@pytest.mark.usefixtures("process_group")
class TestOtherProcesses:
    def test_around_the_whole(self) -> None:
        model, guide, (x,) = vae()
        loss = pv.ELBO()(model, guide)
        gradients = []
        for each in (DistributedDataParallel(compiled(loss)), DistributedDataParallel(loss)):
            loss.zero_grad()
            pyro.set_rng_seed(1)
            each(x).backward()
            gradients.append([p.grad for p in loss.parameters()])
        torch.testing.assert_close(*gradients)

    def test_within_is_refused(self) -> None:
        network = DistributedDataParallel(nn.Linear(3, 3))
        with pytest.raises(CompileError, match=r"is a DistributedDataParallel.*around the whole"):
            compiled(program(lambda x: network(x).sum()))(X)

    def test_sums_over_processes_are_refused(self) -> None:
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        with pytest.raises(CompileError, match=r"all_reduce\(weight \* x.*other processes"):
            compiled(program(lambda x: all_reduce(weight * x, "sum", group.WORLD).sum()))(X)
