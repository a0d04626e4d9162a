"""Every prior, likelihood and posterior in small, for the tests of their combinations.

Each is a function of what it needs, so that every test builds its own.
"""

import pyro.distributions as dist
import torch

from pyro_vae import likelihoods as L
from pyro_vae import posteriors as Q
from pyro_vae import priors as P
from pyro_vae.networks import MLP

LATENT, FEATURES, N = 2, 4, 3

PRIORS = {
    "standard normal": lambda q: P.StandardNormal(LATENT),
    "fixed mixture": lambda q: P.GaussianMixture(torch.randn(3, LATENT), 0.5, learned=False),
    "learned mixture": lambda q: P.GaussianMixture(torch.randn(3, LATENT)),
    "vamp": lambda q: P.VampPrior(q, 3, torch.rand(3, FEATURES), bounds=(0.0, 1.0)),
    "flow": lambda q: P.Flow.spline(LATENT, transforms=2, hidden=(8,)),
    "Laplace callable": lambda q: lambda: dist.Laplace(torch.zeros(LATENT), 1.0).to_event(1),
    "Student callable": lambda q: lambda: dist.StudentT(5.0, torch.zeros(LATENT)).to_event(1),
}

POSTERIORS = {
    "diagonal normal": lambda: Q.DiagonalNormal(encoder(2 * LATENT)),
    "full-rank normal": lambda: Q.FullRankNormal(encoder(Q.FullRankNormal.outputs(LATENT)), LATENT),
    "inverse autoregressive flow": lambda: Q.InverseAutoregressiveFlow(
        encoder(2 * LATENT + 2), LATENT, context_features=2, hidden=(6,)
    ),
}


def encoder(outputs):
    return MLP(FEATURES, [5], outputs)


def decoder(per_feature=1):
    return MLP(LATENT, [5], per_feature * FEATURES)


MIXED = [L.Normal(), L.Bernoulli(), L.Categorical(num_categories=3), L.Poisson()]

BITS = [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
GREYS = [[0.0, 0.2, 0.4, 1.0], [1.0, 0.6, 0.8, 0.0], [0.2, 0.2, 0.0, 0.6]]
REALS = [[-1.0, 0.2, 2.4, 1.0], [0.1, -0.6, 0.8, 0.3], [0.2, 0.2, -1.5, 0.6]]
COUNTS = [[0.0, 2.0, 1.0, 7.0], [1.0, 0.0, 0.0, 3.0], [4.0, 0.0, 2.0, 1.0]]
CODES = [[0.0, 2.0, 1.0, 2.0], [1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 2.0, 1.0]]

# name: likelihood, and three data that it takes
LIKELIHOODS = {
    "Bernoulli": (lambda: L.Bernoulli(decoder()), BITS),
    "continuous Bernoulli": (lambda: L.ContinuousBernoulli(decoder()), GREYS),
    "Normal fixed": (lambda: L.Normal(decoder(), 0.5), REALS),
    "Normal learned": (lambda: L.Normal(decoder()), REALS),
    "Normal per feature": (lambda: L.Normal(decoder(), "per_feature"), REALS),
    "Normal predicted": (lambda: L.Normal(decoder(2), "predicted"), REALS),
    "Laplace": (lambda: L.Laplace(decoder()), REALS),
    "Student t": (lambda: L.StudentT(decoder(), df=3.0), REALS),
    "Binomial": (lambda: L.Binomial(decoder(), 7), COUNTS),
    "Categorical": (lambda: L.Categorical(decoder(3), 3), CODES),
    "discretized logistic": (lambda: L.DiscretizedLogistic(decoder(), levels=6), GREYS),
    "Poisson": (lambda: L.Poisson(decoder()), COUNTS),
    "negative binomial": (lambda: L.NegativeBinomial(decoder()), COUNTS),
    "zero-inflated": (lambda: L.ZeroInflatedNegativeBinomial(decoder(2)), COUNTS),
    "columns": (
        lambda: L.Columns(MLP(LATENT, [5], L.Columns.outputs(MIXED)), MIXED),
        [[-1.0, 0.0, 2.0, 7.0], [0.1, 1.0, 0.0, 0.0], [0.2, 1.0, 1.0, 3.0]],
    ),
}
