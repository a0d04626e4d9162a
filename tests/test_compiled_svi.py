"""CompiledSVI against Pyro's SVI: the same script, the same numbers."""

import re
import shutil
import subprocess
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import FEATURES, LATENT, MODELS, binary, dropout, vae
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.compiled import backend
from pyro_vae.errors import CompileError, ConfigError

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor finds no C++ compiler (g++ or clang++)",
)


def losses(svi: Any, args: Any, steps: int = 6) -> list[float]:
    """Losses of a few steps, from the same seed on."""
    pyro.set_rng_seed(7)
    return [svi.step(*args) for _ in range(steps)] + [svi.evaluate_loss(*args)]


def compare(name: str, backend: str, objective: Any = None) -> None:
    """Train by Pyro and compiled, each from the same start."""
    outcomes = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = MODELS[name]()
        optim = pyro.optim.Adam({"lr": 0.05})
        options = {} if kind is SVI else {"backend": backend}
        svi = kind(model, guide, optim, objective or Trace_ELBO(), **options)
        svi.evaluate_loss(*args)  # an AutoGuide draws its initial values at the first call
        outcomes.append(torch.tensor(losses(svi, args)))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)


class TestAgainstPyro:
    @pytest.mark.parametrize("name", ["bernoulli", "subsampled", "AutoNormal", "PyroModule"])
    def test_it_trains_as_svi_does(self, name: str) -> None:
        compare(name, "eager")

    def test_local_parameters(self) -> None:
        with pyro.settings.context(module_local_params=True):
            compare("PyroModule", "eager")
            compare("bernoulli", "eager")

    def test_a_loss_that_is_a_function(self) -> None:
        def loss(model: Any, guide: Any, *args: Any) -> Tensor:
            trace = pyro.poutine.trace(guide).get_trace(*args)
            replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(*args)
            return trace.log_prob_sum() - replayed.log_prob_sum()

        compare("bernoulli", "eager", loss)

    def test_what_is_not_registered_is_not_trained(self) -> None:
        network = nn.Linear(LATENT, FEATURES)

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=network(z)).to_event(1), obs=x)

        _, guide, (x,) = vae()
        before = network.weight.detach().clone()
        svi = pv.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pv.ELBO(), backend="eager")
        encoder = guide.posterior.network.layers[0].weight.detach().clone()
        svi.step(x)
        assert torch.equal(network.weight, before)
        assert not torch.equal(guide.posterior.network.layers[0].weight, encoder)


class TestTheOptimizer:
    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
    def test_a_torch_optimizer_steps_as_it_would(self, kind: Any) -> None:
        outcomes = []
        for compiled in (False, True):
            pyro.set_rng_seed(0)
            model, guide, (x,) = vae()
            loss = pv.ELBO()(model, guide)
            optim = kind(loss.parameters(), lr=0.01)
            if compiled:
                svi = pv.CompiledSVI(model, guide, optim, loss.elbo, backend="eager")
                pyro.set_rng_seed(3)
                outcomes.append(torch.tensor([svi.step(x) for _ in range(5)]))
                # the update of Adam and AdamW is in the graph
                assert optim.param_groups[0]["fused"] is (True if kind is torch.optim.SGD else None)
                continue
            pyro.set_rng_seed(3)
            values = []
            for _ in range(5):
                optim.zero_grad()
                value = loss(x)
                value.backward()
                optim.step()
                values.append(value.item())
            outcomes.append(torch.tensor(values))
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)

    def test_the_users_choice_stands(self) -> None:
        model, guide, _ = vae()
        for option in ("fused", "foreach"):
            optim = torch.optim.SGD(model.parameters(), 0.1, **{option: False})
            pv.CompiledSVI(model, guide, optim, pv.ELBO())
            assert not optim.param_groups[0]["fused"]

    def test_only_what_it_holds_is_trained(self) -> None:
        model, guide, (x,) = vae()
        before = [p.detach().clone() for p in model.parameters()]
        optim = torch.optim.Adam(guide.parameters(), lr=0.1)
        pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend="eager").step(x)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])

    def test_a_gradient_that_was_there_counts(self) -> None:
        """As in SVI, whose backward adds to it."""
        model, guide, (x,) = vae()
        optim = torch.optim.SGD(guide.parameters(), lr=0.0)
        svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend="eager")
        seen = []
        bias = guide.posterior.network.layers[0].bias
        optim.register_step_pre_hook(lambda *_: seen.append(bias.grad.clone()))
        for held in (None, torch.ones_like(bias)):
            pyro.set_rng_seed(0)
            bias.grad = held
            svi.step(x)
        torch.testing.assert_close(seen[1], seen[0] + 1.0)

    def test_it_takes_an_optimizer(self) -> None:
        model, guide, _ = vae()
        with pytest.raises(ConfigError, match="optim is a torch"):
            pv.CompiledSVI(model, guide, {"lr": 1e-3}, pv.ELBO())  # type: ignore[arg-type]


