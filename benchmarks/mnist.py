"""MNIST from one call of `fit`, beside the same training written out by hand.

    PYRO_VAE_DATA=... python -m benchmarks.mnist

A 784-200-200-50 tanh VAE with a Bernoulli likelihood, Adam at 1e-3, batches of 128, binarised anew
at every visit, both trainings in one process, epoch by epoch in turn. `fit` compiles the step, and
the time that takes is counted. Reported: test ELBO, importance-sampled log p(x) (L_500 of the first
1000 test images), and the ratio of the times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

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


def main(epochs: int = 20, num_samples: int = 500, num_test: int = 1000, seed: int = 0) -> None:
    """Train both ways, evaluate both, write the report."""
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
        by_fit,
        data,
        objective=pv.ELBO(kl="analytic"),
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        trackers=[take_turns],
        compile=True,
    )
    fit_seconds = time.perf_counter() - started - sum(hand_seconds)

    test = data.test.fixed().x
    results = {
        "protocol": "dynamic MNIST, 784-200-200-50 tanh, Adam 1e-3, batch 128",
        "epochs": epochs,
        "num_samples": num_samples,
        "num_test": num_test,
        "fit": judge(by_fit, test, num_samples, num_test) | {"seconds": fit_seconds},
        "by_hand": judge(by_hand, test, num_samples, num_test) | {"seconds": sum(hand_seconds)},
        "time_ratio": fit_seconds / sum(hand_seconds),
    }
    for name in ("fit", "by_hand"):
        row = results[name]
        print(
            f"{name:>8}: test ELBO {row['elbo']:.2f}, log p(x) {row['log_px']:.2f} "
            f"± {row['se_total']:.2f} (L_{num_samples}), {row['seconds']:.1f} s"
        )
    print(f"time of fit / time by hand: {results['time_ratio']:.2f}")
    report.write("mnist", COMMAND, results, draw(run.metrics, results))


@torch.no_grad()
def judge(vae: pv.VAE, test: Tensor, num_samples: int, num_test: int) -> dict[str, float]:
    """Test ELBO on all of `test`, and log p(x) on its first `num_test`; nats per datum."""
    vae.eval()
    with seeded(0):
        elbo = -pv.ELBO(kl="analytic").loss(vae.model, vae.guide, test) / len(test)
    evidence = pv.log_marginal(vae.model, vae.guide, test[:num_test], num_samples=num_samples)
    return {"elbo": elbo, "log_px": evidence.mean, "se_total": evidence.se_total}


def draw(metrics: list[dict[str, float]], results: dict) -> Figure:
    """Training ELBO by epoch, with the final test figures of both."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["epoch"] for r in metrics], [r["train_elbo"] for r in metrics], label="train ELBO")
    for name, style in (("fit", "-"), ("by_hand", ":")):
        axes.axhline(results[name]["elbo"], ls=style, color="C1", label=f"test ELBO, {name}")
        axes.axhline(results[name]["log_px"], ls=style, color="C2", label=f"test log p(x), {name}")
    axes.set(xlabel="epoch", ylabel="nats per datum", title=results["protocol"])
    axes.legend()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.epochs, options.num_samples, seed=options.seed)
