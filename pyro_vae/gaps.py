"""How much the guide's family costs, and how much amortizing it: the two gaps of inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor

from pyro_vae import programs
from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence.ground import prepare, undisturbed
from pyro_vae.evidence.marginal import log_marginal
from pyro_vae.evidence.target import Target
from pyro_vae.hamiltonian import is_real
from pyro_vae.programs import Site
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program

Family = Literal["diagonal", "full_rank"]
Array = np.ndarray
DRAWS_AT_ONCE = 500


@dataclass(frozen=True)
class Gaps:
    """Per datum, `(N,)` in nats: log p(x) >= L[q*] >= L[q], but for Monte Carlo error.

    Attributes:
        log_px: estimated by `log_marginal`, its standard error `log_px_se`; `flagged` where that
            is a lower bound only, and the approximation gap with it.
        local: L[q*], the ELBO of the best q of the family for this datum; `local_se`.
        elbo: L[q], the ELBO of the guide; `elbo_se`.
    """

    log_px: Array
    log_px_se: Array
    flagged: Array
    local: Array
    local_se: Array
    elbo: Array
    elbo_se: Array

    @property
    def approximation(self) -> Array:
        """log p(x) - L[q*]: what no q of the family can reach."""
        return self.log_px - self.local

    @property
    def approximation_se(self) -> Array:
        """Its Monte Carlo standard error."""
        return np.hypot(self.log_px_se, self.local_se)

    @property
    def amortization(self) -> Array:
        """L[q*] - L[q]: what the encoder loses by serving all data with one set of weights."""
        return self.local - self.elbo

    @property
    def amortization_se(self) -> Array:
        """Its Monte Carlo standard error."""
        return np.hypot(self.local_se, self.elbo_se)

    def __str__(self) -> str:
        lines = [f"mean of {len(self.log_px)} data, nats"]
        for name in ("approximation", "amortization"):
            gap, se = getattr(self, name), getattr(self, f"{name}_se")
            error = np.sqrt(np.square(se).sum()) / len(gap)
            lines.append(f"  {name} gap {gap.mean():.3f} ± {error:.2g}")
        if self.flagged.any():
            lines.append(f"  log p(x) of {self.flagged.sum()} data is a lower bound only")
        return "\n".join(lines)


def inference_gaps(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    family: Family = "diagonal",
    num_steps: int = 500,
    num_particles: int = 32,
    num_samples: int = 5000,
    seed: int = 0,
) -> Gaps:
    """The approximation and the amortization gap of every datum (Cremer et al. 2018, eqs. 4-5).

    q* is a Normal of its own for every datum, fitted to the ELBO of the model as it stands by
    Adam with path-derivative gradients, from the guide's own moments. It is the best of `family`
    only as far as the fit went; so the approximation gap is an upper bound on the true one, and
    the amortization gap a lower bound. A negative amortization gap, beyond its error, means that
    the guide's own family is richer than `family`.

    Args:
        model, guide: as in `log_marginal`; the latent sites real.
        x, args: as in `log_marginal`.
        family: "diagonal" or "full_rank" (over the event of each site).
        num_steps, num_particles: of the fit.
        num_samples: draws of a datum for each of log p(x), L[q*] and L[q].
        seed: of the draws.

    Raises:
        ConfigError: an option means nothing.
        SiteError: a latent site is not real; and as `log_marginal`.
    """
    if family not in ("diagonal", "full_rank"):
        raise ConfigError(f'family is "diagonal" or "full_rank", got {family!r}')
    at_least("num_particles", num_particles, 2)
    at_least("num_samples", num_samples, 2)
    at_least("num_steps", num_steps, 1)
    evidence = log_marginal(
        model, guide, x, *args, num_samples=num_samples, method="auto", seed=seed, progress=False
    )
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide), seeded(derive(seed, 1)):
        target = Target(model, guide, x, args)
        if target.supports:
            raise SiteError(f"the guide does not draw the latent sites {sorted(target.supports)}")
        local = _Local(target, family)
        local.fit(num_steps, num_particles)
        elbo, elbo_se = _mean(lambda k: _guide_weights(target, k), num_samples)
        best, best_se = _mean(local.log_weights, num_samples)
    return Gaps(evidence.log_px, evidence.se, evidence.flagged, best, best_se, elbo, elbo_se)


class _Local:
    """A Normal for every datum and latent site, in the coordinates of the guide's moments."""

    def __init__(self, target: Target, family: Family) -> None:
        self.target, self.family = target, family
        sites, draws = _guide_moments(target)
        self.loc, self.scale, self.shift, self.log_scale, self.below = {}, {}, {}, {}, {}
        for name, site in sites.items():
            _check_real(name, site)
            self.loc[name] = draws[name].mean(0)
            self.scale[name] = draws[name].std(0)
            self.shift[name] = torch.zeros_like(self.loc[name])
            self.log_scale[name] = torch.zeros_like(self.loc[name])
            if family == "full_rank" and len(site["fn"].event_shape) == 1:
                size = self.loc[name].shape[-1]
                self.below[name] = self.loc[name].new_zeros(*self.loc[name].shape, size)

    def parameters(self) -> list[Tensor]:
        return [p for group in (self.shift, self.log_scale, self.below) for p in group.values()]

    def distribution(self, name: str, frozen: bool) -> Any:
        """q* of one site, with its parameters as constants where `frozen`."""
        held = [p.get(name) for p in (self.shift, self.log_scale, self.below)]
        shift, log_scale, below = (p.detach() if frozen and p is not None else p for p in held)
        assert shift is not None
        assert log_scale is not None
        loc, scale = self.loc[name] + self.scale[name] * shift, self.scale[name] * log_scale.exp()
        if below is None:
            return Normal(loc, scale).to_event(self._event_dim(name))
        factor = scale.diag_embed() + self.scale[name].unsqueeze(-1) * below.tril(-1)
        return MultivariateNormal(loc, scale_tril=factor)

    def _event_dim(self, name: str) -> int:
        return self.target.event_dims[name]

    def log_weights(self, num_draws: int, path: bool = False) -> Tensor:
        """log p(x, z) - log q*(z), `(draws, rows)`; with `path`, its path derivative only."""
        draws, log_q = {}, torch.zeros(())
        for name in self.loc:
            z = self.distribution(name, frozen=False).rsample((num_draws,))
            draws[name] = z
            log_q = log_q + self.target.within(self.distribution(name, frozen=path).log_prob(z))
        return _log_joint(self.target, draws, num_draws) - log_q.double()

    @torch.enable_grad()
    def fit(self, num_steps: int, num_particles: int) -> None:
        """Climb the ELBO of every datum; none of them feels the others."""
        parameters = self.parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            loss = -self.log_weights(num_particles, path=True).mean(0).sum()
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)


