"""Likelihoods of data with holes, where NaN marks what was not observed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, constraints

from pyro_vae.conditioning import condition
from pyro_vae.distributions import EMPTY
from pyro_vae.errors import DataError, SiteError
from pyro_vae.likelihoods.base import check_finite
from pyro_vae.typing import Conditional, Distribution


class Incomplete(nn.Module):
    """Another likelihood, of the observed values of a datum only: p(x_obs|z), NaN being a hole.

    Given z the values of a datum are independent, so leaving the missing ones out of the sum of
    log-densities integrates them out exactly. Under any objective the VAE then maximises a bound
    on log p(x_obs), which is the right thing where values are missing at random (Rubin 1976). With
    `pv.IWAE(K)` that bound is the one which Mattei & Frellsen 2019 (eq. 4) call MIWAE, "missing
    data IWAE"; `pv.MIWAE` is another thing, the multiply importance weighted bound of Rainforth et
    al. 2018. `log_marginal` gives log p(x_obs) as well.

    The encoder needs to see holes too: see `posteriors.Incomplete`.

        x = torch.where(observed, x, torch.nan)  # from a mask
        vae = pv.VAE(prior, likelihoods.Incomplete(likelihood), posteriors.Incomplete(posterior))
        pv.fit(vae, x, objective=pv.IWAE(20))

    A hole has no part in value or gradient: it is filled in with a stand-in of the support, and
    what that adds is taken out again.

    Args:
        likelihood: maps z, and a context if it takes one, to a distribution whose values are
            independent given z, as all of this library's are.
        allow_empty: whether a datum may have no value at all. Such a datum teaches nothing but
            that the posterior should be the prior.
    """

    def __init__(self, likelihood: Conditional, *, allow_empty: bool = False) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.allow_empty = allow_empty

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x_obs|z): draws of it, and its mean, are of whole data.

        Raises:
            SiteError: the values are not independent given z.
            ConfigError: the likelihood returned no distribution of Pyro's.
        """
        p = condition(self.likelihood, z, context=context)
        return ObservedValues(by_value(p)).to_event(len(p.event_shape))

    def check(self, x: Tensor) -> None:
        """Raise unless every value of `x`, `(N, features)`, is NaN or one the likelihood takes.

        Raises:
            DataError: a value is infinite, or a row has no value.
            SupportError: see `Likelihood.check`.
        """
        missing = x.isnan()
        if not self.allow_empty:
            check_rows(~missing)
        support = getattr(self.likelihood, "support", constraints.real)
        filled = torch.where(missing, stand_in(support, x), x)
        getattr(self.likelihood, "check", check_finite)(filled)

    def initialize(self, train_mean: Tensor) -> None:
        """See `Likelihood.initialize`; the means are those of the observed values. A likelihood
        that has no such method, as a plain function, starts where it is.

        Raises:
            DataError: a mean is NaN: a feature was never observed, or NaN were averaged.
        """
        check_finite(train_mean[None])
        getattr(self.likelihood, "initialize", lambda _: None)(train_mean)


class ObservedValues(TorchDistribution):
    """A distribution of single values at which NaN has the log-density 0: it integrates to one.

    Args:
        base: with scalar events.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, base: Distribution, validate_args: bool | None = None) -> None:
        self.base = base
        super().__init__(base.batch_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return _OrNaN(self.base.support)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ObservedValues:
        return ObservedValues(self.base.expand(batch_shape), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        filled = torch.where(missing, stand_in(self.base.support, value), value)
        return torch.where(missing, 0.0, self.base.log_prob(filled))

    @torch.no_grad()
    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        return self.base.sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self.base.mean


class _OrNaN(constraints.Constraint):
    def __init__(self, observed: constraints.Constraint) -> None:
        self.observed = observed
        self.is_discrete = observed.is_discrete
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return value.isnan() | self.observed.check(value)


def by_value(fn: Distribution) -> Distribution:
    """A distribution over data as one over their single values: `.to_event()` undone.

    Raises:
        SiteError: the values of a datum are not independent.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if fn.event_shape:
        raise SiteError(
            f"the values of a datum under {type(fn).__name__} are not independent given z (event "
            f"shape {tuple(fn.event_shape)}), so missing ones cannot be left out: give a product "
            "of distributions of single values, .to_event(1)"
        )
    return fn.base if isinstance(fn, ObservedValues) else fn


def stand_in(support: constraints.Constraint, like: Tensor) -> Tensor:
    """Values in a support, in the shape of `like`: 0 where it holds that, otherwise 1, or 1/2."""
    zero, one = torch.zeros_like(like), torch.ones_like(like)
    return torch.where(support.check(zero), zero, torch.where(support.check(one), one, 0.5 * one))


def check_rows(observed: Tensor) -> None:
    """Raise `DataError` naming the first row of `(N, ...)` without an observed value."""
    empty = ~observed.flatten(1).any(1)
    if empty.any():
        others = int(empty.sum()) - 1
        more = f" (and {others} more)" if others else ""
        raise DataError(
            f"row {int(empty.nonzero()[0])}{more} has no observed value: leave it out, or say "
            "allow_empty=True"
        )
