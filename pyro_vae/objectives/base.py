"""What every objective shares: its terms, and Pyro's protocol for losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro.infer
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae import programs
from pyro_vae.checks import at_least
from pyro_vae.distributions import stated_mean
from pyro_vae.errors import ShapeError, SiteError
from pyro_vae.objectives.remembered import Remembered
from pyro_vae.programs import Pair, Run, Site
from pyro_vae.typing import Program

Estimator = Literal["analytic", "monte_carlo", "enumerated"]


@dataclass(frozen=True)
class Terms:
    """What an objective computed: its loss, and what the loss is made of.

    Attributes:
        loss: minus the bound, to be minimised; differentiable.
        reconstruction: E_q[log p(x|z)], estimated at the draws.
        kl: E_q[log q(z|x) - log p(z)], neither weighted nor held at free bits.
        kl_per_dimension: the KL of each latent site by dimension of its event, `(latent,)`, for
            sites whose prior and posterior both factorise over dimensions (a number has one).
            That of `IWAE` and `MIWAE` carries no gradient.
        estimators: which KL estimator each latent site really used.
        means: E_q[z|x] of each reparametrised latent site whose distribution states it, a row a
            datum, `(N, dimensions)`; without gradient. (Not of a compiled objective, nor beside
            sites that are summed over.)
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_per_dimension: Mapping[str, Tensor] = field(default_factory=dict)
    estimators: Mapping[str, Estimator] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def active_units(self, threshold: float = 0.01) -> dict[str, Tensor]:
        """Which dimensions of each site in `means` vary over the data of this call by more than
        the threshold (Burda et al. 2015, app. C): booleans, `(dimensions,)`. A batch tells roughly;
        `pv.active_units` looks at a whole data set.

        Raises:
            SiteError: there are no means.
            ShapeError: a site has fewer than two data.
        """
        if not self.means:
            raise SiteError(
                "these terms carry no mean of any latent site: it has none that its distribution "
                "states (a flow, a discrete site), or the objective is compiled or sums over a "
                "site. Use pv.active_units, which averages draws"
            )
        for name, mean in self.means.items():
            if len(mean) < 2:
                raise ShapeError(f'a variance over the data needs two; site "{name}" has one')
        return {name: mean.var(0) > threshold for name, mean in self.means.items()}


class Objective(pyro.infer.ELBO):
    """Base of the objectives.

    Args:
        num_particles: draws of the latent variables per datum, taken at once in an outermost plate.
        max_plate_nesting: how many dimensions the program's own plates take; by default found by
            one extra run at the first call of each (model, guide) that needs it.

    Raises:
        ConfigError: `num_particles` is not a whole number of at least 1, or `max_plate_nesting`
            is none of at least 0.
    """

    def __init__(self, num_particles: int = 1, max_plate_nesting: float = float("inf")) -> None:
        at_least("num_particles", num_particles, 1)
        if max_plate_nesting != float("inf"):
            at_least("max_plate_nesting", max_plate_nesting, 0)
        super().__init__(num_particles=num_particles)
        self.max_plate_nesting = max_plate_nesting
        self._nesting: Remembered[int] = Remembered()

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        """Evaluate the objective once and return every term of it.

        Raises:
            SiteError: a site of the program does not allow a correct estimate.
        """
        raise NotImplementedError

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, differentiable."""
        return self.terms(model, guide, *args, **kwargs).loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, as a number."""
        with torch.no_grad():
            return self.terms(model, guide, *args, **kwargs).loss.item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, as a number; its gradient is added to the parameters' `.grad`."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _pair(
        self,
        model: Program,
        guide: Program,
        args: Sequence[Any],
        kwargs: Any,
        plates: bool | None = None,
    ) -> Pair:
        """The pair as this objective runs it.

        Args:
            plates: whether its plates have to be counted though there is one particle.
        """
        if self.num_particles == 1 and not (plates or self._needs_plates):
            return Pair(model, guide, args, kwargs)
        nesting = self.max_plate_nesting
        if nesting == float("inf"):
            nesting = self._found_nesting(model, guide, args, kwargs)
        return Pair(model, guide, args, kwargs, self.num_particles, int(nesting), self._enumerates)

    def _found_nesting(self, model: Program, guide: Program, args: Any, kwargs: Any) -> int:
        found = self._nesting.get(model, guide)
        if found is None:
            found = programs.plate_nesting(model, guide, args, kwargs)
            self._nesting.keep(model, guide, found)
        return found

    _needs_plates = False
    _enumerates = False

    def _get_trace(self, *_: Any) -> Any:
        raise TypeError("this objective runs programs itself; call terms() or loss()")


def posterior_means(run: Run, num_particles: int) -> dict[str, Tensor]:
    """`Terms.means`, averaged over the particles."""
    means: dict[str, Tensor] = {}
    if run.enumerated:
        return means
    for name, _ in run.latent:
        fn = run.guide[name]["fn"]
        if not fn.has_rsample:
            continue
        mean = stated_mean(fn)
        if mean is None:
            continue
        mean = mean.detach()
        mean = mean if num_particles == 1 else mean.mean(0)
        means[name] = mean.reshape(-1, fn.event_shape.numel())
    return means


def frozen_sites(pair: Pair, run: Run, values: Mapping[str, Tensor]) -> dict[str, Site]:
    """The guide's sites at `values` with its parameters stopped: log q of the path derivatives.

    The guide is run a second time, so it must be the same function of inputs and parameters each
    time it runs: no dropout. Where Pyro's validation is on, that is checked, up to what rounding
    does to a flow that has to be inverted.

    Raises:
        SiteError: a second run gave another q, or q's parameters still carry a gradient (a plain
            function that computes with a module unknown to Pyro).
    """
    sites = programs.frozen_sites(pair, {**run.subsamples, **values})
    if is_validation_enabled():
        constants = {name: value.detach() for name, value in values.items()}
        again = programs.frozen_sites(pair, {**run.subsamples, **constants})
        for name, site in again.items():
            log_q = programs.log_prob(site)
            if log_q.requires_grad:
                raise SiteError(
                    f'the gradient of the guide\'s parameters at site "{name}" cannot be stopped: '
                    "they belong to a module inside a plain function. Make the guide an nn.Module"
                )
            drawn = programs.log_prob(run.guide[name])
            if not torch.allclose(log_q, drawn, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise SiteError(
                    f'the guide gave another density at site "{name}" when it was run again, so '
                    "the gradient would be wrong: it must not draw anything but its sample sites "
                    "(dropout), and a flow must be inverted without much error; or use "
                    'gradient="standard"'
                )
    return sites


def check_reparametrized(run: Run) -> None:
    """Raise where the guide's draws carry no gradient though its parameters want one.

    Raises:
        SiteError: the site is not reparametrised, or is marked for enumeration and was drawn.
    """
    for name, site in run.guide.items():
        if name in run.enumerated:
            continue
        if site["infer"].get("enumerate"):
            raise SiteError(
                f'guide site "{name}" is marked for enumeration, which this objective does not '
                'sum over: use ELBO with infer={"enumerate": "parallel"}, or '
                "pyro.infer.TraceEnum_ELBO"
            )
        if site["is_observed"] or site["fn"].has_rsample or not torch.is_grad_enabled():
            continue
        if programs.log_prob(site).requires_grad:
            raise SiteError(
                f'guide site "{name}" draws from {type(site["fn"]).__name__}, which has no '
                "reparametrised sampler, so its gradient would be wrong: use a distribution with "
                'rsample, mark a discrete one infer={"enumerate": "parallel"} for ELBO, or take '
                "pyro.infer.TraceGraph_ELBO"
            )
