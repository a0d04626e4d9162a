"""`log_marginal`: log p(x) of every datum under any (model, guide)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae import programs
from pyro_vae.data import Split
from pyro_vae.errors import ConfigError, DataError, UnknownNameError
from pyro_vae.evidence.ais import Settings
from pyro_vae.evidence.annealing import Start
from pyro_vae.evidence.diagnostics import checkpoints
from pyro_vae.evidence.draws import Guide
from pyro_vae.evidence.importance import Proposal
from pyro_vae.evidence.methods import METHODS, Columns, Options
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
    annealing: Settings | None = None,
    start: Start = "guide",
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
            is binarised anew at every visit is binarised once, as its `fixed()` says; its context
            is the programs' second argument.
        args: further arguments of the programs; tensors of length N are taken by row.
        num_samples: K, exactly.
        method: "is", importance sampling. "ais", annealed importance sampling (Neal 2001) by
            Hamiltonian Monte Carlo in the guide's coordinates: `annealing.chains` log weights,
            whose log mean is a lower bound in expectation too. "grid", the trapezoid rule over one
            or two latent dimensions, doubled until no log p(x) moves by 1e-3 nats; `se` then holds
            the last change. "enumerate", the exact sum where every latent site is discrete.
            "auto", importance sampling for every datum that a pilot finds sound, with half the
            draws inflated 2 or 3 times for those that then are ("is x2", "is x3"), and for the rest
            the grid, in one or two real latent dimensions, or annealing; what was used is recorded
            a datum. Discrete sites that the guide leaves to the model are summed over by
            every method.
        seed: of the draws.
        defensive: share of the draws that are made with the guide's noise inflated 1.5 times
            (Hesterberg 1995), where the guide's distributions allow it; 0 for none.
        annealing: chains, temperatures and steps of annealing.
        start: where annealing starts, "guide" or "prior". From the prior it takes more
            temperatures, and finds modes that the guide misses altogether and that no diagnostic of
            the guide's weights shows.
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
    _check_options(num_samples, method, defensive, start, chunk_bytes)
    x, args = prepare(model, guide, x, args)
    started = time.perf_counter()
    with undisturbed(model, guide):
        target = Target(model, guide, x, args, enumerate_all=method == "enumerate")
        proposal = Proposal(share=0.0)
        if method in ("is", "auto") and Guide(target).is_map:
            proposal = Proposal(defensive)
        options = Options(num_samples, seed, chunk_bytes, proposal, annealing or Settings(), start)
        bar = tqdm(
            total=target.size, unit="datum", unit_scale=True, dynamic_ncols=True, desc="log p(x)",
            disable=None if progress is None else not progress,
        )  # fmt: skip
        with bar:
            results = []
            for rows, columns in METHODS[method](target, options):
                results.append((rows, columns))
                bar.update(len(rows))
    provenance = {
        "seed": seed,
        "method": method,
        "proposal": asdict(proposal),
        **(
            {"annealing": {**asdict(options.annealing), "start": start}}
            if method in ("ais", "auto")
            else {}
        ),
        "precision": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "seconds": time.perf_counter() - started,
        "model_evaluations": target.evaluations,
        "data": fingerprint(x, *args),
        "versions": versions(),
    }
    return _collect(
        results, data_size=target.data_size, provenance=provenance, source=(model, guide, x, *args)
    )


def _check_options(
    num_samples: int, method: str, defensive: float, start: str, chunk_bytes: int
) -> None:
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise UnknownNameError(f"method is one of {known}; got {method!r}")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if start not in ("guide", "prior"):
        raise ConfigError(f'start is "guide" or "prior", got {start!r}')
    if not 0 <= defensive < 1:
        raise ConfigError(f"defensive is a share in [0, 1), got {defensive}")
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes must be at least 1, got {chunk_bytes}")


def prepare(
    model: Program, guide: Program, x: Any, args: tuple[Any, ...]
) -> tuple[Tensor, tuple[Any, ...]]:
    """Data on the device, and real numbers in the precision, of the programs' parameters."""
    if isinstance(x, Split):
        x, *context = x.fixed().args
        args = (*context, *args)
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
    """The ground for an evaluation: no gradients, evaluation mode, full precision, no validation
    by Pyro (supports are checked once instead of at every draw); all as it was afterwards."""
    store = pyro.get_param_store()
    with (
        _full_precision(),
        torch.no_grad(),
        torch.random.fork_rng(),
        programs.evaluating(*programs_),
        store.scope(store.get_state()),
        pyro.validation_enabled(False),
    ):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever was chosen for training.

    Rounded weights do not average out over draws: TF32 costs about 0.1 nats a datum on a confident
    decoder, bfloat16 nearly 1.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _collect(results: list[tuple[list[int], Columns]], **about: Any) -> Evidence:
    order = np.argsort(np.concatenate([np.array(rows, int) for rows, _ in results]))
    names = [name for name in results[0][1] if name != "convergence"]
    columns: dict[str, Any] = {
        name: np.concatenate([part[name] for _, part in results])[order] for name in names
    }
    convergence = {}
    if all("convergence" in part for _, part in results):
        means = np.concatenate([part["convergence"] for _, part in results]).mean(0)
        ks = checkpoints(int(columns["num_samples"].max()))
        convergence = dict(zip(ks, means.tolist(), strict=True))
    return Evidence(**columns, convergence=convergence, **about)
