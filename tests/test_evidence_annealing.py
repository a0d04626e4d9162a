"""Annealed importance sampling, its mutants that must fail, and automatic escalation."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Linear
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence import ais, importance, methods
from pyro_vae.evidence.ais import Annealing, Space, State
from pyro_vae.evidence.annealing import Annealer
from pyro_vae.evidence.ground import undisturbed
from pyro_vae.evidence.pushforward import pull, push
from pyro_vae.evidence.target import Target

ROWS = 400


def relative_weights(pair: Linear, start: str, settings: Annealing) -> Tensor:
    """w / p(x) of all chains of all data, whose mean is 1."""
    x = pair.draw(ROWS)
    with undisturbed(pair.model, pair.guide):
        target = Target(pair.model, pair.guide, x)
        annealer = Annealer(target, settings, seed=0, chunk_bytes=2**26, start=start)
        log_w = torch.cat([annealer.log_weights(rows) for rows in annealer.chunks()])
    return (log_w - pair.log_px(x)[:, None]).exp().mean(1)


def z_of_one(weights: Tensor) -> float:
    """How many standard errors the mean of the weights is from 1."""
    return ((weights.mean() - 1) / (weights.std() / math.sqrt(len(weights)))).item()


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_weights_have_the_mean_p_of_x(start: str) -> None:
    pair = Linear.random(features=4, latent=2, shift=0.7, shrink=0.7)
    weights = relative_weights(pair, start, Annealing(chains=8, temperatures=15, leapfrogs=3))
    assert abs(z_of_one(weights)) < 3.5  # 1 in 2000
    assert weights.std() < 1


def test_an_increment_after_the_transition_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(space, state, betas, steps, count, fresh) -> Tensor:
        log_w = torch.zeros_like(state.tilt)
        for (before, beta), step in zip(pairwise(betas), steps, strict=True):
            momentum, uniform = fresh(state)
            state, _ = ais.transition(space, state, momentum, uniform, beta, step, count)
            log_w = log_w + (beta - before) * state.tilt
        return log_w

    monkeypatch.setattr(ais, "anneal", late)
    pair = Linear.random(features=4, latent=2, shift=0.7, shrink=0.7)
    weights = relative_weights(pair, "prior", Annealing(chains=8, temperatures=15, leapfrogs=3))
    assert abs(z_of_one(weights)) > 6


def test_a_last_kick_and_a_half_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def kicks_too_far(space, state, momentum, beta, step, count) -> tuple[State, dict]:
        state, momentum = right(space, state, momentum, beta, step, count)
        extra = {
            n: p + space.spread(step, p, n) * (beta * state.slope[n] + state.base_slope[n])
            for n, p in momentum.items()
        }
        return state, extra

    right = ais.leapfrog
    monkeypatch.setattr(ais, "leapfrog", kicks_too_far)
    pair = Linear.random(features=4, latent=2, shift=0.7, shrink=0.7)
    weights = relative_weights(pair, "prior", Annealing(chains=8, temperatures=15, leapfrogs=3))
    assert abs(z_of_one(weights)) > 4


def quartic() -> Space:
    def densities(u: dict[str, Tensor]) -> tuple[Tensor, None]:
        return -(u["z"] ** 4).sum(-1) + u["z"][..., 0] * u["z"][..., 1], None

    return Space({"z": -2}, densities)


def test_leapfrog_is_reversible_and_keeps_volume() -> None:
    space = quartic()
    state, momentum = space.state({"z": torch.randn(3, 5, 2)}), {"z": torch.randn(3, 5, 2)}
    step = torch.full((1, 5), 0.1)
    end, after = ais.leapfrog(space, state, momentum, 0.7, step, 4)
    back, before = ais.leapfrog(space, end, {"z": -after["z"]}, 0.7, step, 4)
    torch.testing.assert_close(back.u["z"], state.u["z"])
    torch.testing.assert_close(-before["z"], momentum["z"])

    def flow(point: Tensor) -> Tensor:
        start = space.state({"z": point[:2].reshape(1, 1, 2)})
        end, after = ais.leapfrog(
            space, start, {"z": point[2:].reshape(1, 1, 2)}, 0.7, step[:, :1], 4
        )
        return torch.cat([end.u["z"].flatten(), after["z"].flatten()])

    # the flow detaches, so its Jacobian is taken by differences
    point, h = torch.randn(4), 1e-6
    jacobian = torch.stack([(flow(point + h * e) - flow(point - h * e)) / (2 * h)
                            for e in torch.eye(4)])  # fmt: skip
    assert torch.det(jacobian).item() == pytest.approx(1, abs=1e-6)


def test_a_region_of_nan_is_never_entered() -> None:
    space = Space({"z": -1}, lambda u: (torch.where(u["z"] > 0, math.nan, -(u["z"] ** 2)), None))
    state = space.state({"z": -torch.rand(50, 20)})
    for _ in range(20):
        momentum, uniform = {"z": torch.randn(50, 20)}, torch.rand(50, 20)
        state, _ = ais.transition(space, state, momentum, uniform, 0.5, torch.ones(1, 20), 3)
    assert (state.u["z"] <= 0).all()
    assert state.tilt.isfinite().all()
    assert state.slope["z"].isfinite().all()


def test_schedule_runs_from_zero_to_one() -> None:
    betas = ais.schedule(50)
    assert (betas[0], betas[-1], len(betas)) == (0.0, 1.0, 51)
    assert all(b > a for a, b in pairwise(betas))
    assert betas[1] - betas[0] < betas[26] - betas[25]


def affine_flow() -> dist.TransformedDistribution:
    factor = torch.tensor([[1.0, 0, 0], [0.5, 2, 0], [1, 1, 0.7]])
    affine = dist.transforms.LowerCholeskyAffine(torch.ones(3), factor)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), affine)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Normal(torch.randn(3), 2.0).to_event(1),
        lambda: dist.MultivariateNormal(torch.ones(3), torch.eye(3) + 0.5),
        lambda: dist.LogNormal(torch.randn(3), 0.5).to_event(1),
        affine_flow,
    ],
)
def test_maps_of_noise_have_the_density_of_their_distribution(
    make: Callable[[], dist.Distribution],
) -> None:
    u, fn = torch.randn(7, 3), make().expand((7,))
    z, log_det = push(fn, u)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1) - log_det
    torch.testing.assert_close(log_q, fn.log_prob(z))
    torch.testing.assert_close(pull(fn, z), u)


def test_annealing_reaches_where_the_guide_does_not() -> None:
    """Two modes of which the guide holds one: only annealing from the prior sees the other."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.25 / x.sqrt()))

    x = torch.full((60,), 1.5)
    exact = pv.log_marginal(model, guide, x[:1], method="grid").mean
    options = {"annealing": Annealing(chains=32, temperatures=40, leapfrogs=4)}
    prior = pv.log_marginal(model, guide, x, method="ais", start="prior", **options)
    z = (prior.log_px - exact) / prior.se
    assert abs(z.mean()) < 4 / math.sqrt(60)
    sampled = pv.log_marginal(model, guide, x, num_samples=500, defensive=0)
    assert sampled.num_flagged == 0, "the guide's weights look well: that is the danger"
    assert sampled.mean == pytest.approx(exact - math.log(2), abs=0.05)


