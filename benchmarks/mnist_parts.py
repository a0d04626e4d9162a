"""What a better prior and a tighter bound are worth: MNIST, equal epochs, equal networks.

    PYRO_VAE_DATA=... python -m benchmarks.mnist_parts

N(0, I) with the ELBO, a VampPrior with the ELBO, N(0, I) with IWAE-50: 784-200-200-50 tanh both
ways, Adam at 1e-3, batches of 128, binarised anew at every visit. Reported: importance-sampled
log p(x) of test data, and the differences from the first, paired datum by datum.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report, tables
from pyro_vae.objectives import Objective
from pyro_vae.seeding import derive, seeded

COMMAND = "python -m benchmarks.mnist_parts"
LATENT, HIDDEN, PSEUDO_INPUTS = 50, [200, 200], 500
RUNS: dict[str, tuple[str, Objective]] = {
    "N(0, I), ELBO": ("normal", pv.ELBO(kl="analytic")),
    "VampPrior, ELBO": ("vamp", pv.ELBO(kl="monte_carlo")),
    "N(0, I), IWAE-50": ("normal", pv.IWAE(50)),
}


def make_vae(data: pv.Data, prior: str, seed: int) -> pv.VAE:
    """The same networks from the same seed, under either prior."""
    with seeded(derive(seed, 0)):
        posterior = pv.posteriors.DiagonalNormal(pv.networks.MLP(data.features, HIDDEN, 2 * LATENT))
        likelihood = pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, HIDDEN, data.features))
        if prior == "vamp":
            start = data.train.fixed().x[:PSEUDO_INPUTS]
            p: Any = pv.priors.VampPrior(posterior, PSEUDO_INPUTS, start)
        else:
            p = pv.priors.StandardNormal(LATENT)
    likelihood.initialize(data.train_mean())
    return pv.VAE(p, likelihood, posterior)


def main() -> None:
    """Train the three, evaluate them on the same data, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic")
    test = data.test.fixed().x
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    test = test[chosen[: options.num_test]]

    rows: list[dict[str, Any]] = []
    log_px: dict[str, torch.Tensor] = {}
    for name, (prior, objective) in RUNS.items():
        vae = make_vae(data, prior, options.seed)
        run = pv.fit(
            vae, data, objective=objective, epochs=options.epochs, seed=options.seed, batch_size=128
        )
        found = pv.log_marginal(vae.model, vae.guide, test, num_samples=options.num_samples)
        log_px[name] = found.log_px
        gain = log_px[name] - next(iter(log_px.values()))
        rows.append({
            "name": name, "log_px": found.mean, "se_total": found.se_total,
            "gain": gain.mean().item(), "gain_se": (gain.std() / len(gain) ** 0.5).item(),
            "active_units": pv.active_units(vae.guide, test).number,
            "seconds": run.metrics[-1]["seconds"],
        })  # fmt: skip
        print(rows[-1])
    results = {"epochs": options.epochs, "num_samples": options.num_samples,
               "num_test": options.num_test, "rows": rows}  # fmt: skip
    report.write("mnist_parts", COMMAND, results, draw(rows))
    print(tables.mnist_parts(report.read("mnist_parts")))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Paired gains over the first row."""
    figure = Figure(figsize=(5, 2.5), layout="constrained")
    axes = figure.subplots()
    others = rows[1:]
    axes.barh(
        [r["name"] for r in others],
        [r["gain"] for r in others],
        xerr=[2 * r["gain_se"] for r in others],
    )
    axes.set(xlabel=f"gain in test log p(x) over {rows[0]['name']}, nats (± 2 paired SE)")
    return figure


if __name__ == "__main__":
    main()
