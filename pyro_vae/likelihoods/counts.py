"""Likelihoods of counts, from log-rates, with an offset for how much was counted."""

from __future__ import annotations

import math

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import distributions
from pyro_vae.errors import ConfigError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.real import LikelihoodScale
from pyro_vae.typing import Distribution


class Poisson(Likelihood):
    """Counts whose variance is their mean, from log-rates.

    Args:
        network: maps `(..., latent)` to `(..., features)`.
        offset: the last column of the context is added to every log-rate and not shown to the
            network, as the offset of a generalised linear model: the logarithm of the exposure. In
            single-cell data that is the log of the cell's library size, and the network's outputs
            are then log-shares of the library.
    """

    support = constraints.nonnegative_integer
    takes = "whole numbers 0, 1, 2, ..."
    advice = "Give raw counts, neither normalised nor log-transformed."

    def __init__(self, network: nn.Module | None = None, *, offset: bool = False) -> None:
        super().__init__(network)
        self.offset = offset

    def parameters_at(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], int]:
        """The network's outputs at z, the log-rates with their offset.

        Raises:
            ConfigError: an offset was promised and there is no context.
        """
        if not self.offset:
            return super().parameters_at(z, context)
        if context is None:
            raise ConfigError(
                f"{type(self).__name__}(offset=True) takes the logarithm of the exposure as the "
                "last column of the context, and there is no context"
            )
        rest = context[..., :-1] if context.shape[-1] > 1 else None
        (log_rate, *others), event_dim = super().parameters_at(z, rest)
        log_exposure = context[(..., slice(-1, None), *[None] * (event_dim - 1))]
        return (log_rate + log_exposure, *others), event_dim

    def distribution(self, *parameters: Tensor) -> Distribution:
        (log_rate,) = parameters
        return distributions.Poisson(log_rate)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        """log of the mean; with an offset, log of the mean's share of the total. A feature that is
        never counted starts at 1e-3 counts."""
        seen = mean.clamp(min=1e-3)
        return (seen / seen.sum() if self.offset else seen).log()


class NegativeBinomial(Poisson):
    """Counts of mean mu and variance mu + mu^2 / theta, from log-rates.

    Args:
        network: maps `(..., latent)` to the log-rates, `(..., features)`; with
            `concentration="predicted"` to `(..., 2 * features)`, log-rates then raw theta.
        concentration: theta, as R and scvi-tools ("inverse dispersion") define it: a positive
            number (fixed), `"learned"` (one for all), `"per_feature"` (one each), or
            `"predicted"`. Large values make a Poisson.
        min_concentration: floor of theta where it is not fixed.
        features: number of values in a datum, for `"per_feature"`; by default what the network's
            `out_features` are enough for.
        offset: see `Poisson`.

    Raises:
        ConfigError: `concentration` or `min_concentration` is not as above.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        concentration: float | str = "per_feature",
        *,
        min_concentration: float = 1e-3,
        features: int | None = None,
        offset: bool = False,
    ) -> None:
        super().__init__(network, offset=offset)
        if concentration == "predicted":
            self.outputs_per_feature += 1
        features = self._features if features is None else features
        self.concentration = LikelihoodScale(concentration, min_concentration, features)

    def distribution(self, *parameters: Tensor) -> Distribution:
        log_rate, *raw_concentration = parameters
        self.concentration.check(log_rate)
        return distributions.NegativeBinomial(log_rate, self.concentration(*raw_concentration))


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """A negative binomial, or with probability sigmoid(gate) a zero.

    E[x|z] is (1 - sigmoid(gate)) mu. The log-density is formed from the gate's logit and the
    negative binomial's log-density alone.

    Args:
        network: maps `(..., latent)` to `(..., 2 * features)`, log-rates then gate logits; with
            `concentration="predicted"` to `(..., 3 * features)`, raw theta last.
        concentration, min_concentration, features, offset: see `NegativeBinomial`.

    Raises:
        ConfigError: an argument is not as above.
    """

    outputs_per_feature = 2

    def distribution(self, *parameters: Tensor) -> Distribution:
        log_rate, gate_logits, *raw_concentration = parameters
        counts = super().distribution(log_rate, *raw_concentration)
        return dist.ZeroInflatedDistribution(counts, gate_logits=gate_logits)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        return super().bias_of_mean(mean) + math.log(2)  # a gate of logit zero halves the mean
