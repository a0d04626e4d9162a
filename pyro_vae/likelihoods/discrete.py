"""Likelihoods of values from a finite set: numbers of successes, categories, grey levels."""

from __future__ import annotations

from typing import Unpack

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import distributions
from pyro_vae.checks import at_least
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.real import LocationScale, ScaleOptions
from pyro_vae.typing import Distribution


class Binomial(Likelihood):
    """Numbers of successes in `total_count` trials, from logits.

    With `total_count=255` the grey levels of an image as integers.

    Args:
        network: maps `(..., latent)` to logits, `(..., features)`.
        total_count: trials, the same for every value of a datum.

    Raises:
        ConfigError: `total_count` is not a whole number of at least 1.
    """

    advice = "Raise total_count, or multiply data in [0, 1] by it and round."

    def __init__(self, network: nn.Module | None = None, total_count: int = 1) -> None:
        super().__init__(network)
        at_least("total_count", total_count, 1)
        self.total_count = total_count
        self.support = constraints.integer_interval(0, total_count)
        self.takes = f"whole numbers from 0 to {total_count}"

    def distribution(self, *parameters: Tensor) -> Distribution:
        (logits,) = parameters
        return dist.Binomial(self.total_count, logits=logits)

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        return torch.logit(mean / self.total_count, eps=1e-3)


class Categorical(Likelihood):
    """Categories, coded 0, 1, ..., from one logit each.

    E[x|z], the `.mean` of the distribution, is that of the code: a picture for ordered codes, of no
    meaning for unordered ones, whose probabilities are in `.probs` of the base distribution.

    Args:
        network: maps `(..., latent)` to `(..., num_categories * features)` logits, the first
            category of all features first.
        num_categories: at least 2, the same for every value of a datum (see `Columns` otherwise).

    Raises:
        ConfigError: `num_categories` is not a whole number of at least 2.
    """

    advice = "Code the categories 0, 1, ..., or raise num_categories."

    def __init__(self, network: nn.Module | None = None, num_categories: int = 2) -> None:
        super().__init__(network)
        at_least("num_categories", num_categories, 2)
        self.outputs_per_feature = num_categories
        self.support = constraints.integer_interval(0, num_categories - 1)
        self.takes = f"the codes 0 to {num_categories - 1}"

    def distribution(self, *parameters: Tensor) -> Distribution:
        return distributions.Categorical(logits=torch.stack(parameters, dim=-1))


class DiscretizedLogistic(LocationScale):
    """Grey levels as probabilities, not densities: a logistic rounded to the levels 0,
    1/(levels - 1), ..., 1, as `distributions.DiscretizedLogistic` defines their edges.

    Data are levels divided by the highest, the scale on which the other likelihoods of images take
    them; log p(x|z) is of the level, in nats, and never positive. Bits per dimension are
    `-log p / (features log 2)`.

    Args:
        network, scale: see `LocationScale`; the scale of the logistic, on the scale where the
            levels span [0, 1]. Starts at 0.1.
        levels: at least 2.
        options: `min_scale`, `mean_activation`, `features`: see `LocationScale`.

    Raises:
        ConfigError: an argument is not as above.
    """

    advice = "Divide 8-bit grey values by 255, and do not blur or dequantize them."
    initial_scale = 0.1

    def __init__(
        self,
        network: nn.Module | None = None,
        scale: float | str = "learned",
        *,
        levels: int = 256,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(network, scale, **options)
        at_least("levels", levels, 2)
        self.levels = levels
        self.support = distributions.Levels(levels)
        self.takes = f"the {levels} levels k/{levels - 1}"

    def family(self, location: Tensor, scale: Tensor) -> Distribution:
        return distributions.DiscretizedLogistic(location, scale, self.levels)
