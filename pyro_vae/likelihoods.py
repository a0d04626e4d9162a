"""p(x|z): modules that map latent vectors to a distribution over data, the decoder inside.

Contract: `forward(z, context=None) -> Distribution` with batch shape `z.shape[:-1]` and the datum's
event shape. A likelihood owns its network and how the network's outputs become parameters.
`support` says which data it takes, `check` refuses the rest by value and row, and
`outputs_per_feature` says how many network outputs it needs for one value of a datum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_vae.errors import ConfigError, DataError, SupportError
from pyro_vae.networks import concatenate
from pyro_vae.typing import Distribution


class Likelihood(nn.Module):
    """Base: runs the network and splits its outputs into the parameters of `distribution`.

    Args:
        network: maps `(..., latent)` to `(..., outputs_per_feature * features)`; the first
            `features` outputs are the first parameter, the next the second, and so on.
    """

    support: ClassVar[constraints.Constraint]
    outputs_per_feature: int = 1
    advice: ClassVar[str] = ""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        outputs = self.network(concatenate(z, context))
        event_dim = outputs.dim() - z.dim() + 1
        parameters = outputs.chunk(self.outputs_per_feature, dim=-event_dim)
        return self.distribution(*parameters).to_event(event_dim)

    def distribution(self, *parameters: Tensor) -> Distribution:
        """The distribution of every value of a datum, given the network's outputs for it."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise unless every value of `x`, a datum a row, is finite and in the support.

        Raises:
            DataError: a value is NaN or infinite; the message names value and place.
            SupportError: a value is outside the support; the message adds what to do.
        """
        check_finite(x)
        self._refuse(x, ~self.support.check(x))

    def _refuse(self, x: Tensor, outside: Tensor) -> None:
        if outside.any():
            raise SupportError(
                f"{type(self).__name__} takes {describe(self.support)}, but {first(outside, x)}. "
                f"{self.advice}".rstrip()
            )

    def initialize(self, train_mean: Tensor) -> None:
        """Set the network's output bias so that training starts at E[x|z] = the data's mean.

        Does nothing where the network exposes no `set_output_bias`.
        """
        set_output_bias = getattr(self.network, "set_output_bias", None)
        if set_output_bias is not None:
            set_output_bias(self.bias_of_mean(train_mean))

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        """The value of the first network output at which the distribution has this mean."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Binary data, from logits. No probability is clamped: log p(x|z) is exact in the logits."""

    support = constraints.boolean
    advice = (
        'Binarize the data (binarize="dynamic", "fixed" or "threshold"), '
        "or use the continuous Bernoulli for grey values in [0, 1]."
    )

    def distribution(self, *parameters: Tensor) -> Distribution:
        (logits,) = parameters
        return dist.Bernoulli(logits=logits)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        # a pixel that is always 0 would ask for minus infinity; 1e-3 is one stray count in 1000
        return torch.logit(mean, eps=1e-3)


class Normal(Likelihood):
    """Real data with Gaussian noise whose scale takes one of four forms.

    Args:
        network: maps `(..., latent)` to the means, `(..., features)`; with `scale="predicted"`
            to `(..., 2 * features)`, means then raw scales.
        scale: a positive number (fixed), `"learned"` (one for all), `"per_feature"` (one each),
            or `"predicted"` (by the network, for each datum and value).
        min_scale: floor of every scale that is not fixed: `scale = min_scale + softplus(raw)`. It
            bounds the likelihood, which otherwise grows without limit as a scale falls to zero.
        mean_activation: applied to the network's means, e.g. `torch.sigmoid` for data in [0, 1].
        features: number of values in a datum, for `"per_feature"`; by default the network's
            `out_features`.

    Raises:
        ConfigError: `scale` or `min_scale` is not as above.
    """

    support = constraints.real

    def __init__(
        self,
        network: nn.Module,
        scale: float | str = "learned",
        *,
        min_scale: float = 1e-3,
        mean_activation: Callable[[Tensor], Tensor] | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__(network)
        self.scale = LikelihoodScale(scale, min_scale, features, network)
        self.outputs_per_feature = 2 if scale == "predicted" else 1
        self.mean_activation = mean_activation

    def distribution(self, *parameters: Tensor) -> Distribution:
        raw_mean, *raw_scale = parameters
        mean = raw_mean if self.mean_activation is None else self.mean_activation(raw_mean)
        return dist.Normal(mean, self.scale(mean, *raw_scale))

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        if self.mean_activation is None:
            return mean
        if self.mean_activation is torch.sigmoid:
            return torch.logit(mean, eps=1e-3)
        return torch.zeros_like(mean)


class LikelihoodScale(nn.Module):
    """The scale of a location-scale likelihood in its four forms (see `Normal`).

    A scale that is learned starts at 1.
    """

    fixed: Tensor

    def __init__(
        self, form: float | str, floor: float, features: int | None, network: nn.Module
    ) -> None:
        super().__init__()
        self.form, self.floor = form, floor
        if floor <= 0:
            raise ConfigError(f"min_scale must be positive, got {floor}")
        unit = torch.tensor(1.0 - floor).expm1().log()  # softplus(unit) = 1 - floor
        if form == "learned":
            self.raw = nn.Parameter(unit)
        elif form == "per_feature":
            features = features or getattr(network, "out_features", None)
            if features is None:
                raise ConfigError('scale="per_feature" needs features=, the values in a datum')
            self.raw = nn.Parameter(unit.repeat(features))
        elif isinstance(form, int | float) and form > 0:
            self.register_buffer("fixed", torch.tensor(float(form)))
        elif form != "predicted":
            raise ConfigError(
                f'scale is a positive number, "learned", "per_feature" or "predicted", got {form!r}'
            )

    def forward(self, mean: Tensor, raw: Tensor | None = None) -> Tensor:
        """Scales that broadcast with `mean`; `raw` is the network's output where predicted."""
        if isinstance(self.form, int | float):
            return self.fixed
        return self.floor + softplus(self.raw if raw is None else raw)


def check_finite(x: Tensor) -> None:
    """Raise `DataError` naming the first NaN or infinity in `x` and its place."""
    bad = ~torch.isfinite(x)
    if bad.any():
        raise DataError(f"data must be finite, but {first(bad, x)}")


def first(bad: Tensor, x: Tensor) -> str:
    """The first value of `x` where `bad` holds, in words: value, row and column, and how many."""
    index = tuple(int(i) for i in bad.nonzero()[0])
    place = f"row {index[0]}" + (f", column {index[1]}" if len(index) == 2 else "")
    others = int(bad.sum()) - 1
    more = f" (and {others} more)" if others else ""
    return f"x[{', '.join(map(str, index))}] = {x[index].item():g} ({place}){more}"


def describe(support: constraints.Constraint) -> str:
    """A support in words."""
    names = {constraints.boolean: "the values 0 and 1", constraints.real: "real numbers"}
    return names.get(support, f"values in {support}")
