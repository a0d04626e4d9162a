"""Every known answer beside ours: closed forms, quadrature, enumeration, and faults that must show.

    python -m benchmarks.evidence_correctness

Statistics are z-scores with fixed seeds: a right estimator is beyond 4 once in 16,000 times. Rows
marked "must fail" plant a fault known from published code and count as right when it shows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report
from pyro_vae.evidence import Annealing, ais, draws

COMMAND = "python -m benchmarks.evidence_correctness"
SHORT = Annealing(chains=8, temperatures=15, leapfrogs=3)


@dataclass(frozen=True)
class Row:
    """One known answer.

    Attributes:
        found, expected: the figure compared.
        score: how far apart they are, in the unit of `unit` ("z" or "nats", ...).
        limit: of the score.
        must_fail: whether a fault was planted.
    """

    name: str
    found: float
    expected: float
    score: float
    limit: float
    unit: str = "z"
    must_fail: bool = False

    @property
    def right(self) -> bool:
        """Within the limit, or beyond it where a fault was planted."""
        return bool(abs(self.score) <= self.limit) != self.must_fail


class Linear(nn.Module):
    """x ~ N(Wz + b, 0.25 I), z ~ N(0, I), and a guide that is the posterior moved and scaled."""

    def __init__(self, latent: int, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(latent)
        self.W = nn.Parameter(torch.randn(6, latent, generator=generator))
        self.b = nn.Parameter(torch.randn(6, generator=generator))
        self.shift, self.scale = shift, scale

    def model(self, x: Tensor) -> None:
        """Probabilistic PCA."""
        zero = torch.zeros_like(self.W[0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The posterior, moved by `shift` of its standard deviations and scaled by `scale`."""
        q = pv.exact.linear_gaussian_posterior(x, self.W, self.b, 0.5)
        with pyro.plate("data", len(x)):
            loc = q.loc + self.shift * q.stddev
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale * q.scale_tril))

    @torch.no_grad()
    def draw(self, n: int) -> Tensor:
        """Data from the model."""
        generator = torch.Generator().manual_seed(n)
        z = torch.randn(n, self.W.shape[1], generator=generator)
        return z @ self.W.T + self.b + 0.5 * torch.randn(n, 6, generator=generator)

    @torch.no_grad()
    def cv2(self) -> float:
        """cv² of the weights of draws from the guide alone, in closed form."""
        q = pv.exact.linear_gaussian_posterior(self.b, self.W, self.b, 0.5)
        moved, P = q.loc + self.shift * q.stddev, q.covariance_matrix
        return pv.exact.weight_variance(q.loc, P, moved, self.scale**2 * P).item()

    @torch.no_grad()
    def log_px(self, x: Tensor) -> np.ndarray:
        """Closed form, by the dense covariance."""
        covariance = self.W @ self.W.T + 0.25 * torch.eye(6, dtype=x.dtype)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x).numpy()


class Pixels(nn.Module):
    """Eight binary pixels from a nonlinear decoder of one or two latent dimensions."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(latent)
            self.net = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, 8))
        for parameter in self.net.parameters():
            parameter.data.mul_(3)
        self.latent = latent

    def model(self, x: Tensor) -> None:
        """z ~ N(0, I), independent pixels."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The prior."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), self.latent), 1.0).to_event(1))


