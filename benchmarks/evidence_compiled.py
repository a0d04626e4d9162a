"""What `log_marginal(compile=True)` gains: the same evaluations eager and compiled, in turn.

    PYRO_VAE_DATA=... OMP_NUM_THREADS=2 python -m benchmarks.evidence_compiled

A 784-200-200-50 tanh VAE of binarised MNIST, a few epochs old: importance sampling with 5,000 draws
a datum, and annealing with the defaults. The seconds are those of the call, its graphs included,
which the first turn has left on disk. Reported: medians over rounds, the ratio of compiled to eager
in the same round, and by how much log p(x) of a datum differs at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from benchmarks.evidence import make_trained

COMMAND = "PYRO_VAE_DATA=... python -m benchmarks.evidence_compiled"
METHODS = ("is", "ais")
Timed = tuple[float, pv.Evidence]


def timed(vae: pv.VAE, x: torch.Tensor, method: str, compile: bool) -> Timed:
    """Seconds of an evaluation, and what it found."""
    started = time.perf_counter()
    found = pv.log_marginal(
        vae.model, vae.guide, x, num_samples=5000, method=method, compile=compile, progress=False
    )
    return time.perf_counter() - started, found


def compared(vae: pv.VAE, x: torch.Tensor, method: str, rounds: int) -> dict[str, Any]:
    """Eager and compiled in turn; the first turn fills the cache on disk and is not counted."""
    timed(vae, x, method, compile=True)
    turns = [[timed(vae, x, method, compile) for compile in (False, True)] for _ in range(rounds)]
    eager, compiled = ([turn[i][0] for turn in turns] for i in (0, 1))
    (_, one), (_, other) = turns[0]
    return {
        "data": len(x),
        "eager_seconds": statistics.median(eager),
        "compiled_seconds": statistics.median(compiled),
        "ratio": statistics.median(c / e for e, c in zip(eager, compiled, strict=True)),
        "largest_difference": float(np.abs(one.log_px - other.log_px).max()),
        "mean": one.mean,
        "se_mc": one.se_mc,
    }


def draw(results: dict[str, Any]) -> Figure:
    """A pair of bars for each method."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for i, way in enumerate(("eager", "compiled")):
        seconds = [
            results[method][f"{way}_seconds"] / results[method]["data"] for method in METHODS
        ]
        bars = axes.bar(np.arange(len(METHODS)) + 0.4 * (i - 0.5), seconds, 0.38, label=way)
        axes.bar_label(bars, fmt="%.2g")
    axes.set_xticks(range(len(METHODS)), ["importance sampling", "annealing"])
    axes.set(ylabel="seconds a datum")
    axes.margins(y=0.15)
    axes.legend()
    return figure


def main() -> None:
    """Time, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--num-data", type=int, nargs=2, default=[1000, 40], help="for each method")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    vae, x = make_trained(options.device, options.epochs, max(options.num_data))
    results: dict[str, Any] = {}
    for method, num_data in zip(METHODS, options.num_data, strict=True):
        row = results[method] = compared(vae, x[:num_data], method, options.rounds)
        print(
            f"{method:<4}{row['eager_seconds']:>8.1f} s eager{row['compiled_seconds']:>8.1f} s "
            f"compiled{row['ratio']:>6.2f}x, {row['largest_difference']:.1e} nats apart at most",
            flush=True,
        )
    report.add("evidence_compiled", COMMAND, results, draw(results))


if __name__ == "__main__":
    main()
