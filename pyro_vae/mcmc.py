"""`nuts`: draws of the latent variables from p(z|x) by Pyro's No-U-Turn sampler, judged by ArviZ.

What a guide approximates, without the guide: slow, and right where R-hat says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.evidence.ground import prepare, undisturbed
from pyro_vae.evidence.sites import check_support, explained
from pyro_vae.inference_data import convergence
from pyro_vae.programs import Pair
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program


@dataclass(frozen=True)
class Chains:
    """Draws of every latent site, and what ArviZ says of them.

    Attributes:
        draws: by site, `(chains, draws, *batch, *event)`; for a `VAE` `(chains, draws, N, latent)`.
        rhat: by site, the rank-normalised split R-hat of every number (Vehtari et al. 2021).
        ess: by site, its bulk effective sample size.
        divergences: transitions whose integration failed, over all chains. Above 0 the draws
            miss part of the posterior.
    """

    draws: Mapping[str, Tensor]
    rhat: Mapping[str, np.ndarray]
    ess: Mapping[str, np.ndarray]
    divergences: int

    @property
    def worst_rhat(self) -> float:
        """The largest R-hat; below 1.01 the chains agree."""
        return max(float(values.max()) for values in self.rhat.values())

    @property
    def least_ess(self) -> float:
        """The smallest effective sample size."""
        return min(float(values.min()) for values in self.ess.values())

    def pooled(self, site: str = "z") -> Tensor:
        """The draws of a site over all chains, `(chains * draws, *batch, *event)`."""
        return self.draws[site].flatten(0, 1)


def nuts(
    model: Program,
    x: Any,
    *args: Any,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 4,
    target_accept: float = 0.8,
    seed: int = 0,
) -> Chains:
    """Sample p(z|x) of all data at once (Hoffman & Gelman 2014), each chain from the prior.

    Chains that start at draws of the prior find modes that a guide does not know of, and disagree
    (R-hat) where they cannot travel between them. The data share step sizes and trajectories, so
    give a few tens of data, not thousands; a step costs one gradient of the model.

    Parameters are constants. Modules run in evaluation mode; modes, parameter store and random
    generators are as before afterwards.

    Args:
        model: a Pyro model of `x` and `args`, whose latent sites are all continuous.
        x: data, as `log_marginal` takes them.
        num_samples, warmup_steps: of every chain.
        num_chains: at least 2, so that R-hat can be taken; they run one after the other.
        target_accept: of the adapted step size; raise it where transitions diverge.
        seed: of the draws.

    Raises:
        ConfigError: a number is too small.
        DataError, SupportError: the model does not run on `x`, or gives it no density.
        SiteError: a latent site is discrete, or there is none.
    """
    at_least("num_chains", num_chains, 2)
    at_least("num_samples", num_samples, 4)
    at_least("warmup_steps", warmup_steps, 1)
    if not 0 < target_accept < 1:
        raise ConfigError(f"target_accept lies between 0 and 1, got {target_accept}")
    x, args = prepare(model, model, x, args)
    with undisturbed(model):
        _check_sites(model, x, *args)
        runs = [
            _run(model, x, args, num_samples, warmup_steps, target_accept, derive(seed, chain))
            for chain in range(num_chains)
        ]
    draws = {name: torch.stack([run[0][name] for run in runs]) for name in runs[0][0]}
    rhat, ess = convergence({name: value.cpu().numpy() for name, value in draws.items()})
    return Chains(draws, rhat, ess, sum(run[1] for run in runs))


def _run(
    model: Program,
    x: Tensor,
    args: tuple[Any, ...],
    num_samples: int,
    warmup_steps: int,
    target_accept: float,
    seed: int,
) -> tuple[dict[str, Tensor], int]:
    """The draws of one chain, and its divergences."""
    kernel = NUTS(model, target_accept_prob=target_accept, init_strategy=init_to_sample)
    chain = MCMC(kernel, num_samples, warmup_steps, disable_progbar=True)
    with seeded(seed), torch.enable_grad():
        chain.run(x, *args)
    divergences = chain.diagnostics()["divergences"]
    draws = {name: value.detach() for name, value in chain.get_samples().items()}
    return draws, sum(len(found) for found in divergences.values())


def _check_sites(model: Program, *args: Any) -> None:
    with seeded(0), explained("model", args, 1):
        sites = Pair(model, model, args).sites_at(model, {})
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    for name in sites.keys() - latent.keys():
        plate = -max(1, len(sites[name]["fn"].batch_shape))  # the outermost
        check_support(name, sites[name], plate, range(len(args[0])))
    if not latent:
        raise SiteError("the model has no latent site to sample")
    for name, site in latent.items():
        if site["fn"].support.is_discrete:
            raise SiteError(
                f'latent site "{name}" is drawn from {type(site["fn"]).__name__}, and NUTS moves '
                "along gradients, which discrete values have none of: sum over it by log_marginal"
            )
