"""The evidence lower bound, with an analytic or a Monte Carlo KL."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae import programs
from pyro_vae.checks import nonnegative
from pyro_vae.errors import AnalyticKLError, ConfigError, SiteError
from pyro_vae.objectives.base import (
    Estimator,
    Objective,
    Terms,
    check_reparametrized,
    frozen_sites,
    posterior_means,
)
from pyro_vae.objectives.dimensions import dimension_first, factor, factors, monte_carlo_kl
from pyro_vae.objectives.expectation import Expectation
from pyro_vae.objectives.remembered import Remembered
from pyro_vae.programs import Pair, Run, Site
from pyro_vae.seeding import noted_generators
from pyro_vae.typing import Program


class ELBO(Objective):
    """E_q[log p(x|z)] - w KL(q(z|x) || p(z)) (Kingma & Welling 2013, eq. 3).

    The KL of a latent site is its closed form (their eq. 7), given the values of the sites its
    distributions depend on, or log q(z) - log p(z) at the draws, as in Pyro's `Trace_ELBO`: the
    Monte Carlo KL, right for any reparametrised guide. The closed form has the right expectation
    exactly when no site's prior depends on a latent that the guide draws later, which is checked
    by the order of the sites, and when model and guide carry the same scale and mask there.
    `kl="auto"` takes it at each site where one is registered and valid, and Monte Carlo at the
    others; `Terms.estimators` says which each site got. With `kl="analytic"` a site without one is
    an error, and with `kl="monte_carlo"` no site's is taken.

    A discrete guide site marked `infer={"enumerate": "parallel"}` is summed over exactly, and the
    sites after it are drawn once for each of its values (Kingma et al. 2014, eq. 7); its own KL is
    then exact as well ("enumerated"), whatever `kl` says.

    Args:
        kl: `"auto"`, `"analytic"` or `"monte_carlo"`.
        gradient: `"standard"`, or `"stl"`: "sticking the landing" drops the score of q from the
            gradient of the Monte Carlo KL. Its expectation is unchanged, and its variance goes to
            zero as q approaches the posterior (Roeder et al. 2017, eq. 7).
        kl_weight: w, the beta of Higgins et al. 2017. May be 0, and may be changed between steps
            (`objective.kl_weight = 0.3`); a tensor, so that a change never invalidates a compiled
            step.
        free_bits: lambda, in nats: each latent dimension's KL, averaged over the data of the call,
            counts as at least this much (Kingma et al. 2016, eq. 15, one group a dimension).
        num_particles, max_plate_nesting: see `Objective`.

    Raises:
        ConfigError: an argument is not as above, or `"stl"` is asked of a KL that is not
            `"monte_carlo"`.
        AnalyticKLError: at call, where `kl="analytic"` asks for what does not exist.
        SiteError: at call, where a guide site's draws carry no gradient, or where free bits are
            asked of a KL that does not split into dimensions.
    """

    def __init__(
        self,
        kl: Literal["auto", "analytic", "monte_carlo"] = "auto",
        gradient: Literal["standard", "stl"] = "standard",
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if kl not in ("analytic", "monte_carlo", "auto"):
            raise ConfigError(f'kl is "auto", "analytic" or "monte_carlo", got {kl!r}')
        if gradient not in ("standard", "stl"):
            raise ConfigError(f'gradient is "standard" or "stl", got {gradient!r}')
        if gradient == "stl" and kl != "monte_carlo":
            raise ConfigError(f'gradient="stl" is of the Monte Carlo KL, got kl={kl!r}')
        super().__init__(num_particles, max_plate_nesting)
        self._enumerated: Remembered[bool] = Remembered()  # whether a pair has marked sites
        self.kl = kl
        self.gradient = gradient
        self.free_bits = nonnegative("free_bits", free_bits)
        self._kl_weight = torch.tensor(0.0, dtype=torch.float64)
        self.kl_weight = kl_weight

    @property
    def kl_weight(self) -> Tensor:
        """The weight w of the KL term, a tensor without dimensions."""
        return self._kl_weight

    @kl_weight.setter
    def kl_weight(self, weight: float) -> None:
        self._kl_weight.fill_(nonnegative("kl_weight", weight))

    def _weight_beside(self, kl: Tensor) -> Tensor:
        """w as a factor of the KL. It moves where the KL is, to stay: a captured graph reads it
        there."""
        if self._kl_weight.device != kl.device:
            self._kl_weight = self._kl_weight.to(kl.device)
        return self._kl_weight.to(kl.dtype)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        pair, run = self._run(model, guide, args, kwargs)
        check_reparametrized(run)
        mean = Expectation(run, self.num_particles)
        if self.gradient == "stl" and torch.is_grad_enabled():
            frozen = frozen_sites(pair, run, run.values)
            run = Run(run.model, frozen, enumerated=run.enumerated)

        reconstruction = _total(run.observed, mean)
        auxiliary = _total(run.auxiliary, mean)
        sites = {name: self._site_kl(name, run, mean) for name, _ in run.latent}
        kl = sum((site.values.sum() for site in sites.values()), auxiliary)
        held = sum((self._hold(name, site, mean) for name, site in sites.items()), auxiliary)
        return Terms(
            loss=self._weight_beside(held) * held - reconstruction,
            reconstruction=reconstruction,
            kl=kl,
            kl_per_dimension={n: site.values for n, site in sites.items() if site.by_dimension},
            estimators={name: site.estimator for name, site in sites.items()},
            means=posterior_means(run, self.num_particles),
        )

    _enumerates = True

    def _run(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Pair, Run]:
        known = self._enumerated.get(model, guide)
        pair = self._pair(model, guide, args, kwargs, known)
        put_generators_back = noted_generators() if known is None else None
        run = pair.run()
        marked = any(site["infer"].get("enumerate") == "parallel" for site in run.guide.values())
        if marked is not known:
            self._enumerated.keep(model, guide, marked)
        if marked and not pair.enumerate:
            pair = self._pair(model, guide, args, kwargs, plates=True)  # values go left of them
            if put_generators_back:
                put_generators_back()
            run = pair.run()
        return pair, run

    def _site_kl(self, name: str, run: Run, mean: Expectation) -> SiteKL:
        q, p = run.guide[name], run.model[name]
        enumerated = name in run.enumerated
        if self.kl != "monte_carlo" and not enumerated:
            kl, obstacle = _analytic_kl(name, run)
            if kl is not None:
                return SiteKL(mean(p, programs.masked(p, kl)), factors(q, p), "analytic", p)
            if self.kl == "analytic":
                raise AnalyticKLError(
                    f'no analytic KL at site "{name}": {obstacle}. Ask for kl="auto" (Monte Carlo '
                    'at such sites) or kl="monte_carlo"'
                )
        estimator: Estimator = "enumerated" if enumerated else "monte_carlo"
        return SiteKL(monte_carlo_kl(q, p, mean), factors(q, p), estimator, p)

    def _hold(self, name: str, kl: SiteKL, mean: Expectation) -> Tensor:
        """The site's KL with every dimension at its free bits or above."""
        if self.free_bits == 0:
            return kl.values.sum()
        if not kl.by_dimension:
            raise SiteError(
                f'free bits are counted by dimension, and the KL at site "{name}" does not split '
                "into dimensions: its prior or posterior does not factorise over them"
            )
        shape = kl.prior["fn"].batch_shape
        num_data = mean(kl.prior, programs.masked(kl.prior, kl.values.new_ones(1, *shape)))
        return kl.values.clamp(min=self.free_bits * num_data).sum()


