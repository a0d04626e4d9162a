"""The gradients of the bounds: unbiased or biased as theory says, and their signal-to-noise ratio.

One datum x, z ~ N(theta, 1), x ~ N(z, 1), q(z|x) = N(a, exp(s)^2) away from the posterior. The
datum is repeated N times with parameters of its own each time, so that one call of an objective
gives N independent draws of its gradient. The oracle differentiates the bound's expectation, a
Gauss-Hermite quadrature over the K = 1 or 2 noises.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

X, THETA, A, S = 1.1, 0.2, -0.3, math.log(0.9)
N = 20_000
SHARED = 0.5  # how much of a guide parameter the shared prior takes


class Model(nn.Module):
    """The prior's mean is theta, or theta + SHARED a: a parameter of the guide, as in VampPrior."""

    def __init__(self, a=None, number=N):
        super().__init__()
        self.theta = nn.Parameter(torch.full((number,), THETA))
        self.a = a

    def forward(self):
        pyro.module("model", self)
        mean = self.theta if self.a is None else self.theta + SHARED * self.a
        with pyro.plate("data", len(self.theta)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full_like(self.theta, X))


class Guide(nn.Module):
    def __init__(self, a=A, s=S, number=N):
        super().__init__()
        self.a = nn.Parameter(torch.full((number,), float(a)))
        self.s = nn.Parameter(torch.full((number,), float(s)))

    def forward(self):
        pyro.module("guide", self)
        with pyro.plate("data", len(self.a)):
            pyro.sample("z", dist.Normal(self.a, self.s.exp()))


def draws(objective, shared=False, number=N, **start):
    """N draws of the gradient of the bound by theta, a and s."""
    guide = Guide(number=number, **start)
    model = Model(guide.a if shared else None, number)
    objective.max_plate_nesting = 1
    loss = objective.differentiable_loss(model, guide)
    gradients = torch.autograd.grad(-loss, [model.theta, guide.a, guide.s])
    return dict(zip(("theta", "a", "s"), gradients, strict=True))


def exact(particles, shared=False):
    """The gradient of E[log (1/K) sum_k w_k], K = 1 or 2, by quadrature and autograd."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    e, w = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    theta, a, s = leaves = [torch.tensor(v, requires_grad=True) for v in (THETA, A, S)]
    z = a + s.exp() * e
    mean = theta + SHARED * a if shared else theta
    log_w = -0.5 * (z - mean) ** 2 - 0.5 * (X - z) ** 2 - 0.5 * math.log(2 * math.pi)
    log_w = log_w + 0.5 * e**2 + s
    if particles == 2:
        pairs = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
        bound = (w[:, None] * w[None, :] * pairs).sum()
    else:
        bound = (w * log_w).sum()
    return dict(zip(("theta", "a", "s"), torch.autograd.grad(bound, leaves), strict=True))


def z_score(sample, mean):
    # a spread of zero is a gradient without noise: then only rounding may part the two
    return ((sample.mean() - mean) / (sample.std() / len(sample) ** 0.5 + 1e-12)).item()


UNBIASED = {
    "analytic ELBO": (pv.ELBO(kl="analytic"), 1),
    "ELBO": (pv.ELBO(kl="monte_carlo"), 1),
    "ELBO, STL": (pv.ELBO(kl="monte_carlo", gradient="stl"), 1),
    "ELBO, 3 particles, STL": (pv.ELBO("monte_carlo", gradient="stl", num_particles=3), 1),
    "IWAE-1, STL": (pv.IWAE(1, gradient="stl"), 1),
    "IWAE-1, DReG": (pv.IWAE(1, gradient="dreg"), 1),
    "IWAE-2": (pv.IWAE(2), 2),
    "IWAE-2, DReG": (pv.IWAE(2, gradient="dreg"), 2),
    "MIWAE(2, 3)": (pv.MIWAE(2, 3), 2),
    "MIWAE(2, 3), DReG": (pv.MIWAE(2, 3, gradient="dreg"), 2),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name, shared):
    objective, particles = UNBIASED[name]
    got, want = draws(objective, shared), exact(particles, shared)
    for parameter in want:
        # 60 scores: odds of one beyond 4.5 are 4e-4
        assert abs(z_score(got[parameter], want[parameter])) < 4.5, parameter


@pytest.mark.parametrize("objective", [pv.IWAE(2, gradient="stl"), pv.MIWAE(2, 3, gradient="stl")])
def test_stl_is_biased_for_several_weights(objective):
    got, want = draws(objective), exact(2)
    assert abs(z_score(got["a"], want["a"])) > 20
    assert abs(z_score(got["theta"], want["theta"])) < 4.5  # the model's gradient is not touched


def test_the_oracle_tells_one_bound_from_another():
    # the mutant of the tests above: K counted wrong
    got = draws(pv.IWAE(2, gradient="dreg"))
    assert abs(z_score(got["a"], exact(1)["a"])) > 20


POSTERIOR = {"a": (X + THETA) / 2, "s": -0.5 * math.log(2)}


@pytest.mark.parametrize(
    "objective",
    [
        pv.ELBO("monte_carlo", gradient="stl"),
        pv.IWAE(5, gradient="stl"),
        pv.IWAE(5, gradient="dreg"),
    ],
)
def test_no_noise_at_the_posterior(objective):
    got = draws(objective, number=100, **POSTERIOR)
    assert got["a"].abs().max() < 1e-12
    assert got["s"].abs().max() < 1e-12
    standard = draws(pv.ELBO("monte_carlo"), number=100, **POSTERIOR)
    assert standard["s"].std() > 0.1


def snr_slope(gradient, parameter, particles=(16, 64, 256)):
    """Slope of log SNR over log K; SNR is mean over standard deviation of one draw."""
    snr = []
    for k in particles:
        got = draws(pv.IWAE(k, gradient=gradient))[parameter]
        snr.append((got.mean().abs() / got.std()).item())
    return np.polyfit(np.log(particles), np.log(snr), 1)[0], snr


def test_signal_to_noise_of_the_standard_gradient_falls_for_the_guide_and_grows_for_the_model():
    """Rainforth et al. 2018, theorem 1: of order 1/sqrt(K) and sqrt(K), for large K."""
    slope, snr = snr_slope("standard", "a", (4, 16, 64))  # beyond, only noise is left
    assert min(snr) > 8 / N**0.5  # the signal is above its own noise
    assert slope == pytest.approx(-0.5, abs=0.12)
    slope, _ = snr_slope("standard", "theta")
    assert slope == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("parameter", ["a", "s"])
def test_signal_to_noise_of_dreg_grows(parameter):
    """Tucker et al. 2018, sec. 4: of order sqrt(K) for the guide as well."""
    slope, _ = snr_slope("dreg", parameter)
    assert slope == pytest.approx(0.5, abs=0.12)
