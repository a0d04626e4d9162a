"""Figure 2 of Kingma & Welling 2013, in minutes: the bound by samples seen, AEVB and wake-sleep.

    PYRO_VAE_DATA=... python -m benchmarks.aevb_bound

MNIST, binarised anew at every visit, 3 to 200 latents, one tanh layer of 500 units each side,
weights of standard deviation 0.01, batches of 100, one draw of z, Adagrad at one rate for all.
Every method trains once, and its bound on training and test digits is noted after every epoch. The
paper goes on to 10^8 samples; the best test bounds of its AEVB stand beside. Frey faces, the other
half of the figure, are `benchmarks.frey_faces`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from matplotlib.figure import Figure

import pyro_vae as pv
from benchmarks import report
from benchmarks.aevb import BATCH, OBJECTIVES, adagrad, make_vae
from pyro_vae.plots import style

COMMAND = "PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.aevb_bound"
HIDDEN = 500
LIMITS = -250, -90  # of the figure, nats; what starts below them is in the JSON
PAPER = {3: -133.2, 5: -118.7, 10: -103.2, 20: -99.4, 200: -99.5}


def run(method: str, latent: int, data: pv.Data, epochs: int, seed: int) -> dict[str, Any]:
    """Train once; the bounds after every epoch."""
    vae = make_vae(HIDDEN, latent, seed)
    started = time.process_time()
    found = pv.fit(
        vae, data, objective=OBJECTIVES[method], epochs=epochs, batch_size=BATCH,
        optimizer=adagrad, seed=seed, compile=True, progress=False,
    )  # fmt: skip
    return {
        "method": method,
        "latent": latent,
        "paper": PAPER[latent],
        "samples": [int(row["epoch"]) * len(data.train) for row in found.metrics],
        "train": [row["train_elbo"] for row in found.metrics],
        "test": [row["valid_elbo"] for row in found.metrics],
        "seconds": time.process_time() - started,
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel for every number of latents; training dashed, the paper's best test bound dotted."""
    figure = style.figure(9.0, 2.8)
    panels = figure.subplots(1, len(PAPER), sharey=True)
    colours = dict(zip(OBJECTIVES, style.class_colours(len(OBJECTIVES)), strict=True))
    for axes, (latent, paper) in zip(panels, PAPER.items(), strict=True):
        for row in rows:
            if row["latent"] == latent:
                for part, line in (("train", "--"), ("test", "-")):
                    axes.plot(
                        [n / 1000 for n in row["samples"]], row[part], line,
                        color=colours[row["method"]], label=f"{row['method']}, {part}",
                    )  # fmt: skip
        axes.axhline(paper, color="grey", linestyle=":", label="AEVB of the paper, 10^8 samples")
        axes.set_ylim(*LIMITS)
        style.dress(axes, f"{latent} latents", "samples seen / 1000")
    panels[0].set_ylabel("ELBO, nats", fontsize=style.LABEL)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False,
        fontsize=style.TICK,
    )  # fmt: skip
    return figure


def main() -> None:
    """Train everything, into results/aevb_bound.json and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="of 50,000 digits")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mnist = pv.datasets.load("mnist", binarize="dynamic")
    data = pv.Data(mnist.train, mnist.test[::10], mnist.test)
    rows = []
    for latent in PAPER:
        for method in OBJECTIVES:
            rows.append(run(method, latent, data, options.epochs, options.seed))
            last = rows[-1]
            print(f"{latent:3} latents, {method}: {last['test'][-1]:.1f} nats, "
                  f"{last['seconds']:.0f} s CPU", flush=True)  # fmt: skip
    report.write("aevb_bound", COMMAND, {**vars(options), "rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
