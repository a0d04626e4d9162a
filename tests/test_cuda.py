"""Compiled training on a GPU: captured steps against eager ones on the same draws, and `fit`."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import MODELS, vae
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from training_helpers import binary_data, small_vae

import pyro_vae as pv
from pyro_vae.compiled.replay import cuda_graph
from pyro_vae.errors import CompileError, NonFiniteError, PyroVAEError
from pyro_vae.programs import modules_of
from pyro_vae.schedules import Warmup

pytestmark = pytest.mark.cuda
GPU = "cuda"
STEPS = 9  # a few settle, then the graph is captured and replayed


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.set_default_device(GPU)
    yield
    torch.set_default_device(None)


def trained(model: Any, guide: Any) -> list[Tensor]:
    found = [p for module in modules_of(model, guide) for p in module.parameters()]
    found += [p for _, p in pyro.get_param_store().named_parameters()]
    return list({id(p): p for p in found}.values())


def eager_steps(objective: Any, model: Any, guide: Any, args: Any, optim: Any) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optim.zero_grad()
        loss = objective.differentiable_loss(model, guide, *args)
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    return losses


def outcomes(make: Callable[[], Any], objective: Any, kind: Any) -> list[list[Tensor]]:
    """Losses and parameters after training eagerly, step by step, and all at once."""
    found = []
    for way in ("eager", "step", "steps"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = make()
        try:
            objective.differentiable_loss(model, guide, *args)  # makes what is made at first use
        except PyroVAEError as error:
            pytest.skip(f"the objective refuses it: {error}")
        parameters = trained(model, guide)
        optim = kind(parameters)
        svi = pv.CompiledSVI(model, guide, optim, objective)
        pyro.set_rng_seed(1)
        if way == "eager":
            losses = eager_steps(objective, model, guide, args, optim)
        elif way == "step":
            losses = [svi.step(*args) for _ in range(STEPS)]
        else:
            losses = svi.steps(*(a.expand(STEPS, *a.shape) for a in args)).tolist()
        counts = [optim.state[p].get("step", torch.zeros(())) for p in parameters]
        found.append([torch.tensor(losses), *parameters, *(c.to(GPU) for c in counts)])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_captured_steps_are_the_eager_ones(name: str) -> None:
    first, *others = outcomes(MODELS[name], pv.ELBO("auto"), lambda p: Adam(p, 0.01))
    for other in others:
        for got, wanted in zip(other, first, strict=True):
            torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: Adam(p, 0.01, fused=True),
        lambda p: Adam(p, 0.01, capturable=True),
        lambda p: AdamW(p, 0.01, weight_decay=0.1),
        lambda p: SGD(p, 1e-3),
    ],
    ids=["fused", "capturable", "AdamW", "SGD"],
)
def test_every_optimizer(kind: Any) -> None:
    first, *others = outcomes(vae, pv.IWAE(3, "dreg"), kind)
    for other in others:
        for got, wanted in zip(other, first, strict=True):
            torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-7, atol=1e-9)


def test_torch_goes_on_where_the_graph_stopped() -> None:
    """State and counts are such as torch's own step takes."""
    model, guide, (x,) = vae()
    pair = nn.ModuleList([model, guide])
    optim = Adam(pair.parameters(), 0.01, fused=True)
    svi = pv.CompiledSVI(model, guide, optim, pv.ELBO())
    svi.steps(x.expand(STEPS, *x.shape))
    twin = copy.deepcopy(pair)
    its = Adam(twin.parameters(), 0.5, fused=True)
    its.load_state_dict(copy.deepcopy(optim.state_dict()))
    pyro.set_rng_seed(2)
    svi.steps(x.expand(STEPS, *x.shape))
    pyro.set_rng_seed(2)
    eager_steps(pv.ELBO(), *twin, (x,), its)
    for got, wanted in zip(pair.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_draws_go_on_and_a_seed_repeats_them() -> None:
    model, guide, (x,) = vae()
    svi = pv.CompiledSVI(model, guide, Adam(trained(model, guide), 0.0), pv.ELBO())
    svi.steps(x.expand(STEPS, *x.shape))
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(svi.steps(x.expand(STEPS, *x.shape)))
    assert torch.equal(*runs)
    assert len(runs[0].unique()) == STEPS


def test_what_is_not_finite_changes_nothing() -> None:
    model, guide, (x,) = vae()
    svi = pv.CompiledSVI(model, guide, Adam(trained(model, guide), 0.01), pv.ELBO())
    svi.steps(x.expand(STEPS, *x.shape))
    before = [p.clone() for p in trained(model, guide)]
    bad = x.expand(2, *x.shape).clone()
    bad[:, 3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step 1 of 2: .*argument 0 holds nan at \(3, 2\)"):
        svi.steps(bad)
    with pytest.raises(NonFiniteError, match="no step was taken"):
        svi.step(bad[0])
    for now, then in zip(trained(model, guide), before, strict=True):
        assert torch.equal(now, then)
    assert svi.steps(x.expand(STEPS, *x.shape)).isfinite().all()


def test_a_matrix_without_a_factor_takes_no_step() -> None:
    loc = nn.Parameter(torch.zeros(2))

    def model(covariance: Tensor) -> None:
        pyro.sample("x", dist.MultivariateNormal(loc, covariance), obs=torch.ones(2))

    svi = pv.CompiledSVI(model, lambda _: None, Adam([loc], 0.01), pv.ELBO())
    covariance = torch.eye(2)
    svi.steps(covariance.expand(STEPS, 2, 2))
    before = loc.detach().clone()
    with pytest.raises(NonFiniteError):
        svi.step(-covariance)
    assert torch.equal(loc, before)


def test_a_schedule_of_the_kl_weight_captures_nothing_anew() -> None:
    model, guide, (x,) = vae()
    objective = pv.ELBO("analytic")
    svi = pv.CompiledSVI(model, guide, Adam(trained(model, guide), 0.0), objective)
    losses = []
    for step in range(12):
        objective.kl_weight = step / 10
        pyro.set_rng_seed(4)
        losses.append(svi.step(x))
    slopes = torch.tensor(losses).diff()
    torch.testing.assert_close(slopes, slopes[:1].expand(11), rtol=1e-8, atol=1e-8)
    assert slopes[0] > 0
    assert svi._step is not None
    assert len(svi._step._replayed._captured) == len(svi._step.seconds) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kl_schedule": Warmup(30)},
        {"gradient_clip": 0.05},
        {"optimizer": lambda p: SGD(p, 0.02, momentum=0.9)},
        {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.3)},
        {"objective": pv.IWAE(3, "dreg"), "precision": "64-true"},
    ],
    ids=["KL warm-up", "clip", "SGD", "scheduler", "IWAE"],
)
def test_fit_ends_at_the_eager_weights(options: dict[str, Any]) -> None:
    """Batches of two shapes, binarised on the device, and more steps than are taken unseen."""
    torch.set_default_device(None)
    runs = []
    for compile in (False, True):
        made = small_vae()
        run = pv.fit(
            made, binary_data(1290, dynamic=True), epochs=2, batch_size=20, compile=compile,
            device=GPU, **options,
        )  # fmt: skip
        runs.append((made.state_dict(), run.metrics))
    (eager, eager_rows), (fused, fused_rows) = runs
    for name, value in eager.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-6, atol=1e-8)
    for row, other in zip(eager_rows, fused_rows, strict=True):
        for column in ("train_loss", "valid_elbo"):
            assert other[column] == pytest.approx(row[column], rel=1e-7)


