"""Semi-supervised learning on MNIST: M1, M2 and M1+M2 beside Kingma et al. 2014, table 1.

    PYRO_VAE_DATA=... python -m benchmarks.semi_supervised

50,000 training images, of which 100 or 1000 have labels, as many of each class; the error is that
of the 10,000 test images. The networks have one hidden layer of 300 units, and training takes
minutes. M1 is logistic regression on the means of q(z|x),
where theirs is a transductive support vector machine. The rows that have labels are repeated until
they are a tenth of an epoch, so that every batch has some, and weigh the less.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.data import UNKNOWN, Data
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP
from pyro_vae.plots import style
from pyro_vae.posteriors import Classifier, DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.seeding import derive, seeded
from pyro_vae.variants import SemiSupervisedVAE, StackedVAE, encoded

COMMAND = "python -m benchmarks.semi_supervised"
FEATURES, CLASSES, LATENT, HIDDEN, BATCH = 784, 10, 50, 300, 200
ALPHA = 0.1  # of eq. 9, in units of N
PUBLISHED = {
    ("M2", 100): (11.97, 1.71),
    ("M1+M2", 100): (3.33, 0.14),
    ("M2", 1000): (3.60, 0.56),
    ("M1+M2", 1000): (2.40, 0.02),
}


def network(inputs: int, outputs: int) -> MLP:
    return MLP(inputs, [HIDDEN], outputs, nn.ReLU)


def repeated(data: Data) -> tuple[Data, float]:
    """The data with labelled rows repeated to a tenth of all, and the weight of each label."""
    known = (data.train.context != UNKNOWN).nonzero().squeeze(1)
    total = len(data.train)
    times = max(1, total // (9 * len(known)))
    rows = torch.cat([torch.arange(total), known.repeat(times - 1)])
    return replace(data, train=data.train[rows]), ALPHA * total / (len(known) * times)


def make_m2(features: int, likelihood: nn.Module, label_weight: float) -> SemiSupervisedVAE:
    return SemiSupervisedVAE(
        StandardNormal(LATENT),
        likelihood,
        DiagonalNormal(network(features + CLASSES, 2 * LATENT)),
        Classifier(network(features, CLASSES)),
        CLASSES,
        label_weight,
    )


def train_m1(data: Data, epochs: int, seed: int) -> pv.VAE:
    with seeded(derive(seed, 0)):
        likelihood = Bernoulli(network(LATENT, FEATURES))
        posterior = DiagonalNormal(network(FEATURES, 2 * LATENT))
    likelihood.initialize(data.train_mean())
    vae = pv.VAE(StandardNormal(LATENT), likelihood, posterior)
    pv.fit(vae, data, epochs=epochs, batch_size=BATCH, seed=seed, progress=False)
    return vae


def train_m2(data: Data, epochs: int, seed: int) -> SemiSupervisedVAE:
    more, weight = repeated(data)
    with seeded(derive(seed, 1)):
        likelihood = Bernoulli(network(LATENT + CLASSES, FEATURES))
        vae = make_m2(FEATURES, likelihood, weight)
    likelihood.initialize(data.train_mean())
    pv.fit(
        vae, replace(more, valid=None), epochs=epochs, batch_size=BATCH, seed=seed,
        compile="auto", progress=False,
    )  # fmt: skip
    return vae


def train_m1m2(m1: pv.VAE, data: Data, epochs: int, seed: int) -> StackedVAE:
    more, weight = repeated(data)
    with seeded(derive(seed, 2)):
        likelihood = Normal(network(LATENT + CLASSES, 2 * LATENT), "predicted")
        m2 = make_m2(LATENT, likelihood, weight)
    features = replace(encoded(m1, more), valid=None)
    pv.fit(m2, features, epochs=epochs, batch_size=BATCH, seed=seed, compile="auto", progress=False)
    return StackedVAE(m1, m2)


def m1_error(m1: pv.VAE, data: Data) -> float:
    """Of logistic regression on the means of q(z|x) of the rows with labels."""
    known = data.train.context != UNKNOWN
    with torch.no_grad():
        seen, test = (m1.encode(x).mean for x in (data.train.fixed().x[known], data.test.x))
    regression = LogisticRegression(max_iter=2000).fit(seen, data.train.context[known])
    return error(torch.as_tensor(regression.predict(test)), data.test.y)


@torch.no_grad()
def class_error(vae: Any, data: Data) -> float:
    return error(vae.classify(data.test.x).probs.argmax(-1), data.test.y)


def error(found: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (found != labels).double().mean().item()


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Bars of the errors, by method and number of labels, the published ones as points."""
    figure = style.figure(6.0, 3.2)
    axes = figure.subplots()
    names = [f"{row['method']}\n{row['labels']} labels" for row in rows]
    places = range(len(rows))
    axes.bar(places, [row["error"] for row in rows], color=style.BLUE, width=0.6, label="ours")
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['error']:.1f}", (place, row["error"]), ha="center", va="bottom")
    published = [(i, *PUBLISHED[key]) for i, row in enumerate(rows)
                 if (key := (row["method"], row["labels"])) in PUBLISHED]  # fmt: skip
    where, means, errors = zip(*published, strict=True)
    axes.errorbar(where, means, errors, fmt="o", color=style.VERMILION, label="Kingma et al. 2014")
    axes.set_xticks(list(places), names)
    style.dress(axes, "MNIST, test error at a budget of minutes", "", "error, %")
    axes.legend(frameon=False, fontsize=style.LABEL)
    return figure


def main() -> None:
    """Train each method with each number of labels, print and write the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--epochs-m1", type=int, default=8)
    parser.add_argument("--epochs-m2", type=int, default=4)
    parser.add_argument("--epochs-m1m2", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    plain = pv.datasets.load("mnist", binarize="dynamic")
    started = time.monotonic()
    m1 = train_m1(plain, options.epochs_m1, options.seed)
    m1_seconds = time.monotonic() - started
    rows: list[dict[str, Any]] = []
    for labels in options.labels:
        data = plain.given_labels(labels, options.seed)
        jobs = {
            "M1": lambda data=data: m1_error(m1, data),
            "M1+M2": lambda data=data: class_error(
                train_m1m2(m1, data, options.epochs_m1m2, options.seed), data
            ),
            "M2": lambda data=data: class_error(
                train_m2(data, options.epochs_m2, options.seed), data
            ),
        }
        for method, job in jobs.items():
            started = time.monotonic()
            found = job()
            seconds = time.monotonic() - started + (m1_seconds if "M1" in method else 0)
            mean, sd = PUBLISHED.get((method, labels), (None, None))
            rows.append({"method": method, "labels": labels, "error": found, "seconds": seconds,
                         "published": mean, "published_sd": sd})  # fmt: skip
            print(rows[-1], flush=True)
    budget = {name: value for name, value in vars(options).items() if name != "labels"}
    report.write("semi_supervised", COMMAND, {**budget, "rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
