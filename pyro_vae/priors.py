"""p(z): modules that return a distribution over one latent vector.

Contract: `forward(context=None) -> Distribution` with event shape `(latent,)` and batch shape `()`
(or the context's). Any callable that returns such a distribution serves in place of a module:

    prior = lambda: dist.Laplace(torch.zeros(8), 1.0).to_event(1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, constraints

from pyro_vae.checks import at_least, nonnegative
from pyro_vae.conditioning import condition
from pyro_vae.distributions import EMPTY
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.mixtures import NormalMixture
from pyro_vae.typing import Conditional, Distribution


class StandardNormal(nn.Module):
    """N(0, I), the prior of Kingma & Welling 2013.

    Args:
        latent: dimension of z.

    Raises:
        ConfigError: `latent` is not a whole number of at least 1.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int) -> None:
        super().__init__()
        at_least("latent", latent, 1)
        # buffers, so that the distribution follows the module's device and precision
        self.register_buffer("loc", torch.zeros(latent), persistent=False)
        self.register_buffer("scale", torch.ones(latent), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class GaussianMixture(nn.Module):
    """sum_c w_c N(m_c, diag(s_c^2)), fixed or learned.

    Its draws are not reparametrised: they are for generating, and training draws z from q. There is
    no analytic KL to it: the `ELBO` takes the Monte Carlo one.

    Args:
        loc: means of the components, `(components, latent)`; for a learned mixture a start, e.g.
            `torch.randn(10, latent)`.
        scale: standard deviations, positive, broadcast to `loc`.
        weights: of the components, positive, `(components,)`, up to a factor. Equal by default.
        learned: whether means, scales and weights are parameters or stay as given.

    Raises:
        ConfigError: an argument is no array of numbers, a mean is not finite, or a scale or weight
            not finite and positive.
        ShapeError: `loc` is not a matrix with a row and a column at least, there is not one weight
            a component, or `scale` does not broadcast to `loc`.
    """

    loc: Tensor
    log_scale: Tensor
    logits: Tensor

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float = 1.0,
        weights: Tensor | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        loc = _floating("loc", loc)
        if loc.dim() != 2 or loc.numel() == 0:
            raise ShapeError(f"loc is (components, latent), got shape {tuple(loc.shape)}")
        scale = _floating("scale", scale).to(loc)
        weights = loc.new_ones(len(loc)) if weights is None else _floating("weights", weights)
        weights = weights.to(loc)
        if weights.shape != loc.shape[:1]:
            raise ShapeError(f"{len(loc)} components, but weights of shape {tuple(weights.shape)}")
        try:
            scale = scale.expand_as(loc)
        except RuntimeError as error:
            raise ShapeError(
                f"a scale of shape {tuple(scale.shape)} for means of shape {tuple(loc.shape)}"
            ) from error
        _check_each("loc", loc, loc.isfinite(), "finite")
        for name, value in (("scale", scale), ("weights", weights)):
            _check_each(name, value, value.isfinite() & (value > 0), "positive and finite")
        start = {"loc": loc, "log_scale": scale.log(), "logits": weights.log()}
        for name, value in start.items():
            value = value.detach().clone()
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return NormalMixture(self.logits, self.loc, self.log_scale.exp())


class ClassMeans(nn.Module):
    """N(m_y, I): each class moves the mean of the standard normal, by a learned vector.

    Its KL from a posterior of Normals is analytic. Give each datum's class as its context
    (`Data.given_classes`).

    Args:
        num_classes, latent: sizes.
        spread: standard deviation of the means at the start.

    Raises:
        ConfigError: a size is not a whole number of at least 1; or, at call, there is no context.
        ShapeError: at call, a context that is not over `num_classes` classes.
    """

    scale: Tensor

    def __init__(self, num_classes: int, latent: int, spread: float = 1.0) -> None:
        super().__init__()
        at_least("num_classes", num_classes, 1)
        at_least("latent", latent, 1)
        self.means = nn.Parameter(spread * torch.randn(num_classes, latent))
        self.register_buffer("scale", torch.ones(latent), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        """p(z|y).

        Args:
            context: the classes, one-hot, `(..., num_classes)`.
        """
        if context is None:
            raise ConfigError("ClassMeans needs each datum's class as its context, one-hot")
        if context.shape[-1] != len(self.means):
            raise ShapeError(
                f"ClassMeans has {len(self.means)} classes, got a context of shape "
                f"{tuple(context.shape)}"
            )
        return dist.Normal(context @ self.means, self.scale).to_event(1)


class VampPrior(nn.Module):
    """The mixture of the posteriors at learned pseudo-inputs, (1/K) sum_k q(z|u_k)
    (Tomczak & Welling 2017, eq. 9).

    The prior holds the very posterior that the guide uses, so training moves both together. With a
    context, the pseudo-inputs are encoded with each datum's own: `(N, K)` encodings. There is no
    analytic KL: the `ELBO` takes the Monte Carlo one. One evaluation costs K encodings, whatever
    the batch, and with a `DiagonalNormal` one matrix product for all K densities of all data. With
    other posteriors the densities are taken one by one, and with an `InverseAutoregressiveFlow`
    each needs the flow's inverse (see there). Batch normalisation in the encoder takes the
    pseudo-inputs for a batch of their own, and counts it. Warm the KL up (the authors do, over 100
    epochs): at full weight from the start, prior and posterior may agree before they have seen
    anything.

    Args:
        posterior: of the same VAE: a module, or any callable of `(x)` (or `(x, context)`).
        num_pseudo_inputs: K, 500 in the paper.
        start: training data `(N, features)`, of which K rows are drawn without replacement; or
            their mean `(features,)`, which K times with Gaussian noise makes the pseudo-inputs.
        bounds: `(low, high)`, the range that pseudo-inputs are kept in, by a scaled sigmoid: none
            reaches an end, and none gets stuck there. None leaves them free.
        noise: standard deviation of the noise around a mean.
        seed: of the rows, or of the noise.

    Raises:
        ConfigError: K is not a whole number of at least 1, or more than the rows; `bounds` are not
            in order or not finite, or do not hold `start`; `noise` is negative or not finite.
        ShapeError: `start` is a number.
    """

    def __init__(
        self,
        posterior: Conditional,
        num_pseudo_inputs: int,
        start: Tensor,
        *,
        bounds: tuple[float, float] | None = None,
        noise: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least("num_pseudo_inputs", num_pseudo_inputs, 1)
        nonnegative("noise", noise)
        if bounds is not None and not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ConfigError(f"bounds are finite numbers (low, high), got {bounds}")
        start = _floating("start", start).detach()
        self.posterior = posterior
        self.bounds = bounds
        u = _pseudo_inputs(num_pseudo_inputs, start, noise, seed)
        if bounds is not None:
            low, high = bounds
            if not ((low <= start) & (start <= high)).all():
                raise ConfigError(
                    f"pseudo-inputs start within their bounds {bounds}, got values from "
                    f"{start.min().item():g} to {start.max().item():g}"
                )
            # binary data lie on the ends, where a sigmoid has no gradient: start a little inside
            u = torch.logit((u - low) / (high - low), eps=0.02)
        self.raw = nn.Parameter(u)

    @property
    def pseudo_inputs(self) -> Tensor:
        """`(K, features)`, within the bounds."""
        if self.bounds is None:
            return self.raw
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(self.raw)

    def forward(self, context: Tensor | None = None) -> Distribution:
        u = self.pseudo_inputs
        if context is None:
            components = self.posterior(u)
        else:
            each = u.expand(*context.shape[:-1], *u.shape)
            components = condition(self.posterior, each, context=context.unsqueeze(-2))
        logits = u.new_zeros(len(u))
        if isinstance(components, Independent) and len(components.event_shape) == 1:
            normals = components.base_dist
            if isinstance(normals, torch.distributions.Normal):
                return NormalMixture(logits, normals.loc, normals.scale)
        weights = dist.Categorical(logits=logits.expand(components.batch_shape))
        return dist.MixtureSameFamily(weights, components)


def _check_each(name: str, value: Tensor, good: Tensor, what: str) -> None:
    """Raise `ConfigError` unless all elements are good, naming one that is not."""
    if not good.all():
        raise ConfigError(f"{name} must be {what}, got {value[~good][0].item():g}")


def _floating(name: str, value: Any) -> Tensor:
    """A tensor of real numbers, in the default precision what is none yet.

    Raises:
        ConfigError: the value is no array of numbers.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} must be an array of numbers, got {value!r}") from error


def _pseudo_inputs(number: int, start: Tensor, noise: float, seed: int) -> Tensor:
    """Where a `VampPrior` starts: rows of the data, or noise around their mean."""
    generator = torch.Generator().manual_seed(seed)
    if start.dim() == 0:
        raise ShapeError("pseudo-inputs start at data (N, features) or their mean (features,)")
    if start.dim() == 1:
        jitter = torch.randn(
            (number, len(start)), generator=generator, dtype=start.dtype, device="cpu"
        )
        return start + noise * jitter.to(start.device)
    if number > len(start):
        raise ConfigError(f"{number} pseudo-inputs cannot start at {len(start)} rows of data")
    rows = torch.randperm(len(start), generator=generator, device="cpu")[:number]
    return start[rows.to(start.device)]


class Flow(nn.Module):
    """A normalising flow: a learned invertible map of N(0, I) (Rezende & Mohamed 2015).

    Takes any flow of zuko, e.g. `Flow(zuko.flows.NAF(latent))`. Training evaluates log p(z) at the
    guide's draws and generating inverts the map, so coupling flows, which do both in one pass, suit
    best: `Flow.spline` makes one. There is no analytic KL: the `ELBO` takes the Monte Carlo one.

    zuko and not Pyro's own transforms: one constructor makes any flow with or without a context,
    where Pyro has another class for each, and three spline couplings of 10 dimensions took 0.7
    times as long for the log-density of 128 draws with its gradient, and as long for a draw.

    Args:
        flow: a `zuko.lazy.Flow`, called with the context.
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    @classmethod
    def spline(
        cls,
        latent: int,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
    ) -> Flow:
        """A neural spline coupling flow (Durkan et al. 2019), the identity outside [-5, 5].

        Args:
            latent: dimension of z, at least 2 (a coupling needs two halves).
            transforms: coupling layers.
            hidden: sizes of the hidden layers of each.
            context_features: size of the context.

        Raises:
            ConfigError: `latent` is no whole number of at least 2, or `transforms` of at least 1.
        """
        at_least("latent", latent, 2)
        at_least("transforms", transforms, 1)
        zuko = _zuko()
        return cls(
            zuko.flows.NSF(
                latent,
                context_features,
                transforms=transforms,
                hidden_features=tuple(hidden),
                passes=2,
            )
        )

    def forward(self, context: Tensor | None = None) -> Distribution:
        return FlowDistribution(self.flow(context))


class FlowDistribution(TorchDistribution):
    """A zuko distribution over vectors, with the manners of Pyro's (plates, masks, expansion)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        return FlowDistribution(self.flow.expand(torch.Size(batch_shape)))

    def rsample(self, sample_shape: Any = EMPTY) -> Tensor:
        return self.flow.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow.log_prob(value)


def _zuko() -> Any:
    """zuko, whose import switches off the validation of all of torch's distributions: undone."""
    validate = torch.distributions.Distribution._validate_args
    import zuko

    torch.distributions.Distribution.set_default_validate_args(validate)
    return zuko
