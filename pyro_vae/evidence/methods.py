"""The ways to log p(x), each as a plan: which rows at a time, and their columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyro_vae.evidence.ais import Settings
from pyro_vae.evidence.annealing import Annealer, Start
from pyro_vae.evidence.diagnostics import MIN_ESS, khat_threshold
from pyro_vae.evidence.draws import Guide
from pyro_vae.evidence.figures import annealed_figures, exact_figures, figures
from pyro_vae.evidence.grid import LARGEST, TOLERANCE, GridIntegrator, real_sites
from pyro_vae.evidence.importance import Proposal, Sampler
from pyro_vae.evidence.target import Target
from pyro_vae.seeding import derive

Columns = dict[str, np.ndarray]
Results = Iterator[tuple[list[int], Columns]]
PILOT_SHARE, SMALLEST_PILOT = 0.1, 200


@dataclass(frozen=True)
class Options:
    """What an evaluation is asked for; see `log_marginal`."""

    num_samples: int
    seed: int
    chunk_bytes: int
    proposal: Proposal = field(default_factory=Proposal)
    annealing: Settings = field(default_factory=Settings)
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
        log_px = target.log_joint(rows, {})[0].double().cpu().numpy()
        zero = np.zeros(len(rows))
        yield list(rows), exact_figures(log_px, zero, "enumerate", states, zero > 0)


def automatic(target: Target, options: Options) -> Results:
    """Importance sampling where a pilot says that it will do; a grid or annealing elsewhere.

    The pilot's draws only decide, and are thrown away. A datum whose final weights are flagged all
    the same is annealed too.
    """
    sampler = _sampler(target, options)
    size = max(SMALLEST_PILOT, round(PILOT_SHARE * options.num_samples))
    size = min(options.num_samples, size)
    pilot = Sampler(target, size, derive(options.seed, 1), options.chunk_bytes, options.proposal)
    escalate = _escalation(target, sampler.guide)
    hard: list[int] = []
    for rows in sampler.chunks():
        sound = _promising(pilot, rows, options.num_samples)
        if escalate is None:
            sound[:] = True
        hard += [row for row, good in zip(rows, sound, strict=True) if not good]
        chosen = [row for row, good in zip(rows, sound, strict=True) if good]
        if not chosen:
            continue
        part = sampler if len(chosen) == len(rows) else _sampler(target.subset(chosen), options)
        within = rows if part is sampler else range(len(chosen))
        columns = figures(part.weights(within))
        if part is not sampler:
            target.evaluations += part.target.evaluations
        keep = np.ones(len(chosen), bool) if escalate is None else ~columns["flagged"]
        hard += [row for row, good in zip(chosen, keep, strict=True) if not good]
        columns.pop("convergence")
        yield [r for r, k in zip(chosen, keep, strict=True) if k], _filter(columns, keep)
    if hard and escalate is not None:
        hard.sort()
        subset = target.subset(hard)
        for some, columns in escalate(subset, options):
            yield [hard[row] for row in some], columns
        target.evaluations += subset.evaluations


METHODS: dict[str, Callable[[Target, Options], Results]] = {
    "auto": automatic,
    "is": by_importance,
    "ais": by_annealing,
    "grid": by_grid,
    "enumerate": by_enumeration,
}


def _sampler(target: Target, options: Options) -> Sampler:
    return Sampler(target, options.num_samples, options.seed, options.chunk_bytes, options.proposal)


def _promising(pilot: Sampler, rows: range, num_samples: int) -> np.ndarray:
    """Whether K draws will do for each of the rows, as far as a pilot can see."""
    summary = pilot.weights(rows).summary()
    ess = summary.ess * num_samples / pilot.num_samples
    # the pilot's own threshold is stricter than that of K draws: its k-hat is noisier
    sound = (summary.khat <= khat_threshold(pilot.num_samples)) & (ess >= MIN_ESS)
    return sound.numpy()


def _escalation(target: Target, guide: Guide) -> Callable[[Target, Options], Results] | None:
    """What to do for data that importance sampling fails on: None where there is nothing."""
    if target.latent_size in LARGEST and real_sites(target):
        return by_grid
    return by_annealing if guide.is_map else None


def _filter(columns: Columns, keep: np.ndarray) -> dict[str, Any]:
    return {name: values[keep] for name, values in columns.items()}