class VampLike(Pixels):
    """The same pixels under a mixture of five narrow Normals as prior."""

    def __init__(self) -> None:
        super().__init__(2)
        centres = 2 * torch.randn(5, 2, generator=torch.Generator().manual_seed(4))
        self.prior = pv.priors.GaussianMixture(centres, 0.4)

    def model(self, x: Tensor) -> None:
        """z from the mixture, independent pixels."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def z_of_mean(values: np.ndarray, expected: float) -> float:
    """How many of its standard errors the mean of `values` is from `expected`."""
    return (values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values)))


def closed_forms() -> Iterator[Row]:
    """Importance sampling on probabilistic PCA: value, error, bias, flags."""
    for share, scale in ((0.0, 1.15), (0.1, 0.85)):
        pair = Linear(3, shift=0.3, scale=scale)
        x = pair.draw(1).expand(1000, -1)
        exact = pair.log_px(x[:1])[0]
        found = pv.log_marginal(pair.model, pair.guide, x, num_samples=500, defensive=share)
        error = found.log_px - exact
        what = f"pPCA, {share:.0%} inflated"
        yield Row(f"{what}: log p(x), bias removed", found.log_px_jackknife.mean(), exact,
                  z_of_mean(found.log_px_jackknife, exact), 4)  # fmt: skip
        yield Row(f"{what}: bias", error.mean(), found.bias_est.mean(),
                  z_of_mean(error, found.bias_est.mean()), 4)  # fmt: skip
    pair = Linear(3)
    x = pair.draw(100)
    found = pv.log_marginal(pair.model, pair.guide, x, num_samples=1, defensive=0)
    worst = abs(found.log_px - pair.log_px(x)).max()
    yield Row("pPCA, guide = posterior, K = 1", worst, 0.0, worst, 1e-9, "nats")
    narrow = Linear(3, scale=0.3)
    found = pv.log_marginal(narrow.model, narrow.guide, x, num_samples=5000, defensive=0)
    share = found.flagged.mean()
    yield Row("pPCA, infinite variance: flagged", share, 1.0, share - 1, 0.05, "share")


def coverage() -> Iterator[Row]:
    """Nominal 95% intervals over 1,000 seeds at finite cv².

    By default (10% inflated) they hold for every guide whose weights have a finite variance; from
    the guide alone, where the weights also have a finite fourth moment (scale² > 3/4).
    """
    cases = [(0.1, scale) for scale in (0.72, 0.8, 0.9, 1.15, 1.5)]
    for share, scale in [*cases, (0.0, 0.9), (0.0, 1.15), (0.0, 1.5), (0.0, 0.72)]:
        pair = Linear(2, shift=0.3 if scale > 0.75 else 0.0, scale=scale)
        x = pair.draw(1).expand(1000, -1)
        found = pv.log_marginal(pair.model, pair.guide, x, num_samples=2500, defensive=share)
        covered = (abs(found.log_px - pair.log_px(x[:1])[0]) < 1.96 * found.se).mean()
        what = f"95%, {'default' if share else 'plain'}, q x{scale:g}, plain cv² {pair.cv2():.2f}"
        heavy = not share and scale**2 < 0.75
        limit = 0.06 if heavy else 0.02
        yield Row(f"{what}{', heavy tail' * heavy}", covered, 0.95, covered - 0.95, limit, "share")


def sums() -> Iterator[Row]:
    """Quadrature and enumeration."""
    for latent in (1, 2):
        pair = Linear(latent)
        x = pair.draw(50)
        found = pv.log_marginal(pair.model, pair.guide, x, method="grid")
        worst = abs(found.log_px - pair.log_px(x)).max()
        yield Row(f"grid, {latent} latent: pPCA", worst, 0.0, worst, 1e-3, "nats")
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    for method in ("is", "grid"):
        pair = Pixels(2)
        found = pv.log_marginal(pair.model, pair.guide, x, method=method, num_samples=2000)
        p = np.exp(found.log_px)
        if method == "is":
            error = math.sqrt(float(((p * found.se) ** 2).sum()))
            yield Row("all 256 images, is: total", p.sum(), 1.0, (p.sum() - 1) / error, 4)
        else:
            yield Row("all 256 images, grid: total", p.sum(), 1.0, p.sum() - 1, 1e-3, "share")


def mixture() -> Iterator[Row]:
    """A discrete site left to the model: p(x) is a mixture of normals."""
    centres, weights = torch.tensor([-2.0, 2.0]), torch.tensor([0.3, 0.7])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(centres[c], 0.5))
            pyro.sample("x", dist.Normal(2 * z, 0.4), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.3))

    x = 4 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(2 * centres, math.sqrt(1.16))
    exact = (normal.log_prob(x[:, None]) + weights.log()).logsumexp(1).numpy()
    found = pv.log_marginal(model, guide, x, num_samples=500)
    error = (found.log_px_jackknife - exact) / found.se
    yield Row("mixture prior, enumerated", found.mean, exact.mean(), z_of_mean(error, 0), 4)


def relative(start: str) -> np.ndarray:
    """w/p(x) of annealing on probabilistic PCA, a mean over chains for each of 400 data."""
    pair = Linear(3, shift=0.7, scale=0.7)
    x = pair.draw(400)
    found = pv.log_marginal(pair.model, pair.guide, x, method="ais", start=start, annealing=SHORT)
    return np.exp(found.log_px - pair.log_px(x))


def late_weights(space, state, betas, steps, count, fresh) -> Tensor:
    """The fault of taking each increment after the transition."""
    log_w = torch.zeros_like(state.tilt)
    for (before, beta), step in zip(pairwise(betas), steps, strict=True):
        momentum, uniform = fresh(state)
        state, _ = ais.transition(space, state, momentum, uniform, beta, step, count)
        log_w = log_w + (beta - before) * state.tilt
    return log_w


def long_kick(right: Callable) -> Callable:
    """The fault of ending the leapfrog with a kick and a half."""

    def leapfrog(space, state, momentum, beta, step, count):
        state, momentum = right(space, state, momentum, beta, step, count)
        return state, {
            n: p + space.spread(step, p, n) * (beta * state.slope[n] + state.base_slope[n])
            for n, p in momentum.items()
        }

    return leapfrog


def annealing() -> Iterator[Row]:
    """E[w]/p(x) = 1, and the two faults."""
    for start in ("guide", "prior"):
        w = relative(start)
        yield Row(f"annealing from the {start}: E[w]/p(x)", w.mean(), 1.0, z_of_mean(w, 1), 4)
    pair = VampLike()
    x = (torch.rand(60, 8, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    exact = pv.log_marginal(pair.model, pair.guide, x, method="grid").log_px
    settings = Annealing(chains=8, temperatures=30, leapfrogs=3)
    found = pv.log_marginal(
        pair.model, pair.guide, x, method="ais", start="prior", annealing=settings
    )
    w = np.exp(found.log_px - exact)
    yield Row("annealing from a mixture prior: E[w]/p(x)", w.mean(), 1.0, z_of_mean(w, 1), 4)
    with mock.patch.object(ais, "anneal", late_weights):
        w = relative("prior")
    yield Row("fault: weight after the move", w.mean(), 1.0, z_of_mean(w, 1), 4, must_fail=True)
    with mock.patch.object(ais, "leapfrog", long_kick(ais.leapfrog)):
        w = relative("prior")
    yield Row("fault: last kick and a half", w.mean(), 1.0, z_of_mean(w, 1), 4, must_fail=True)


def bounds() -> Iterator[Row]:
    """A sandwich closes where the guide is good, and gapes where it misses a mode."""
    pair = Linear(3, shift=0.3, scale=1.1)
    x = pair.draw(200)
    for method in ("is", "ais"):
        found = pv.sandwich(pair.model, pair.guide, x, method=method, num_samples=500)
        yield Row(f"sandwich, {method}: gap", found.gap, 0.0, found.gap, 0.05, "nats")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def one_mode(x: Tensor) -> None:
        root = x.abs().sqrt().clamp_min(0.3)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(root, 0.2 / root))

    found = pv.sandwich(model, one_mode, torch.zeros(200), num_samples=500)
    yield Row("fault: a mode missed, gap", found.gap, 0.0, found.gap, 0.5, "nats", must_fail=True)


def precision() -> Iterator[Row]:
    """Single precision against double, and the work divided in two ways, on confident pixels."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(10),
            likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(10, [100], 200)),
            posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(200, [100], 20)),
        )
    for parameter in vae.likelihood.parameters():
        parameter.data.mul_(5)
    x = (torch.rand(20, 200, generator=generator) < 0.5).double()
    u = torch.randn(500, 20, 10, generator=generator).float()  # draws differ between precisions
    log_px = {}
    for dtype in (torch.float32, torch.float64):
        vae.to(dtype)
        with mock.patch.object(draws, "noise", given_noise(u.to(dtype))):
            log_px[dtype] = pv.log_marginal(vae.model, vae.guide, x, num_samples=500).log_px
    worst = abs(log_px[torch.float32] - log_px[torch.float64]).max()
    yield Row("float32 against float64, whole evaluation", worst, 0.0, worst, 1e-3, "nats")
    whole = pv.log_marginal(vae.model, vae.guide, x, num_samples=300)
    parts = pv.log_marginal(vae.model, vae.guide, x, num_samples=300, chunk_bytes=100_000)
    worst = abs(whole.log_px - parts.log_px).max()
    yield Row("work divided otherwise", worst, 0.0, worst, 1e-9, "nats")


