"""Bias and variance of gradient estimators: repeated draws against an exact gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.objectives import Objective
from pyro_vae.seeding import derive, seeded

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Noise:
    """How a gradient estimator errs on one group of parameters, per datum.

    Attributes:
        variance: trace of its covariance over the squared norm of the exact gradient of all
            parameters, so that groups and stages compare.
        bias_z: squared distance of its mean from the exact gradient, as a z-score: about N(0, 1)
            where the estimator is unbiased.
    """

    variance: float
    bias_z: float


@dataclass(frozen=True)
class Reference:
    """A gradient to compare with, and the variance of each of its coordinates, 0 where exact."""

    gradient: Tensor
    variance: Tensor

    def __getitem__(self, coordinates: Tensor) -> Reference:
        return Reference(self.gradient[coordinates], self.variance[coordinates])


def draw_gradients(
    loss: Loss, groups: Mapping[str, list[Tensor]], draws: int, seed: int
) -> dict[str, Tensor]:
    """The gradient of `loss` `draws` times, by group, `(draws, coordinates)`.

    Args:
        groups: parameters by group; each is flattened into one vector.
    """
    samples = {name: [] for name in groups}
    for i in range(draws):
        with seeded(derive(seed, i)):
            for name, gradient in gradients(loss(), groups).items():
                samples[name].append(gradient)
    return {name: torch.stack(samples[name]) for name in groups}


def squared_norm(references: Mapping[str, Reference]) -> float:
    """|exact gradient of all parameters|^2."""
    return sum(float(r.gradient.square().sum()) for r in references.values())


def gradients(loss: Tensor, groups: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """The gradient of a loss by group, each flattened."""
    flat = [p for group in groups.values() for p in group]
    pieces = iter(torch.autograd.grad(loss, flat))
    return {
        name: torch.cat([next(pieces).flatten() for _ in group]) for name, group in groups.items()
    }


def noise(samples: Tensor, reference: Reference, scale: float) -> Noise:
    """How drawn gradients, `(draws, coordinates)`, err about a reference; `scale` is the
    `squared_norm`."""
    draws = len(samples)
    samples = samples.double()
    mean, total = samples.mean(0), float(samples.var(0).sum())
    # without bias |mean - reference|^2 has the mean `expected`; its spread, which dependence
    # between the coordinates makes larger, is taken from the draws through their Gram matrix
    centred = samples - mean
    gram = centred @ centred.T / (draws - 1)
    expected = total / draws + float(reference.variance.sum())
    spread = float((2 * gram.square().sum()).sqrt()) * expected / total if total > 0 else 0.0
    distance = float((mean - reference.gradient.double()).square().sum())
    return Noise(total / scale, (distance - expected) / spread if spread > 0 else 0.0)


def exact(loss: Tensor, groups: Mapping[str, list[Tensor]]) -> dict[str, Reference]:
    """The gradient of a loss that is known in closed form."""
    return {
        name: Reference(g.double(), torch.zeros_like(g, dtype=torch.float64))
        for name, g in gradients(loss, groups).items()
    }


def long_run(objective: Objective, vae: pv.VAE, x: Tensor, groups: Mapping[str, list[Tensor]],
             repeats: int, seed: int) -> dict[str, Reference]:  # fmt: skip
    """The mean of many gradient draws: the reference where no closed form exists."""
    total, squares = ({n: torch.zeros((), dtype=torch.float64) for n in groups} for _ in range(2))
    for i in range(repeats):
        with seeded(derive(seed, i)):
            loss = objective.differentiable_loss(vae.model, vae.guide, x) / len(x)
        for name, g in gradients(loss, groups).items():
            total[name] = total[name] + g.double()
            squares[name] = squares[name] + g.double().square()
    references = {}
    for name in groups:
        mean = total[name] / repeats
        variance = (squares[name] / repeats - mean.square()) / (repeats - 1)
        references[name] = Reference(mean, variance)
    return references


def linear_elbo(vae: pv.VAE, x: Tensor) -> Tensor:
    """The exact negative ELBO per datum of a linear decoder, a Normal likelihood and N(0, I).

    E_q |x - Wz - b|^2 = |x - W m - b|^2 + sum_j s_j^2 |w_j|^2 for q = N(m, diag s^2).
    """
    q = vae.encode(x).base_dist
    decoder = vae.likelihood.network.layers[-1]
    sigma = vae.likelihood.scale(x)
    residual = (x - decoder(q.loc)).square().sum(-1)
    spread = (q.scale.square() * decoder.weight.square().sum(0)).sum(-1)
    normaliser = (torch.log(2 * torch.pi * sigma.square()) * torch.ones_like(x)).sum(-1)
    reconstruction = -0.5 * ((residual + spread) / sigma.square() + normaliser)
    kl = 0.5 * (q.loc.square() + q.scale.square() - 1 - q.scale.square().log()).sum(-1)
    return (kl - reconstruction).mean()


def parameter_groups(vae: pv.VAE) -> dict[str, list[Tensor]]:
    """Encoder body, encoder head (means and log-variances), decoder, and the likelihood's own."""
    *body, head = [m for m in vae.posterior.modules() if isinstance(m, nn.Linear)]
    decoder = list(vae.likelihood.network.parameters())
    own = [p for n, p in vae.likelihood.named_parameters() if not n.startswith("network")]
    groups = {
        "encoder body": [p for layer in body for p in layer.parameters()],
        "encoder head": list(head.parameters()),
        "decoder": decoder + own,
    }
    return {name: group for name, group in groups.items() if group}


def dimensions_of_head(vae: pv.VAE) -> list[Tensor]:
    """Of the gradient of the group "encoder head", the coordinates of each latent dimension: those
    of the weights and biases that make its mean and its log-variance."""
    *_, head = [m for m in vae.posterior.modules() if isinstance(m, nn.Linear)]
    outputs, inputs = head.weight.shape
    rows = torch.arange(outputs * inputs).reshape(outputs, inputs)
    biases = outputs * inputs + torch.arange(outputs)
    by_output = torch.cat([rows, biases.unsqueeze(1)], 1)
    means, log_variances = by_output.chunk(2)
    return list(torch.cat([means, log_variances], 1))
