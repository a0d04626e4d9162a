"""Batch normalisation under every objective: rows are rows, and each step counts once."""

import copy

import pytest
import torch
from torch import nn

import pyro_vae as pv

N, FEATURES, LATENT, WIDTH = 6, 4, 2, 5

OBJECTIVES = {
    "analytic": pv.ELBO(),
    "particles": pv.ELBO(num_particles=WIDTH),
    "stl": pv.ELBO("monte_carlo", gradient="stl"),
    "iwae": pv.IWAE(WIDTH),
    "iwae-stl": pv.IWAE(3, "stl"),
    "dreg": pv.IWAE(3, "dreg"),
    "miwae": pv.MIWAE(2, 3),
}


def normalised(fan_in, fan_out):
    return nn.Sequential(
        nn.Linear(fan_in, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, fan_out)
    )


def build(num_data=N):
    posterior = pv.posteriors.DiagonalNormal(normalised(FEATURES, 2 * LATENT))
    likelihood = pv.likelihoods.Normal(normalised(LATENT, FEATURES))
    return pv.VAE(pv.priors.StandardNormal(LATENT), likelihood, posterior), torch.randn(
        num_data, FEATURES
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_counts_its_batch_once_and_evaluation_never(name):
    objective = copy.copy(OBJECTIVES[name])  # so that its first call looks for plates here
    vae, x = build()
    encoder, decoder = vae.posterior.network[1], vae.likelihood.network[1]
    objective.differentiable_loss(vae.model, vae.guide, x).backward()
    assert encoder.num_batches_tracked == 1
    assert decoder.num_batches_tracked == 1
    first = vae.posterior.network[0]
    torch.testing.assert_close(encoder.running_mean, 0.1 * first(x).mean(0))
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    vae.eval()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    objective.loss(vae.model, vae.guide, x)
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())


@pytest.mark.parametrize("columns", [False, True])
def test_the_decoder_normalises_rows_whatever_the_leading_dimensions(columns):
    # as many data as the layer is wide: the layer would take the data for its channels
    vae, _ = build()
    likelihood = vae.likelihood
    if columns:
        kinds = [pv.likelihoods.Normal()] * FEATURES
        likelihood = pv.likelihoods.Columns(normalised(LATENT, FEATURES), kinds)
    z = torch.randn(7, WIDTH, LATENT)
    at_once = likelihood(z).mean
    rows = likelihood(z.flatten(0, 1)).mean
    torch.testing.assert_close(at_once, rows.reshape(at_once.shape))
    assert likelihood.eval()(z[0, 0]).mean.shape == (FEATURES,)


def test_evidence_leaves_the_statistics_alone():
    vae, x = build()
    before = copy.deepcopy(vae.state_dict())
    evidence = pv.log_marginal(vae.model, vae.guide, x, num_samples=10)
    assert torch.as_tensor(evidence.log_px).isfinite().all()
    assert vae.training
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())