@needs_compiler
class TestInductor:
    """Through the compiler proper: a few programs that between them use what a graph can hold."""

    @pytest.mark.parametrize(
        ("name", "objective"),
        [
            ("bernoulli", pv.IWAE(3, "dreg")),
            ("batch norm", pv.ELBO()),
            ("subsampled", Trace_ELBO()),
        ],
    )
    def test_it_trains_as_svi_does(self, name: str, objective: Any) -> None:
        from torch._dynamo.utils import counters

        bypassed = counters["inductor"]["fxgraph_cache_bypass"]
        compare(name, "inductor", objective)
        # torch could keep the graph on disk
        assert counters["inductor"]["fxgraph_cache_bypass"] == bypassed

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_what_opts_out_of_autocast_is_precise(self, backend: str) -> None:
        """A graph carries its casts: it is neither compiled nor run under autocast."""
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 2, 3), nn.Linear(2 * 3, 8)
        convolution, further, linear = (layer.float() for layer in layers)

        def loss(model: Any, guide: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                maps = further(convolution(x).tanh())
                return linear(maps.flatten(2).flatten(1).tanh()).square().sum()

        nothing = lambda x: None  # noqa: E731
        parameters = [p for layer in layers for p in layer.parameters()]
        x = torch.randn(16, 1, 7, 11).float()
        expected = [loss(None, None, x)]
        expected += torch.autograd.grad(expected[0], parameters)
        optim = torch.optim.SGD(parameters, 1.0)
        before = [p.detach().clone() for p in parameters]
        with torch.autocast("cpu", torch.bfloat16):
            found = pv.CompiledSVI(nothing, nothing, optim, loss, backend=backend).step(x)
        assert found == pytest.approx(expected[0].item(), rel=1e-6)
        for p, was, gradient in zip(parameters, before, expected[1:], strict=True):
            largest = gradient.abs().max().item()
            torch.testing.assert_close(was - p, gradient, rtol=1e-5, atol=1e-5 * largest)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_difference_of_equal_products_is_zero(self, dtype: torch.dtype) -> None:
        """As it is not where a product and a sum are rounded once: a graph checked on points that
        lie elsewhere would say that a point on a line lies beside it."""

        def model(points: Tensor, ends: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            (a, b), (c, d) = points, ends
            side = (a * d - b * c).sign()
            pyro.sample("side", dist.Normal(z, 1.0).expand(a.shape).to_event(1), obs=side)

        def guide(*_: Tensor) -> None:
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros((), dtype=dtype)), 1.0))

        points, ends = torch.rand(2, 2, 64, dtype=dtype)
        loss = Trace_ELBO()
        compiled = pv.compile(loss(model, guide), points, ends)
        for other in (ends, points):
            pyro.set_rng_seed(1)
            expected = loss.differentiable_loss(model, guide, points, other)
            pyro.set_rng_seed(1)
            torch.testing.assert_close(compiled(points, other), expected)

    def test_draws_of_several_kinds_stay_in_order(self) -> None:
        """Dropout, Gamma and Normal draw from one stream; a swap would change the numbers."""
        model, guide, (x,) = dropout()

        def model_with_more(x: Tensor) -> None:
            model(x)
            with pyro.plate("more", 3):
                pyro.sample("scale", dist.Gamma(2.0, 1.0))

        def guide_with_more(x: Tensor) -> None:
            guide(x)
            shape = pyro.param("shape", torch.tensor(1.5))
            with pyro.plate("more", 3):
                pyro.sample("scale", dist.Gamma(shape, 1.0))

        loss = pv.ELBO("monte_carlo")
        compiled = pv.compile(loss(model_with_more, guide_with_more), x)
        for seed in range(3):
            pyro.set_rng_seed(seed)
            expected = loss.differentiable_loss(model_with_more, guide_with_more, x)
            pyro.set_rng_seed(seed)
            torch.testing.assert_close(compiled(x), expected)


