"""How much the guide's family costs, and how much amortizing it: the two gaps of inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence.draws import Draws
from pyro_vae.evidence.ground import CHUNK_BYTES, prepare, undisturbed
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.marginal import log_marginal
from pyro_vae.evidence.pushforward import noise, push, streams
from pyro_vae.evidence.target import Target
from pyro_vae.hamiltonian import is_real
from pyro_vae.seeding import derive, generators_put_back
from pyro_vae.typing import Program

Family = Literal["diagonal", "full_rank"]
Array = np.ndarray
DRAWS_AT_ONCE = 500
MOMENTS, FIT, EVALUATION = 1, 2, 3  # keys of a row's streams


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
    chunk_bytes: int = CHUNK_BYTES,
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
        seed: of the draws, which depend on it and on a datum's row alone.
        chunk_bytes: budget for the intermediate results of one call of the model. Rows and draws
            are divided to keep it, which changes no more than rounding.

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
        model, guide, x, *args, num_samples=num_samples, method="auto", seed=seed,
        chunk_bytes=chunk_bytes, progress=False,
    )  # fmt: skip
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide):
        target = Target(model, guide, x, args)
        if target.supports:
            raise SiteError(f"the guide does not draw the latent sites {sorted(target.supports)}")
        _check_real(target)
        sampler = Sampler(target, num_samples, derive(seed, 1), chunk_bytes, Proposal(share=0.0))
        # a gradient keeps about four times what one evaluation holds
        pairs = chunk_bytes // (4 * target.bytes_per_pair)
        step = max(1, min(pairs // num_particles, len(sampler.chunks()[0])))
        parts = []
        for start in range(0, target.size, step):
            rows = range(start, min(start + step, target.size))
            local = _Local(sampler, rows, family)
            local.fit(num_steps, num_particles)
            parts.append((*_mean(local.log_weights()), *_mean(sampler.weights(rows).log_w)))
    bounds = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Gaps(evidence.log_px, evidence.se, evidence.flagged, *bounds)


class _Local:
    """A Normal for each of some rows and every latent site, in the coordinates of the guide's
    moments. What it draws depends on the seed and the row alone."""

    def __init__(self, sampler: Sampler, rows: range, family: Family) -> None:
        self.sampler, self.target, self.rows, self.family = sampler, sampler.target, rows, family
        draws = _guide_draws(sampler, rows)
        self.loc = {name: z.mean(0) for name, z in draws.items()}
        self.scale = {name: z.std(0) for name, z in draws.items()}
        self.shift = {name: torch.zeros_like(loc) for name, loc in self.loc.items()}
        self.log_scale = {name: torch.zeros_like(loc) for name, loc in self.loc.items()}
        self.below = {
            name: loc.new_zeros(*loc.shape, loc.shape[-1])
            for name, loc in self.loc.items()
            if family == "full_rank" and self.target.event_dims[name] == 1
        }

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
            return Normal(loc, scale).to_event(self.target.event_dims[name])
        factor = scale.diag_embed() + self.scale[name].unsqueeze(-1) * below.tril(-1)
        return MultivariateNormal(loc, scale_tril=factor)

    def draw(self, num_draws: int, streams: list[torch.Generator], path: bool = False) -> Draws:
        """Draws of q* with log q*(z); with `path`, the path derivative of it only."""
        values, log_q = {}, torch.zeros(())
        for name, loc in self.loc.items():
            shape = torch.Size((num_draws, *loc.shape))
            u = noise(shape, self.target.axis(name), streams, loc.dtype)
            z, _ = push(self.distribution(name, frozen=False), u)
            values[name] = z
            log_q = log_q + self.target.within(self.distribution(name, frozen=path).log_prob(z))
        return Draws(values, log_q, None)

    @torch.enable_grad()
    def fit(self, num_steps: int, num_particles: int) -> None:
        """Climb the ELBO of every datum; none of them feels the others."""
        parameters, fresh = self.parameters(), self._streams(FIT)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            draws = self.draw(num_particles, fresh, path=True)
            log_w = self.target.log_joint(self.rows, draws.values) - draws.log_q
            gradients = torch.autograd.grad(-log_w.mean(0).sum(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def log_weights(self) -> Tensor:
        """log p(x, z) - log q*(z) at the sampler's number of draws from q*, `(rows, draws)`."""
        parts, fresh = [], self._streams(EVALUATION)
        for start in range(0, self.sampler.num_samples, DRAWS_AT_ONCE):
            number = min(DRAWS_AT_ONCE, self.sampler.num_samples - start)
            draws = self.draw(number, fresh)
            parts.append(self.sampler.log_joint(self.rows, draws) - draws.log_q)
        return torch.cat(parts).T

    def _streams(self, key: int) -> list[torch.Generator]:
        seeds = self.target.seeds(self.rows, self.sampler.seed, key)
        return streams(seeds, self.target.arguments[0].device)


def _mean(log_w: Tensor) -> tuple[Array, Array]:
    """Mean of the log weights `(rows, draws)` of every datum, and its standard error."""
    log_w = log_w.cpu()
    return log_w.mean(1).numpy(), (log_w.std(1) / log_w.shape[1] ** 0.5).numpy()


def _guide_draws(sampler: Sampler, rows: range) -> dict[str, Tensor]:
    """Draws of every latent site from the guide, to take its moments from."""
    target = sampler.target
    seeds = target.seeds(rows, sampler.seed, MOMENTS)
    ones = torch.ones(DRAWS_AT_ONCE, device=target.arguments[0].device)
    return sampler.guide.draw(rows, DRAWS_AT_ONCE, seeds, ones, 1.0).values


def _check_real(target: Target) -> None:
    with generators_put_back():
        sites = target.pair(range(1), 1).sites_at(target.guide, {})
    for name, site in sites.items():
        if not is_real(site["fn"]):
            raise SiteError(
                f'latent site "{name}" takes values in {site["fn"].support}, and the best Normal '
                "is of real ones"
            )
