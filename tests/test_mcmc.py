"""NUTS draws from the exact posterior, and the gaps of inference are their closed forms."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Linear

import pyro_vae as pv
from pyro_vae.errors import ConfigError, DataError, SiteError, SupportError


@pytest.fixture(scope="module")
def linear() -> Linear:
    torch.set_default_dtype(torch.float64)
    return Linear.random(5, 2, shift=0.4, shrink=0.8)


@pytest.fixture(scope="module")
def chains(linear: Linear) -> pv.Chains:
    torch.set_default_dtype(torch.float64)
    return pv.nuts(linear.model, linear.draw(2), num_samples=300, warmup_steps=100, num_chains=2)


def test_nuts_draws_from_the_posterior(linear, chains):
    x = linear.draw(2)
    assert chains.draws["z"].shape == (2, 300, 2, 2)
    assert chains.worst_rhat < 1.01
    assert chains.divergences == 0
    covariance = torch.linalg.inv(linear.precision)
    draws = chains.pooled()
    error = (covariance.diagonal() / torch.as_tensor(chains.ess["z"])).sqrt()
    z = (draws.mean(0) - linear.posterior_mean(x)) / error
    assert z.abs().max() < 3.5  # 4 of them: odds of 1 in 500
    for row in range(2):
        # a variance from some 400 effective draws is known to 7%
        torch.testing.assert_close(draws[:, row].T.cov(), covariance, rtol=0.25, atol=0.02)


def test_nuts_leaves_everything_as_it_was(linear):
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5))
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(decoder),
        pv.posteriors.DiagonalNormal(torch.nn.Linear(4, 4)),
    )
    state, x = torch.get_rng_state(), torch.ones(3, 4)
    first = pv.nuts(vae.model, x, num_samples=4, warmup_steps=4, num_chains=2)
    assert torch.equal(state, torch.get_rng_state())
    assert vae.model.training
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    assert not pyro.get_param_store()
    again = pv.nuts(vae.model, x, num_samples=4, warmup_steps=4, num_chains=2)
    assert torch.equal(first.draws["z"], again.draws["z"])
    assert not torch.equal(first.draws["z"][0], first.draws["z"][1])


def test_chains_in_different_modes_disagree():
    """x = z^2 with little noise: two modes that no chain travels between."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z**2, 1.0).to_event(1), obs=x)

    found = pv.nuts(model, torch.full((2, 1), 9.0), num_samples=20, warmup_steps=20, num_chains=4)
    assert found.worst_rhat > 1.5
    assert set(found.pooled().sign().flatten().tolist()) == {-1.0, 1.0}


def test_what_nuts_cannot_sample():
    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def nothing(x):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(SiteError, match='"k" is drawn from Categorical'):
        pv.nuts(discrete, torch.zeros(3))
    with pytest.raises(SiteError, match="no latent site"):
        pv.nuts(nothing, torch.zeros(3))
    for name, number in (("num_chains", 1), ("num_samples", 3), ("warmup_steps", 2.5)):
        with pytest.raises(ConfigError, match=rf"{name} must be .*, got {number}"):
            pv.nuts(nothing, torch.zeros(3), **{name: number})
    with pytest.raises(ConfigError, match="target_accept"):
        pv.nuts(nothing, torch.zeros(3), target_accept=1.0)


def test_nuts_is_not_asked_about_impossible_data():
    vae = pv.VAE(
        pv.priors.StandardNormal(1),
        pv.likelihoods.Bernoulli(torch.nn.Linear(1, 2)),
        pv.posteriors.DiagonalNormal(torch.nn.Linear(2, 2)),
    )
    for value, place in ((0.5, "0.5"), (float("nan"), "nan")):
        x = torch.tensor([[1.0, 0.0], [1.0, value]])
        with pytest.raises(SupportError, match=rf"row 1, position \[1\] = {place}"):
            pv.nuts(vae.model, x, num_samples=4, warmup_steps=1, num_chains=2)
    with pytest.raises(DataError, match="does not run"):
        pv.nuts(lambda x, context: None, x, num_samples=4, warmup_steps=1, num_chains=2)