def test_a_missing_compiler_is_an_error_that_says_so() -> None:
    from torch._inductor import config

    model, guide, _ = vae()
    with (
        config.patch({"cpp.cxx": ("/nowhere/c++",)}),
        pytest.raises(CompileError, match=r"/nowhere/c\+\+.*needs a working C\+\+ compiler"),
    ):
        pv.compile(pv.ELBO()(model, guide), binary(rows=11))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", "RuntimeError$"),
        ("LoweringException: KeyError\n  target: aten.mm", "LoweringException: KeyError$"),
        (
            "OSError: [Errno 30] Read-only file system: '/cache/x.lock'\n",
            r"OSError: \[Errno 30\] .*/x\.lock'\. See that .* in /.* set TORCHINDUCTOR_CACHE_DIR",
        ),
        (
            "CppCompileError: C++ compile error\n\nOutput:\nk.cpp:3: error: none\n 3 | x",
            r"k\.cpp:3: error: none\. .* a working C\+\+ compiler, .* TORCHINDUCTOR_CACHE_DIR",
        ),
    ],
)
def test_of_a_long_error_the_line_that_tells_most(said: str, told: str) -> None:
    assert re.match(told, backend._said(RuntimeError(said)))


@needs_compiler
@pytest.mark.slow
def test_a_second_process_finds_the_kernels_on_disk(tmp_path: Any, monkeypatch: Any) -> None:
    script = """
import torch, pyro_vae as pv
from torch._dynamo.utils import counters
torch.manual_seed(0)
vae = pv.VAE(
    pv.priors.StandardNormal(2),
    pv.likelihoods.Bernoulli(pv.networks.MLP(2, [4], 6)),
    pv.posteriors.DiagonalNormal(pv.networks.MLP(6, [4], 4)),
)
compiled = pv.compile(pv.ELBO()(vae.model, vae.guide), torch.zeros(5, 6))
hits = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
print(*hits, compiled(torch.zeros(5, 6)).item())
"""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (*hits, first), (*hits_again, second) = (run.stdout.split() for run in runs)
    assert (hits, hits_again) == (["0", "0"], ["1", "1"])
    assert first == second


def test_enumeration_is_compiled_to_scalar_code() -> None:
    assert backend.resolve("inductor", pv.ELBO()) is backend.inductor
    for loss in (TraceEnum_ELBO(), TraceTMC_ELBO()):
        made_by = backend.resolve("inductor", loss)
        assert (made_by.func, made_by.keywords) == (backend.inductor, {"vectorized": False})


@needs_compiler
@pytest.mark.slow
def test_a_chain_that_is_enumerated_is_compiled_right() -> None:
    """TorchInductor's vector code of this one is wrong, and the guard would say so."""
    transition, loc = (nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.linspace(-2, 2, 8)))

    def model(x: Tensor) -> None:
        state: Any = 0
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                states = dist.Categorical(logits=transition[state])
                state = pyro.sample(f"state {t}", states, infer={"enumerate": "parallel"})
                pyro.sample(f"x {t}", dist.Normal(loc[state], 1.0), obs=x[:, t])

    loss, x = TraceEnum_ELBO(max_plate_nesting=1)(model, lambda x: None), torch.randn(64, 4)
    compiled = pv.compile(loss, x)
    torch.testing.assert_close(compiled(x), loss(x))
