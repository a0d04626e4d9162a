"""What compiling changes: MNIST trained eagerly, compiled, and compiled in mixed precision.

    PYRO_VAE_DATA=... python -m benchmarks.mnist_compiled

The VAE of `benchmarks.mnist`, every seed in every way in turn, on the same draws: log p(x) of 500
test images against the seconds of training, the compiling included. Compiled and eager differ by
rounding; "bf16-mixed" trades precision in the matrix products, so its log p(x) is shown beside
theirs. Reported: the final log p(x), mean and sd over seeds, and the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from benchmarks.mnist import BATCH, make_vae
from pyro_vae.seeding import seeded

COMMAND = "python -m benchmarks.mnist_compiled"
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "compiled": {"compile": True},
    "compiled, bf16-mixed": {"compile": True, "precision": "bf16-mixed"},
}


def train(data: pv.Data, way: str, seed: int, epochs: int, every: int) -> dict[str, Any]:
    """The seconds of training and log p(x) at every `every`-th epoch."""
    with seeded(seed):
        vae = make_vae(data)
    test = data.test.fixed().x[:500]
    log_px = pv.track_log_px(vae, test, every)
    clock = {"start": time.perf_counter(), "paused": 0.0}
    curve: list[tuple[float, float]] = []

    def track(epoch: int) -> dict[str, float]:
        now = time.perf_counter()
        row = log_px(epoch)
        if row:
            curve.append((now - clock["start"] - clock["paused"], row["valid_log_px"]))
        clock["paused"] += time.perf_counter() - now
        return {}

    pv.fit(
        vae, data, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=BATCH, seed=seed,
        trackers=[track], **WAYS[way],
    )  # fmt: skip
    seconds, values = zip(*curve, strict=True)
    return {"way": way, "seed": seed, "seconds": seconds, "log_px": values}


def main() -> None:
    """Train, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic")
    runs = []
    for seed in range(options.seeds):
        for way in WAYS:
            runs.append(train(data, way, seed, options.epochs, every=2))
            print(way, seed, f"{runs[-1]['log_px'][-1]:.2f}", f"{runs[-1]['seconds'][-1]:.1f} s")
    rows = []
    for way in WAYS:
        mine = [run for run in runs if run["way"] == way]
        final = [run["log_px"][-1] for run in mine]
        rows.append({
            "way": way, "log_px": statistics.mean(final), "sd": statistics.stdev(final),
            "seconds": statistics.median(run["seconds"][-1] for run in mine),
        })  # fmt: skip
        print(rows[-1])
    results = {"epochs": options.epochs, "seeds": options.seeds, "rows": rows, "runs": runs}
    report.add("mnist_compiled", COMMAND, results, draw(runs))


def draw(runs: list[dict[str, Any]]) -> Figure:
    """log p(x) against the seconds of training, a line a seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, way in enumerate(WAYS):
        for j, run in enumerate(run for run in runs if run["way"] == way):
            axes.plot(run["seconds"], run["log_px"], ".-", color=f"C{i}", label=None if j else way)
    axes.set(xlabel="seconds of training", ylabel="test log p(x), nats per datum")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
