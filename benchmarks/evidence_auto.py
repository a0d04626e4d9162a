"""What escalation is worth: `method="auto"` beside plain importance sampling at equal time.

    OMP_NUM_THREADS=1 python -m benchmarks.evidence_auto

Two VAEs of binarised digits, each trained from several seeds, are evaluated where importance
sampling fails: with an encoder whose scales are halved, and on data that the encoder never saw
(digits with black and white exchanged). Errors are against a long annealing run. Plain importance
sampling draws from the guide alone, and gets at least the processor time that auto took.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.evidence import Annealing

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.evidence_auto"
LONG = Annealing(chains=48, temperatures=200, leapfrogs=5)
MODELS = {"10 latents, [100]": (10, [100]), "20 latents, [200, 200]": (20, [200, 200])}


class Halved(nn.Module):
    """A posterior with its scales multiplied."""

    def __init__(self, posterior: nn.Module, factor: float = 0.5) -> None:
        super().__init__()
        self.posterior, self.factor = posterior, factor

    def forward(self, x: Tensor) -> Any:
        q = self.posterior(x).base_dist
        return dist.Normal(q.loc, self.factor * q.scale).to_event(1)


def train(latent: int, hidden: list[int], seed: int, epochs: int, num_data: int) -> Any:
    """A VAE of digits, and some of its test data."""
    data = pv.datasets.load("digits", binarize="dynamic", seed=seed)
    torch.manual_seed(seed)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(latent, hidden, data.features)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(data.features, hidden, 2 * latent)),
    )
    vae.likelihood.initialize(data.train_mean())
    pv.fit(vae, data, epochs=epochs, batch_size=64, seed=seed, progress=False)
    return vae, data.test.fixed().x[:num_data]


def duel(vae: pv.VAE, x: Tensor, truth: pv.Evidence, seed: int) -> dict[str, Any]:
    """Errors and times of both."""
    started = time.process_time()
    auto = pv.log_marginal(vae.model, vae.guide, x, method="auto", seed=seed, progress=False)
    seconds = time.process_time() - started

    def plain(num_samples: int) -> tuple[pv.Evidence, float]:
        started = time.process_time()
        found = pv.log_marginal(
            vae.model, vae.guide, x, num_samples=num_samples, defensive=0, seed=seed, progress=False
        )
        return found, time.process_time() - started

    plain(1000)
    num_samples = 5000
    same_time, plain_seconds = plain(num_samples)
    while plain_seconds < seconds:  # a draw costs less, the more there are
        num_samples = int(1.05 * num_samples * seconds / plain_seconds) + 1
        same_time, plain_seconds = plain(num_samples)
    escalated = {m: int((auto.method == m).sum()) for m in sorted(set(auto.method.tolist()))}
    return {
        "truth": {"mean": truth.mean, "se_mc": truth.se_mc, "flagged": truth.num_flagged},
        "auto": {**_row(auto, truth, seconds), "methods": escalated},
        "plain": {**_row(same_time, truth, plain_seconds), "draws": num_samples},
    }


def _row(found: pv.Evidence, truth: pv.Evidence, seconds: float) -> dict[str, Any]:
    error = found.log_px - truth.log_px
    return {
        "mean": found.mean,
        "rms_error": float(np.sqrt((error**2).mean())),
        "mean_error": float(error.mean()),
        "flagged": found.num_flagged,
        "seconds": seconds,
        "errors": error.tolist(),
    }


def run(name: str, seed: int, epochs: int, num_data: int) -> list[dict[str, Any]]:
    """One model from one seed, under all conditions."""
    vae, x = train(*MODELS[name], seed, epochs, num_data)
    halved = pv.VAE(vae.prior, vae.likelihood, Halved(vae.posterior))

    def reference(x: Tensor) -> pv.Evidence:
        return pv.log_marginal(
            vae.model, vae.guide, x, method="ais", annealing=LONG, seed=1000 + seed, progress=False
        )

    seen, unseen = reference(x), reference(1 - x)
    found = {
        "as trained": duel(vae, x, seen, seed),
        "scales halved": duel(halved, x, seen, seed),
        "unseen data": duel(vae, 1 - x, unseen, seed),
        "halved, unseen": duel(halved, 1 - x, unseen, seed),
    }
    for condition, row in found.items():
        auto, plain = row["auto"], row["plain"]
        print(
            f"{name:<23} seed {seed} {condition:<15} truth {row['truth']['mean']:.2f} ± "
            f"{row['truth']['se_mc']:.2g}; rms error: auto {auto['rms_error']:.3f} "
            f"({auto['methods']}, {auto['seconds']:.1f} s), plain {plain['rms_error']:.3f} "
            f"(K = {plain['draws']:,}, {plain['seconds']:.1f} s): "
            f"{plain['rms_error'] / auto['rms_error']:.1f}x",
            flush=True,
        )
    return [{"model": name, "seed": seed, "condition": c, **row} for c, row in found.items()]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: rms errors, and the ratio of each seed's."""
    found = []
    for key in dict.fromkeys((row["model"], row["condition"]) for row in rows):
        some = [row for row in rows if (row["model"], row["condition"]) == key]
        auto, plain = (
            np.array([row[method]["rms_error"] for row in some]) for method in ("auto", "plain")
        )
        found.append(
            {
                "model": key[0],
                "condition": key[1],
                "seeds": len(some),
                "auto": float(np.sqrt((auto**2).mean())),
                "plain": float(np.sqrt((plain**2).mean())),
                "gain": float(np.median(plain / auto)),
                "least_gain": float((plain / auto).min()),
                "auto_flagged": sum(row["auto"]["flagged"] for row in some),
            }
        )
    return found


def main(seeds: int, epochs: int, num_data: int) -> None:
    """Train, duel, print, write."""
    rows: list[dict[str, Any]] = []
    for seed, name in itertools.product(range(seeds), MODELS):
        rows += run(name, seed, epochs, num_data)
    results = {"num_data": num_data, "summary": summary(rows), "rows": rows}
    report.write("evidence_auto", COMMAND, results, draw(rows))
    for row in results["summary"]:
        print(
            f"{row['model']:<23} {row['condition']:<15} auto {row['auto']:.3f}, plain "
            f"{row['plain']:.3f} nats: {row['gain']:.1f}x, at least {row['least_gain']:.1f}x"
        )


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The errors of every datum."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(len(MODELS), len(conditions), squeeze=False)
    for line, model in zip(panels, MODELS, strict=True):
        for axes, condition in zip(line, conditions, strict=True):
            some = [r for r in rows if (r["model"], r["condition"]) == (model, condition)]
            for i, method in enumerate(("auto", "plain")):
                errors = [error for row in some for error in row[method]["errors"]]
                jitter = i + np.linspace(-0.15, 0.15, len(errors))
                axes.plot(jitter, errors, "o", alpha=0.5, markersize=3)
            axes.axhline(0, color="k", lw=0.5)
            axes.set(title=condition, xticks=[0, 1], xticklabels=["auto", "plain"])
        line[0].set_ylabel(f"{model}\nerror of log p(x), nats")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-data", type=int, default=8)
    options = parser.parse_args()
    main(options.seeds, options.epochs, options.num_data)
