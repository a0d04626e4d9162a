"""Semi-supervised learning on MNIST: M1, M2 and M1+M2 beside Kingma et al. 2014, table 1.

    PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.semi_supervised

Their protocol (section 4 and the code they published): of 50,000 training images 100 or 1000 keep
their labels, as many of each class; networks of softplus units, 50 latent dimensions; M1 with two
hidden layers of 600 units, M2 with one of 500; alpha = 0.1 N in eq. 9. One M1 serves all of M1+M2,
its features drawn from q(z|x) of the grey images anew at every visit. The error is that of q(y|x)
on the 10,000 test images; reported are its mean and standard deviation over choices of the labels,
and beside it theirs.

What differs is the budget, minutes of one core where they trained M1+M2 for 3000 epochs, and what
it takes to use that well: a larger learning rate that falls to zero, weights that start with the
variance of their inputs, and labelled rows that come `times` as often and count `times` as little,
so that every batch has some while the objective remains theirs. For M1 alone, the classifier is
logistic regression, theirs a transductive support vector machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro import poutine
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import pyro_vae as pv
from benchmarks import report
from pyro_vae.data import UNKNOWN, Data
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP
from pyro_vae.plots import style
from pyro_vae.posteriors import Classifier, DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Distribution
from pyro_vae.variants import SemiSupervisedVAE, encoded

COMMAND = "PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.semi_supervised"
FEATURES, CLASSES, LATENT, BATCH = 784, 10, 50, 200
HIDDEN_M1, HIDDEN_M2 = [600, 600], 500
ALPHA = 0.1  # of eq. 9, in units of N
SHARE = 0.1  # of every epoch, that of rows with labels
PUBLISHED = {
    ("M2", 100): (11.97, 1.71),
    ("M1+M2", 100): (3.33, 0.14),
    ("M2", 1000): (3.60, 0.56),
    ("M1+M2", 1000): (2.40, 0.02),
}


def network(inputs: int, hidden: list[int], outputs: int) -> MLP:
    return MLP(inputs, hidden, outputs, nn.Softplus)


class Encoder(nn.Module):
    """q(z|x, y) by one hidden layer over x and y side by side; what x adds to it is worked out
    once, and not for each of the ten classes again."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.by_x = nn.Linear(features, HIDDEN_M2)
        self.by_y = nn.Linear(CLASSES, HIDDEN_M2, bias=False)
        self.top = DiagonalNormal(nn.Linear(HIDDEN_M2, 2 * LATENT))

    def forward(self, x: Tensor, y: Tensor) -> Distribution:
        return self.top(nn.functional.softplus(self.by_x(x) + self.by_y(y)))


def start(vae: nn.Module) -> None:
    """Weights that keep the variance of their inputs (LeCun et al. 1998, section 4.6): from
    PyTorch's own, a third of that, two layers of softplus units take epochs to see their data."""
    for module in vae.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Weighted(nn.Module):
    """A model or guide in which rows with labels count by a weight."""

    def __init__(self, program: nn.Module, weight: float) -> None:
        super().__init__()
        self.program, self.weight = program, weight

    def forward(self, x: Tensor, labels: Tensor) -> None:
        with poutine.scale(scale=torch.where(labels == UNKNOWN, 1.0, self.weight)):
            self.program(x, labels)


def train(vae: Any, data: Data, epochs: int, learning_rate: float, seed: int) -> None:
    def falling(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2)

    pv.fit(
        vae, replace(data, valid=None), epochs=epochs, batch_size=BATCH, compile="auto",
        learning_rate=learning_rate, scheduler=falling, seed=seed, progress=False,
    )  # fmt: skip


def train_m1(data: Data, epochs: int, learning_rate: float, seed: int) -> pv.VAE:
    likelihood = Bernoulli(network(LATENT, HIDDEN_M1, FEATURES))
    posterior = DiagonalNormal(network(FEATURES, HIDDEN_M1, 2 * LATENT))
    vae = pv.VAE(StandardNormal(LATENT), likelihood, posterior)
    with seeded(derive(seed, 0)):
        start(vae)
    likelihood.initialize(data.train_mean())
    train(vae, data, epochs, learning_rate, seed)
    return vae


def train_m2(
    likelihood: nn.Module, features: int, data: Data, epochs: int, learning_rate: float, seed: int
) -> SemiSupervisedVAE:
    known = (data.train.context != UNKNOWN).nonzero().squeeze(1)
    total = len(data.train)
    times = max(1, round(SHARE * total / len(known)))
    rows = torch.cat([torch.arange(total), known.repeat(times - 1)])
    vae = SemiSupervisedVAE(
        StandardNormal(LATENT), likelihood, Encoder(features),
        Classifier(network(features, [HIDDEN_M2], CLASSES)), CLASSES, ALPHA * total / len(known),
    )  # fmt: skip
    with seeded(derive(seed, 1)):
        start(vae)
    if isinstance(likelihood, Bernoulli):
        likelihood.initialize(data.train_mean())
    weighted = nn.Module()
    weighted.model, weighted.guide = (Weighted(p, 1 / times) for p in (vae.model, vae.guide))
    train(weighted, replace(data, train=data.train[rows]), epochs, learning_rate, seed)
    return vae


