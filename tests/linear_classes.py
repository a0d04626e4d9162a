"""A linear-Gaussian model with classes, whose every density scipy knows.

With class means m_y, z ~ N(m_y, 1) and x ~ N(W z + U_y + b, s^2 I), x given y is a Normal, its
posteriors are Normals with linear means, and p(y|x) is a softmax of linear logits (all classes have
one covariance), so that a guide of linear networks can be the posterior itself.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_vae.likelihoods import Normal
from pyro_vae.networks import MLP
from pyro_vae.posteriors import Classifier, DiagonalNormal
from pyro_vae.priors import ClassMeans
from pyro_vae.variants import GaussianMixtureVAE, SemiSupervisedVAE

BOUND = 4.5  # of a z-score: a right estimator passes it with a probability below 1e-5
CLASSES, FEATURES = 3, 2
S = 0.6

MEANS = torch.tensor([[-1.5], [0.2], [1.0]], dtype=torch.float64)  # m
WEIGHT = torch.tensor([[0.8], [-0.5]], dtype=torch.float64)  # W
OFFSETS = torch.tensor([[0.5, -1.0], [0.0, 0.7], [-0.4, 0.1]], dtype=torch.float64)  # U
BIAS = torch.tensor([0.1, -0.2], dtype=torch.float64)  # b
X = torch.tensor([[0.3, -0.4], [-1.2, 0.9], [1.5, 0.2], [0.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([2, -1, 0, -1])


def log_px_given_y(offsets: Tensor = OFFSETS, means: Tensor = MEANS) -> np.ndarray:
    """log p(x|y), `(rows, classes)`."""
    covariance = (WEIGHT @ WEIGHT.T).numpy() + S**2 * np.eye(FEATURES)
    locs = (means @ WEIGHT.T + offsets + BIAS).numpy()
    normals = [stats.multivariate_normal(loc, covariance) for loc in locs]
    return np.stack([normal.logpdf(X.numpy()) for normal in normals], -1)


def linear(weight: Tensor, bias: Tensor) -> MLP:
    network = MLP(weight.shape[1], [], len(weight))
    with torch.no_grad():
        network.layers[-1].weight.copy_(weight)
        network.layers[-1].bias.copy_(bias)
    return network


def class_means() -> ClassMeans:
    prior = ClassMeans(CLASSES, 1)
    with torch.no_grad():
        prior.means.copy_(MEANS)
    return prior


def exact_posterior(offsets: Tensor = OFFSETS) -> DiagonalNormal:
    """p(z|x, y): precision 1 + W'W / s^2, mean (m_y + W'(x - U_y - b) / s^2) / precision."""
    precision = 1 + WEIGHT.square().sum() / S**2
    by_x = WEIGHT.T / S**2 / precision
    by_class = (MEANS.T - WEIGHT.T @ offsets.T / S**2) / precision
    mean = torch.cat([by_x, by_class], 1)
    bias = torch.cat([-WEIGHT.T @ BIAS / S**2 / precision, -precision.log().reshape(1)])
    return DiagonalNormal(linear(torch.cat([mean, torch.zeros_like(mean)]), bias))


def exact_classifier(offsets: Tensor = OFFSETS) -> Classifier:
    """p(y|x): linear discriminant analysis."""
    precision = torch.linalg.inv(WEIGHT @ WEIGHT.T + S**2 * torch.eye(FEATURES))
    locs = MEANS @ WEIGHT.T + offsets + BIAS
    return Classifier(linear(locs @ precision, -0.5 * (locs @ precision * locs).sum(1)))


def decoder(offsets: Tensor = OFFSETS) -> Normal:
    return Normal(linear(torch.cat([WEIGHT, offsets.T], 1), BIAS), S)


def m2(label_weight: float = 0.0) -> SemiSupervisedVAE:
    return SemiSupervisedVAE(
        class_means(), decoder(), exact_posterior(), exact_classifier(), CLASSES, label_weight
    )


def gmvae() -> GaussianMixtureVAE:
    none = torch.zeros_like(OFFSETS)
    likelihood = Normal(linear(WEIGHT, BIAS), S)
    vae = GaussianMixtureVAE(likelihood, exact_posterior(none), CLASSES, 1, exact_classifier(none))
    means = torch.cat([MEANS.T, torch.zeros(1, CLASSES)])
    vae.model.prior.network = linear(means, torch.zeros(2))
    return vae
