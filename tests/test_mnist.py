"""MNIST itself, where it is at hand: what the notes this project grew from saw fail."""

from pathlib import Path

import pytest
import torch

import pyro_vae as pv

pytestmark = pytest.mark.data


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_two_latent_units_train_without_nan(likelihood: str, real_data: Path) -> None:
    binarize = "dynamic" if likelihood == "bernoulli" else None
    data = pv.datasets.load("mnist", binarize=binarize, folder=real_data, dtype=torch.float32)
    torch.manual_seed(0)
    decoder = pv.networks.MLP(2, [400], 784)
    encoder = pv.networks.MLP(784, [400], 4)
    kinds = {"bernoulli": pv.likelihoods.Bernoulli, "normal": pv.likelihoods.Normal}
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        kinds[likelihood](decoder),
        pv.posteriors.DiagonalNormal(encoder),
    ).float()
    part = pv.Data(data.train[:20_000], data.valid[:1000], data.test)
    run = pv.fit(vae, part, objective=pv.ELBO(kl="analytic"), epochs=2)
    assert run.metrics[-1]["valid_elbo"] > run.metrics[0]["valid_elbo"]
    assert all(torch.isfinite(p).all() for p in vae.parameters())
