"""Comparisons, posterior draws and the bridge to ArviZ."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from evidence_pairs import Binary, Linear, all_images

import pyro_vae as pv
from pyro_vae.errors import ConfigError, DataError
from pyro_vae.evidence import Annealing
from pyro_vae.evidence.posterior import posterior_draws
from pyro_vae.inference_data import to_arviz

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def evaluate(pair: Linear, x: torch.Tensor, **options: object) -> pv.Evidence:
    return pv.log_marginal(pair.model, pair.guide, x, **{"num_samples": 500, **options})


def test_paired_differences_are_those_of_the_closed_forms() -> None:
    a = Linear.random(5, 2, shift=0.2)
    b = Linear(a.W, a.b + 0.1, a.sigma, shift=0.3)
    x = a.draw(100)
    found = evaluate(a, x).compare(evaluate(b, x, seed=1))
    exact = (a.log_px(x) - b.log_px(x)).mean().item()
    assert abs(found.mean - exact) < 4 * found.se_mc
    assert found.se_total == pytest.approx(found.per_datum.std(ddof=1) / 10)
    ranked = pv.compare({"worse": evaluate(b, x), "better": evaluate(a, x)})
    assert ranked.names == ["better", "worse"]
    assert ranked.differences[0].mean == 0
    assert ranked.differences[1].mean == pytest.approx(-exact, abs=4 * found.se_mc)
    assert "better" in str(ranked).splitlines()[1]


def test_a_difference_of_bounds_has_no_plus_or_minus() -> None:
    pair = Linear.random(5, 2)
    sound = evaluate(pair, pair.draw(10))
    poor = replace(sound, log_px=sound.log_px - 1, flagged=np.arange(10) < 3)
    for found in (sound.compare(poor), poor.compare(sound)):
        assert found.num_flagged == 3
        assert "between lower bounds: 3 of 10 data flagged" in str(found)
        assert "±" not in str(found)
    assert "±" in str(sound.compare(sound))
    best, worse = str(pv.compare({"sound": sound, "poor": poor})).splitlines()[1:]
    assert best.split()[2:] == [f"{sound.mean:.3f}", "0.000", "0", "0", "0"]
    assert worse.split()[2:] == [f">={poor.mean:.3f}", "1.000", "0", "unknown", "3"]


def test_errors_and_biases_of_a_difference_are_those_of_both() -> None:
    pair = Linear.random(5, 2)
    one = evaluate(pair, pair.draw(10))
    other = replace(one, se=2 * one.se, bias_est=3 * one.bias_est)
    found = one.compare(other)
    assert found.se_mc == pytest.approx(math.sqrt(5 * (one.se**2).sum()) / 10)
    assert found.bias_est == pytest.approx(-2 * one.bias_est.mean())


def test_refuses_what_cannot_be_compared() -> None:
    pair = Linear.random(5, 2)
    x = pair.draw(10)
    one = evaluate(pair, x)
    with pytest.raises(DataError, match="different data"):
        one.compare(evaluate(pair, x + 1))
    with pytest.raises(ConfigError, match=r"num_samples \[500\] and \[400\]"):
        one.compare(evaluate(pair, x, num_samples=400))
    assert one.compare(evaluate(pair, x, num_samples=400), mixed=True).mean < 1
    for few in ({"alone": one}, [one, one]):
        with pytest.raises(ConfigError, match="at least two"):
            pv.compare(few)
    with pytest.raises(ConfigError, match="got float"):
        one.compare(-1.5)


def test_auto_is_compared_with_auto_whatever_it_took() -> None:
    """What was asked for is the same; what was done about it is told."""
    pair = Linear.random(5, 3, shift=0.2)
    bad = Linear(pair.W, pair.b, pair.sigma, shift=6.0, shrink=0.2)
    x, options = pair.draw(6), {"method": "auto", "annealing": Annealing(4, 5, 2)}
    good, poor = evaluate(pair, x, **options), evaluate(bad, x, **options)
    assert set(good.method) == {"is"}
    assert set(poor.method) == {"ais"}
    ranked = pv.compare({"good": good, "poor": poor})
    assert str(ranked).splitlines()[-1].endswith("good: is; poor: ais")
    assert ranked.differences[0].se_mc == 0, "the best differs from itself by nothing"
    assert len(str(pv.compare({"good": good, "again": good})).splitlines()) == 3
    for other in ({"num_samples": 400}, {"annealing": Annealing(4, 6, 2)}, {"method": "is"}):
        with pytest.raises(ConfigError, match=f"have {next(iter(other))} "):
            good.compare(evaluate(pair, x, **{**options, **other}))


def test_grids_are_compared_whatever_their_points() -> None:
    pair = Linear.random(5, 1)
    x = pair.draw(5)
    one = evaluate(pair, x, method="grid")
    finer = replace(one, num_samples=2 * one.num_samples - 1)
    assert one.compare(finer).mean == 0


def test_posterior_draws_are_calibrated_where_the_guide_is_not() -> None:
    """Simulation-based calibration: z* ~ p, x ~ p(x|z*); z*'s rank among posterior draws is
    uniform. Draws of a guide that is shifted and wide fail the same test."""
    pair = Linear.random(5, 2, shift=0.8, shrink=1.3)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(400, 2, generator=generator)
    x = z @ pair.W.T + pair.b + pair.sigma * torch.randn(400, 5, generator=generator)
    draws = posterior_draws(pair.model, pair.guide, x, num_draws=19, num_samples=1000)["z"]
    assert draws.shape == (19, 400, 2)
    raw = pair.posterior_mean(x) + 0.8 * torch.linalg.inv(pair.precision).diagonal().sqrt()
    factor = 1.3 * torch.linalg.cholesky(torch.linalg.inv(pair.precision))
    of_guide = raw + torch.randn(19, 400, 2, generator=generator) @ factor.T
    for d in range(2):
        counts = torch.bincount((draws[..., d] < z[:, d]).sum(0), minlength=20)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
        counts = torch.bincount((of_guide[..., d] < z[:, d]).sum(0), minlength=20)
        assert scipy.stats.chisquare(counts).pvalue < 1e-6


def test_discrete_sites_that_the_guide_leaves_out_are_drawn_from_their_posterior() -> None:
    centres, weights = torch.tensor([-1.0, 0.0, 1.5]), torch.tensor([0.2, 0.5, 0.3])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(centres[c], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.tensor([-1.0, 0.3, 2.0])
    draws = posterior_draws(model, guide, x, num_draws=4000, num_samples=20_000)
    assert draws["c"].shape == draws["z"].shape == (4000, 3)
    log_joint = dist.Normal(centres, 1.25**0.5).log_prob(x[:, None]) + weights.log()
    exact = log_joint.softmax(1)
    for state in range(3):
        share, p = (draws["c"] == state).double().mean(0), exact[:, state]
        error = (p * (1 - p) * (1 / 4000 + 3 / 20_000)).sqrt()
        assert ((share - p).abs() < 4 * error).all()
    few = posterior_draws(model, guide, x[:1], num_draws=4000, num_samples=20_000)
    torch.testing.assert_close(few["c"], draws["c"][:, :1])


GROUPS = {
    "posterior", "log_likelihood", "posterior_predictive", "prior", "prior_predictive",
    "observed_data",
}  # fmt: skip


def group_names(data: object) -> set[str]:
    """Of an InferenceData (ArviZ 0.23) or a DataTree (1.x)."""
    return set(data.children) if hasattr(data, "children") else set(data.groups())


def test_arviz_gets_every_group() -> None:
    import arviz as az

    pair, x = Binary.random(pixels=5, latent=2), all_images(5)[:8]
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=200)
    data = evidence.to_arviz(num_draws=30)
    assert group_names(data) == GROUPS
    assert data["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim_0")
    assert data["posterior"]["z"].shape == (1, 30, 8, 2)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", "x_dim_0")
    assert data["prior"]["z"].shape == (1, 30, 8, 2)
    np.testing.assert_array_equal(data["observed_data"]["x"], x)
    z = torch.as_tensor(data["posterior"]["z"].values[0])
    expected = torch.distributions.Bernoulli(logits=pair.decoder(z)).log_prob(x).sum(-1)
    np.testing.assert_allclose(data["log_likelihood"]["x"][0], expected.detach(), rtol=1e-9)
    assert len(az.summary(data, var_names="z", kind="stats")) == 16
    pieces = to_arviz(pair.model, pair.guide, x, num_draws=30, chunk_bytes=20_000)
    np.testing.assert_array_equal(pieces["posterior"]["z"], data["posterior"]["z"])
    np.testing.assert_allclose(pieces["log_likelihood"]["x"], data["log_likelihood"]["x"])


def test_arviz_is_given_what_the_model_says_when_it_does_not_train() -> None:
    """Evaluation mode from the first group to the last, and no generator disturbed."""
    layer = torch.nn.BatchNorm1d(2)

    def model(x: torch.Tensor) -> None:
        assert not layer.training
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = layer(z.reshape(-1, 2)).reshape(z.shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x, buffer = torch.randn(4, 2), layer.running_mean.clone()
    state = torch.get_rng_state()
    to_arviz(model, guide, x, num_draws=5, num_samples=50)
    assert (torch.get_rng_state() == state).all()
    assert (layer.running_mean == buffer).all()
    assert layer.training


def test_posterior_draws_and_arviz_check_their_options() -> None:
    pair = Linear.random(5, 2)
    x = pair.draw(3)
    for option in ({"num_draws": 0}, {"num_samples": 0}, {"defensive": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            posterior_draws(pair.model, pair.guide, x, **option)
    with pytest.raises(ConfigError, match="num_draws"):
        to_arviz(pair.model, pair.guide, x, num_draws=1.5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of so few draws, and of binary data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's, within ArviZ
def test_arviz_draws_and_weighs_what_it_gets() -> None:
    """ArviZ's own plots and statistics, of whichever version is installed."""
    import arviz as az
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    pair, x = Binary.random(pixels=5, latent=2), all_images(5)[:6]
    data = pv.log_marginal(pair.model, pair.guide, x, num_samples=200).to_arviz(num_draws=40)
    az.plot_forest(data, var_names=["z"])
    az.plot_trace(data, var_names=["z"])
    predictive = az.plot_ppc_dist if hasattr(az, "plot_ppc_dist") else az.plot_ppc
    predictive(data)
    loo = az.loo(data, pointwise=True)
    az.plot_khat(loo)
    assert loo.n_data_points == 6
    plt.close("all")


