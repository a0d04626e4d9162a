"""Models compared on the same data: paired differences of log p(x)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_vae.errors import ConfigError, DataError
from pyro_vae.evidence.result import Evidence, methods_used


@dataclass(frozen=True, eq=False)
class Difference:
    """log p_a(x) - log p_b(x), paired by datum; nats.

    Attributes:
        per_datum: `(N,)`.
        mean: a datum.
        se_mc: Monte Carlo error of `mean` for these data.
        se_total: error over test sets, sd(per_datum)/sqrt(N); NaN for one datum.
        bias_est: estimated bias of `mean`: the two estimates' biases subtracted.
        num_flagged: data flagged in either; where it is not 0, `mean` compares bounds.
    """

    per_datum: np.ndarray
    mean: float
    se_mc: float
    se_total: float
    bias_est: float
    num_flagged: int

    def __str__(self) -> str:
        if self.num_flagged:
            return (
                f"difference {self.mean:+.3f} nats a datum between lower bounds: "
                f"{self.num_flagged:,} of {len(self.per_datum):,} data flagged, so its Monte Carlo "
                f"error is not known; {self.se_total:.2g} over test sets"
            )
        return (
            f"difference {self.mean:+.3f} ± {self.se_total:.2g} nats a datum over test sets "
            f"(± {self.se_mc:.2g} Monte Carlo, bias about {self.bias_est:.2g})"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models ranked by mean log p(x), each against the best, in the manner of `az.compare`.

    Attributes:
        names: best first.
        evidences: in that order.
        differences: of each to the best, in that order.
    """

    names: list[str]
    evidences: list[Evidence]
    differences: list[Difference]

    def __str__(self) -> str:
        width = max(len(name) for name in [*self.names, "model"])
        lines = [
            f"{'rank':>4}  {'model':<{width}}  {'log p(x)':>10}  {'behind':>8}  {'± test':>7}  "
            f"{'± MC':>7}  {'flagged':>8}"
        ]
        for rank, (name, e, d) in enumerate(
            zip(self.names, self.evidences, self.differences, strict=True)
        ):
            bound = ">=" if e.num_flagged else ""
            error = "unknown" if d.num_flagged else format(d.se_mc, ".2g")
            lines.append(
                f"{rank:>4}  {name:<{width}}  {bound + format(e.mean, '.3f'):>10}  "
                f"{0.0 - d.mean:>8.3f}  {d.se_total:>7.2g}  {error:>7}  {e.num_flagged:>8,}"
            )
        methods = [methods_used(e) for e in self.evidences]
        if len(set(methods)) > 1:
            told = "; ".join(f"{n}: {how}" for n, how in zip(self.names, methods, strict=True))
            lines.append(f"evaluated by different methods, whose biases differ: {told}")
        return "\n".join(lines)


def difference(a: Evidence, b: Evidence, mixed: bool = False) -> Difference:
    """log p_a(x) - log p_b(x) on the same data.

    Args:
        mixed: allow different numbers of draws or methods: their biases then differ too. What
            counts is what was asked for: "auto" may treat the two differently.

    Raises:
        DataError: the two saw different data (or binarised them differently).
        ConfigError: different K or methods, and not `mixed`.
    """
    for e in (a, b):
        if not isinstance(e, Evidence):
            raise ConfigError(f"compare takes evaluations by log_marginal, got {type(e).__name__}")
    seen = a.provenance.get("data"), b.provenance.get("data")
    if seen[0] != seen[1] or len(a) != len(b):
        raise DataError(
            f"these evaluations saw different data: {len(a)} rows with fingerprint {seen[0]}, and "
            f"{len(b)} with {seen[1]}. Evaluate both on the same rows, binarised alike"
        )
    one, other = _request(a), _request(b)
    for what in one | other:
        if one.get(what) != other.get(what) and not mixed:
            raise ConfigError(
                f"these evaluations have {what} {one.get(what)} and {other.get(what)}, so their "
                "biases differ: evaluate both alike, or pass mixed=True"
            )
    per_datum = a.log_px - b.log_px
    N = len(per_datum)
    return Difference(
        per_datum=per_datum,
        mean=float(per_datum.mean()),
        se_mc=0.0 if a is b else math.sqrt(float((a.se**2 + b.se**2).sum())) / N,
        se_total=float(per_datum.std(ddof=1)) / math.sqrt(N) if N > 1 else math.nan,
        bias_est=float((a.bias_est - b.bias_est).mean()),
        num_flagged=int((a.flagged | b.flagged).sum()),
    )


def _request(e: Evidence) -> dict[str, list[Any]]:
    """What an evaluation was asked for, as far as its bias depends on it; of one without
    provenance, what it did."""

    def asked(what: str) -> list[Any]:
        given = e.provenance.get(what)
        return sorted(set(getattr(e, what).tolist())) if given is None else [given]

    if (method := asked("method")) in (["grid"], ["enumerate"]):
        return {"method": method}
    annealing = [e.provenance["annealing"]] if "annealing" in e.provenance else []
    return {"method": method, "num_samples": asked("num_samples"), "annealing": annealing}


def compare(evidences: Mapping[str, Evidence], mixed: bool = False) -> Comparison:
    """Rank models by mean log p(x) on the same data.

    Args:
        evidences: by name.
        mixed: as in `difference`.

    Raises:
        ConfigError: fewer than two models; else as `difference`.
        DataError: as `difference`.
    """
    if not isinstance(evidences, Mapping) or len(evidences) < 2:
        raise ConfigError(
            "a comparison takes at least two evaluations by name, "
            '{"a": evidence_a, "b": evidence_b}'
        )
    evidences = {str(name): e for name, e in evidences.items()}
    names = sorted(evidences, key=lambda name: -evidences[name].mean)
    best = evidences[names[0]]
    return Comparison(
        names=names,
        evidences=[evidences[name] for name in names],
        differences=[difference(evidences[name], best, mixed) for name in names],
    )
