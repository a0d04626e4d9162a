"""Small programs with known answers, written in plain Pyro and numpy: none of it is the library's.

The linear-Gaussian model (probabilistic PCA) is z ~ N(0, I), x ~ N(W z + b, sigma^2 I), with the
guide q(z|x) = N(A x + c, diag(s^2)). Its ELBO, log p(x) and posterior are closed forms (Bishop,
Pattern Recognition and Machine Learning, section 12.2).
"""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from scipy import stats
from torch import Tensor, nn

FEATURES, LATENT = 3, 2


def linear_data(num_data: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(num_data, FEATURES, generator=torch.Generator().manual_seed(seed))


class LinearModel(nn.Module):
    """The columns of W are orthogonal, so the posterior factorises over dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -0.5], [0.5, 1.0], [0.8, 0.0]]))
        self.bias = nn.Parameter(torch.tensor([0.1, -0.3, 0.2]))
        self.log_sigma = nn.Parameter(torch.tensor(-0.2))

    def forward(
        self, x: Tensor, size: int | None = None, rows: Tensor | None = None, name: str = "data"
    ) -> None:
        with pyro.plate(name, size or len(x), subsample=rows, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            fn = dist.Normal(z @ self.weight.T + self.bias, self.log_sigma.exp())
            pyro.sample("x", fn.to_event(1), obs=x[rows])

    def log_evidence(self, x: Tensor) -> np.ndarray:
        """log p(x) of every row."""
        w, b, sigma = (p.detach().numpy() for p in (self.weight, self.bias, self.log_sigma.exp()))
        covariance = w @ w.T + sigma**2 * np.eye(FEATURES)
        return stats.multivariate_normal(b, covariance).logpdf(x.numpy())


class LinearGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, 0.1, 0.2], [-0.2, 0.4, 0.1]]))
        self.bias = nn.Parameter(torch.tensor([0.2, -0.1]))
        self.log_scale = nn.Parameter(torch.tensor([-0.5, 0.1]))

    def forward(
        self, x: Tensor, size: int | None = None, rows: Tensor | None = None, name: str = "data"
    ) -> None:
        with pyro.plate(name, size or len(x), subsample=rows, dim=-1) as rows:
            fn = dist.Normal(x[rows] @ self.weight.T + self.bias, self.log_scale.exp())
            pyro.sample("z", fn.to_event(1))

    @torch.no_grad()
    def become_posterior(self, model: LinearModel) -> "LinearGuide":
        """q(z|x) = p(z|x): every importance weight is then p(x), whatever is drawn."""
        w, variance = model.weight, model.log_sigma.exp() ** 2
        precision = w.T @ w / variance + torch.eye(LATENT)
        self.weight.copy_(torch.linalg.solve(precision, w.T / variance))
        self.bias.copy_(-self.weight @ model.bias)
        self.log_scale.copy_(-0.5 * precision.diagonal().log())
        return self


def linear_pair(exact: bool = False) -> tuple[LinearModel, LinearGuide]:
    model, guide = LinearModel(), LinearGuide()
    return model, guide.become_posterior(model) if exact else guide


def linear_elbo(model: LinearModel, guide: LinearGuide, x: Tensor) -> Tensor:
    """The expectation of the ELBO over the draws, summed over the rows; differentiable."""
    mean, scale = x @ guide.weight.T + guide.bias, guide.log_scale.exp()
    variance = model.log_sigma.exp() ** 2
    residual = x - mean @ model.weight.T - model.bias
    spread = (scale**2 * model.weight.square().sum(0)).sum()
    square = residual.square().sum(1) + spread
    reconstruction = -0.5 * (FEATURES * (2 * math.pi * variance).log() + square / variance)
    kl = 0.5 * (scale**2 + mean**2 - 1 - 2 * guide.log_scale).sum(1)
    return (reconstruction - kl).sum()


def gradient_of(loss: Tensor, *modules: nn.Module) -> Tensor:
    """The gradient by all parameters of the modules, as one vector."""
    parameters = [p for module in modules for p in module.parameters()]
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([slope.flatten() for slope in slopes])


# this many copies of the data in one call are as many draws, and cost little more than one
COPIES = 5


def repeat(draw: Callable[[], Tensor | float], times: int, seed: int = 0) -> Tensor:
    """`times` independent results, stacked."""
    pyro.set_rng_seed(seed)
    return torch.stack([torch.as_tensor(draw()).detach() for _ in range(times)])


def z_scores(draws: Tensor, truth: Tensor | float) -> Tensor:
    """(mean - truth) / standard error; a quantity that does not vary must equal the truth."""
    error = draws.std(0) / math.sqrt(len(draws))
    difference = draws.mean(0) - truth
    constant = error < 1e-12
    assert (difference[constant].abs() < 1e-9).all()
    return torch.where(constant, 0.0, difference / error.clamp(min=1e-12))


def z_score_between(a: Tensor, b: Tensor) -> Tensor:
    """The difference of two means over its standard error."""
    return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()


class Draws(Messenger):
    """Records what every sample site drew, each time it did."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[Tensor]] = {}

    def _pyro_post_sample(self, msg: dict) -> None:
        self.values.setdefault(msg["name"], []).append(msg["value"].detach())
