"""`log_marginal`: log p(x) of every datum under any (model, guide)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from pyro_vae.checks import at_least, check_compile, check_known
from pyro_vae.data import Split
from pyro_vae.evidence.ais import Annealing
from pyro_vae.evidence.annealing import Start, check_annealing
from pyro_vae.evidence.diagnostics import checkpoints
from pyro_vae.evidence.draws import Guide
from pyro_vae.evidence.ground import CHUNK_BYTES, prepare, undisturbed
from pyro_vae.evidence.importance import Proposal
from pyro_vae.evidence.methods import METHODS, Columns, Options, Results
from pyro_vae.evidence.result import Evidence
from pyro_vae.evidence.target import Target
from pyro_vae.provenance import fingerprint, versions
from pyro_vae.typing import Compile, Program

AUDITED = 16  # data, where products are rounded


def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *args: Any,
    num_samples: int = 5000,
    method: str = "is",
    seed: int = 0,
    defensive: float = 0.1,
    annealing: Annealing | None = None,
    start: Start = "guide",
    chunk_bytes: int = CHUNK_BYTES,
    tf32: bool = False,
    compile: Compile = False,
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
            Hamiltonian Monte Carlo: `annealing.chains` log weights, whose log mean is a lower bound
            in expectation too. "grid", the trapezoid rule over one or two latent dimensions,
            doubled until no log p(x) moves by 1e-3 nats, over a box that is widened until as little
            is beyond it; `se` then holds the larger of the two. "enumerate", the exact sum where
            every latent site is discrete.
            "auto", importance sampling for every datum that a pilot finds sound, with half the
            draws inflated 2 or 3 times for those that then are ("is x2", "is x3"), and for the rest
            the grid, in one or two real latent dimensions, or annealing; what was used is recorded
            a datum. Discrete sites that the guide leaves to the model are summed over by
            every method.
        seed: of the draws.
        defensive: share of the draws that are made with the guide's noise inflated 1.5 times
            (Hesterberg 1995), where the guide's distributions allow it; 0 for none.
        annealing: chains, temperatures and steps of annealing.
        start: where annealing starts: "guide", a map of normal noise, in whose coordinates the
            chains then move, or "prior", any that can be drawn from and has a density, continuous
            sites without or with fixed bounds. From the prior it takes more temperatures, and finds
            modes that the guide misses altogether and that no diagnostic of its weights shows.
        chunk_bytes: about how much memory intermediate results may take; it is halved whenever
            memory runs out.
        tf32: let a GPU round the factors of matrix products to TF32. Then sixteen of the data are
            evaluated again, with the same draws, in full precision; the provenance and the printed
            result tell by how much the two differ at most. Other devices are as precise as ever.
        compile: fuse the densities (of annealing, with their gradients) into graphs, one for each
            number of rows and draws that has come up a hundred times, see `pyro_vae.compile`: the
            same draws and, within rounding, the same numbers. A graph takes seconds to a minute
            (less when it is in the cache on disk), so it pays for long evaluations: annealing above
            all. `True` raises what stands in the way, "auto" warns of it and goes on without.
        progress: show a progress bar with the time left; by default only on a terminal.

    Raises:
        SiteError: a site that belongs to no datum, is missing from the guide, or whose density
            depends on more than the datum and the latent variables (dropout that is always on).
        ShapeError: a plate that does not follow the length of `x`.
        SupportError: an observed value outside the support of its distribution.
        DataError: no data, or none that the programs run on.
        NonFiniteError: log weights are NaN.
        ConfigError, UnknownNameError: an option means nothing.
        CompileError: with `compile=True`, the programs cannot be compiled.
    """
    _check_options(num_samples, method, start, annealing, chunk_bytes)
    check_compile(compile)
    proposal = Proposal(defensive)
    preparation = _preparation(x)
    x, args = prepare(model, guide, x, args)
    started = time.perf_counter()
    with undisturbed(model, guide, tf32=tf32):
        target = Target(model, guide, x, args, enumerate_all=method == "enumerate", compile=compile)
        if method not in ("is", "auto") or not Guide(target).is_map:
            proposal = Proposal(share=0.0)
        options = Options(num_samples, seed, chunk_bytes, proposal, annealing or Annealing(), start)
        results = list(_watched(METHODS[method](target, options), target.size, progress))
    columns, convergence = _collect(results)
    provenance = {
        "method": method,
        **_settings(method, options),
        "precision": "tf32" if tf32 else str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "compile": compile,
        "seconds": time.perf_counter() - started,
        "model_evaluations": target.evaluations,
        "data": fingerprint(x, *args),
        "preparation": preparation,
        "versions": versions(),
    }
    if tf32:
        with undisturbed(model, guide):
            provenance["tf32_audit"] = _audit(target, method, options, columns["log_px"])
    return Evidence(
        **columns, data_size=target.data_size, provenance=provenance, convergence=convergence,
        source=(model, guide, x, *args),
    )  # fmt: skip


def _check_options(
    num_samples: int, method: str, start: str, annealing: Any, chunk_bytes: int
) -> None:
    check_known("method", method, METHODS)
    at_least("num_samples", num_samples, 1)
    at_least("chunk_bytes", chunk_bytes, 1)
    check_annealing(annealing, start)


def _preparation(x: Any) -> dict[str, Any]:
    """How the rows were drawn, where they come from a split that draws them."""
    if not isinstance(x, Split) or x.draw is None:
        return {}
    return {"drawn_once_by": getattr(x.draw, "__name__", type(x.draw).__name__), "seed": x.seed}


def _settings(method: str, options: Options) -> dict[str, Any]:
    """What the draws depend on."""
    settings = {"seed": int(options.seed), "proposal": asdict(options.proposal)}
    if method in ("is", "auto"):
        settings["num_samples"] = int(options.num_samples)
    if method in ("ais", "auto"):
        settings["annealing"] = {**asdict(options.annealing), "start": options.start}
    return settings


def _watched(results: Results, size: int, progress: bool | None) -> Results:
    """The results as they come, counted on a progress bar that tells the time left."""
    with tqdm(
        total=size, unit="datum", unit_scale=True, dynamic_ncols=True, desc="log p(x)",
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        for rows, columns in results:
            yield rows, columns
            bar.update(len(rows))


def _audit(target: Target, method: str, options: Options, log_px: np.ndarray) -> dict[str, Any]:
    """Some of the data again, with the same draws but products in full precision."""
    rows = sorted({round(i) for i in np.linspace(0, target.size - 1, AUDITED)})
    again, _ = _collect(list(METHODS[method](target.subset(rows), options)))
    one, other = again["log_px"], log_px[rows]
    # minus infinity in both is no difference
    difference = np.abs(np.subtract(one, other, where=one != other, out=np.zeros(len(rows))))
    return {"data": len(rows), "largest_difference": float(difference.max())}


def _collect(
    results: list[tuple[list[int], Columns]],
) -> tuple[dict[str, np.ndarray], dict[int, float]]:
    """The columns of all rows in order, and the convergence of their mean."""
    order = np.argsort(np.concatenate([np.array(rows, int) for rows, _ in results]))
    names = [name for name in results[0][1] if name != "convergence"]
    columns = {name: np.concatenate([part[name] for _, part in results])[order] for name in names}
    if not all("convergence" in part for _, part in results):
        return columns, {}
    means = np.concatenate([part["convergence"] for _, part in results]).mean(0)
    ks = checkpoints(int(columns["num_samples"].max()))
    return columns, dict(zip(ks, means.tolist(), strict=True))
