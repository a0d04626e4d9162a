"""What `fit` costs beside the bare loop over the same step.

    python -m benchmarks.fit_overhead

Both train the same kind of VAE (784-200-200-50, tanh, Bernoulli, batch 128) on the same synthetic
binary data with the same objective, optimizer and batches, one epoch of each in turn in one
process. The bare loop is the least that trains: gather a batch, terms, backward, step. `fit` adds
Fabric, sums of the terms, the check for NaN, the interruption guard and, once an epoch, a row of
metrics and a checkpoint. Reported: the ratio of times by pair of epochs, its median and quartiles,
by the processor's clock (what the process used, whoever else was busy) and by the wall's; and
beside it the ratio of the bare loop to itself, which is the noise of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv
from benchmarks import report
from pyro_vae.seeding import derive, seeded
from pyro_vae.training.mean_terms import MeanTerms

COMMAND = "python -m benchmarks.fit_overhead"
FEATURES, HIDDEN, LATENT, BATCH = 784, [200, 200], 50, 128
NOISE = "the bare loop again"


def make_vae() -> pv.VAE:
    """The VAE of both loops."""
    with seeded(0):
        return pv.VAE(
            pv.priors.StandardNormal(LATENT),
            pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, HIDDEN, FEATURES)),
            pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES, HIDDEN, 2 * LATENT)),
        )


Times = tuple[float, float]  # by the processor's clock, by the wall's
CLOCKS = ("processor", "wall")


def now() -> Times:
    """Both clocks."""
    return time.process_time(), time.perf_counter()


def since(start: Times) -> Times:
    """Seconds since `start`, by both clocks."""
    cpu, wall = now()
    return cpu - start[0], wall - start[1]


def bare_loop(x: Tensor, seed: int) -> Iterator[Times]:
    """The same training by hand; yields the seconds of each epoch."""
    vae = make_vae()
    module = MeanTerms(pv.ELBO(kl="analytic"), vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3, fused=True)
    epoch = 0
    while True:
        start = now()
        with pyro.get_param_store().scope(), pyro.validation_enabled(False):
            generator = torch.Generator().manual_seed(derive(seed, epoch))
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                loss, _ = module(x.index_select(0, rows))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        epoch += 1
        yield since(start)


def in_turn(x: Tensor, epochs: int, out: Path | None) -> dict[str, list[Times]]:
    """Seconds of each epoch of `fit` and of two bare loops, one after the other."""
    hands = [bare_loop(x, seed) for seed in (0, 1)]
    seconds: dict[str, list[Times]] = {"fit": [], "bare": [], "bare again": []}
    start = [now()]

    def take_turns(_: int) -> dict[str, float]:
        # from the end of the last turn: the checkpoint of the epoch before is counted too
        seconds["fit"].append(since(start[0]))
        seconds["bare"].append(next(hands[0]))
        seconds["bare again"].append(next(hands[1]))
        start[0] = now()
        return {}

    pv.fit(
        make_vae(), x, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=BATCH,
        device="cpu", trackers=[take_turns], out=out, progress=False,
    )  # fmt: skip
    return {name: values[1:] for name, values in seconds.items()}  # the first epoch warms up


def main(rows: int = 60_000, epochs: int = 8) -> None:
    """Measure with and without a run folder; print, and write the report."""
    with seeded(1):
        x = torch.bernoulli(torch.rand(rows, FEATURES) * 0.5)
    measured: dict[str, list[Times]] = {"fit": [], "fit with a run folder": [], NOISE: []}
    speed: dict[str, float] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, out in (("fit", None), ("fit with a run folder", Path(folder) / "run")):
            seconds = in_turn(x, epochs, out)
            measured[name] += ratios(seconds["fit"], seconds["bare"])
            measured[NOISE] += ratios(seconds["bare again"], seconds["bare"])
            speed[name] = rows / statistics.median(wall for _, wall in seconds["fit"])
    results = {
        "rows": rows, "epochs": epochs, "load_average": [load, os.getloadavg()[0]],
        "samples_per_second": speed,
        "ratios": {
            name: {clock: summary([v[i] for v in values]) for i, clock in enumerate(CLOCKS)}
            for name, values in measured.items()
        },
    }  # fmt: skip
    for name, by_clock in results["ratios"].items():
        for clock, r in by_clock.items():
            print(f"{name:>22}, {clock:>9}: {r['median']:.3f} ({r['q1']:.3f}-{r['q3']:.3f})")
    report.write("fit_overhead", COMMAND, results, draw(measured))


def ratios(seconds: list[Times], bare: list[Times]) -> list[Times]:
    """The times of each epoch over those of the bare loop beside it."""
    return [(a[0] / b[0], a[1] / b[1]) for a, b in zip(seconds, bare, strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4)
    return {"median": median, "q1": q1, "q3": q3}


def draw(measured: dict[str, list[Times]]) -> Figure:
    """The ratios by the processor's clock as boxes, with the goal."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    values = [[cpu for cpu, _ in ratios] for ratios in measured.values()]
    axes.boxplot(values, tick_labels=list(measured), orientation="horizontal")
    axes.axvline(1.05, ls="--", color="C1", label="goal: 5% lost")
    axes.set(xlabel="processor time of an epoch / that of the bare loop beside it")
    axes.legend()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    main(options.rows, options.epochs)