def test_arviz_takes_scalars_matrices_and_sites_that_the_guide_leaves_out() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            scalar = pyro.sample("scalar", dist.Normal(c, 1.0))
            matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            loc = scalar[..., None] + matrix.sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scalar", dist.Normal(x.mean(1), 1.0))
            pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    data = to_arviz(model, guide, torch.randn(4, 2), num_draws=7, num_samples=50)
    assert data["posterior"]["scalar"].dims == ("chain", "draw", "datum")
    assert data["posterior"]["matrix"].sizes == {
        "chain": 1, "draw": 7, "datum": 4, "matrix_dim_0": 2, "matrix_dim_1": 3,
    }  # fmt: skip
    assert data["prior"]["c"].dims == ("chain", "draw", "datum")
    assert data["posterior"]["c"].dims == ("chain", "draw", "datum")
    assert data["posterior_predictive"]["x"].shape == (1, 7, 4, 2)


def test_a_loaded_evaluation_has_no_model(tmp_path: object) -> None:
    pair = Linear.random(5, 2)
    evidence = evaluate(pair, pair.draw(3))
    loaded = pv.Evidence.load(evidence.save(tmp_path / "e.json"))
    with pytest.raises(ConfigError, match="knows no model"):
        loaded.to_arviz()
    assert loaded.compare(evidence).mean == 0
    assert math.isfinite(loaded.se_mc)