def m1_error(m1: pv.VAE, grey: Data) -> float:
    known = grey.train.context != UNKNOWN
    with torch.no_grad():
        seen, test = (m1.encode(x).mean for x in (grey.train.x[known], grey.test.x))
    regression = LogisticRegression(max_iter=2000).fit(seen, grey.train.context[known])
    return error(torch.as_tensor(regression.predict(test)), grey.test.y)


def m1m2_error(m1: pv.VAE, grey: Data, epochs: int, learning_rate: float, seed: int) -> float:
    likelihood = Normal(network(LATENT + CLASSES, [HIDDEN_M2], 2 * LATENT), "predicted")
    m2 = train_m2(likelihood, LATENT, encoded(m1, grey), epochs, learning_rate, seed)
    with torch.no_grad():
        return class_error(m2, m1.encode(grey.test.x).mean, grey.test.y)


def m2_error(data: Data, grey: Data, epochs: int, learning_rate: float, seed: int) -> float:
    likelihood = Bernoulli(network(LATENT + CLASSES, [HIDDEN_M2], FEATURES))
    m2 = train_m2(likelihood, FEATURES, data, epochs, learning_rate, seed)
    return class_error(m2, grey.test.x, grey.test.y)


@torch.no_grad()
def class_error(m2: SemiSupervisedVAE, x: Tensor, labels: Tensor) -> float:
    return error(m2.classify(x).probs.argmax(-1), labels)


def error(found: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (found != labels).double().mean().item()


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Bars of the errors, by method and number of labels, the published ones as points."""
    figure = style.figure(6.0, 3.2)
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(places, [row["error"] for row in rows], yerr=[row["sd"] for row in rows],
             color=style.BLUE, width=0.6, capsize=3, label="ours")  # fmt: skip
    known = [(i, *row["published"]) for i, row in enumerate(rows) if row["published"]]
    where, means, errors = zip(*known, strict=True)
    axes.errorbar(where, means, errors, fmt="o", capsize=3, color=style.VERMILION,
                  label="Kingma et al. 2014")  # fmt: skip
    axes.set_xticks(list(places), [f"{row['method']}\n{row['labels']} labels" for row in rows])
    style.dress(axes, "MNIST, error on test data at a budget of minutes", "", "error, %")
    axes.legend(frameon=False, fontsize=style.LABEL)
    return figure


def summary(method: str, labels: int, errors: list[float], seconds: float) -> dict[str, Any]:
    return {
        "method": method, "labels": labels, "error": mean(errors), "sd": stdev(errors),
        "errors": errors, "processor_seconds": seconds,
        "published": PUBLISHED.get((method, labels)),
    }  # fmt: skip


def main() -> None:
    """Train each method with each number of labels, print and write the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--epochs-m1", type=int, default=20)
    parser.add_argument("--epochs-m2", type=int, default=4)
    parser.add_argument("--epochs-m1m2", type=int, default=20)
    parser.add_argument("--rate-m1", type=float, default=1.5e-3)
    parser.add_argument("--rate-m2", type=float, default=1e-3)
    parser.add_argument("--rate-m1m2", type=float, default=1e-3)
    options = parser.parse_args()

    binary = pv.datasets.load("mnist", binarize="dynamic")
    grey = pv.datasets.load("mnist")
    started = time.process_time()
    m1 = train_m1(binary, options.epochs_m1, options.rate_m1, seed=0)
    m1_seconds = time.process_time() - started
    rows: list[dict[str, Any]] = []
    for labels in options.labels:
        jobs: dict[str, Callable[[Data, Data, int], float]] = {
            "M1": lambda data, shown, seed: m1_error(m1, shown),
            "M2": partial(_m2, options),
            "M1+M2": partial(_m1m2, options, m1),
        }
        for method, job in jobs.items():
            errors, started = [], time.process_time()
            for seed in range(options.seeds):
                told = [data.given_labels(labels, seed) for data in (binary, grey)]
                errors.append(job(*told, seed))
                print(method, labels, seed, errors[-1], flush=True)
            seconds = (time.process_time() - started) / options.seeds
            rows.append(summary(method, labels, errors, seconds + m1_seconds * ("M1" in method)))
    report.write("semi_supervised", COMMAND, {**vars(options), "rows": rows}, draw(rows))


def _m2(options: argparse.Namespace, data: Data, grey: Data, seed: int) -> float:
    return m2_error(data, grey, options.epochs_m2, options.rate_m2, seed)


def _m1m2(options: argparse.Namespace, m1: pv.VAE, data: Data, grey: Data, seed: int) -> float:
    return m1m2_error(m1, grey, options.epochs_m1m2, options.rate_m1m2, seed)


if __name__ == "__main__":
    main()
