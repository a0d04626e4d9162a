"""Figure 3 of Kingma & Welling 2013, in minutes: log p(x) by AEVB, wake-sleep and Monte Carlo EM.

    PYRO_VAE_DATA=... python -m benchmarks.aevb

1000 digits of MNIST, binarised once, 3 latents, one tanh layer of 100 units each side, weights of
standard deviation 0.01 (with 0.1, the other reading of the paper's N(0, 0.01), wake-sleep's encoder
never finds the data), batches of 100, one draw of z, Adagrad; each method trained anew for every
budget. Budgets are updates of the parameters, so that methods compare: Monte Carlo EM makes five at
every visit of a batch, after ten leapfrog steps of its E-step, and so sees a fifth of the samples,
and takes the gradient of the decoder three times as often; processor time stands beside.

log p(x) is that of importance sampling where its weights are sound and of annealing elsewhere
(`method="auto"`); for Monte Carlo EM from an encoder fitted to the finished decoder. The paper goes
on to 6 * 10^7 samples; its numbers stand beside, for scale.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from pyro_vae.evidence import Annealing
from pyro_vae.plots import style
from pyro_vae.seeding import derive, seeded

COMMAND = "PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.aevb"
TRAIN, HIDDEN, LATENT, BATCH, RATE = 1000, 100, 3, 100, 0.02
UPDATES_A_VISIT = {"AEVB": 1, "wake-sleep": 1, "MCEM": 5}
OBJECTIVES = {"AEVB": pv.ELBO(kl="analytic"), "wake-sleep": pv.WakeSleep()}
PAPER = {  # after 60 million samples, N = 1000
    "AEVB": (-109.1, -143.2),
    "wake-sleep": (-125.5, -144.8),
    "MCEM": (-109.2, -141.7),
}


def make_vae(hidden: int, latent: int, seed: int) -> pv.VAE:
    """The paper's networks and weights."""
    with seeded(derive(seed, hidden)):
        vae = pv.VAE(
            pv.priors.StandardNormal(latent),
            pv.likelihoods.Bernoulli(pv.networks.MLP(latent, [hidden], 784)),
            pv.posteriors.DiagonalNormal(pv.networks.MLP(784, [hidden], 2 * latent)),
        )
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    return vae


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer."""
    return torch.optim.Adagrad(parameters, RATE)


def train(vae: pv.VAE, method: str, data: pv.Data, updates: int, seed: int) -> None:
    """So many updates of the parameters."""
    epochs = updates * BATCH // (UPDATES_A_VISIT[method] * len(data.train))
    if method == "MCEM":
        pv.mcem(
            vae.model, data.train.x, epochs=epochs, batch_size=BATCH, optimizer=adagrad,
            num_updates=UPDATES_A_VISIT[method], seed=seed,
        )  # fmt: skip
    else:
        pv.fit(
            vae, data, objective=OBJECTIVES[method], epochs=epochs, batch_size=BATCH,
            optimizer=adagrad, seed=seed, compile=True, progress=False,
        )  # fmt: skip


def fit_guide(vae: pv.VAE, data: pv.Data, seed: int) -> None:
    """An encoder for a decoder that has none, the decoder left as it is."""
    vae.model.requires_grad_(False)
    pv.fit(vae, data.train, epochs=100, batch_size=BATCH, seed=seed, progress=False)
    vae.model.requires_grad_(True)


def evaluate(vae: pv.VAE, x: torch.Tensor, temperatures: int) -> dict[str, Any]:
    """log p(x), its error, and how many of the data are annealed, and flagged all the same."""
    found = pv.log_marginal(
        vae.model, vae.guide, x, num_samples=5000, method="auto",
        annealing=Annealing(temperatures=temperatures), progress=False,
    )  # fmt: skip
    return {
        "log_px": found.mean,
        "se": found.se_total,
        "monte_carlo_se": float((found.se**2).sum() ** 0.5 / len(x)),
        "annealed": int((found.method == "ais").sum()),
        "flagged": found.num_flagged,
    }


def run(method: str, updates: int, data: pv.Data, temperatures: int, seed: int) -> dict[str, Any]:
    """Train and evaluate."""
    vae = make_vae(HIDDEN, LATENT, seed)
    started = time.process_time()
    train(vae, method, data, updates, seed)
    seconds = time.process_time() - started
    if method == "MCEM":
        fit_guide(vae, data, seed)
    parts = {"train": data.train.x[: len(data.test)], "test": data.test.x}
    return {
        "method": method,
        "updates": updates,
        "visits": updates * BATCH // UPDATES_A_VISIT[method],
        "seconds": seconds,
        "paper": PAPER[method],
        **{name: evaluate(vae, x, temperatures) for name, x in parts.items()},
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """log p(x) by updates; training data dashed."""
    figure = style.figure(4.6, 3.6)
    axes = figure.subplots()
    for method, colour in zip(PAPER, style.class_colours(len(PAPER)), strict=True):
        mine = [row for row in rows if row["method"] == method]
        for part, line in (("train", "--"), ("test", "-")):
            axes.errorbar(
                [row["updates"] * BATCH for row in mine], [row[part]["log_px"] for row in mine],
                yerr=[row[part]["se"] for row in mine], color=colour, linestyle=line, marker="o",
                markersize=3, capsize=2, label=f"{method}, {part}",
            )  # fmt: skip
    axes.set_xscale("log")
    style.dress(axes, f"N = {TRAIN}", "samples in all updates", "log p(x), nats")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=style.TICK)
    return figure


def main() -> None:
    """Every method at every budget, into results/aevb.json and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[1000, 3000, 10_000])
    parser.add_argument("--num-test", type=int, default=100, help="data of each part evaluated")
    parser.add_argument("--temperatures", type=int, default=100, help="of the annealing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mnist = pv.datasets.load("mnist", binarize="fixed")
    test = mnist.test.fixed()[:: len(mnist.test) // options.num_test]
    data = pv.Data(mnist.train.fixed()[:TRAIN], None, test)
    rows = []
    for method in PAPER:
        for updates in options.updates:
            rows.append(run(method, updates, data, options.temperatures, options.seed))
            print(rows[-1], flush=True)
    report.write("aevb", COMMAND, {**vars(options), "rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
