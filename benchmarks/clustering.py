"""Clusters without labels: the Gaussian-mixture VAE on the digits and on MNIST.

    PYRO_VAE_DATA=... python -m benchmarks.clustering

A plain VAE is trained, components are placed at the clusters of its latent means, and the mixture
is trained on. Reported for every seed: test accuracy under the best one-to-one matching of ten
clusters with ten classes, of the components as they were placed and at the end, and the share of
data in the smallest and the largest cluster.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.data import Data
from pyro_vae.networks import MLP
from pyro_vae.seeding import derive, seeded
from pyro_vae.variants import GaussianMixtureVAE

COMMAND = "python -m benchmarks.clustering"
CLUSTERS, LATENT = 10, 10
# hidden layers, scale of the Normal likelihood, epochs as a plain VAE and as a mixture, seeds
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"hidden": [128], "scale": 0.2, "epochs": (60, 40), "batch": 64, "seeds": 3},
    "mnist": {"hidden": [300], "scale": 0.25, "epochs": (8, 8), "batch": 200, "seeds": 1},
}


def make(data: Data, hidden: list[int], scale: float, seed: int) -> GaussianMixtureVAE:
    with seeded(derive(seed, 0)):
        decoder = MLP(LATENT, hidden[::-1], data.features, nn.ReLU)
        encoder = MLP(data.features, hidden, 2 * LATENT, nn.ReLU)
        likelihood = pv.likelihoods.Normal(decoder, scale)
        vae = GaussianMixtureVAE(
            likelihood, pv.posteriors.DiagonalNormal(encoder), CLUSTERS, LATENT
        )
    likelihood.initialize(data.train_mean())
    return vae


@torch.no_grad()
def judge(vae: GaussianMixtureVAE, data: Data) -> dict[str, float]:
    """Accuracy on the test data, and the sizes of the extreme clusters."""
    clusters = vae.classify(data.test.x).probs.argmax(-1)
    shares = torch.bincount(clusters, minlength=CLUSTERS) / len(clusters)
    return {
        "accuracy": pv.clustering_accuracy(clusters, data.test.y),
        "smallest": shares.min().item(),
        "largest": shares.max().item(),
    }


def run(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    data = pv.datasets.load(name)
    started = time.monotonic()
    vae = make(data, settings["hidden"], settings["scale"], seed)
    options = {"batch_size": settings["batch"], "seed": seed, "progress": False}
    first, then = settings["epochs"]
    pv.fit(vae.plain(), data, epochs=first, **options)
    vae.place(data.train.x[:10_000], seed)
    placed = judge(vae, data)
    pv.fit(vae, data, epochs=then, compile="auto" if name == "mnist" else False, **options)
    return {"data": name, "seed": seed, "placed": placed["accuracy"], **judge(vae, data),
            "seconds": time.monotonic() - started}  # fmt: skip


def main() -> None:
    """Cluster both data sets, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    rows = []
    for name in options.data:
        for seed in range(SETTINGS[name]["seeds"]):
            rows.append(run(name, seed, SETTINGS[name]))
            print(rows[-1], flush=True)
    report.write("clustering", COMMAND, {"settings": SETTINGS, "rows": rows})


if __name__ == "__main__":
    main()
