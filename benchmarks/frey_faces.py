"""Frey faces by the protocol of Kingma & Welling 2013: the best test lower bound of figure 2.

    PYRO_VAE_DATA=... python -m benchmarks.frey_faces

One tanh layer of 200 units each side, a Normal likelihood with sigmoid means, weights drawn from
N(0, 0.01), batches of 100, one draw of z, Adagrad; 200 of the 1,965 frames held out. The scale in
two forms: predicted, as in the paper's decoder (appendix C.2), and one learned number. Densities
are of grey values in [0, 1]. Reported: the best test ELBO through training beside the paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.programs import evaluating
from pyro_vae.seeding import derive, seeded

COMMAND = "python -m benchmarks.frey_faces"
HIDDEN, BATCH, RATE = 200, 100, 0.02
PAPER = {2: 882, 5: 1117, 10: 1316, 20: 1320}  # read off figure 2
SCALES = ("predicted", "learned")


def make_vae(features: int, latent: int, scale: str, seed: int) -> pv.VAE:
    """The paper's networks."""
    outputs = 2 * features if scale == "predicted" else features
    with seeded(derive(seed, latent)):
        vae = pv.VAE(
            pv.priors.StandardNormal(latent),
            pv.likelihoods.Normal(
                pv.networks.MLP(latent, [HIDDEN], outputs), scale, mean_activation=torch.sigmoid
            ),
            pv.posteriors.DiagonalNormal(pv.networks.MLP(features, [HIDDEN], 2 * latent)),
        )
        for layer in vae.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.1)
                nn.init.normal_(layer.bias, std=0.1)
    return vae


def train(
    data: pv.Data, latent: int, scale: str, epochs: int, every: int, seed: int
) -> list[float]:
    """The test ELBO, nats per datum, after every `every` epochs."""
    vae = make_vae(data.features, latent, scale, seed)
    curve: list[float] = []

    def track(epoch: int) -> Mapping[str, float]:
        if epoch % every == 0:
            curve.append(elbo(vae, data.test.x))
        return {}

    pv.fit(
        vae, data, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=BATCH, seed=seed,
        optimizer=lambda parameters: torch.optim.Adagrad(parameters, RATE),
        trackers=[track], compile=True,
    )  # fmt: skip
    return curve


@torch.no_grad()
def elbo(vae: pv.VAE, x: Tensor, num_particles: int = 20) -> float:
    """The ELBO per datum, on the same draws each time."""
    objective = pv.ELBO(kl="analytic", num_particles=num_particles, max_plate_nesting=1)
    with evaluating(vae.model, vae.guide), seeded(0):
        return -objective.loss(vae.model, vae.guide, x) / len(x)


def main() -> None:
    """Train every setting, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--every", type=int, default=50, help="epochs between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = pv.datasets.load("frey_faces", split="aevb", binarize=None)
    rows: list[dict[str, Any]] = []
    for scale in SCALES:
        for latent, paper in PAPER.items():
            curve = train(data, latent, scale, options.epochs, options.every, options.seed)
            rows.append({
                "scale": scale, "latent": latent, "test_elbo": max(curve), "last": curve[-1],
                "paper": paper, "curve": curve,
            })  # fmt: skip
            print(f"{scale:>9}, {latent:2} latents: {max(curve):7.1f} (paper {paper})", flush=True)
    results = {
        "epochs": options.epochs, "every": options.every,
        "samples_seen": options.epochs * len(data.train), "rows": rows,
    }  # fmt: skip
    report.write("frey_faces", COMMAND, results, draw(rows, options.every * len(data.train)))


def draw(rows: list[dict[str, Any]], samples: int) -> Figure:
    """The test ELBO through training, and the paper's best."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 2, sharey=True), SCALES, strict=True):
        for i, row in enumerate(r for r in rows if r["scale"] == scale):
            seen = [samples * (k + 1) for k in range(len(row["curve"]))]
            axes.plot(seen, row["curve"], color=f"C{i}", label=f"{row['latent']} latents")
            axes.axhline(row["paper"], color=f"C{i}", ls=":")
        axes.set(
            xscale="log", xlabel="training samples seen", title=f"{scale} scale (paper dotted)"
        )
        axes.set_ylim(0, None)
        axes.legend()
    figure.axes[0].set_ylabel("test ELBO, nats per image")
    return figure


if __name__ == "__main__":
    main()