def given_noise(u: Tensor) -> Callable:
    """Noise `(draws, rows, latent)` in place of fresh noise, for rows that come in order."""
    rows = iter(range(u.shape[1]))
    return lambda shape, axis, streams, dtype: u[:, [next(rows) for _ in streams]]


def main() -> int:
    """Print and write the report; returns how many rows are not right."""
    torch.set_default_dtype(torch.float64)
    checks = (closed_forms, coverage, sums, mixture, annealing, bounds, precision)
    rows = [row for check in checks for row in check()]
    print(f"{'known answer':<52}{'ours':>12}{'expected':>12}{'score':>12}{'limit':>9}")
    for row in rows:
        verdict = "right" if row.right else "WRONG"
        verdict += " (must fail)" if row.must_fail else ""
        print(
            f"{row.name:<52}{row.found:>12.5g}{row.expected:>12.5g}{row.score:>12.2g}"
            f"{row.limit:>9.2g} {row.unit:<6} {verdict}"
        )
    wrong = sum(not row.right for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} right")
    results = [
        asdict(row)
        | {"found": float(row.found), "expected": float(row.expected), "score": float(row.score)}
        | {"right": row.right}
        for row in rows
    ]
    report.write("evidence_correctness", COMMAND, results, draw(rows))
    return wrong


def draw(rows: list[Row]) -> Figure:
    """Every score as a multiple of its limit."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    scores = [max(abs(row.score) / row.limit, 1e-3) for row in rows]
    colours = ["C3" if row.must_fail else "C0" for row in rows]
    axes.barh([row.name for row in rows], scores, color=colours)
    axes.axvline(1, color="k", lw=1)
    axes.set(xscale="log", xlabel="score / limit (red: planted faults, which must exceed 1)")
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
