"""Wake-sleep: model and guide trained by two objectives, each on what the other dreams or sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae import programs
from pyro_vae.errors import SiteError
from pyro_vae.objectives.base import Objective, Terms
from pyro_vae.programs import Pair, Site
from pyro_vae.typing import Program


class WakeSleep(Objective):
    """log p(x, z) at z ~ q(z|x) for the model, log q(z|x) at (z, x) ~ p for the guide.

    The wake-sleep algorithm (Hinton et al. 1995; compared with the ELBO in Kingma & Welling 2013,
    sec. 5). Awake, the model is fitted to data completed by the guide; asleep, the guide to data
    that the model dreams. No gradient passes through a draw, so discrete latent variables will do;
    but the two phases are no gradient of one function. The guide minimises KL(p(z|x)||q(z|x)) over
    the model's data, not the KL(q||p) of a bound on the given data's.

    The model's first argument must be the data that its one observed site observes: the guide is
    given the dreamed data in its place, with the same holes (NaN) in it.

    Terms: `loss` is minus the sum of both phases; `reconstruction` and `kl` are those of the ELBO
    at the waking draws, so that `reconstruction - kl` is a bound that can be followed.

    Raises:
        SiteError: at call, the model observes not just its first argument.
    """

    def __init__(self) -> None:
        super().__init__()

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Terms:
        pair = Pair(model, guide, args, kwargs)
        with torch.no_grad():
            seen = pair.sites_at(guide, {})
        awake = pair.sites_at(model, _values(seen))
        name = _data_site(awake, args)

        with torch.no_grad():
            dream = pair.sites_at(poutine.uncondition(model), {})
        x = _with_holes_of(args[0], dream[name]["value"])
        asleep = Pair(model, guide, (x, *args[1:]), kwargs).sites_at(guide, _values(dream))

        log_joint, log_q = _total(awake), _total(asleep)
        with torch.no_grad():
            reconstruction = _total({name: awake[name]})
            kl = _total(seen) - (log_joint - reconstruction)
        latent = (n for n, site in awake.items() if not site["is_observed"])
        return Terms(
            loss=-log_joint - log_q,
            reconstruction=reconstruction,
            kl=kl,
            estimators=dict.fromkeys(latent, "monte_carlo"),
        )


def _values(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in sites.items()}


def _total(sites: Mapping[str, Site]) -> Tensor:
    """Log-densities, scaled and summed over the data."""
    logs = [
        scale_and_mask(programs.log_prob(site), site["scale"], None).sum()
        for site in sites.values()
    ]
    return torch.as_tensor(sum(logs))


def _with_holes_of(data: Tensor, dream: Tensor) -> Tensor:
    """The dream as it would have been seen: a guide of holes learns to bear them."""
    if not data.is_floating_point():
        return dream
    return torch.where(data.isnan(), torch.nan, dream)


def _data_site(sites: Mapping[str, Site], args: Any) -> str:
    observed = [name for name, site in sites.items() if site["is_observed"]]
    if len(observed) == 1 and args and isinstance(args[0], Tensor):
        value, x = sites[observed[0]]["value"], args[0]
        # the same tensor is seen without a look at its values, which NaN or a trace would spoil
        if value is x or (value.shape == x.shape and torch.equal(value, x)):
            return observed[0]
    raise SiteError(
        "wake-sleep dreams data for the guide in place of its first argument, so the model must "
        f"observe that argument and nothing else; it observes {observed}"
    )
