"""The whole binarised MNIST test set, 10,000 data by 5,000 draws: time, and the most memory.

    PYRO_VAE_DATA=... python -m benchmarks.evidence_whole

A 784-200-200-50 tanh VAE is trained for some epochs; then a fresh process loads its weights and
evaluates log p(x) of all the test data with the defaults of `log_marginal`. The memory is the most
that this process held, the library, the data and all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from benchmarks.mnist import BATCH, make_vae

COMMAND = "python -m benchmarks.evidence_whole"


def train(folder: Path, epochs: int) -> Path:
    """Train on MNIST and write the weights."""
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic", seed=0)
    torch.manual_seed(0)
    vae = make_vae(data)
    pv.fit(vae, data, objective=pv.ELBO(), epochs=epochs, batch_size=BATCH, progress=False)
    path = folder / "model.safetensors"
    pv.save_weights(vae, path)
    return path


def evaluate(weights: str, num_data: int, num_samples: int) -> None:
    """Evaluate in this process, and print what it took as JSON."""
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic", seed=0)
    vae = make_vae(data)
    pv.load_weights(vae, weights)
    before = peak_megabytes()
    started = time.perf_counter()
    evidence = pv.log_marginal(
        vae.model, vae.guide, data.test[:num_data], num_samples=num_samples, progress=False
    )
    found = {
        "num_data": len(evidence),
        "num_samples": num_samples,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time(),
        "peak_megabytes_before": before,
        "peak_megabytes": peak_megabytes(),
        "mean": evidence.mean,
        "se_mc": evidence.se_mc,
        "se_total": evidence.se_total,
        "num_flagged": evidence.num_flagged,
        "convergence": evidence.convergence,
        "printed": str(evidence),
    }
    print(json.dumps(found))


def peak_megabytes() -> float:
    """The most memory that this process has held (rusage would count its parent's as well)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell a process's peak memory in /proc/self/status")


def main(epochs: int, sizes: list[tuple[int, int]]) -> None:
    """Train, evaluate, print, write."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = train(Path(folder), epochs)
        for num_data, num_samples in sizes:
            code = (
                "from benchmarks.evidence_whole import evaluate; "
                f"evaluate({str(weights)!r}, {num_data}, {num_samples})"
            )
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout)
            found.append(row)
            pairs = row["num_data"] * row["num_samples"]
            print(
                f"{row['num_data']:,} x {row['num_samples']:,}: {row['seconds']:.0f} s, "
                f"{1e6 * row['seconds'] / pairs:.2f} µs a pair, {row['peak_megabytes']:.0f} MB at "
                f"most ({row['peak_megabytes_before']:.0f} before)\n{row['printed']}",
                flush=True,
            )
    report.write("evidence_whole", COMMAND, {"epochs": epochs, "rows": found}, draw(found))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Memory by the number of pairs."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['num_data']:,} x {row['num_samples']:,}" for row in rows]
    axes.bar(names, [row["peak_megabytes"] for row in rows], label="at most")
    axes.bar(names, [row["peak_megabytes_before"] for row in rows], label="before evaluating")
    axes.axhline(2000, color="C3", lw=1)
    axes.set(ylabel="memory of the process, MB", xlabel="data x draws")
    axes.legend()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--sizes", nargs="+", default=["100x50", "100x5000", "10000x50", "10000x5000"],
        help="DATAxDRAWS of each evaluation",
    )  # fmt: skip
    options = parser.parse_args()
    pairs = [tuple(int(n) for n in size.split("x")) for size in options.sizes]
    main(options.epochs, [(n, k) for n, k in pairs])
