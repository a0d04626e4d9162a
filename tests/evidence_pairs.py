"""(model, guide) pairs with known evidence, as plain Pyro programs."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass
class Linear:
    """z ~ N(0, I), x ~ N(Wz + b, σ²I), with a Gaussian guide: loc and scale as multiples of the
    posterior's own."""

    W: Tensor
    b: Tensor
    sigma: float
    shift: float = 0.0
    shrink: float = 1.0

    @classmethod
    def random(cls, features: int, latent: int, sigma: float = 0.5, **kwargs: float) -> "Linear":
        generator = torch.Generator().manual_seed(7)
        W = torch.randn(features, latent, generator=generator)
        return cls(W, torch.randn(features, generator=generator), sigma, **kwargs)

    @property
    def precision(self) -> Tensor:
        return torch.eye(self.W.shape[1]) + self.W.T @ self.W / self.sigma**2

    def posterior_mean(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.precision, self.W.T @ (x - self.b).T / self.sigma**2).T

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.W.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.sigma).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        covariance = torch.linalg.inv(self.precision)
        factor = self.shrink * torch.linalg.cholesky(covariance)
        loc = self.posterior_mean(x) + self.shift * covariance.diagonal().sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    def draw(self, n: int, seed: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.W.shape[1], generator=generator)
        noise = torch.randn(n, len(self.b), generator=generator)
        return z @ self.W.T + self.b + self.sigma * noise

    def log_px(self, x: Tensor) -> Tensor:
        covariance = self.W @ self.W.T + self.sigma**2 * torch.eye(len(self.b))
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)


@dataclass
class Binary:
    """z ~ N(0, I), binary pixels from a small nonlinear decoder; an arbitrary guide."""

    decoder: Callable[[Tensor], Tensor]
    encoder: Callable[[Tensor], Tensor]
    latent: int

    @classmethod
    def random(cls, pixels: int, latent: int) -> "Binary":
        torch.manual_seed(11)
        decoder = torch.nn.Sequential(
            torch.nn.Linear(latent, 8), torch.nn.Tanh(), torch.nn.Linear(8, pixels)
        )
        for parameter in decoder.parameters():
            parameter.data.mul_(3)
        encoder = torch.nn.Linear(pixels, 2 * latent)
        return cls(decoder, encoder, latent)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, raw = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0 + torch.tanh(raw) / 4).to_event(1))


def all_images(pixels: int) -> Tensor:
    """Every binary image, `(2**pixels, pixels)`."""
    numbers = torch.arange(2**pixels)
    return ((numbers[:, None] >> torch.arange(pixels)) & 1).double()
