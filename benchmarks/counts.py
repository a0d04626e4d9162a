"""Count likelihoods on single cells: CEL-seq2 of three cell lines (Tian et al. 2019).

    PYRO_VAE_DATA=... python -m benchmarks.counts

The same VAE (1000 genes that vary most in the training cells, 10 latent dimensions, the log of the
library size as offset) under a Poisson, a negative binomial and a zero-inflated one. Reported for
every seed: importance-sampled log p(x) of the held-out cells, paired differences from the Poisson,
and the adjusted Rand index of k-means on the posterior means of all cells against the cell lines.
"""

from __future__ import annotations

import argparse
import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report, tables
from pyro_vae.seeding import derive, seeded

COMMAND = "python -m benchmarks.counts"
LATENT, HIDDEN = 10, 128
KINDS = {
    "Poisson": pv.likelihoods.Poisson,
    "negative binomial": pv.likelihoods.NegativeBinomial,
    "zero-inflated NB": pv.likelihoods.ZeroInflatedNegativeBinomial,
}


@dataclass
class Cells:
    """Counts `(cells, genes)`, the log of each cell's library size `(cells, 1)`, and the line."""

    counts: Tensor
    log_library: Tensor
    line: np.ndarray
    train: Tensor
    test: Tensor


def load(folder: Path, genes: int, split_seed: int) -> Cells:
    """The cells, a fifth of them held out, in the genes whose log-shares vary most in the rest."""
    with gzip.open(folder / "counts" / "sc_celseq2.count.csv.gz", "rt") as file:
        names = [name.strip('"\n') for name in file.readline().split(",")]
        rows = [np.array(line.rstrip("\n").split(",")[1:], dtype=float) for line in file]
    counts = torch.tensor(np.array(rows).T, dtype=torch.float32)
    with gzip.open(folder / "counts" / "sc_celseq2.metadata.csv.gz", "rt") as file:
        column = [c.strip('"\n') for c in file.readline().split(",")].index("cell_line") + 1
        fields = [[f.strip('"\n') for f in line.split(",")] for line in file]
    lines = {row[0]: row[column] for row in fields}
    shuffled = torch.randperm(len(counts), generator=torch.Generator().manual_seed(split_seed))
    test, train = shuffled[: len(counts) // 5], shuffled[len(counts) // 5 :]
    library = counts.sum(1, keepdim=True)
    spread = (1e4 * counts / library).log1p()[train].var(0)
    chosen = spread.topk(genes).indices
    return Cells(counts[:, chosen], library.log(), np.array([lines[n] for n in names]), train, test)


class Encoder(nn.Module):
    """Log-shares of the library to the posterior's parameters."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.network = pv.networks.MLP(genes, [HIDDEN], 2 * LATENT, nn.SiLU)

    def forward(self, x_and_log_library: Tensor) -> Tensor:
        x, log_library = x_and_log_library[..., :-1], x_and_log_library[..., -1:]
        return self.network((1e4 * x * (-log_library).exp()).log1p())


def make_vae(kind: str, cells: Cells, seed: int) -> pv.VAE:
    """The same networks from the same seed under any of the likelihoods."""
    genes = cells.counts.shape[1]
    with seeded(derive(seed, 0)):
        encoder = Encoder(genes)
        outputs = genes * (2 if kind == "zero-inflated NB" else 1)
        decoder = pv.networks.MLP(LATENT, [HIDDEN], outputs, nn.SiLU)
    likelihood = KINDS[kind](decoder, offset=True)
    likelihood.initialize(cells.counts[cells.train].mean(0))
    return pv.VAE(
        pv.priors.StandardNormal(LATENT), likelihood, pv.posteriors.DiagonalNormal(encoder)
    )


def train(vae: pv.VAE, cells: Cells, steps: int, seed: int) -> None:
    """Adam on all training cells at once, the KL warmed up over the first half."""
    x, context = cells.counts[cells.train], cells.log_library[cells.train]
    objective = pv.ELBO(kl="analytic")
    weight = pv.schedules.Warmup(steps // 2)
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    with seeded(derive(seed, 1)):
        for step in range(steps):
            objective.kl_weight = weight(step)
            optimizer.zero_grad()
            objective.differentiable_loss(vae.model, vae.guide, x, context).backward()
            optimizer.step()


def rand_index(vae: pv.VAE, cells: Cells, seed: int) -> float:
    """Agreement of three clusters of posterior means with the three cell lines; 1 is perfect."""
    with torch.no_grad():
        means = vae.encode(cells.counts, cells.log_library).mean.numpy()
    found = KMeans(3, n_init=10, random_state=seed).fit_predict(means)
    return float(adjusted_rand_score(cells.line, found))


def main() -> None:
    """Train every likelihood from every seed, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=200)
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        cells = load(Path(os.environ["PYRO_VAE_DATA"]), options.genes, split_seed=seed)
        poisson: Tensor | None = None
        for kind in KINDS:
            vae = make_vae(kind, cells, seed)
            train(vae, cells, options.steps, seed)
            x, context = cells.counts[cells.test], cells.log_library[cells.test]
            found = pv.log_marginal(
                vae.model, vae.guide, x, context, num_samples=options.num_samples
            )
            log_px = torch.as_tensor(found.log_px)
            poisson = log_px if poisson is None else poisson
            gain = log_px - poisson
            rows.append({
                "seed": seed, "likelihood": kind, "log_px": found.mean, "se_total": found.se_total,
                "gain": gain.mean().item(), "gain_se": (gain.std() / len(gain) ** 0.5).item(),
                "rand_index": rand_index(vae, cells, seed),
            })  # fmt: skip
            print(rows[-1], flush=True)
    results = {"steps": options.steps, "genes": options.genes,
               "num_samples": options.num_samples, "rows": rows}  # fmt: skip
    report.write("counts", COMMAND, results)
    print(tables.counts(report.read("counts")))


if __name__ == "__main__":
    main()
