"""The bridge to ArviZ, version 0.23 (InferenceData) and 1.x (DataTree) alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pyro import poutine
from torch import Tensor

from pyro_vae.evidence import kernels
from pyro_vae.evidence.ground import CHUNK_BYTES, prepare, undisturbed
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.posterior import resample
from pyro_vae.evidence.target import Target
from pyro_vae.programs import Site
from pyro_vae.provenance import versions
from pyro_vae.seeding import derive, seeded
from pyro_vae.typing import Program

Groups = dict[str, dict[str, np.ndarray]]


def to_arviz(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_draws: int = 100,
    num_samples: int = 5000,
    seed: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Any:
    """What a model and guide say of the data, as ArviZ takes it: one chain of `num_draws`.

    Groups: `posterior`, draws of every latent site from p(z|x) (`posterior_draws`), with dimensions
    chain, draw, datum; `log_likelihood`, log p(x|z) a datum at these draws; `posterior_predictive`,
    `prior`, `prior_predictive` and `observed_data`. Since z belongs to one datum, log p(x|z) is no
    pointwise predictive density: `az.loo` and `az.waic` on it do not estimate how a model predicts
    new data. Compare models by `pv.compare` of their `log_marginal` instead.

    Args and raises: as `pyro_vae.log_marginal`; `num_samples` draws are weighed for each datum.

    Returns:
        `arviz.InferenceData` (0.23) or `xarray.DataTree` (1.x).
    """
    x, args = prepare(model, guide, x, args)
    with undisturbed(model, guide):
        target = Target(model, guide, x, args)
        values = resample(Sampler(target, num_samples, seed, chunk_bytes, Proposal()), num_draws)
        with seeded(derive(seed, num_draws)):
            return from_groups(_groups(target, values, num_draws, chunk_bytes))


def _groups(
    target: Target, values: Mapping[str, Tensor], num_draws: int, chunk_bytes: int
) -> Groups:
    """All groups, from draws of the latent sites."""
    rows = range(target.size)
    step, posterior, prior = max(1, chunk_bytes // target.bytes_per_pair // target.size), [], []
    for start in range(0, num_draws, step):
        part = {name: value[start : start + step] for name, value in values.items()}
        num = len(next(iter(part.values())))
        posterior.append(_at(target, rows, part, num))
        prior.append(_prior(target, rows, num))
    groups = {name: _stack([p[name] for p in posterior]) for name in posterior[0]}
    groups |= {name: _stack([p[name] for p in prior]) for name in prior[0]}
    groups["posterior"] = {name: _array(v, target.axis(name)) for name, v in values.items()}
    groups["observed_data"] = _observed(target, rows)
    return groups


def from_groups(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """ArviZ's container of these groups; arrays `(draw, datum, ...)`, observed data `(datum, ...)`.

    The chain is added; the dimension of the data is called "datum".
    """
    import arviz

    chained: dict[str, Any] = {
        group: {
            name: array if group == "observed_data" else array[None]
            for name, array in variables.items()
        }
        for group, variables in groups.items()
    }
    # log p(x|z) has the name of its site but not its features, so it is added with dimensions of
    # its own
    likelihood = {"log_likelihood": chained.pop("log_likelihood")}
    by_datum = {name: ["datum"] for name in likelihood["log_likelihood"]}
    dims = _dims(groups)
    attrs = {"inference_library": "pyro_vae", **versions()}
    if _major(arviz) < 1:
        data = arviz.from_dict(**chained, dims=dims, attrs=attrs)
        data.add_groups(likelihood, dims=by_datum)
    else:
        data = arviz.from_dict(chained, dims=dims, attrs={"/": attrs})
        added = arviz.from_dict(likelihood, dims=by_datum)
        data["log_likelihood"] = added["log_likelihood"]
    return data


def _dims(groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[str]]:
    """The names of every variable's dimensions after chain and draw."""
    dims = {}
    for group, variables in groups.items():
        before = 1 if group == "observed_data" else 2  # (draw and) datum
        for name, array in variables.items():
            if group != "log_likelihood":
                dims[name] = ["datum", *(f"{name}_dim_{i}" for i in range(array.ndim - before))]
    return dims


def convergence(
    draws: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """ArviZ's rank-normalised R-hat and bulk effective sample size of arrays `(chain, draw, ...)`,
    each of the shape without these two, whichever version is installed."""
    import arviz

    if _major(arviz) < 1:
        posterior = arviz.convert_to_dataset(dict(draws))
        found = arviz.rhat(posterior), arviz.ess(posterior)
        rhat, ess = ({name: f[name].values for name in draws} for f in found)
        return rhat, ess
    from arviz_stats.base import array_stats

    axes = {"chain_axis": 0, "draw_axis": 1}
    return (
        {name: np.asarray(array_stats.rhat(value, **axes)) for name, value in draws.items()},
        {name: np.asarray(array_stats.ess(value, **axes)) for name, value in draws.items()},
    )


def _at(target: Target, rows: range, values: Mapping[str, Tensor], num: int) -> Groups:
    """log p(x|z) and draws of x at draws of z."""
    if num == 1:
        values = {name: value.squeeze(0) for name, value in values.items()}
    sites = target.pair(rows, num).sites_at(target.model, values)
    observed = {name: sites[name] for name in sorted(target.observed)}
    return {
        "log_likelihood": {
            name: target.within(kernels.log_prob(site)).expand(num, len(rows)).cpu().numpy()
            for name, site in observed.items()
        },
        "posterior_predictive": {
            name: _draws_first(site["fn"].sample(), site, target, num)
            for name, site in observed.items()
        },
    }


def _prior(target: Target, rows: range, num: int) -> Groups:
    """Draws of z and x from the model."""
    free = poutine.uncondition(target.model)
    sites = target.pair(rows, num).sites_at(free, {})
    drawn = {n: _draws_first(s["value"], s, target, num) for n, s in sites.items()}
    return {
        "prior": {n: v for n, v in drawn.items() if n not in target.observed},
        "prior_predictive": {n: v for n, v in drawn.items() if n in target.observed},
    }


def _observed(target: Target, rows: range) -> dict[str, np.ndarray]:
    sites = target.pair(rows, 1).sites_at(target.model, {})
    return {
        name: _draws_first(sites[name]["value"], sites[name], target, 1)[0]
        for name in sorted(target.observed)
    }


def _draws_first(value: Tensor, site: Site, target: Target, num: int) -> np.ndarray:
    """A site's value as `(draw, datum, ...)`."""
    value = value.unsqueeze(0) if num == 1 else value
    return _array(value, target.plate - len(site["fn"].event_shape))


def _array(value: Tensor, axis: int) -> np.ndarray:
    return value.movedim(axis, 1).cpu().numpy()


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _major(package: Any) -> int:
    return int(package.__version__.split(".")[0])
