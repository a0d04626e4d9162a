"""AEVB beside wake-sleep and Monte Carlo EM: figures 2 and 3 of Kingma & Welling 2013, in minutes.

    PYRO_VAE_DATA=... python -m benchmarks.aevb

MNIST, binarised; one tanh layer each side, weights of standard deviation 0.01 (with 0.1, the other
reading of the paper's N(0, 0.01), wake-sleep's encoder never finds the data), batches of 100, one
draw of z, Adagrad. Figure 2: the test lower bound of AEVB and wake-sleep by samples seen, 500
hidden units and 3 latents, 10,000 training digits. Figure 3: log p(x) of training and test data,
100 hidden units and 3 latents, 1000 training data, by AEVB, wake-sleep and Monte Carlo EM (10
leapfrog steps, 5 updates a visit), each trained anew for every budget. log p(x) is importance
sampled; for Monte Carlo EM from an encoder fitted to the finished decoder. The paper goes on to
10^7 or 10^8 samples; its numbers stand beside, for scale.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from pyro_vae.plots import style
from pyro_vae.seeding import derive, seeded

COMMAND = "python -m benchmarks.aevb"
LATENT, BATCH, RATE = 3, 100, 0.02
EPOCH = 10_000  # training digits of figure 2
OBJECTIVES = {"AEVB": pv.ELBO(kl="analytic"), "wake-sleep": pv.WakeSleep()}
PAPER = {  # figure 2, best test bound at 3 latents; figure 3 after 60 million samples, N = 1000
    "figure 2": -133.2,
    "figure 3": {
        "AEVB": (-109.1, -143.2),
        "wake-sleep": (-125.5, -144.8),
        "MCEM": (-109.2, -141.7),
    },
}


def make_vae(hidden: int, seed: int) -> pv.VAE:
    """The paper's networks and weights."""
    with seeded(derive(seed, hidden)):
        vae = pv.VAE(
            pv.priors.StandardNormal(LATENT),
            pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, [hidden], 784)),
            pv.posteriors.DiagonalNormal(pv.networks.MLP(784, [hidden], 2 * LATENT)),
        )
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    return vae


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer."""
    return torch.optim.Adagrad(parameters, RATE)


def train(vae: pv.VAE, method: str, data: pv.Data, samples: int, seed: int) -> list[Any]:
    """Train for so many samples; the rows of metrics."""
    if method == "MCEM":
        epochs = samples // len(data.train)
        return pv.mcem(
            vae.model, data.train.x, epochs=epochs, batch_size=BATCH, optimizer=adagrad, seed=seed
        )
    run = pv.fit(
        vae, data, objective=OBJECTIVES[method], epochs=samples // len(data.train),
        batch_size=BATCH, optimizer=adagrad, seed=seed, progress=False,
    )  # fmt: skip
    return run.metrics


def fit_guide(vae: pv.VAE, data: pv.Data, seed: int) -> None:
    """An encoder for a decoder that has none, the decoder left as it is."""
    vae.model.requires_grad_(False)
    pv.fit(vae, data.train, epochs=60, batch_size=BATCH, seed=seed, progress=False)
    vae.model.requires_grad_(True)


def figure_2(samples: int, seed: int) -> dict[str, Any]:
    """Test bounds by samples seen."""
    mnist = pv.datasets.load("mnist", binarize="dynamic")
    curves = {}
    for method in OBJECTIVES:
        vae = make_vae(500, seed)
        data = pv.Data(mnist.train[:EPOCH], mnist.test[::10], mnist.test)
        rows = train(vae, method, data, samples, seed)
        curves[method] = {
            "samples": [int(row["epoch"]) * EPOCH for row in rows],
            "bound": [row["valid_elbo"] for row in rows],
        }
        print(method, curves[method]["bound"][-1], flush=True)
    return curves


def figure_3(budgets: list[int], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """log p(x) of training and test data by samples seen."""
    mnist = pv.datasets.load("mnist", binarize="fixed")
    test = mnist.test.fixed()[::50]
    data = pv.Data(mnist.train.fixed()[:1000], None, test)
    rows = []
    for method in (*OBJECTIVES, "MCEM"):
        for budget in budgets:
            vae = make_vae(100, seed)
            started = time.process_time()
            train(vae, method, data, budget, seed)
            seconds = time.process_time() - started
            if method == "MCEM":
                fit_guide(vae, data, seed)
            row: dict[str, Any] = {"method": method, "samples": budget, "seconds": seconds}
            for name, x in (("train", data.train.x[:200]), ("test", test.x)):
                found = pv.log_marginal(
                    vae.model, vae.guide, x, num_samples=num_samples, progress=False
                )
                row[name], row[f"{name}_se"] = found.mean, found.se_total
                row[f"{name}_flagged"] = found.num_flagged
            rows.append(row)
            print(row, flush=True)
    return rows


def draw(curves: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """The two figures side by side."""
    figure = style.figure(7.0, 3.2)
    left, right = figure.subplots(1, 2)
    methods = (*OBJECTIVES, "MCEM")
    colours = dict(zip(methods, style.class_colours(len(methods)), strict=True))
    for method, curve in curves.items():
        left.plot(
            np.array(curve["samples"]) / 1000, curve["bound"], color=colours[method], label=method
        )
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        for name, line in (("train", "--"), ("test", "-")):
            right.errorbar(
                [row["samples"] for row in mine], [row[name] for row in mine],
                yerr=[row[f"{name}_se"] for row in mine], color=colours[method], linestyle=line,
                marker="o", markersize=3, capsize=2, label=f"{method}, {name}",
            )  # fmt: skip
    right.set_xscale("log")
    budgets = sorted({row["samples"] for row in rows})
    right.set_xticks(budgets, [f"{budget // 1000}" for budget in budgets])
    right.minorticks_off()
    style.dress(left, "Figure 2: test bound, 3 latents", "samples seen, thousands", "ELBO, nats")
    style.dress(right, "Figure 3: N = 1000", "samples seen, thousands", "log p(x), nats")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=style.TICK)
    return figure


def main() -> None:
    """Both figures, into results/aevb.json and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=300_000, help="seen in figure 2")
    parser.add_argument("--budgets", type=int, nargs="+", default=[20_000, 60_000, 200_000])
    parser.add_argument("--num-samples", type=int, default=1000, help="draws for log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    curves = figure_2(options.samples, options.seed)
    rows = figure_3(options.budgets, options.num_samples, options.seed)
    results = {**vars(options), "figure_2": curves, "figure_3": rows, "paper": PAPER}
    report.write("aevb", COMMAND, results, draw(curves, rows))


if __name__ == "__main__":
    main()