def _mean(log_weights: Any, num_samples: int) -> tuple[Array, Array]:
    """Mean of the log weights of every datum, and its standard error."""
    parts = -(-num_samples // DRAWS_AT_ONCE)
    sizes = [len(part) for part in np.array_split(np.arange(num_samples), parts)]
    log_w = torch.cat([log_weights(size) for size in sizes]).cpu()
    return log_w.mean(0).numpy(), (log_w.std(0) / num_samples**0.5).numpy()


def _guide_weights(target: Target, num_draws: int) -> Tensor:
    """log p(x, z) - log q(z|x) at draws from the guide, `(draws, rows)`."""
    sites = target.pair(range(target.size), num_draws).sites_at(target.guide, {})
    log_q = sum(target.within(programs.log_prob(site)).double() for site in sites.values())
    draws = {name: site["value"] for name, site in sites.items()}
    return _log_joint(target, draws, num_draws) - log_q


def _log_joint(target: Target, draws: Mapping[str, Tensor], num_draws: int) -> Tensor:
    sites = target.pair(range(target.size), num_draws).sites_at(target.model, draws)
    return torch.as_tensor(
        sum(target.within(programs.log_prob(site)).double() for site in sites.values())
    )


def _guide_moments(target: Target) -> tuple[dict[str, Site], dict[str, Tensor]]:
    sites = target.pair(range(target.size), DRAWS_AT_ONCE).sites_at(target.guide, {})
    return sites, {name: site["value"] for name, site in sites.items()}


def _check_real(name: str, site: Site) -> None:
    if not is_real(site["fn"]):
        raise SiteError(
            f'latent site "{name}" takes values in {site["fn"].support}, and the best Normal is of '
            "real ones"
        )
