"""The yardstick of `benchmarks.kl_estimators` on gradients whose bias and variance are known."""

import pytest
import torch
from toys import repeat, z_scores

import pyro_vae as pv
from benchmarks.gradient_noise import (
    Reference,
    dimensions_of_head,
    exact,
    linear_elbo,
    long_run,
    noise,
    parameter_groups,
    squared_norm,
)

FEATURES, LATENT = 5, 3


def linear_vae() -> pv.VAE:
    torch.manual_seed(0)
    posterior = pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES, [4], 2 * LATENT))
    likelihood = pv.likelihoods.Normal(pv.networks.MLP(LATENT, [], FEATURES), 0.5)
    return pv.VAE(pv.priors.StandardNormal(LATENT), likelihood, posterior)


def test_variance_and_bias_of_correlated_gradients():
    gradient, mix, draws = torch.tensor([1.0, -2.0, 0.5]), torch.randn(3, 3), 50
    reference = Reference(gradient, torch.zeros(3))

    def scores(bias: float) -> torch.Tensor:
        errors = torch.randn(400, draws, 3) @ mix + bias
        found = [noise(gradient + e, reference, squared_norm({"all": reference})) for e in errors]
        return torch.tensor([[f.bias_z, f.variance] for f in found])

    unbiased = scores(0.0)
    z, variance = unbiased.mean(0)
    assert variance.item() == pytest.approx((mix.square().sum() / 5.25).item(), rel=0.02)
    assert abs(z) < 4.5 / 400**0.5
    assert 0.7 < unbiased[:, 0].std() < 1.3
    assert scores(1.0)[:, 0].mean() > 5


def test_a_reference_that_was_drawn_counts_with_its_own_variance():
    def score(variance: float) -> float:
        reference = Reference(0.3 * torch.randn(10), torch.full((10,), variance))
        return noise(0.1 * torch.randn(50, 10), reference, 1.0).bias_z

    assert abs(torch.tensor([score(0.09) for _ in range(400)]).mean()) < 4.5 / 400**0.5
    assert torch.tensor([score(0.0) for _ in range(20)]).mean() > 10  # it would look biased


def test_the_closed_form_is_what_the_elbo_draws_about():
    vae, x = linear_vae(), torch.randn(4, FEATURES)
    want = linear_elbo(vae, x)
    drawn = repeat(lambda: pv.ELBO("monte_carlo").loss(vae.model, vae.guide, x) / len(x), 400)
    assert abs(z_scores(drawn, want.detach())) < 4.5
    groups = parameter_groups(vae)
    known = exact(want, groups)
    estimated = long_run(pv.ELBO(num_particles=10), vae, x, groups, repeats=100, seed=1)
    for name, reference in estimated.items():
        error = reference.variance.clamp(min=1e-12).sqrt()
        # 60 coordinates: odds of one beyond 4.5 are 4e-4
        assert ((reference.gradient - known[name].gradient) / error).abs().max() < 4.5


def test_the_coordinates_of_a_latent_dimension():
    vae, x = linear_vae(), torch.randn(4, FEATURES)
    head = parameter_groups(vae)["encoder head"]
    own = dimensions_of_head(vae)
    assert torch.cat(own).sort().values.tolist() == list(range(sum(p.numel() for p in head)))
    for j, coordinates in enumerate(own):
        q = vae.encode(x).base_dist
        loss = q.loc[:, j].sum() + q.scale[:, j].square().sum()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, head)])
        assert (flat[coordinates] != 0).all()
        assert flat.count_nonzero() == len(coordinates)
