"""Likelihoods of real numbers: a location from the network, and a scale in one of four forms."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TypedDict, Unpack

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_vae.checks import at_least, positive
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.typing import Distribution


class LikelihoodScale(nn.Module):
    """A positive parameter of a likelihood (scale, dispersion) in one of four forms.

    Args:
        form: a positive number (fixed, and taken as it is), `"learned"` (one for all),
            `"per_feature"` (one each), or `"predicted"` (by the network, for each datum and value).
        floor: of every form that is not fixed: the value is `floor + softplus(raw)`. It bounds the
            likelihood, which otherwise grows without limit as a scale falls to zero.
        features: number of values in a datum, for `"per_feature"`.
        initial: where a learned value starts, and the predicted one for a raw output of zero.

    Raises:
        ConfigError: an argument is not as above.
    """

    fixed: Tensor

    def __init__(
        self,
        form: float | str,
        floor: float,
        features: int | None = None,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        number = isinstance(form, Real) and not isinstance(form, bool)
        self.form: float | str = float(form) if number else form
        self.floor = floor
        if not 0 < floor < initial:
            raise ConfigError(f"the floor must lie between 0 and {initial}, got {floor}")
        start = torch.tensor(initial - floor).expm1().log()  # softplus(start) = initial - floor
        if form == "learned":
            self.raw = nn.Parameter(start)
        elif form == "per_feature":
            if features is None:
                raise ConfigError('"per_feature" needs features=, the number of values in a datum')
            at_least("features", features, 1)
            self.raw = nn.Parameter(start.repeat(features))
        elif form == "predicted":
            self.start = start.item()
        elif isinstance(self.form, float) and 0 < self.form < float("inf"):
            self.register_buffer("fixed", torch.tensor(self.form))
        else:
            raise ConfigError(
                'a scale is a positive number, "learned", "per_feature" or "predicted", '
                f"got {form!r}"
            )

    def forward(self, raw: Tensor | None = None) -> Tensor:
        """Values that broadcast with a datum; `raw` is the network's output where predicted."""
        if isinstance(self.form, float):
            return self.fixed
        return self.floor + softplus(self.raw if raw is None else self.start + raw)

    def check(self, values: Tensor) -> None:
        """Raise `ShapeError` where there is one a feature, and not one for each of these values."""
        if self.form == "per_feature" and values.shape[-1:] != self.raw.shape:
            raise ShapeError(
                f'"per_feature" was given features={len(self.raw)}, but the network gives '
                f"{values.shape[-1]} values"
            )


class ScaleOptions(TypedDict, total=False):
    """What every `LocationScale` takes besides its network and scale."""

    min_scale: float
    mean_activation: Callable[[Tensor], Tensor] | None
    features: int | None


class LocationScale(Likelihood):
    """Base of the likelihoods with a location and a scale.

    Args:
        network: maps `(..., latent)` to the locations, `(..., features)`; with
            `scale="predicted"` to `(..., 2 * features)`, locations then raw scales.
        scale: a positive number (fixed), `"learned"` (one for all), `"per_feature"` (one each),
            or `"predicted"` (by the network, for each datum and value).
        min_scale: floor of every scale that is not fixed: `scale = min_scale + softplus(raw)`.
        mean_activation: applied to the network's locations, e.g. `torch.sigmoid` for data in
            [0, 1].
        features: number of values in a datum, for `"per_feature"`; by default the network's
            `out_features`.

    Raises:
        ConfigError: `scale` or `min_scale` is not as above.
    """

    support: constraints.Constraint = constraints.real
    takes = "real numbers"
    initial_scale = 1.0

    def __init__(
        self,
        network: nn.Module | None = None,
        scale: float | str = "learned",
        *,
        min_scale: float = 1e-3,
        mean_activation: Callable[[Tensor], Tensor] | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__(network)
        self.outputs_per_feature = 2 if scale == "predicted" else 1
        features = self._features if features is None else features
        self.scale = LikelihoodScale(scale, min_scale, features, self.initial_scale)
        self.mean_activation = mean_activation

    def distribution(self, *parameters: Tensor) -> Distribution:
        raw_location, *raw_scale = parameters
        activation = self.mean_activation
        location = raw_location if activation is None else activation(raw_location)
        self.scale.check(location)
        return self.family(location, self.scale(*raw_scale))

    def family(self, location: Tensor, scale: Tensor) -> Distribution:
        """The distribution with this location and scale."""
        raise NotImplementedError

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        if self.mean_activation is None:
            return mean
        if self.mean_activation is torch.sigmoid:
            return torch.logit(mean, eps=1e-3)
        return torch.zeros_like(mean)


class Normal(LocationScale):
    """Real data with Gaussian noise (arguments: see `LocationScale`)."""

    def family(self, location: Tensor, scale: Tensor) -> Distribution:
        return dist.Normal(location, scale)


class Laplace(LocationScale):
    """Real data with double-exponential noise, whose log-density is the absolute error; `scale` is
    the mean absolute deviation (arguments: see `LocationScale`)."""

    def family(self, location: Tensor, scale: Tensor) -> Distribution:
        return dist.Laplace(location, scale)


class StudentT(LocationScale):
    """Real data with heavy-tailed noise, for outliers.

    Args:
        network, scale: see `LocationScale`.
        df: degrees of freedom, above 1 so that E[x|z] exists.
        options: `min_scale`, `mean_activation`, `features`: see `LocationScale`.

    Raises:
        ConfigError: an argument is not as above.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        scale: float | str = "learned",
        *,
        df: float = 4.0,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(network, scale, **options)
        self.df = positive("df", df)
        if self.df <= 1:
            raise ConfigError(f"df must be finite and above 1, got {df!r}")

    def family(self, location: Tensor, scale: Tensor) -> Distribution:
        return dist.StudentT(location.new_tensor(self.df), location, scale)
