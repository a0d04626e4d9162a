"""What an evaluation of log p(x) found: every datum's figures, the data set's, and provenance."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.errors import ConfigError, CorruptFileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_vae.evidence.comparison import Difference

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Evidence:
    """log p(x) of N data, each with its error, its bias and its diagnostics. Nats throughout.

    The arrays are `(N,)`, float64 but for `method`, `flagged` and `num_samples`.

    Attributes:
        log_px: the estimate of log p(x): log of the mean of the importance weights. It is a lower
            bound in expectation (Burda et al. 2015).
        se: Monte Carlo standard error of `log_px`. Not to be trusted where `flagged`.
        bias_est: first-order bias of `log_px`, -se²/2.
        log_px_jackknife: `log_px` with its 1/K bias removed (Nowozin 2018); not a bound.
        elbo: mean of log p(x, z) - log q(z|x) over draws from the guide.
        ess: effective sample size of the weights (Kish).
        khat: Pareto k-hat of the weights (Vehtari et al. 2024).
        max_weight: share of the largest weight in their sum.
        num_samples: draws, K.
        method: what made the estimate.
        flagged: the weights' tail is too heavy or their effective number too small (k-hat over its
            threshold, or ess < 100): read `log_px` as a lower bound only.
        data_size: number of observed values in a datum.
        provenance: seed, precision, device, versions, time, decoder evaluations, proposal and
            fingerprint of the data.
        convergence: mean log p(x) of the data set from the first k draws, by k.
        source: model, guide, data and arguments, for `to_arviz`; not saved.
    """

    log_px: Array
    se: Array
    bias_est: Array
    log_px_jackknife: Array
    elbo: Array
    ess: Array
    khat: Array
    max_weight: Array
    num_samples: Array
    method: Array
    flagged: Array
    data_size: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    convergence: Mapping[int, float] = field(default_factory=dict)
    source: tuple[Any, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.log_px)

    @property
    def mean(self) -> float:
        """Mean log p(x) a datum."""
        return float(self.log_px.mean())

    @property
    def se_mc(self) -> float:
        """Monte Carlo standard error of `mean` for these very data: sqrt(sum se²)/N."""
        return math.sqrt(float(np.square(self.se).sum())) / len(self)

    @property
    def se_total(self) -> float:
        """Standard error of `mean` over test sets like this one: sd(log_px)/sqrt(N).

        It already holds the Monte Carlo error. NaN for one datum, or where a log p(x) is infinite.
        """
        if len(self) == 1 or not np.isfinite(self.log_px).all():
            return math.nan
        return float(self.log_px.std(ddof=1)) / math.sqrt(len(self))

    @property
    def mean_bias_est(self) -> float:
        """Estimated bias of `mean`: it does not shrink with N."""
        return float(self.bias_est.mean())

    @property
    def num_flagged(self) -> int:
        """How many data are flagged."""
        return int(self.flagged.sum())

    @property
    def bits_per_dim(self) -> float:
        """-log2 p(x) a datum and observed value."""
        return -self.mean / (self.data_size * math.log(2))

    def __str__(self) -> str:
        audit = self.provenance.get("tf32_audit")
        if audit is None:
            return _describe(self)
        return (
            f"{_describe(self)}\n  in TF32: of {audit['data']} data evaluated again in full "
            f"precision, log p(x) differs by up to {audit['largest_difference']:.2g} nats"
        )

    def compare(self, other: Evidence, mixed: bool = False) -> Difference:
        """This evaluation minus another of the same data, paired by datum: see `difference`."""
        from pyro_vae.evidence.comparison import difference

        return difference(self, other, mixed)

    def plot(self, image_shape: tuple[int, ...] | None = None) -> Figure:
        """Histogram of log p(x), convergence in K, k-hat, and the worst-explained data: see
        `plots.evaluation`.

        Args:
            image_shape: of a datum, channels first; None where it is no image.
        """
        from pyro_vae.plots import evaluation

        return evaluation(self, image_shape=image_shape)

    def to_arviz(self, num_draws: int = 100, seed: int = 0) -> Any:
        """Posterior, predictive and prior draws and log p(x|z): see `inference_data.to_arviz`.

        Raises:
            ConfigError: this evaluation was loaded from a file, which holds no model.
        """
        from pyro_vae.inference_data import to_arviz

        if self.source is None:
            raise ConfigError(
                "an evaluation read from a file knows no model: call "
                "pyro_vae.inference_data.to_arviz(model, guide, x)"
            )
        return to_arviz(*self.source, num_draws=num_draws, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Write to `path`: `.npz`, or `.json` for other languages. No pickle.

        Raises:
            ConfigError: another ending.
        """
        path = Path(path)
        plain = {"data_size": self.data_size, "provenance": dict(self.provenance),
                 "convergence": {str(k): v for k, v in self.convergence.items()}}  # fmt: skip
        plain = _to_json(plain)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if path.suffix == ".npz":
            np.savez(path, header=np.array(json.dumps(plain)), **arrays)
        elif path.suffix == ".json":
            columns = {name: _to_json(values.tolist()) for name, values in arrays.items()}
            path.write_text(json.dumps({**plain, **columns}, indent=1) + "\n")
        else:
            raise ConfigError(f"evidence is saved as .npz or .json, not {path.name!r}")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what `save` wrote.

        Raises:
            ConfigError: another ending.
            CorruptFileError: the file is not what `save` writes.
        """
        path = Path(path)
        if path.suffix not in (".npz", ".json"):
            raise ConfigError(f"evidence is read from .npz or .json, not {path.name!r}")
        try:
            if path.suffix == ".npz":
                with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                    plain = json.loads(str(stored["header"]))
                    arrays = {name: stored[name] for name in _ARRAYS}
            else:
                plain = json.loads(path.read_text())
                arrays = {name: plain.pop(name) for name in _ARRAYS}
            arrays = {name: _column(name, values) for name, values in arrays.items()}
            plain["convergence"] = {int(k): float(v) for k, v in plain["convergence"].items()}
            found = cls(**arrays, **plain)
            _check(found)
            return found
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise CorruptFileError(f"{path} holds no evidence: {error}") from error


_ARRAYS = [f.name for f in fields(Evidence) if f.type == "Array"]
_KINDS = {"method": np.str_, "flagged": np.bool_, "num_samples": np.int64}
_DAMAGE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error,
    ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


def _to_json(value: Any) -> Any:
    # JSON has no NaN and no infinity: they travel as words
    if isinstance(value, Mapping):
        return {name: _to_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _column(name: str, values: Any) -> Array:
    """An array as a file has it, in its type."""
    kind = _KINDS.get(name, np.float64)
    array = np.array(values, dtype=kind if kind is np.float64 else None)
    if not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} is of type {array.dtype}")
    return array


def _check(e: Evidence) -> None:
    """Raise ValueError where the parts of an evaluation do not fit together."""
    shapes = {name: getattr(e, name).shape for name in _ARRAYS}
    if set(shapes.values()) != {(len(e),)} or not len(e):
        raise ValueError(f"its columns have shapes {shapes}")
    if not isinstance(e.data_size, int) or e.data_size < 1 or not isinstance(e.provenance, dict):
        raise ValueError(f"data_size is {e.data_size!r}, provenance {e.provenance!r}")


def methods_used(e: Evidence) -> str:
    """What made the estimates, and of how many data each."""
    methods, numbers = np.unique(e.method, return_counts=True)
    if len(methods) == 1:
        return str(methods[0])
    return ", ".join(f"{m} {n:,}" for m, n in zip(methods, numbers, strict=True))


def _describe(e: Evidence) -> str:
    counts = sorted(set(e.num_samples.tolist()))
    draws = f"K = {counts[0]:,}" if len(counts) == 1 else f"K = {counts[0]:,} to {counts[-1]:,}"
    how = methods_used(e)
    about = f"{len(e):,} data, {draws}, {how}"
    over = f"{e.se_total:.3g} over test sets, " if len(e) > 1 else ""
    bits = e.bits_per_dim
    if not e.num_flagged:
        return (
            f"log p(x) = {e.mean:.3f} ± {e.se_mc:.2g} nats a datum ({about})\n"
            f"  errors: {e.se_mc:.2g} Monte Carlo, {over}bias about {e.mean_bias_est:.2g}; "
            f"{bits:.4g} bits a value; none flagged"
        )
    if set(e.method[e.flagged].tolist()) == {"grid"}:
        return (
            f"log p(x) about {e.mean:.3f} nats a datum, {e.num_flagged:,} of {len(e):,} data "
            f"flagged ({about})\n  their integrals had not settled on the finest grid (last "
            f'change up to {e.se[e.flagged].max():.2g} nats): use method="is" or "ais"'
        )
    worst = e.khat[e.flagged & np.isfinite(e.khat)]
    tail = f", k-hat up to {worst.max():.2f}" if len(worst) else ""
    return (
        f"log p(x) >= {e.mean:.3f} nats a datum: a lower bound, {e.num_flagged:,} of {len(e):,} "
        f"data flagged ({about})\n"
        f"  the flagged data's weights are too uneven to estimate their own error (effective "
        f"sample size down to {np.nan_to_num(e.ess[e.flagged]).min():.1f}{tail}):\n"
        f"  their log p(x) is probably higher. {over.capitalize()}{bits:.4g} bits a value at most"
    )
