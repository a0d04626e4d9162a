"""Bounds from several importance weights a datum: IWAE, MIWAE, and their gradient estimators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae import programs
from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.objectives.base import (
    Objective,
    Terms,
    check_reparametrized,
    frozen_sites,
    posterior_means,
)
from pyro_vae.objectives.dimensions import factors, monte_carlo_kl
from pyro_vae.objectives.expectation import Expectation
from pyro_vae.programs import Pair, Run
from pyro_vae.typing import Program


class MIWAE(Objective):
    """Mean over M of log (1/K) sum_k p(x, z_mk) / q(z_mk|x), per datum (Rainforth et al. 2018).

    The K weights of a datum are averaged within the plates that all sites share, so that the bound
    is as tight as K weights a datum make it. The scale of a subsampled plate multiplies the
    logarithm (it does not enter the weights), so the bound of a subsample is unbiased for that of
    the whole data.

    Args:
        num_particles: K, the weights in each logarithm.
        num_estimates: M, the logarithms that are averaged; M = 1 is the IWAE, K = 1 the ELBO.
        gradient: `"standard"` is the gradient of the bound as it stands (Burda et al. 2015, eq.
            13). `"dreg"` is doubly reparametrised (Tucker et al. 2018, eq. 8): the same
            expectation, and a signal-to-noise ratio that grows with K. `"stl"` drops the score of
            q (Roeder et al. 2017): small variance, but **biased** for K > 1.
        max_plate_nesting: see `Objective`.

    Raises:
        ConfigError: an argument is not as above; or, at call, `max_plate_nesting` is too small.
        SiteError: at call, where the sites of one datum carry different scales, or a plate is
            subsampled that not all sites are in.
    """

    _needs_plates = True

    def __init__(
        self,
        num_particles: int,
        num_estimates: int,
        gradient: Literal["standard", "stl", "dreg"] = "standard",
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if gradient not in ("standard", "stl", "dreg"):
            raise ConfigError(f'gradient is "standard", "stl" or "dreg", got {gradient!r}')
        at_least("num_particles", num_particles, 1)
        at_least("num_estimates", num_estimates, 1)
        super().__init__(num_particles * num_estimates, max_plate_nesting)
        self.num_estimates = num_estimates
        self.gradient = gradient

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        pair = self._pair(model, guide, args, kwargs)
        gradient = self.gradient if torch.is_grad_enabled() else "standard"
        run = pair.run(leaves=gradient == "dreg")
        check_reparametrized(run)
        draws, leaves = run.values, run.leaves
        if gradient != "standard":
            run = Run(run.model, frozen_sites(pair, run, leaves or draws))

        weights = LogWeights.of(run, pair)
        log_w = weights.log_w.unflatten(0, (self.num_estimates, -1))
        mean_w = _without_negligible(log_w).logsumexp(1) - math.log(log_w.shape[1])
        bound = weights.total(mean_w.mean(0))
        loss = -bound
        if gradient == "dreg":
            loss = _with_gradient_of(loss, -self._dreg(log_w, weights, leaves, draws))
        reconstruction = weights.total(weights.reconstruction.mean(0))
        kl = weights.total((weights.reconstruction - weights.log_w).mean(0))
        return Terms(
            loss,
            reconstruction,
            kl,
            kl_per_dimension=self._kl_per_dimension(run),
            estimators={name: "monte_carlo" for name, _ in run.latent},
            means=posterior_means(run, self.num_particles),
        )

    @torch.no_grad()
    def _kl_per_dimension(self, run: Run) -> dict[str, Tensor]:
        """As that of the ELBO; the loss is not made of it, so it carries no gradient."""
        mean = Expectation(run, self.num_particles)
        sites = [(name, run.guide[name], p) for name, p in run.latent]
        return {name: monte_carlo_kl(q, p, mean) for name, q, p in sites if factors(q, p)}

    def _dreg(
        self,
        log_w: Tensor,
        weights: LogWeights,
        leaves: Mapping[str, Tensor],
        draws: Mapping[str, Tensor],
    ) -> Tensor:
        """A function whose gradient is the estimator: sum_k w_k d log w_k / d theta for the model,
        sum_k w_k^2 d log w_k / dz dz / d phi for the guide, w_k the normalised weights."""
        w = _without_negligible(log_w.detach()).softmax(1)
        squared_w = _squared(w)
        model_part = weights.total((w * log_w).sum(1).mean(0))
        squared = weights.total((squared_w * log_w).sum(1).mean(0))
        sites = [name for name in leaves if leaves[name].requires_grad]
        if not sites:
            return model_part
        slopes = torch.autograd.grad(
            squared, [leaves[name] for name in sites], retain_graph=True, allow_unused=True
        )
        guide_part = sum(
            (slope * draws[name]).sum()
            for name, slope in zip(sites, slopes, strict=True)
            if slope is not None
        )
        return model_part + guide_part


class IWAE(MIWAE):
    """log (1/K) sum_k p(x, z_k) / q(z_k|x), per datum (Burda et al. 2015, eq. 8).

    Args:
        num_particles: K.
        gradient, max_plate_nesting: see `MIWAE`.
    """

    def __init__(
        self,
        num_particles: int,
        gradient: Literal["standard", "stl", "dreg"] = "standard",
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_particles, 1, gradient, max_plate_nesting)


class LogWeights:
    """The log importance weights of every datum, and the scale its bound carries.

    Attributes:
        log_w: log p(x, z_k) - log q(z_k|x), `(particles, *data)`.
        reconstruction: log p(x|z_k), `(particles, *data)`.
    """

    def __init__(self, log_w: Tensor, reconstruction: Tensor, scale: Any) -> None:
        self.log_w = log_w
        self.reconstruction = reconstruction
        self.scale = scale

    @classmethod
    def of(cls, run: Run, pair: Pair) -> LogWeights:
        """The weights of a run; all sites must agree on the scale of a datum."""
        sites = [*run.model.items(), *run.guide.items()]
        _check_nesting(sites, pair.nesting)
        plates = programs.shared_plates([site for _, site in sites])
        scale = _scale_of_a_datum(_common_scale(sites, plates), plates, pair.nesting)

        def within(site: programs.Site) -> Tensor:
            return programs.sum_within(programs.log_prob(site), plates, pair.nesting)

        log_joint, log_q, reconstruction = (
            sum(map(within, group), torch.zeros(()))
            for group in (run.model.values(), run.guide.values(), (s for _, s in run.observed))
        )
        return cls(log_joint - log_q, reconstruction, scale)

    def total(self, per_datum: Tensor) -> Tensor:
        """Scaled sum over the data."""
        return (self.scale * per_datum).sum()


def _without_negligible(log_w: Tensor) -> Tensor:
    """`(estimates, particles, *data)`, -inf where a weight is nothing beside its datum's largest.

    Its part of the gradient would be lost in rounding; but times the gradients of the networks it
    makes denormal numbers, with which many processors take a hundred times as long.
    """
    found = log_w.detach()
    least = found.amax(1, keepdim=True) + math.log(_negligible(log_w))
    return log_w.masked_fill(found < least, -math.inf)


def _squared(w: Tensor) -> Tensor:
    """w^2, 0 where that is nothing beside its datum's largest; what is not finite stays so."""
    least = w.amax(1, keepdim=True) * _negligible(w) ** 0.5
    return w.masked_fill(w < least, 0.0).square()


