"""Samples a second of `fit`, data handling included, beside pythae's trainer.

    python -m benchmarks.fit_throughput        # with pythae installed

Both train a 784-400-20 tanh VAE with a Bernoulli likelihood on the same binary rows, batch 128,
Adam at 1e-3 as each has it by default, an epoch of each in turn in one process: `fit` compiled, not
compiled, and with its matrix products in bfloat16 (`mnist_compiled` shows what that does to log
p(x)); and pythae's `BaseTrainer` (its `train_step`, which is an epoch). Neither writes files.
Beside them stand the matrix products of an epoch and nothing else: no training in full float32 is
faster than that, on the machine as it was at the time. Reported: rows a second, medians over
epochs, and the medians of the ratios to pythae's epoch in the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import products_peer, pythae_peer, report
from pyro_vae.seeding import seeded

COMMAND = "python -m benchmarks.fit_throughput"
FEATURES, HIDDEN, LATENT, BATCH = 784, [400], 20, 128
PEER, FLOOR = "pythae", "products alone"
WAYS: dict[str, dict[str, Any]] = {
    "fit": {"compile": False},
    "fit, compiled": {"compile": True},
    "fit, compiled, bf16-mixed": {"compile": True, "precision": "bf16-mixed"},
}


def networks() -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder, from the same seed for everyone."""
    with seeded(0):
        return (
            pv.networks.MLP(FEATURES, HIDDEN, 2 * LATENT),
            pv.networks.MLP(LATENT, HIDDEN, FEATURES),
        )


def pythae_epoch(x: Tensor, folder: str) -> Callable[[int], Any]:
    """An epoch of pythae's trainer, which makes a folder to write to."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    trainer = BaseTrainer(
        model=pythae_peer.model(*networks(), LATENT),
        train_dataset=BaseDataset(pythae_peer.images(x), torch.zeros(len(x))),
        training_config=BaseTrainerConfig(
            per_device_train_batch_size=BATCH, learning_rate=1e-3,
            no_cuda=not torch.cuda.is_available(), output_dir=folder,
        ),
    )  # fmt: skip
    trainer.prepare_training()
    return trainer.train_step


def products_epoch(x: Tensor) -> Callable[[int], Any]:
    """An epoch of nothing but the matrix products."""
    step = products_peer.step(networks(), BATCH)

    def epoch(_: int) -> None:
        for _ in range(len(x) // BATCH):
            step()

    return epoch


def over(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def measure(
    x: Tensor, way: dict[str, Any], epochs: int, folder: str
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each epoch of `fit`, and of the others' in the same turn, without the first."""
    others = {FLOOR: products_epoch(x), PEER: pythae_epoch(x, folder)}
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}
    start = [time.perf_counter()]

    def take_turns(epoch: int) -> Mapping[str, float]:
        ours.append(time.perf_counter() - start[0])
        for name, other in others.items():
            theirs[name].append(products_peer.timed(partial(other, epoch)))
        start[0] = time.perf_counter()
        return {}

    encoder, decoder = networks()
    vae = pv.VAE(
        pv.priors.StandardNormal(LATENT),
        pv.likelihoods.Bernoulli(decoder),
        pv.posteriors.DiagonalNormal(encoder),
    )
    pv.fit(
        vae, x, objective=pv.ELBO(kl="analytic"), epochs=epochs, batch_size=BATCH,
        trackers=[take_turns], progress=False, **way,
    )  # fmt: skip
    return ours[1:], {name: times[1:] for name, times in theirs.items()}


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    with seeded(1):
        x = torch.bernoulli(torch.rand(options.rows, FEATURES) * 0.5)
    speed: dict[str, float] = {}
    ratios: dict[str, float] = {}
    beside: dict[str, list[float]] = {FLOOR: [], PEER: []}
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            ours, others = measure(x, way, options.epochs, folder)
        for other, times in others.items():
            beside[other] += times
        speed[name] = options.rows / statistics.median(ours)
        ratios[name] = over(others[PEER], ours)
    speed |= {name: options.rows / statistics.median(times) for name, times in beside.items()}
    ratios[FLOOR] = over(beside[PEER], beside[FLOOR])
    for name, value in speed.items():
        print(f"{name:>25}: {value:9,.0f} rows/s", f"({ratios.get(name, 1.0):.2f}x pythae's)")
    results = {"rows": options.rows, "rows_per_second": speed, "times_pythae": ratios}
    report.add("fit_throughput", COMMAND, results, draw(speed))


def draw(speed: dict[str, float]) -> Figure:
    """Rows a second, as bars."""
    figure = Figure(figsize=(6, 2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(speed), list(speed.values()), color=["C1", "C0", "C9", "C7", "C3"])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set(xlabel="training samples a second", xlim=(0, 1.15 * max(speed.values())))
    return figure


if __name__ == "__main__":
    main()
