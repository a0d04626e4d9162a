"""log p(x) with its inner loop compiled: the same numbers, errors and counts."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Binary, Linear
from torch import Tensor

import pyro_vae as pv
from pyro_vae.compiled import backend
from pyro_vae.errors import CompileError, DataError, SupportError
from pyro_vae.evidence import Annealing, inner_loop
from pyro_vae.evidence.inner_loop import InnerLoop

SHORT = Annealing(chains=4, temperatures=10, leapfrogs=2)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs run as they were traced, without a compiler; what came of each compiled call."""
    found = []
    compiled = InnerLoop._compiled

    def noted(self: InnerLoop, *args: Any) -> Any:
        found.append(compiled(self, *args))
        return found[-1]

    monkeypatch.setattr(inner_loop, "FEW", 3)
    eager = torch._dynamo.lookup_backend("eager")
    monkeypatch.setattr(backend, "resolve", lambda *_: eager)
    monkeypatch.setattr(InnerLoop, "_compiled", noted)
    return found


def mixture_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[k], 0.7), obs=x)


def no_guide(x: Tensor) -> None:
    pass


# so little that the work is in many pieces
CHUNKS = {"is": 4000, "ais": 40_000, "grid": 40_000, "enumerate": 100, "auto": 20_000}


def pair_for(method: str) -> tuple[Any, Any, Tensor]:
    if method == "enumerate":
        return mixture_model, no_guide, torch.randn(40)
    latent = 1 if method == "grid" else 3
    pair = Linear.random(features=4, latent=latent, shift=0.5, shrink=0.6)
    return pair.model, pair.guide, pair.draw(6 if method == "grid" else 30)


@pytest.mark.parametrize(
    ("method", "start"),
    [("is", "guide"), ("ais", "guide"), ("ais", "prior"), ("grid", "guide"),
     ("enumerate", "guide"), ("auto", "guide")],
)  # fmt: skip
def test_compiled_and_eager_agree(method: str, start: Any, graphs: list[Any]) -> None:
    model, guide, x = pair_for(method)
    how = {"num_samples": 200, "method": method, "annealing": SHORT, "start": start,
           "chunk_bytes": CHUNKS[method]}  # fmt: skip
    eager = pv.log_marginal(model, guide, x, **how)
    compiled = pv.log_marginal(model, guide, x, **how, compile=True)
    assert sum(made is not None for made in graphs) > 10
    np.testing.assert_allclose(compiled.log_px, eager.log_px, rtol=1e-10)
    np.testing.assert_allclose(compiled.se, eager.se, rtol=1e-7)
    assert (compiled.flagged == eager.flagged).all()
    counts = [e.provenance["model_evaluations"] for e in (eager, compiled)]
    assert counts[0] == counts[1]
    assert [e.provenance["compile"] for e in (eager, compiled)] == [False, True]


def test_a_closed_form_is_met(graphs: list[Any]) -> None:
    pair = Linear.random(features=4, latent=2, shift=0.5, shrink=0.9)
    x = pair.draw(200)
    found = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=400, chunk_bytes=30_000, compile=True
    )
    assert graphs
    z = (found.log_px - pair.log_px(x).numpy()) / found.se
    assert abs(z.mean()) * math.sqrt(len(z)) < 4  # 1 in 16,000
    assert 0.8 < z.std() < 1.25


def test_rows_frozen_into_the_graph_are_found_out(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Linear.random(features=4, latent=2, shift=0.5, shrink=0.9)
    x = pair.draw(20)
    run = InnerLoop._compiled

    def of_the_first_rows(self: InnerLoop, target: Any, rows: range, values: Any) -> Any:
        return run(self, target, range(len(rows)), values)

    eager = pv.log_marginal(pair.model, pair.guide, x, num_samples=50, chunk_bytes=3000)
    monkeypatch.setattr(InnerLoop, "_compiled", of_the_first_rows)
    wrong = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=50, chunk_bytes=3000, compile=True
    )
    assert abs(wrong.log_px - eager.log_px).max() > 1


