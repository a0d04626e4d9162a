"""Missing entries of two tables filled in: a VAE trained on the holes, scikit-learn's imputers.

    PYRO_VAE_DATA=... python -m benchmarks.imputation

Wine (11 real columns, a quality of 3 to 9, red or white) and breast cancer (9 ordinal columns of 1
to 10, benign or malignant), both of UCI, with the masks that Nazabal et al. 2020 (HI-VAE)
published: 10 to 50% of the entries missing. The VAE has a Normal for each real column and
categories for codes, and its draws are resampled by importance, as its encoder knows of holes;
scikit-learn's imputers see all columns as standardised numbers, and their prediction of a category
is rounded. Errors are of the missing entries in their own units: for numbers the root mean square
over the column's range, averaged over columns; for categories the share that is wrong.

Coverage is the share of true numbers that lie between the least and the greatest of 19 draws, which
is 90% if they are draws like the truth. Of ordered codes many are equal, and a truth that equals
the least or the greatest draw may lie on either side of it: among so many equals it takes a place
at random, as continuous values would have, and 90% is right for codes too (the randomised transform
of Czado, Gneiting & Held 2009).
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report, tables
from pyro_vae import likelihoods, networks, posteriors
from pyro_vae.plots import style
from pyro_vae.seeding import derive, seeded

COMMAND = "PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.imputation"
SHARES = (10, 30, 50)
LATENT, HIDDEN = 10, 128
PARTICLES, BATCH = 10, 128
NUM_IMPUTATIONS = 19  # 18 of 20 gaps between them: 90%
NEIGHBOURS, ROUNDS = 10, 10  # of scikit-learn's imputers
Array = np.ndarray


@dataclass
class Table:
    """A table as published.

    Attributes:
        x: `(N, columns)`; codes from 0.
        kinds: of each column: "real", "ordinal" or "category".
        levels: how many codes a column has.
    """

    x: Array
    kinds: list[str]
    levels: list[int]

    @classmethod
    def read(cls, folder: Path, name: str) -> Table:
        """Wine or breast, NaN where truly missing."""
        x = np.genfromtxt(folder / "tabular" / name / "data.csv", delimiter=",")
        if name == "wine":
            kinds = ["real"] * 11 + ["ordinal", "category"]
            x[:, 11:] -= (3, 1)
            return cls(x, kinds, [0] * 11 + [7, 2])
        return cls(x - 1, ["ordinal"] * 9 + ["category"], [10] * 9 + [2])


def read_mask(folder: Path, name: str, share: int, shape: tuple[int, ...]) -> Array:
    """True where observed; the file lists row and column, from 1, of what is missing."""
    missing = np.loadtxt(
        folder / "tabular" / name / f"Missing{share}_1.csv", delimiter=",", dtype=int
    )
    observed = np.ones(shape, dtype=bool)
    observed[missing[:, 0] - 1, missing[:, 1] - 1] = False
    return observed


class Standardized(nn.Module):
    """A network over standardised values, its mask left as it is."""

    def __init__(self, network: nn.Module, mean: Tensor, sd: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.cat([mean, torch.zeros_like(mean)]))
        self.register_buffer("sd", torch.cat([sd, torch.ones_like(sd)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.sd)


def make_vae(table: Table, x: Tensor, seed: int) -> pv.VAE:
    """Each column under its own likelihood, an encoder that sees what is missing."""
    real = likelihoods.Normal(scale="predicted", min_scale=0.02)
    columns = [
        real if kind == "real" else likelihoods.Categorical(num_categories=levels)
        for kind, levels in zip(table.kinds, table.levels, strict=True)
    ]
    mean = x.nanmean(0)
    sd = (x - mean).square().nanmean(0).sqrt()
    outputs = likelihoods.Columns.outputs(columns)
    with seeded(derive(seed, 0)):
        decoder = networks.MLP(LATENT, [HIDDEN, HIDDEN], outputs)
        encoder = networks.MLP(2 * x.shape[1], [HIDDEN, HIDDEN], 2 * LATENT)
    q = posteriors.DiagonalNormal(Standardized(encoder, mean, sd))
    return pv.VAE(
        pv.priors.StandardNormal(LATENT),
        likelihoods.Incomplete(likelihoods.Columns(decoder, columns), allow_empty=True),
        posteriors.Incomplete(q, fill=mean, mask=True),
    )


def by_vae(table: Table, x: Array, epochs: int, draws: int, seed: int) -> dict[str, Array]:
    """Train on the bound of the observed values, and draw the others."""
    mean, sd = np.nanmean(x, 0), np.nanstd(x, 0)
    real = np.array([kind == "real" for kind in table.kinds])
    shift, scale = np.where(real, mean, 0.0), np.where(real, sd, 1.0)
    rows = torch.as_tensor((x - shift) / scale, dtype=torch.float32)
    vae = make_vae(table, rows, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    valid, train = order[: len(rows) // 10], order[len(rows) // 10 :]
    data = pv.Data(pv.Split(rows[train]), pv.Split(rows[valid]), pv.Split(rows))
    pv.fit(
        vae, data, objective=pv.IWAE(PARTICLES), epochs=epochs, batch_size=BATCH,
        patience=max(10, epochs // 5), seed=seed, progress=False,
    )  # fmt: skip
    found = pv.impute(
        vae.model, vae.guide, rows, num_imputations=NUM_IMPUTATIONS, method="importance",
        num_samples=draws, allow_empty=True, seed=seed,
    )  # fmt: skip
    return {
        "mean": found.mean.double().numpy() * scale + shift, "mode": found.mode().numpy(),
        "draws": found.values.double().numpy() * scale + shift, "flagged": found.flagged.numpy(),
    }  # fmt: skip


def by_sklearn(table: Table, x: Array, imputer: Any) -> dict[str, Array]:
    """One of scikit-learn's imputers on the standardised numbers."""
    mean, sd = np.nanmean(x, 0), np.nanstd(x, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it ends after its rounds, converged or not
        filled = imputer.fit_transform((x - mean) / sd) * sd + mean
    codes = np.clip(np.round(filled), 0, np.maximum(table.levels, 1) - 1)
    return {"mean": filled, "mode": codes}


def by_mean(x: Array) -> dict[str, Array]:
    """Means of numbers, most frequent categories."""
    mode = SimpleImputer(strategy="most_frequent").fit_transform(x)
    return {"mean": SimpleImputer().fit_transform(x), "mode": mode}


def by_iterative(table: Table, x: Array, seed: int) -> dict[str, Array]:
    """Regressions of every column on the others, in turns; and draws of them."""
    found = by_sklearn(table, x, IterativeImputer(max_iter=ROUNDS, random_state=seed))
    draws = [
        by_sklearn(table, x, IterativeImputer(
            max_iter=ROUNDS, sample_posterior=True, random_state=derive(seed, i) % 2**32))
        for i in range(NUM_IMPUTATIONS)
    ]  # fmt: skip
    real = np.array(table.kinds) == "real"
    return found | {"draws": np.stack([np.where(real, d["mean"], d["mode"]) for d in draws])}


def covered(draws: Array, truth: Array, seed: int) -> Array:
    """Which of `(n,)` true values lie within their draws `(M, n)`, equals in random order."""
    equal = (draws == truth).sum(0)
    rank = (draws < truth).sum(0) + np.random.default_rng(seed).integers(0, equal + 1)
    return (rank > 0) & (rank < len(draws))


def errors(
    table: Table, truth: Array, observed: Array, found: dict[str, Array], seed: int
) -> dict[str, float]:
    """Errors of the entries that are missing and known."""
    hole = ~observed & ~np.isnan(truth)
    scores: dict[str, Any] = {"rmse": [], "wrong": [], "covered": []}
    for j, kind in enumerate(table.kinds):
        rows = hole[:, j]
        if kind == "category":
            scores["wrong"] += list(found["mode"][rows, j] != truth[rows, j])
            continue
        span = np.nanmax(truth[:, j]) - np.nanmin(truth[:, j])
        error = found["mean"][rows, j] - truth[rows, j]
        scores["rmse"].append(np.sqrt(np.mean(error**2)) / span)
        if "draws" in found:
            inside = covered(found["draws"][:, rows, j], truth[rows, j], derive(seed, j))
            scores["covered"] += list(inside)
    if "flagged" in found:
        scores["flagged"] = found["flagged"]
    return {name: float(np.mean(values)) for name, values in scores.items() if len(values)}


def run(table: Table, observed: Array, epochs: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """Errors of every method on one table under one mask."""
    x = np.where(observed, table.x, np.nan)
    methods = {
        "VAE": lambda: by_vae(table, x, epochs, draws, seed),
        "mean": lambda: by_mean(x),
        "kNN": lambda: by_sklearn(table, x, KNNImputer(n_neighbors=NEIGHBOURS)),
        "iterative": lambda: by_iterative(table, x, seed),
    }
    rows = []
    for name, method in methods.items():
        started = time.process_time()
        found = method()
        seconds = time.process_time() - started
        rows.append(
            {"method": name, **errors(table, table.x, observed, found, seed), "seconds": seconds}
        )
    return rows


def draw(rows: list[dict[str, Any]]) -> Any:
    """Errors against the share that is missing, a line a method."""
    figure = style.figure(7.0, 4.6)
    panels = figure.subplots(2, 2, sharex=True)
    names = {"rmse": "RMSE over range", "wrong": "Share of categories wrong"}
    colours = dict(zip(("VAE", "mean", "kNN", "iterative"), style.class_colours(4), strict=True))
    for line, table in zip(panels, ("wine", "breast"), strict=True):
        for axes, (score, label) in zip(line, names.items(), strict=True):
            for method, colour in colours.items():
                mine = [r for r in rows if (r["table"], r["method"]) == (table, method)]
                axes.plot([r["missing"] for r in mine], [r[score] for r in mine], marker="o",
                          markersize=3, color=colour, label=method)  # fmt: skip
            style.dress(axes, table, "Missing, %" if table == "breast" else "", label)
            axes.set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False, fontsize=style.TICK)
    return figure


def main() -> None:
    """Every table under every mask, into results/imputation.json and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=50, help="on wine; ten times as many on breast"
    )
    parser.add_argument("--draws", type=int, default=1000, help="importance draws of a row")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(os.environ["PYRO_VAE_DATA"])
    rows = []
    for name, epochs in (("breast", 10 * options.epochs), ("wine", options.epochs)):
        table = Table.read(folder, name)
        for share in options.shares:
            observed = read_mask(folder, name, share, table.x.shape)
            for row in run(table, observed, epochs, options.draws, options.seed):
                rows.append({"table": name, "missing": share, **row})
                print(rows[-1], flush=True)
    results = {**vars(options), "num_imputations": NUM_IMPUTATIONS, "rows": rows}
    report.write("imputation", COMMAND, results, draw(rows))
    print(tables.imputation({"results": results}))


if __name__ == "__main__":
    main()
