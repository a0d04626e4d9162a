"""`log_marginal`: log p(x) of every datum under any (model, guide)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae import programs
from pyro_vae.data import Split
from pyro_vae.errors import ConfigError, DataError, UnknownNameError
from pyro_vae.evidence.diagnostics import checkpoints
from pyro_vae.evidence.figures import exact_figures, figures
from pyro_vae.evidence.grid import TOLERANCE, GridIntegrator
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.result import Evidence
from pyro_vae.evidence.target import Target
from pyro_vae.provenance import fingerprint, versions
from pyro_vae.typing import Program

CHUNK_BYTES = 64 * 2**20


def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_samples: int = 5000,
    method: str = "is",
    seed: int = 0,
    defensive: float = 0.1,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool | None = None,
) -> Evidence:
    """log p(x) of every datum, with its Monte Carlo error, its bias, and a flag when neither holds.

    Importance sampling: log (1/K) sum_k p(x, z_k) / q(z_k), z_k ~ q (Burda et al. 2015, eq. 8), for
    each datum by itself. It is a lower bound in expectation, consistent in K.

    The programs run in evaluation mode; parameters, buffers, training modes, Pyro's parameter
    store and the random generators are as before afterwards. The draws of a datum depend on
    `seed` and on its row alone, so results do not depend on how the work is divided.

    Args:
        model, guide: any Pyro programs that take `x` and `args`, whose latent variables belong to
            one datum each: all sites in one plate as long as `x`. Plates may be subsampled
            (`pyro.plate("data", size, subsample=x)`), sites masked, and the KL weighted: scales do
            not enter, masked values are integrated out where the mask is on the observed site.
        x: data, `(N, ...)`: a tensor, a `Split`, or what `torch.as_tensor` takes. A `Split` that
            is binarised anew at every visit is binarised once, as its `fixed()` says.
        args: further arguments of the programs; tensors of length N are taken by row.
        num_samples: K, exactly.
        method: "is", importance sampling. "grid", the trapezoid rule over one or two latent
            dimensions, doubled until no log p(x) moves by 1e-3 nats; `se` then holds the last
            change. "enumerate", the exact sum where every latent site is discrete. Discrete sites
            that the guide leaves to the model are summed over by every method.
        seed: of the draws.
        defensive: share of the draws that are made with the guide's noise inflated 1.5 times
            (Hesterberg 1995), where the guide's distributions allow it; 0 for none.
        chunk_bytes: about how much memory intermediate results may take; it is halved whenever
            memory runs out.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        SiteError: a site that belongs to no datum, or is missing from the guide.
        ShapeError: a plate that does not follow the length of `x`.
        SupportError: an observed value outside the support of its distribution.
        DataError: no data.
        NonFiniteError: log weights are NaN.
        ConfigError, UnknownNameError: an option means nothing.
    """
    _check_options(num_samples, method, defensive, chunk_bytes)
    x, args = prepare(model, guide, x, args)
    started = time.perf_counter()
    with undisturbed(model, guide):
        target = Target(model, guide, x, args, enumerate_all=method == "enumerate")
        bar = tqdm(
            total=target.size, unit="datum", unit_scale=True, dynamic_ncols=True, desc="log p(x)",
            disable=None if progress is None else not progress,
        )  # fmt: skip
        with bar:
            evaluate, chunks, about = _METHODS[method](
                target, num_samples, seed, chunk_bytes, Proposal(defensive)
            )
            parts = []
            for rows in chunks:
                parts.append(evaluate(rows))
                bar.update(len(rows))
    provenance = {
        "seed": seed,
        "method": method,
        **about,
        "precision": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "seconds": time.perf_counter() - started,
        "model_evaluations": target.evaluations,
        "data": fingerprint(x, *args),
        "versions": versions(),
    }
    return _collect(
        parts, data_size=target.data_size, provenance=provenance, source=(model, guide, x, *args)
    )


Columns = dict[str, np.ndarray]
Plan = tuple[Callable[[range], Columns], list[range], dict[str, Any]]


def _by_importance(
    target: Target, num_samples: int, seed: int, chunk_bytes: int, proposal: Proposal
) -> Plan:
    sampler = Sampler(target, num_samples, seed, chunk_bytes, proposal)
    about = {"inflated_share": sampler.proposal.share, "inflation": sampler.proposal.inflation}
    return lambda rows: figures(sampler.weights(rows)), sampler.chunks(), {"proposal": about}


def _by_grid(
    target: Target, num_samples: int, seed: int, chunk_bytes: int, proposal: Proposal
) -> Plan:
    integrator = GridIntegrator(target, seed, chunk_bytes)

    def evaluate(rows: range) -> Columns:
        grid = integrator.integrate(rows)
        log_px, change = grid.log_px.numpy(), grid.change.numpy()
        return exact_figures(log_px, change, "grid", grid.points, change > TOLERANCE)

    return evaluate, integrator.chunks(), {"tolerance": TOLERANCE}


def _by_enumeration(
    target: Target, num_samples: int, seed: int, chunk_bytes: int, proposal: Proposal
) -> Plan:
    states = math.prod(len(values) for values in target.supports.values())
    step = max(1, chunk_bytes // target.bytes_per_pair)

    def evaluate(rows: range) -> Columns:
        log_px = target.log_joint(rows, {})[0].double().cpu().numpy()
        zero = np.zeros(len(rows))
        return exact_figures(log_px, zero, "enumerate", states, zero > 0)

    chunks = [range(i, min(i + step, target.size)) for i in range(0, target.size, step)]
    return evaluate, chunks, {"states": states}


_METHODS: dict[str, Callable[[Target, int, int, int, Proposal], Plan]] = {
    "is": _by_importance,
    "grid": _by_grid,
    "enumerate": _by_enumeration,
}


def _check_options(num_samples: int, method: str, defensive: float, chunk_bytes: int) -> None:
    if method not in _METHODS:
        known = ", ".join(f'"{name}"' for name in _METHODS)
        raise UnknownNameError(f"method is one of {known}; got {method!r}")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if not 0 <= defensive < 1:
        raise ConfigError(f"defensive is a share in [0, 1), got {defensive}")
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes must be at least 1, got {chunk_bytes}")


def prepare(
    model: Program, guide: Program, x: Any, args: tuple[Any, ...]
) -> tuple[Tensor, tuple[Any, ...]]:
    """Data on the device, and real numbers in the precision, of the programs' parameters."""
    if isinstance(x, Split):
        x = x.fixed().x
    x = torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x))
    if x.dim() == 0 or len(x) == 0:
        raise DataError(f"there is no datum to evaluate: x has shape {tuple(x.shape)}")
    parameters = [p for m in programs.modules_of(model, guide) for p in m.parameters()]
    like = next((p for p in parameters if p.is_floating_point()), None)

    def fit(value: Any) -> Any:
        if like is None or not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    return fit(x), tuple(map(fit, args))


@contextmanager
def undisturbed(*programs_: Program) -> Iterator[None]:
    """The ground for an evaluation: no gradients, evaluation mode, Pyro's validation off (supports
    are checked once instead of at every draw), and everything as it was afterwards."""
    store = pyro.get_param_store()
    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        programs.evaluating(*programs_),
        store.scope(store.get_state()),
        pyro.validation_enabled(False),
    ):
        yield


def _collect(parts: list[Columns], **about: Any) -> Evidence:
    columns: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts])
        for name in parts[0]
        if name != "convergence"
    }
    convergence = {}
    if all("convergence" in part for part in parts):
        means = np.concatenate([part["convergence"] for part in parts]).mean(0)
        ks = checkpoints(int(columns["num_samples"].max()))
        convergence = dict(zip(ks, means.tolist(), strict=True))
    return Evidence(**columns, convergence=convergence, **about)