def test_annealing_takes_gradients_within_inference_mode() -> None:
    """A random walk without gradients would not get from the guide to the posterior."""
    pair = Linear.random(5, 3, shift=5.0, shrink=0.5)
    settings = Annealing(chains=4, temperatures=20, leapfrogs=3)
    expected = pv.log_marginal(
        pair.model, pair.guide, pair.draw(3), method="ais", annealing=settings
    )
    with torch.inference_mode():
        x = pair.draw(3)
        found = pv.log_marginal(pair.model, pair.guide, x, method="ais", annealing=settings)
    np.testing.assert_array_equal(found.log_px, expected.log_px)


class Mixture:
    """z from a mixture, or c then z given c; x = Wz + b + noise: p(x) is a mixture of Normals.

    The guide holds one component only, so annealing from it would miss the others.
    """

    def __init__(self, separate: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.tensor([0.3, 0.5, 0.2])
        self.loc = 4 * torch.randn(3, 2, generator=generator)
        self.scale = torch.tensor([0.3, 1.0, 0.6])
        self.W, self.b = torch.randn(4, 2, generator=generator), torch.zeros(4)
        self.separate = separate

    def model(self, x: Tensor) -> None:
        components = dist.Normal(self.loc, self.scale[:, None]).to_event(1)
        with pyro.plate("data", len(x)):
            if self.separate:
                c = pyro.sample("c", dist.Categorical(self.weights))
                q = dist.Normal(self.loc[c], self.scale[c][..., None]).to_event(1)
            else:
                q = dist.MixtureSameFamily(dist.Categorical(self.weights), components)
            z = pyro.sample("z", q)
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, 0.7).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc[0], 0.5).to_event(1))

    def log_px(self, x: Tensor) -> Tensor:
        noise = 0.49 * torch.eye(4)
        covariance = self.scale.square()[:, None, None] * (self.W @ self.W.T) + noise
        each = torch.distributions.MultivariateNormal(self.loc @ self.W.T + self.b, covariance)
        return (each.log_prob(x[:, None]) + self.weights.log()).logsumexp(1)

    def draw(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        c = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = self.loc[c] + self.scale[c][:, None] * torch.randn(n, 2, generator=generator)
        return z @ self.W.T + self.b + 0.7 * torch.randn(n, 4, generator=generator)


@pytest.mark.parametrize("separate", [False, True])
def test_annealing_from_a_prior_that_is_a_mixture(separate: bool) -> None:
    pair = Mixture(separate)
    x = pair.draw(100)
    options = {"start": "prior", "annealing": Annealing(chains=8, temperatures=20, leapfrogs=3)}
    found = pv.log_marginal(pair.model, pair.guide, x, method="ais", **options)
    weights = torch.as_tensor(found.log_px - pair.log_px(x).numpy()).exp()
    assert abs(z_of_one(weights)) < 3.5  # 1 in 2000
    assert weights.std() < 1
    parts = pv.log_marginal(pair.model, pair.guide, x[:2], method="ais", chunk_bytes=1, **options)
    np.testing.assert_allclose(parts.log_px, found.log_px[:2], rtol=1e-9)
    both = pv.sandwich(pair.model, pair.guide, x, method="ais", **options)
    assert both.gap + 3 * both.gap_se > 0
    assert both.gap < 2


def test_annealing_from_the_vampprior_and_a_mixture_of_gaussians() -> None:
    posterior = pv.posteriors.DiagonalNormal(pv.networks.MLP(12, [8], 4))
    priors = {
        "vamp": pv.priors.VampPrior(posterior, 5, torch.rand(20, 12)),
        "mixture": pv.priors.GaussianMixture(2 * torch.randn(6, 2)),
    }
    for prior in priors.values():
        likelihood = pv.likelihoods.Bernoulli(pv.networks.MLP(2, [8], 12))
        vae = pv.VAE(prior, likelihood, posterior)
        x = (torch.rand(20, 12) < 0.5).double()
        exact = pv.log_marginal(vae.model, vae.guide, x, method="grid")
        found = pv.log_marginal(vae.model, vae.guide, x, method="ais", start="prior",
                                annealing=Annealing(8, 12, 3))  # fmt: skip
        assert abs(z_of_one(torch.as_tensor(found.log_px - exact.log_px).exp())) < 3.5


def test_annealing_from_priors_with_bounds() -> None:
    """Gamma, Beta and Dirichlet: u is the logarithm, the logit, the stick-breaking."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 2.0))
            b = pyro.sample("b", dist.Beta(2.0, 3.0))
            c = pyro.sample("c", dist.Dirichlet(torch.tensor([2.0, 1.5, 1.0])))
            pyro.sample("x", dist.Normal(a + 2 * b + 3 * c[..., 0] - c[..., 2], 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Gamma(2.0, 2.0))
            pyro.sample("b", dist.Beta(2.0, 3.0))
            pyro.sample("c", dist.Dirichlet(torch.tensor([2.0, 1.5, 1.0])))

    x = torch.full((60,), 1.2)
    draws = 400_000
    a, b = dist.Gamma(2.0, 2.0).sample((draws,)), dist.Beta(2.0, 3.0).sample((draws,))
    c = dist.Dirichlet(torch.tensor([2.0, 1.5, 1.0])).sample((draws,))
    mean = a + 2 * b + 3 * c[:, 0] - c[:, 2]
    exact = dist.Normal(mean, 0.5).log_prob(x[0]).logsumexp(0) - math.log(draws)
    found = pv.log_marginal(
        model, guide, x, method="ais", start="prior", annealing=Annealing(8, 15, 3)
    )
    weights = torch.as_tensor(found.log_px).sub(exact).exp()
    assert abs(z_of_one(weights)) < 3.5  # the integral's own error is a tenth of this one's
    assert weights.std() < 0.3


def test_auto_escalates_the_data_that_need_it() -> None:
    """A guide that is right for some data, too narrow for others, and astray for the rest."""
    pair = Linear.random(features=6, latent=6)
    covariance = torch.linalg.inv(pair.precision)
    factor = torch.linalg.cholesky(covariance)

    def group(x: Tensor) -> Tensor:
        return (x[:, 0] > pair.b[0]).long() + ((x[:, 0] > pair.b[0]) & (x[:, 1] > pair.b[1])).long()

    def guide(x: Tensor) -> None:
        scale = torch.tensor([1.0, 0.4, 0.4])[group(x)]
        shift = torch.tensor([0.0, 0.0, 3.0])[group(x)]
        loc = pair.posterior_mean(x) + shift[:, None] * covariance.diagonal().sqrt()
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(loc, scale_tril=scale[:, None, None] * factor)
            pyro.sample("z", q)

    x = pair.draw(40)
    right, narrow, astray = ((group(x) == g).numpy() for g in range(3))
    options = {"num_samples": 1000, "annealing": Annealing(16, 40, 4)}
    found = pv.log_marginal(pair.model, guide, x, method="auto", **options)
    assert set(found.method[right]) == {"is"}
    assert set(found.method[narrow]) <= {"is x2", "is x3"}
    assert (found.method[astray] == "ais").mean() > 0.8
    assert (found.num_samples[found.method == "ais"] == 16).all()
    plain = pv.log_marginal(pair.model, guide, x, num_samples=1000, defensive=0)
    exact = pair.log_px(x).numpy()
    for part in (narrow, astray):
        better, worse = (abs(e.log_px - exact)[part].mean() for e in (found, plain))
        assert better < worse / 3
    again = pv.log_marginal(pair.model, guide, x, method="auto", chunk_bytes=100_000, **options)
    np.testing.assert_allclose(again.log_px, found.log_px)
    np.testing.assert_array_equal(again.method, found.method)
    assert "ais" in str(found)


def test_auto_keeps_to_the_guide_where_all_draws_would_do() -> None:
    """A pilot of 200 has too few effective draws, but then 1,000 have enough (tails are light)."""
    pair = Linear.random(features=5, latent=3, shrink=1.7)
    x = pair.draw(20)
    found = pv.log_marginal(pair.model, pair.guide, x, method="auto", num_samples=1000, defensive=0)
    assert set(found.method) == {"is"}
    assert (0.2 * found.ess < 100).all(), "of 200 draws, no 100 are effective"
    assert found.provenance["model_evaluations"] == 20 * (200 + 1000)
    plain = pv.log_marginal(pair.model, pair.guide, x, num_samples=1000, defensive=0)
    assert found.convergence.keys() == plain.convergence.keys()
    assert found.convergence[1000] == pytest.approx(found.mean)


def test_auto_counts_the_evaluations_of_all_its_stages() -> None:
    pair = Linear.random(features=6, latent=6)
    factor = torch.linalg.cholesky(torch.linalg.inv(pair.precision))

    def guide(x: Tensor) -> None:
        scale = torch.where(x[:, 0] > pair.b[0], 0.55, 1.0)
        with pyro.plate("data", len(x)):
            q = dist.MultivariateNormal(
                pair.posterior_mean(x), scale_tril=scale[:, None, None] * factor
            )
            pyro.sample("z", q)

    x = pair.draw(30)
    found = pv.log_marginal(pair.model, guide, x, method="auto", num_samples=1000)
    escalated = (found.method == "is x2").sum()
    assert 0 < escalated < 30
    assert set(found.method) == {"is", "is x2"}
    assert found.provenance["model_evaluations"] == (30 + escalated) * 200 + 30 * 1000


def test_every_stage_and_every_pilot_has_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that chose a proposal would be too good, were they counted."""
    seeds: dict[int, set[tuple[int, float]]] = {}

    class Spy(methods.Sampler):
        def weights(self, rows: range) -> importance.Weights:
            seeds.setdefault(self.seed, set()).add((self.num_samples, self.proposal.inflation))
            return super().weights(rows)

    monkeypatch.setattr(methods, "Sampler", Spy)
    pair = Linear.random(features=6, latent=6, shift=4.0, shrink=0.4)
    settings = Annealing(4, 5, 2)
    pv.log_marginal(
        pair.model, pair.guide, pair.draw(3), method="auto", num_samples=1000, annealing=settings
    )
    assert {pilot for used in seeds.values() for pilot in used} >= {(200, 1.5), (200, 2), (200, 3)}
    assert all(len(used) == 1 for used in seeds.values())


def test_auto_takes_the_grid_in_two_dimensions() -> None:
    pair = Linear.random(features=5, latent=2, shift=2.0, shrink=0.3)
    x = pair.draw(10)
    found = pv.log_marginal(pair.model, pair.guide, x, method="auto", num_samples=400)
    assert "grid" in found.method
    settled = found.method == "grid"
    np.testing.assert_allclose(found.log_px[settled], pair.log_px(x)[settled], atol=2e-3)


def test_what_cannot_be_annealed() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(0.5))

    with pytest.raises(SiteError, match='"c" is drawn from Bernoulli'):
        pv.log_marginal(model, guide, torch.randn(3), method="ais")
    with pytest.raises(SiteError, match=r'"c" is in Boolean\(\), and annealing from the prior'):
        pv.log_marginal(model, guide, torch.randn(3), method="ais", start="prior")
    for counts in ({"chains": 1}, {"chains": 2.5}, {"temperatures": "a"}, {"leapfrogs": 0}):
        with pytest.raises(ConfigError, match="at least 2 chains"):
            Annealing(**counts)
    for shares in ({"acceptance": 1.0}, {"acceptance": math.nan}, {"inflation": 0.0}):
        with pytest.raises(ConfigError, match="tuned to an acceptance"):
            Annealing(**shares)
    pair = Linear.random(5, 2)
    with pytest.raises(ConfigError, match="start"):
        pv.log_marginal(pair.model, pair.guide, pair.draw(2), method="ais", start="nowhere")