def test_fit_finds_what_is_not_finite() -> None:
    torch.set_default_device(None)
    made = small_vae()
    with pytest.raises(NonFiniteError):
        pv.fit(
            made, binary_data(400), epochs=3, batch_size=20, compile=True, device=GPU,
            optimizer=lambda p: Adam(p, 1e306),
        )  # fmt: skip


def test_mixed_precision_trains() -> None:
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    losses = [
        pv.fit(
            small_vae(), binary_data(400), epochs=10, batch_size=20, compile=True, device=GPU,
            precision=precision,
        ).metrics[-1]["train_loss"]
        for precision in ("32-true", "bf16-mixed")
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class TestDefaultsOnTheCpu:
    """As in most scripts: the data and the parameters are moved, and no default device is set."""

    @pytest.fixture(autouse=True)
    def _no_default(self) -> None:
        torch.set_default_device(None)

    def train(self, model: Any, guide: Any, *args: Any, steps: int = STEPS) -> list[float]:
        pyro.set_rng_seed(0)
        svi = pv.CompiledSVI(model, guide, Adam(trained(model, guide), 1e-3), pv.ELBO())
        return [svi.step(*args) for _ in range(steps)]

    def made(self) -> tuple[Any, Any, Tensor]:
        pyro.set_rng_seed(0)
        model, guide, (x,) = vae()
        return model.to(GPU), guide.to(GPU), x.to(GPU)

    def test_the_weight_of_the_kl_moves(self) -> None:
        model, guide, x = self.made()
        assert all(torch.tensor(self.train(model, guide, x)).isfinite())

    def test_and_it_moves_back(self) -> None:
        model, guide, x = self.made()
        objective = pv.ELBO("analytic", kl_weight=0.5)
        there = objective.terms(model, guide, x).kl.item()
        here = objective.terms(model.cpu(), guide.cpu(), x.cpu()).kl.item()
        assert here == pytest.approx(there)
        assert objective.kl_weight.device.type == "cpu"

    def test_an_argument_whose_rows_lie_apart(self) -> None:
        model, guide, x = self.made()
        apart = torch.cat([x, x], 1)[:, : x.shape[1]]
        start = copy.deepcopy(nn.ModuleList([model, guide]))
        wanted = self.train(model, guide, x)
        assert self.train(*start, apart) == pytest.approx(wanted)

    def test_a_number_on_the_cpu_is_read_at_every_step(self) -> None:
        scale = nn.Parameter(torch.zeros(3, device=GPU))

        def model(x: Tensor, weight: Tensor) -> None:
            pyro.factor("x", -weight * ((x - scale) ** 2).sum())

        def guide(x: Tensor, weight: Tensor) -> None:
            pass

        svi = pv.CompiledSVI(model, guide, Adam([scale], 0.0), pv.ELBO())
        x = torch.ones(3, device=GPU)
        with pytest.warns(UserWarning, match="an argument of shape .* is on the CPU"):
            losses = [svi.step(x, torch.tensor(float(n))) for n in range(STEPS)]
        assert losses == pytest.approx([3.0 * n for n in range(STEPS)])

    def test_a_draw_on_the_cpu_is_refused(self) -> None:
        def model(x: Tensor) -> None:
            pyro.sample("s", dist.LogNormal(0.0, 0.5))
            like = dist.Normal(pyro.param("m", x.mean()), 1.0).expand(x.shape).to_event(1)
            pyro.sample("x", like, obs=x)

        def guide(x: Tensor) -> None:
            pyro.sample("s", dist.LogNormal(0.0, 0.5))

        loss = pv.ELBO()(model, guide)
        with pytest.raises(CompileError, match=r"LogNormal.*draws on the CPU"):
            pv.compile(loss, torch.ones(3, device=GPU))

    def test_fit_with_a_gpu_as_the_default(self) -> None:
        data = binary_data(200)  # drawn on the CPU
        torch.set_default_device(GPU)
        made = small_vae()
        run = pv.fit(made, data, epochs=1, batch_size=20, compile=True, device=GPU)
        assert len(run.metrics) == 1


def test_a_failed_capture_leaves_torch_as_it_was() -> None:
    device = torch.device(GPU, 0)
    stream = torch.cuda.current_stream(device)
    earlier = cuda_graph(lambda: [torch.rand(3, device=device)], device)

    def waits() -> list[Tensor]:
        drawn = torch.rand(3, device=device)
        drawn.sum().item()
        return [drawn]

    with pytest.raises(RuntimeError):
        cuda_graph(waits, device)
    assert torch.cuda.current_stream(device) == stream
    torch.manual_seed(0)
    first = torch.rand(3, device=device)
    torch.manual_seed(0)
    replay = cuda_graph(lambda: [torch.rand(3, device=device)], device)
    assert torch.equal(replay()[0], first)
    torch.manual_seed(0)
    assert torch.equal(earlier()[0], first)
    assert not torch.equal(earlier()[0], first)
