"""The ways to log p(x), each as a plan: which rows at a time, and their columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyro_vae.errors import SiteError
from pyro_vae.evidence.ais import Annealing
from pyro_vae.evidence.annealing import Annealer, Start
from pyro_vae.evidence.diagnostics import MIN_ESS, khat_threshold
from pyro_vae.evidence.figures import annealed_figures, exact_figures, figures
from pyro_vae.evidence.grid import LARGEST, TOLERANCE, GridIntegrator, real_sites
from pyro_vae.evidence.ground import refuse_nan
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.target import Target
from pyro_vae.seeding import derive

Columns = dict[str, np.ndarray]
Results = Iterator[tuple[list[int], Columns]]
PILOT_SHARE, SMALLEST_PILOT = 0.1, 200
# for guides that are too narrow: half the draws from noise inflated so much
WIDER = (Proposal(0.5, 2.0), Proposal(0.5, 3.0))


@dataclass(frozen=True)
class Options:
    """What an evaluation is asked for; see `log_marginal`."""

    num_samples: int
    seed: int
    chunk_bytes: int
    proposal: Proposal = field(default_factory=Proposal)
    annealing: Annealing = field(default_factory=Annealing)
    start: Start = "guide"


def by_importance(target: Target, options: Options) -> Results:
    """Importance sampling with K draws."""
    sampler = _sampler(target, options)
    for rows in sampler.chunks():
        yield list(rows), figures(sampler.weights(rows))


def by_annealing(target: Target, options: Options) -> Results:
    """Annealed importance sampling."""
    annealer = Annealer(target, options.annealing, options.seed, options.chunk_bytes, options.start)
    for rows in annealer.chunks():
        yield list(rows), annealed_figures(annealer.log_weights(rows))


def by_grid(target: Target, options: Options) -> Results:
    """The trapezoid rule in one or two latent dimensions."""
    integrator = GridIntegrator(target, options.seed, options.chunk_bytes)
    for rows in integrator.chunks():
        grid = integrator.integrate(rows)
        log_px, change = grid.log_px.numpy(), grid.change.numpy()
        yield list(rows), exact_figures(log_px, change, "grid", grid.points, change > TOLERANCE)


def by_enumeration(target: Target, options: Options) -> Results:
    """The exact sum over all values of discrete latent sites."""
    states = math.prod(len(values) for values in target.supports.values())
    step = max(1, options.chunk_bytes // target.bytes_per_pair)
    for start in range(0, target.size, step):
        rows = range(start, min(start + step, target.size))
        log_px = refuse_nan(target.log_joint(rows, {}).T, rows).squeeze(1).cpu().numpy()
        zero = np.zeros(len(rows))
        yield list(rows), exact_figures(log_px, zero, "enumerate", states, zero > 0)


def automatic(target: Target, options: Options) -> Results:
    """Importance sampling where it will do, from wider and wider proposals; then grid or annealing.

    At every stage a pilot decides for each datum, and its draws are thrown away; a datum whose
    final weights are flagged all the same goes on to the next stage too.
    """
    last = _last_resort(target, options)
    if last is None:
        yield from by_importance(target, options)
        return
    left = list(range(target.size))
    stages = [options.proposal] if last is by_grid else [options.proposal, *WIDER]
    for stage, proposal in enumerate(stages):
        part = _part(target, left)
        chosen = replace(options, proposal=proposal, seed=derive(options.seed, stage))
        done = set()
        for rows, columns in _where_sound(part, chosen):
            if stage:
                columns["method"] = np.full(len(rows), f"is x{proposal.inflation:g}")
            done |= set(rows)
            yield [left[row] for row in rows], columns
        _count(target, part)
        left = [row for i, row in enumerate(left) if i not in done]
        if not left:
            return
    part = _part(target, left)
    for rows, columns in last(part, options):
        yield [left[row] for row in rows], columns
    _count(target, part)


METHODS: dict[str, Callable[[Target, Options], Results]] = {
    "auto": automatic,
    "is": by_importance,
    "ais": by_annealing,
    "grid": by_grid,
    "enumerate": by_enumeration,
}


def _sampler(target: Target, options: Options) -> Sampler:
    return Sampler(target, options.num_samples, options.seed, options.chunk_bytes, options.proposal)


def _where_sound(target: Target, options: Options) -> Results:
    """Importance sampling of the data for which a pilot finds it sound, if it then is."""
    size = max(SMALLEST_PILOT, round(PILOT_SHARE * options.num_samples))
    pilot = _sampler(
        target,
        replace(options, num_samples=min(options.num_samples, size), seed=derive(options.seed, 1)),
    )
    for rows in _sampler(target, options).chunks():
        chosen = [
            row for row, good in zip(rows, _promising(pilot, rows, options), strict=True) if good
        ]
        if not chosen:
            continue
        part = _part(target, chosen)
        columns = figures(_sampler(part, options).weights(range(len(chosen))))
        _count(target, part)
        keep = ~columns["flagged"]
        yield [row for row, kept in zip(chosen, keep, strict=True) if kept], _filter(columns, keep)


def _promising(pilot: Sampler, rows: range, options: Options) -> np.ndarray:
    """Whether K draws will do for each of the rows, as far as a pilot can see."""
    summary = pilot.weights(rows).summary()
    ess = summary.ess * options.num_samples / pilot.num_samples
    sound = (summary.khat <= khat_threshold(pilot.num_samples)) & (ess >= MIN_ESS)
    return sound.numpy()


def _last_resort(target: Target, options: Options) -> Callable[[Target, Options], Results] | None:
    """What to do for data that importance sampling fails on: None where there is nothing."""
    if target.latent_size in LARGEST and real_sites(target):
        return by_grid
    try:
        Annealer(target, options.annealing, options.seed, options.chunk_bytes, options.start)
    except SiteError:
        return None
    return by_annealing


def _part(target: Target, rows: list[int]) -> Target:
    return target if len(rows) == target.size else target.subset(rows)


def _count(target: Target, part: Target) -> None:
    if part is not target:
        target.evaluations += part.evaluations
        part.evaluations = 0


def _filter(columns: Columns, keep: np.ndarray) -> dict[str, Any]:
    return {name: values[keep] for name, values in columns.items()}