def closed_forms(p: Linear) -> tuple[float, float]:
    """Approximation gap of a diagonal Normal, and L[q*] - L[q] for the pair's own guide.

    KL(q*||p) with the precisions' diagonal is 1/2 (sum log P_ii - log det P); the guide is the
    posterior shifted and shrunk, whose KL is that of two Normals.
    """
    precision = p.precision
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    covariance = torch.linalg.inv(precision)
    loc = p.shift * covariance.diagonal().sqrt()
    q = torch.distributions.MultivariateNormal(loc, p.shrink**2 * covariance)
    posterior = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    return best.item(), (torch.distributions.kl_divergence(q, posterior) - best).item()


@pytest.mark.parametrize("family", ["diagonal", "full_rank"])
def test_gaps_of_a_linear_model_are_closed_forms(linear, family):
    approximation, amortization = closed_forms(linear)
    if family == "full_rank":
        approximation, amortization = 0.0, approximation + amortization
    gaps = pv.inference_gaps(
        linear.model, linear.guide, linear.draw(20), family=family, num_steps=400, num_samples=4000
    )
    assert approximation + amortization > 0.1
    # the fit leaves some thousandths of a nat: part of the tolerance
    for found, se, truth in [
        (gaps.approximation, gaps.approximation_se, approximation),
        (gaps.amortization, gaps.amortization_se, amortization),
    ]:
        assert abs(found.mean() - truth) < 3.5 * np.sqrt(np.square(se).sum()) / 20 + 0.004
        assert (abs(found - truth) < 4 * se + 0.02).all()
    assert not gaps.flagged.any()
    assert "amortization gap" in str(gaps)


def test_gaps_of_an_exact_guide_are_nil():
    p = Linear(torch.eye(3)[:, :2], torch.zeros(3), 0.5)  # a posterior that factorises
    gaps = pv.inference_gaps(p.model, p.guide, p.draw(5), num_steps=100, num_samples=500)
    np.testing.assert_allclose(gaps.approximation, 0, atol=0.01)
    np.testing.assert_allclose(gaps.amortization, 0, atol=0.01)


@pytest.mark.parametrize("family", ["diagonal", "full_rank"])
def test_gaps_do_not_depend_on_how_rows_and_draws_are_divided(linear, family):
    x, options = linear.draw(5), {"family": family, "num_steps": 20, "num_samples": 700, "seed": 4}
    whole = pv.inference_gaps(linear.model, linear.guide, x, **options)
    parts = pv.inference_gaps(linear.model, linear.guide, x, chunk_bytes=40_000, **options)
    for name in ("log_px", "local", "local_se", "elbo", "elbo_se"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6)
    other = pv.inference_gaps(linear.model, linear.guide, x, **{**options, "seed": 5})
    assert (other.local != whole.local).all()
    assert (other.elbo != whole.elbo).all()


def test_gaps_keep_their_budget_of_memory(linear, monkeypatch):
    x, sizes = linear.draw(6), []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = z @ linear.W.T + linear.b
            sizes.append(mean.numel() * mean.element_size())
            pyro.sample("x", dist.Normal(mean, linear.sigma).to_event(1), obs=x)

    def then_forget(*args, **options):
        evidence = pv.log_marginal(*args, **options)
        sizes.clear()
        return evidence

    monkeypatch.setattr("pyro_vae.gaps.log_marginal", then_forget)
    largest = []
    for budget in (10_000_000, 20_000):
        pv.inference_gaps(model, linear.guide, x, num_steps=3, num_samples=600, chunk_bytes=budget)
        largest.append(max(sizes))
    assert largest[1] <= 20_000 < largest[0]


def test_gaps_refuse_what_they_cannot_fit(linear):
    x = linear.draw(3)
    with pytest.raises(ConfigError, match="family"):
        pv.inference_gaps(linear.model, linear.guide, x, family="flow")
    with pytest.raises(ConfigError, match="num_samples"):
        pv.inference_gaps(linear.model, linear.guide, x, num_samples=1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[:, :1])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(torch.ones(1), 1.0).to_event(1))

    with pytest.raises(SiteError, match='"z" takes values in'):
        pv.inference_gaps(model, guide, x, num_samples=50)
