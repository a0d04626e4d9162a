"""MNIST from one call of `fit`, beside the same training written out by hand.

    PYRO_VAE_DATA=... python -m benchmarks.mnist

A 784-200-200-50 tanh VAE with a Bernoulli likelihood, Adam at 1e-3, batches of 128, binarised anew
at every visit, both trainings in one process, epoch by epoch in turn. `fit` compiles the step, and
the time that takes is counted. Reported, as means over seeds: test ELBO, importance-sampled
log p(x) (L_500 of the first 1000 test images), and the ratio of the times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.seeding import derive, seeded

COMMAND = "python -m benchmarks.mnist"
LATENT, HIDDEN, BATCH = 50, [200, 200], 128


def make_vae(data: pv.Data) -> pv.VAE:
    """The library's VAE."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, HIDDEN, data.features)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(data.features, HIDDEN, 2 * LATENT)),
    )
    vae.likelihood.initialize(data.train_mean())
    return vae


def train_by_hand(vae: pv.VAE, data: pv.Data, epochs: int, seed: int) -> Iterator[float]:
    """The same training in plain PyTorch, same networks: yields the seconds of each epoch."""
    encoder, decoder = vae.posterior.network, vae.likelihood.network
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3, fused=True)
    x_all = data.train.x
    for epoch in range(epochs):
        started = time.perf_counter()
        torch.manual_seed(derive(seed, epoch))
        for rows in torch.randperm(len(x_all)).split(BATCH):
            intensity = x_all[rows]
            x = (torch.rand_like(intensity) < intensity).float()
            loc, log_variance = encoder(x).chunk(2, -1)
            z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
            reconstruction = -nn.functional.binary_cross_entropy_with_logits(
                decoder(z), x, reduction="sum"
            )
            kl = 0.5 * (loc**2 + log_variance.exp() - 1 - log_variance).sum()
            loss = (kl - reconstruction) / len(x)
            loss.item()  # a loop that is watched reads its loss, as `fit` does
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield time.perf_counter() - started


def main(
    epochs: int = 20, num_samples: int = 500, num_test: int = 1000, num_seeds: int = 3
) -> None:
    """Train both ways from every seed, evaluate both, write the report."""
    runs = [compare(seed, epochs, num_samples, num_test) for seed in range(num_seeds)]
    results = {
        "protocol": "dynamic MNIST, 784-200-200-50 tanh, Adam 1e-3, batch 128",
        "epochs": epochs,
        "num_samples": num_samples,
        "num_test": num_test,
        "runs": runs,
        "mean": {
            way: {name: statistics.mean(run[way][name] for run in runs) for name in runs[0][way]}
            for way in ("fit", "by_hand")
        },
        "time_ratio": statistics.median(run["time_ratio"] for run in runs),
    }
    for way, row in results["mean"].items():
        print(
            f"{way:>8}: test ELBO {row['elbo']:.2f} (first {num_test}: {row['elbo_first']:.2f}), "
            f"log p(x) {row['log_px']:.2f} ± {row['se_total']:.2f} (L_{num_samples}), "
            f"{row['seconds']:.1f} s; mean of {num_seeds} seeds"
        )
    print(f"time of fit / time by hand: {results['time_ratio']:.2f}")
    report.write("mnist", COMMAND, results, draw(results))


def compare(seed: int, epochs: int, num_samples: int, num_test: int) -> dict[str, Any]:
    """One training each way, epoch by epoch in turn, and what came of them."""
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic", seed=seed)
    with seeded(seed):
        by_fit, by_hand = make_vae(data), make_vae(data)
    hand = train_by_hand(by_hand, data, epochs, seed)
    hand_seconds: list[float] = []

    def take_turns(epoch: int) -> dict[str, float]:
        hand_seconds.append(next(hand))
        return {}

    started = time.perf_counter()
    run = pv.fit(
        by_fit, data, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=BATCH, seed=seed,
        trackers=[take_turns], compile=True,
    )  # fmt: skip
    fit_seconds = time.perf_counter() - started - sum(hand_seconds)
    test = data.test.fixed().x
    result = {
        "seed": seed,
        "fit": judge(by_fit, test, num_samples, num_test) | {"seconds": fit_seconds},
        "by_hand": judge(by_hand, test, num_samples, num_test) | {"seconds": sum(hand_seconds)},
        "time_ratio": fit_seconds / sum(hand_seconds),
        "train_elbo": [row["train_elbo"] for row in run.metrics],
    }
    print(f"seed {seed}: {result['fit']}, {result['by_hand']}", flush=True)
    return result


@torch.no_grad()
def judge(vae: pv.VAE, test: Tensor, num_samples: int, num_test: int) -> dict[str, float]:
    """Nats per datum: the ELBO on all of `test`; ELBO and log p(x) on its first `num_test`."""
    vae.eval()
    evidence = pv.log_marginal(vae.model, vae.guide, test[:num_test], num_samples=num_samples)
    return {
        "elbo": elbo(vae, test), "elbo_first": elbo(vae, test[:num_test]),
        "log_px": evidence.mean, "se_total": evidence.se_total,
    }  # fmt: skip


def elbo(vae: pv.VAE, x: Tensor) -> float:
    """The ELBO per datum, a mean of ten draws."""
    objective = pv.ELBO(kl="analytic")
    with seeded(0):
        losses = [objective.loss(vae.model, vae.guide, x) for _ in range(10)]
    return -statistics.mean(losses) / len(x)


def draw(results: dict[str, Any]) -> Figure:
    """Training ELBO by epoch and seed, with the final test figures of both."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run in results["runs"]:
        epochs = range(1, 1 + len(run["train_elbo"]))
        axes.plot(epochs, run["train_elbo"], color="C0", label=f"train ELBO, seed {run['seed']}")
    for way, style in (("fit", "-"), ("by_hand", ":")):
        mean = results["mean"][way]
        axes.axhline(mean["elbo"], ls=style, color="C1", label=f"test ELBO, {way}")
        axes.axhline(mean["log_px"], ls=style, color="C2", label=f"test log p(x), {way}")
    axes.set(xlabel="epoch", ylabel="nats per datum", title=results["protocol"])
    axes.legend()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    main(options.epochs, options.num_samples, num_seeds=options.seeds)