def _negligible(values: Tensor) -> float:
    """A ratio that is nothing: times a factor of 1 / eps^2 it would still be lost in rounding."""
    return torch.finfo(values.dtype).eps ** 3


def _check_nesting(sites: list[tuple[str, programs.Site]], nesting: int) -> None:
    for name, site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name != programs.PARTICLES and -frame.dim > nesting:
                raise ConfigError(
                    f'plate "{frame.name}" at site "{name}" is in dimension {frame.dim}, beyond '
                    f"max_plate_nesting={nesting}: give more, or none to have it found"
                )


def _common_scale(sites: list[tuple[str, programs.Site]], plates: list[int]) -> Any:
    """The scale of a datum: one for all its sites, and none from a plate inside the weights."""
    for name, site in sites:
        for frame in site["cond_indep_stack"]:
            subsampled = frame.full_size is not None and frame.full_size != frame.size
            if subsampled and frame.dim not in plates:
                raise SiteError(
                    f'plate "{frame.name}" at site "{name}" is subsampled but does not hold all '
                    "sites (a latent variable is global), so its scale would enter the importance "
                    "weights: use ELBO, or run on the full data"
                )
    first_name, first = sites[0]
    for name, site in sites:
        if not programs.equal(site["scale"], first["scale"]):
            raise SiteError(
                f'sites "{first_name}" and "{name}" carry different scales, so the importance '
                "weights of a datum mean nothing: scale all sites alike, or use ELBO"
            )
    return first["scale"]


def _scale_of_a_datum(scale: Any, plates: list[int], nesting: int) -> Any:
    """A scale in the dimensions of the data alone, as the weights are."""
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return scale
    shape = (1,) * (nesting - scale.dim()) + tuple(scale.shape)
    inner = [dim for dim in range(-len(shape), 0) if dim not in plates]
    if any(shape[dim] != 1 for dim in inner):
        raise SiteError(
            f"the scale, of shape {tuple(scale.shape)}, differs within a datum, so it would enter "
            "its importance weight: give one for each datum, or use ELBO"
        )
    return scale.reshape([shape[dim] for dim in plates])


def _with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` as a number, with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()
