"""Grid, enumeration and closed forms, each against an oracle of its own."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from evidence_pairs import Binary, Linear, all_images
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import ConfigError, ShapeError, SiteError


def test_linear_gaussian_is_the_multivariate_normal() -> None:
    pair = Linear.random(features=6, latent=3)
    x = pair.draw(5)
    cov = (pair.W @ pair.W.T + 0.25 * torch.eye(6)).numpy()
    expected = scipy.stats.multivariate_normal(pair.b.numpy(), cov).logpdf(x.numpy())
    np.testing.assert_allclose(pv.exact.linear_gaussian(x, pair.W, pair.b, 0.5), expected)
    assert pv.exact.linear_gaussian(x[0], pair.W, pair.b, 0.5).shape == ()
    with pytest.raises(ShapeError, match=r"\(6, 3\)"):
        pv.exact.linear_gaussian(x[:, :5], pair.W, pair.b, 0.5)


def test_linear_gaussian_posterior_satisfies_bayes() -> None:
    pair = Linear.random(features=6, latent=3)
    x, z = pair.draw(5), torch.randn(5, 3)
    posterior = pv.exact.linear_gaussian_posterior(x, pair.W, pair.b, 0.5)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    log_joint += dist.Normal(z @ pair.W.T + pair.b, 0.5).log_prob(x).sum(1)
    log_px = pv.exact.linear_gaussian(x, pair.W, pair.b, 0.5)
    torch.testing.assert_close(posterior.log_prob(z), log_joint - log_px)


def test_variance_of_weights_is_the_integral() -> None:
    m, n, P, Q = 0.3, -0.2, 0.5, 0.8
    p, q = scipy.stats.norm(m, math.sqrt(P)), scipy.stats.norm(n, math.sqrt(Q))
    second, _ = scipy.integrate.quad(lambda z: p.pdf(z) ** 2 / q.pdf(z), -12, 12)
    one = torch.ones(1)
    found = pv.exact.weight_variance(m * one, P * torch.eye(1), n * one, Q * torch.eye(1))
    assert found.item() == pytest.approx(second - 1)
    narrow = pv.exact.weight_variance(one, torch.eye(1), one, 0.49 * torch.eye(1))
    assert narrow == math.inf


@pytest.mark.parametrize("latent", [1, 2])
def test_grid_is_the_closed_form(latent: int) -> None:
    pair = Linear.random(features=4, latent=latent)
    x = pair.draw(30)
    found = pv.log_marginal(pair.model, pair.guide, x, method="grid", progress=False)
    np.testing.assert_allclose(found.log_px, pair.log_px(x), atol=1e-4)
    assert not found.flagged.any()
    assert set(found.method) == {"grid"}


def test_grid_gives_all_images_a_total_probability_of_one() -> None:
    pair, x = Binary.random(pixels=10, latent=1), all_images(10)
    found = pv.log_marginal(pair.model, pair.guide, x, method="grid", progress=False)
    assert np.exp(found.log_px).sum() == pytest.approx(1, abs=1e-4)
    # one decoding of the grid serves all rows, and the integral does not depend on how many
    assert found.provenance["model_evaluations"] < 10_000 * len(x)
    few = pv.log_marginal(pair.model, pair.guide, x[:3], method="grid", progress=False)
    np.testing.assert_allclose(few.log_px, found.log_px[:3], atol=2e-3)


def mixture_pair(separation: float) -> tuple[Callable, Callable, Callable]:
    """Two-component prior, linear decoder: p(x) is a mixture of two normals."""
    centres = torch.tensor([-separation, separation])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(centres[c], 0.5))
            pyro.sample("x", dist.Normal(2 * z, 0.4), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.3))

    def log_px(x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(2 * centres, math.sqrt(1 + 0.16))
        return (normal.log_prob(x[:, None]) + torch.tensor([0.3, 0.7]).log()).logsumexp(1)

    return model, guide, log_px


def test_a_discrete_site_left_to_the_model_is_summed_over() -> None:
    model, guide, log_px = mixture_pair(2.0)
    x = 4 * torch.randn(50)
    sampled = pv.log_marginal(model, guide, x, num_samples=2000, progress=False)
    z = (sampled.log_px - log_px(x).numpy()) / sampled.se
    assert abs(z.mean()) < 4 / math.sqrt(50)
    gridded = pv.log_marginal(model, guide, x, method="grid", progress=False)
    np.testing.assert_allclose(gridded.log_px, log_px(x), atol=1e-3)


def test_enumeration_is_the_sum() -> None:
    table = torch.softmax(torch.randn(2, 3), 1)
    rates = torch.rand(3, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Categorical(table[a.long()]))
            pyro.sample("x", dist.Bernoulli(rates[b]).to_event(1), obs=x)

    def no_guide(x: Tensor) -> None:
        raise AssertionError("enumeration needs no guide")

    x = all_images(4)
    found = pv.log_marginal(model, no_guide, x, method="enumerate", chunk_bytes=2000)
    prior = 0.7 * table[0] + 0.3 * table[1]
    likelihood = torch.where(x[:, None] == 1, rates, 1 - rates).prod(2)
    np.testing.assert_allclose(found.log_px, (likelihood @ prior).log(), rtol=1e-10)
    assert np.exp(found.log_px).sum() == pytest.approx(1)
    assert found.se_mc == 0
    assert "enumerate" in str(found)


@pytest.mark.parametrize("method", ["grid", "auto"])
def test_a_grid_reaches_data_that_prior_and_guide_know_nothing_of(method: str) -> None:
    """x = 20 puts the posterior at z = 10: what a box around the prior holds of it is no p(x)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0).to_event(1))

    x = torch.tensor([[5.0, 4.0], [20.0, -18.0], [1.0, 60.0]])
    found = pv.log_marginal(model, prior, x, method=method, num_samples=300)
    np.testing.assert_allclose(
        found.log_px, scipy.stats.norm(0, math.sqrt(2)).logpdf(x.numpy()).sum(1), atol=1e-3
    )
    assert found.num_flagged == 0
    assert set(found.method) == {"grid"}
    one = pv.log_marginal(model, prior, x[:1], method="grid", chunk_bytes=20_000)
    np.testing.assert_allclose(one.log_px, found.log_px[:1], atol=1e-3)