def test_sizes_that_come_seldom_stay_eager(graphs: list[Any]) -> None:
    pair = Linear.random(features=4, latent=2)
    pv.log_marginal(pair.model, pair.guide, pair.draw(inner_loop.FEW), num_samples=50, compile=True)
    assert not graphs


def test_parameters_without_gradients_and_sums_in_float64_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inner_loop, "FEW", 3)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float32)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(2, [8], 16)),
            posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(16, [8], 4)),
        )
    vae.requires_grad_(False)
    x = (torch.rand(12, 16) < 0.5).float()
    how = {"num_samples": 100, "chunk_bytes": 100_000, "method": "is"}
    eager = pv.log_marginal(vae.model, vae.guide, x, **how)
    compiled = pv.log_marginal(vae.model, vae.guide, x, **how, compile=True)
    np.testing.assert_allclose(compiled.log_px, eager.log_px, rtol=1e-5)


def bounded_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def unbounded_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 + 0 * x, 0.3))


def test_draws_outside_the_prior_compile_once(graphs: list[Any]) -> None:
    x = torch.rand(20)
    how = {"num_samples": 200, "chunk_bytes": 3000, "method": "is"}
    eager = pv.log_marginal(bounded_model, unbounded_guide, x, **how)
    compiled = pv.log_marginal(bounded_model, unbounded_guide, x, **how, compile=True)
    np.testing.assert_allclose(compiled.log_px, eager.log_px, rtol=1e-10)
    assert sum(made is not None for made in graphs) > 10
    # p(x) = Phi((1 - x) / 0.5) - Phi(-x / 0.5)
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = (normal.cdf((1 - x) / 0.5) - normal.cdf(-x / 0.5)).log().numpy()
    assert (abs(compiled.log_px - truth) < 5 * compiled.se).all()  # 1 in 80,000


@pytest.mark.parametrize("row", [0, 1, 2, 3, 17])  # one of the first few makes the graph
def test_an_observed_value_that_cannot_be_is_told_by_row(graphs: list[Any], row: int) -> None:
    pair = Binary.random(pixels=5, latent=2)
    x = (torch.rand(20, 5) < 0.5).double()
    x[row, 3] = 0.5
    with pytest.raises(SupportError, match=rf"row {row}, position \[3\] = 0.5"):
        pv.log_marginal(
            pair.model, pair.guide, x, num_samples=50, chunk_bytes=3000, method="is", compile=True
        )
    assert row < 17 or any(made is not None for made in graphs)


@pytest.mark.parametrize("row", [0, 1, 2, 3, 17])
def test_nan_among_the_data_is_told_as_ever(graphs: list[Any], row: int) -> None:
    pair = Linear.random(features=4, latent=2)
    x = pair.draw(20)
    x[row, 3] = math.nan
    messages = []
    for compile in (False, True):
        with pytest.raises((DataError, pv.errors.NonFiniteError)) as told:
            pv.log_marginal(
                pair.model, pair.guide, x, num_samples=50, chunk_bytes=3000, compile=compile
            )
        messages.append(str(told.value))
    assert messages[0] == messages[1]


def branching(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = 1.0 if z.sum() > -1e9 else 2.0
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def plain_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.8).to_event(1))


def test_what_cannot_be_compiled_is_an_error_or_a_warning(graphs: list[Any]) -> None:
    x = torch.randn(20, 2)
    how = {"num_samples": 50, "chunk_bytes": 3000}
    with pytest.raises(CompileError, match=r"test_evidence_compiled\.py"):
        pv.log_marginal(branching, plain_guide, x, **how, compile=True)
    with pytest.warns(UserWarning, match="evaluating without compiling") as warned:
        found = pv.log_marginal(branching, plain_guide, x, **how, compile="auto")
    assert len(warned) == 1
    eager = pv.log_marginal(branching, plain_guide, x, **how)
    assert (found.log_px == eager.log_px).all()


def test_another_word_for_compile_is_refused() -> None:
    with pytest.raises(pv.errors.ConfigError, match='compile is True, False or "auto"'):
        pv.log_marginal(branching, plain_guide, torch.randn(3, 2), compile="yes")