class SiteKL(NamedTuple):
    """The KL of one latent site: `values` by dimension, or one number where it does not split."""

    values: Tensor
    by_dimension: bool
    estimator: Estimator
    prior: Site


def _total(sites: Iterable[tuple[str, Site]], mean: Expectation) -> Tensor:
    totals = (mean(site, programs.log_prob(site).unsqueeze(0)).squeeze(0) for _, site in sites)
    return torch.as_tensor(sum(totals))


def _analytic_kl(name: str, run: Run) -> tuple[Tensor | None, str]:
    """KL(q || p) of a site, `(event or 1, *batch)`; or None, and what stands in the way."""
    q, p = run.guide[name], run.model[name]
    earlier_in_model = _before(name, [n for n, _ in run.latent])
    drawn_later = earlier_in_model - _before(name, list(run.guide))
    if drawn_later:
        return None, (
            f"its prior may depend on {sorted(drawn_later)}, which the guide draws later, "
            "so the closed form would have the wrong expectation"
        )
    if not programs.same_scale(q, p):
        return None, "model and guide carry different scales or masks there"
    q_fn, p_fn = q["fn"], p["fn"]
    if factors(q, p):
        q_fn, p_fn = factor(q_fn), factor(p_fn)
    if isinstance(q_fn, Delta):
        return None, "the guide's distribution is a Delta, whose log-density is exact as it is"
    try:
        kl = kl_divergence(q_fn, p_fn)
    except NotImplementedError:
        names = f"{type(q_fn).__name__}, {type(p_fn).__name__}"
        return None, f"no closed form is registered for ({names})"
    return dimension_first(kl, q, factors(q, p)), ""


def _before(name: str, order: list[str]) -> set[str]:
    return set(order[: order.index(name)])
