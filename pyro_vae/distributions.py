"""Distributions that torch and Pyro lack, or compute from clamped or cancelling quantities.

Each has scalar events and is parametrised by what a network can output without a bound that would
be reached: logits, log-rates, locations. All log-densities are in nats; no probability is clamped,
and no large terms are subtracted that nearly cancel, so that float32 serves as well as float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyro_vae.typing import Distribution

EMPTY = torch.Size()


def stated_mean(fn: Distribution) -> Tensor | None:
    """The mean of a distribution; None where it has no closed form of it (a flow)."""
    try:
        return fn.mean
    except NotImplementedError:
        return None


class ContinuousBernoulli(TorchDistribution):
    """Density proportional to exp(logit * x) on [0, 1] (Loaiza-Ganem & Cunningham 2019).

    The normaliser, log((e^l - 1) / l) = l/2 + log(sinh(l/2) / (l/2)), has a removable singularity
    at l = 0 (probability 1/2). torch's `ContinuousBernoulli` goes through a clamped probability and
    is wrong by 0.2 nats a value at a logit of 20 in float32; this one takes the series of
    log(sinh(h)/h) near 0, to rounding, and never forms a probability.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousBernoulli:
        return ContinuousBernoulli(
            self.logits.expand(batch_shape), validate_args=self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - log_sinh_ratio(0.5 * self.logits)

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        logits = self.logits.expand(self._extended_shape(sample_shape))
        rate = logits.abs().clamp(min=torch.finfo(logits.dtype).eps)  # below, it is uniform
        # an exponential of this rate truncated to [0, 1], by inversion
        x = -(torch.rand_like(logits) * torch.expm1(-rate)).log1p() / rate
        return torch.where(logits > 0, 1 - x, x)

    @property
    def mean(self) -> Tensor:
        return 0.5 + 0.5 * langevin(0.5 * self.logits)


def log_sinh_ratio(h: Tensor) -> Tensor:
    """log(sinh(h) / h): even, 0 at 0, close to abs(h) - log(2 abs(h)) far out."""
    near = h.abs() < 0.1
    s = torch.where(near, h, 0.0) ** 2
    series = s / 6 * (1 - s / 30 * (1 - s * 4 / 63 * (1 - s * 3 / 40 * (1 - s * 8 / 99))))
    a = torch.where(near, 1.0, h.abs())
    return torch.where(near, series, a + (-torch.exp(-2 * a)).log1p() - (2 * a).log())


def langevin(h: Tensor) -> Tensor:
    """coth(h) - 1/h, the derivative of `log_sinh_ratio`."""
    near = h.abs() < 0.1
    small = torch.where(near, h, 0.0)
    s = small**2
    series = small / 3 * (1 - s / 15 * (1 - s * 2 / 21 * (1 - s / 10 * (1 - s * 10 / 99))))
    far = torch.where(near, 1.0, h)
    return torch.where(near, series, 1 / far.tanh() - 1 / far)


class DiscretizedLogistic(TorchDistribution):
    """A logistic rounded to equally spaced levels of [0, 1] (Kingma et al. 2016, app. C.3).

    The levels are 0, 1/(levels - 1), ..., 1, each with the mass of the half-open bin around it; the
    outermost bins reach to infinity, as in PixelCNN++ (Salimans et al. 2017, sec. 2.1), so the
    masses sum to one. With u and l the standardised upper and lower edges, the mass

        sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u))

    is a product: nothing cancels however far a level is from the location.

    Args:
        loc, scale: of the logistic, on the scale where the levels span [0, 1].
        levels: how many.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    has_rsample = False

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogistic(loc, scale, self.levels, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        width = 1 / (self.levels - 1)
        bottom, top = value < 0.5 * width, value > 1 - 0.5 * width
        below_upper = logsigmoid((value + 0.5 * width - self.loc) / self.scale)
        above_lower = logsigmoid((self.loc - value + 0.5 * width) / self.scale)
        both_edges = (-torch.expm1(-width / self.scale)).log()
        return (
            torch.where(top, 0.0, below_upper)
            + torch.where(bottom, 0.0, above_lower)
            + torch.where(bottom | top, 0.0, both_edges)
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        uniform = torch.rand(
            self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device
        )
        x = self.loc + self.scale * uniform.logit()
        return (x * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        # the sum of P(level >= k) over k, one k at a time: an array over levels is 255 times larger
        width = 1 / (self.levels - 1)
        mean = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            mean = mean + width * torch.sigmoid((self.loc - (k - 0.5) * width) / self.scale)
        return mean


class Levels(constraints.Constraint):
    """Equally spaced levels 0, 1/(levels - 1), ..., 1, up to rounding in float32."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        k = value * (self.levels - 1)
        return ((k - k.round()).abs() < 1e-3) & (value > -1e-6) & (value < 1 + 1e-6)


class Poisson(TorchDistribution):
    """Counts, from the logarithm of their rate, which may be arbitrarily small.

    For x > 0 the log-mass is -D(x, mu) - r(x): the deviance D(x, mu) = x log(x / mu) - x + mu and
    what Stirling's formula leaves of log x! (after Loader 2000). They are of the size of the
    result, where x log mu, mu and log x! are large and nearly cancel.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Poisson:
        return Poisson(self.log_rate.expand(batch_shape), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        counted = value > 0
        log_x = torch.where(counted, value, 1.0).log()
        some = -deviance(value, self.log_rate - log_x) - stirling_rest(value, log_x)
        return torch.where(counted, some, -self.log_rate.exp())

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()


class NegativeBinomial(TorchDistribution):
    """Counts of mean mu = exp(log_rate) and variance mu + mu^2 / theta.

    With n = x + theta and p = mu / (theta + mu) the log-mass is

        -D(x, n p) - D(theta, n (1 - p)) + log(theta / n) + r(n) - r(theta) - r(x),

    by the deviance D and Stirling's rest r (see `Poisson`), to which it tends as theta grows.

    Args:
        log_rate: log mu.
        concentration: theta > 0, R's `theta` and scvi-tools' inverse dispersion.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "log_rate": constraints.real,
        "concentration": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, log_rate: Tensor, concentration: Tensor, validate_args: bool | None = None
    ) -> None:
        self.log_rate, self.concentration = broadcast_all(log_rate, concentration)
        super().__init__(self.log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        log_rate, theta = self.log_rate.expand(batch_shape), self.concentration.expand(batch_shape)
        return NegativeBinomial(log_rate, theta, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        theta, log_theta = self.concentration, self.concentration.log()
        logits = self.log_rate - log_theta  # of p
        growth = (value / theta).log1p()  # log(n / theta)
        log_ratio = growth + logsigmoid(-logits)  # of n (1 - p) to theta, and of n p to mu
        counted = value > 0
        log_x = torch.where(counted, value, 1.0).log()
        of_x = deviance(value, self.log_rate - log_x + log_ratio)
        of_theta = deviance(theta, log_ratio)
        rest = (
            stirling_rest(value + theta, log_theta + growth)
            - stirling_rest(theta, log_theta)
            - stirling_rest(value, log_x)
        )
        # D(0, n p) is n p
        return rest - torch.where(counted, of_x, theta * logits.sigmoid()) - of_theta - growth

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        theta = self.concentration.expand(self._extended_shape(sample_shape))
        return torch.poisson(self.mean * torch._standard_gamma(theta) / theta)

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()


def deviance(x: Tensor, log_ratio: Tensor) -> Tensor:
    """x log(x / m) - x + m for m = x e^log_ratio: not negative, and 0 at m = x."""
    return x * (torch.expm1(log_ratio) - log_ratio)


def stirling_rest(n: Tensor, log_n: Tensor) -> Tensor:
    """log Gamma(n + 1) - (n log n - n) for n >= 0: about log(2 pi n) / 2.

    Above 16 by the series of its rest, whose four terms leave an error below 1e-13.

    Args:
        log_n: log n, and anything finite at n = 0.
    """
    s = 1 / n.clamp(min=16.0)
    t = s * s
    series = s / 12 * (1 - t / 30 * (1 - t * 2 / 7 * (1 - t * 3 / 4)))
    large = 0.5 * (log_n + math.log(2 * math.pi)) + series
    return torch.where(n > 16, large, torch.lgamma(n + 1) - n * log_n + n)


class Categorical(dist.Categorical):
    """Pyro's categorical over the codes 0, 1, ..., with E[x] in place of its `nan` mean."""

    @property
    def mean(self) -> Tensor:
        codes = torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
        return self.probs @ codes


class SideBySide(constraints.Constraint):
    """Constraints of the columns of a table. `constraints.cat` breaks where one of them has batch
    dimensions of its own, as the support of a binomial has."""

    def __init__(self, parts: Sequence[constraints.Constraint], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = parts, sizes
        self.is_discrete = any(part.is_discrete for part in parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        pieces = value.split(list(self.sizes), -1)
        checks = [p.check(x) for p, x in zip(self.parts, pieces, strict=True)]
        batch = torch.broadcast_shapes(*(check.shape[:-1] for check in checks))
        return torch.cat([check.expand(*batch, -1) for check in checks], -1)


class Columnwise(TorchDistribution):
    """Distributions with scalar events side by side along the last batch dimension.

    Args:
        parts: each of batch shape `(..., columns of the part)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, parts: Sequence[Distribution], validate_args: bool | None = None) -> None:
        self.sizes = [part.batch_shape[-1] for part in parts]
        batch = torch.broadcast_shapes(*(part.batch_shape[:-1] for part in parts))
        self.parts = [p.expand((*batch, n)) for p, n in zip(parts, self.sizes, strict=True)]
        super().__init__(torch.Size([*batch, sum(self.sizes)]), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return SideBySide([part.support for part in self.parts], self.sizes)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columnwise:
        *batch, _ = batch_shape
        parts = [p.expand((*batch, n)) for p, n in zip(self.parts, self.sizes, strict=True)]
        return Columnwise(parts, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        pieces = value.split(self.sizes, -1)
        return torch.cat([p.log_prob(x) for p, x in zip(self.parts, pieces, strict=True)], -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        return torch.cat([part.sample(sample_shape) for part in self.parts], -1)

    @property
    def mean(self) -> Tensor:
        return torch.cat([part.mean for part in self.parts], -1)
