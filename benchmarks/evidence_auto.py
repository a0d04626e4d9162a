"""What escalation is worth: `method="auto"` beside plain importance sampling at equal time.

    python -m benchmarks.evidence_auto

A VAE is trained on binarised digits. Its evidence is then evaluated where importance sampling
fails: with an encoder whose scales are halved, and on data that the encoder never saw (digits with
black and white exchanged). Errors are against a long annealing run; plain importance
sampling draws from the guide alone, and gets as many draws as fit in the time that auto took.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.evidence import Settings

COMMAND = "python -m benchmarks.evidence_auto"
LATENT, NUM_DATA = 10, 20
LONG = Settings(chains=64, temperatures=500, leapfrogs=6)


class Halved(nn.Module):
    """A posterior with its scales multiplied."""

    def __init__(self, posterior: nn.Module, factor: float = 0.5) -> None:
        super().__init__()
        self.posterior, self.factor = posterior, factor

    def forward(self, x: Tensor) -> Any:
        q = self.posterior(x).base_dist
        return dist.Normal(q.loc, self.factor * q.scale).to_event(1)


def train(epochs: int = 60) -> tuple[pv.VAE, Tensor]:
    """A VAE of digits, and its test data."""
    data = pv.datasets.load("digits", binarize="dynamic", seed=0)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, [100], data.features)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(data.features, [100], 2 * LATENT)),
    )
    vae.likelihood.initialize(data.train_mean())
    pv.fit(vae, data, objective=pv.ELBO(), epochs=epochs, batch_size=64, progress=False)
    return vae, data.test.fixed().x[:NUM_DATA]


def reference(vae: pv.VAE, x: Tensor) -> pv.Evidence:
    """A long annealing run from the inflated guide of the VAE as it was trained."""
    return pv.log_marginal(
        vae.model, vae.guide, x, method="ais", annealing=LONG, seed=1, progress=False
    )


def duel(vae: pv.VAE, x: Tensor, truth: pv.Evidence) -> dict[str, Any]:
    """Errors and times of both."""
    started = time.perf_counter()
    auto = pv.log_marginal(vae.model, vae.guide, x, method="auto", progress=False)
    seconds = time.perf_counter() - started

    def plain(num_samples: int) -> pv.Evidence:
        return pv.log_marginal(
            vae.model, vae.guide, x, num_samples=num_samples, defensive=0, progress=False
        )

    plain(1000)
    started = time.perf_counter()
    plain(5000)
    rate = (time.perf_counter() - started) / 5000
    num_samples = max(5000, int(seconds / rate))
    started = time.perf_counter()
    same_time = plain(num_samples)
    return {
        "truth": {"mean": truth.mean, "se_mc": truth.se_mc, "flagged": truth.num_flagged},
        "auto": _row(auto, truth, seconds)
        | {"escalated": int((auto.method == "ais").sum()), "draws": 5000},
        "plain": _row(same_time, truth, time.perf_counter() - started) | {"draws": num_samples},
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


def main() -> None:
    """Train, duel, print, write."""
    vae, x = train()
    halved = pv.VAE(vae.prior, vae.likelihood, Halved(vae.posterior))
    seen, unseen = reference(vae, x), reference(vae, 1 - x)
    results = {
        "as trained": duel(vae, x, seen),
        "scales halved": duel(halved, x, seen),
        "unseen data": duel(vae, 1 - x, unseen),
        "halved, unseen": duel(halved, 1 - x, unseen),
    }
    for name, row in results.items():
        auto, plain = row["auto"], row["plain"]
        print(
            f"{name:<16} truth {row['truth']['mean']:.3f} ± {row['truth']['se_mc']:.2g}; "
            f"rms error: auto {auto['rms_error']:.3f} ({auto['escalated']} of {NUM_DATA} annealed, "
            f"{auto['seconds']:.1f} s), plain {plain['rms_error']:.3f} "
            f"(K = {plain['draws']:,}, {plain['seconds']:.1f} s): "
            f"{plain['rms_error'] / auto['rms_error']:.1f}x"
        )
    report.write("evidence_auto", COMMAND, results, draw(results))


def draw(results: dict[str, Any]) -> Figure:
    """The errors of every datum."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for i, method in enumerate(("auto", "plain")):
            errors = row[method]["errors"]
            axes.plot([i] * len(errors), errors, "o", alpha=0.5)
        axes.axhline(0, color="k", lw=0.5)
        axes.set(title=name, xticks=[0, 1], xticklabels=["auto", "plain"], xlim=(-0.5, 1.5))
    figure.axes[0].set_ylabel("error of log p(x), nats")
    return figure


if __name__ == "__main__":
    main()