def test_a_grid_that_no_widening_makes_large_enough_is_flagged() -> None:
    """Without data the posterior is the prior, whose tails hold a thousandth at any distance."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(0.2, 0.0, 1.0))
            with pyro.poutine.mask(mask=False):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0))

    found = pv.log_marginal(model, narrow, torch.zeros(2), method="grid")
    assert found.flagged.all()
    assert (found.se > 1e-3).all()


def test_what_the_closed_forms_refuse() -> None:
    x, W, b = torch.zeros(3, 4), torch.ones(4, 2), torch.zeros(4)
    for scale in (0.0, -1.0, math.nan, torch.ones(4)):
        with pytest.raises(ConfigError, match="scale is one positive number"):
            pv.exact.linear_gaussian(x, W, b, scale)
    for low, high, first in ((1.0, -1.0, 65), (0.0, 0.0, 65), (-1.0, 1.0, 1)):
        ends = torch.tensor([low]), torch.tensor([high])
        with pytest.raises(ConfigError, match="ends low < high and at least 2 points"):
            pv.exact.quadrature(lambda z: -(z**2), *ends, first=first)


def test_what_cannot_be_gridded_or_enumerated_names_the_site() -> None:
    pair = Linear.random(features=4, latent=3)
    x = pair.draw(4)
    with pytest.raises(SiteError, match=r"\['z'\] have 3"):
        pv.log_marginal(pair.model, pair.guide, x, method="grid")
    with pytest.raises(SiteError, match=r'"z" is drawn from .*cannot be enumerated'):
        pv.log_marginal(pair.model, pair.guide, x, method="enumerate")
    with pytest.raises(ConfigError, match="1 or 2 latent dimensions, got 3"):
        pv.exact.quadrature(lambda z: z, -torch.ones(3), torch.ones(3))

    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0, 2.0))

    with pytest.raises(SiteError, match='takes real latent sites, "z"'):
        pv.log_marginal(positive, guide, x[:, 0], method="grid")
    # importance sampling takes it, and agrees with scipy's integral
    found = pv.log_marginal(positive, guide, x[:, 0], num_samples=2000)
    for value, log_px, se in zip(x[:, 0].tolist(), found.log_px, found.se, strict=True):
        prior = scipy.stats.gamma(2, scale=0.5)
        exact, _ = scipy.integrate.quad(
            lambda z, v=value, p=prior: p.pdf(z) * scipy.stats.norm(z).pdf(v), 0, 20
        )
        assert abs(log_px - math.log(exact)) < 4 * se
