"""The per-epoch metrics of a run: rows of a table, on disk as CSV and, if asked, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.training.folder import METRICS

Row = dict[str, float]


class MetricsLog:
    """Appends a row an epoch to `metrics.csv`, and mirrors it to TensorBoard where asked.

    Args:
        folder: of the run; None keeps rows in memory only.
        rows: already logged (a resumed run); the file is rewritten to hold just these.
        tensorboard: also write TensorBoard event files, into `folder/tensorboard`.
    """

    def __init__(
        self, folder: Path | None, rows: Sequence[Row] = (), tensorboard: bool = False
    ) -> None:
        self.rows = list(rows)
        self._path = None if folder is None else folder / METRICS
        self._writer: Any = None
        if tensorboard and folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=len(self.rows))
        self._rewrite()

    def append(self, row: Row) -> None:
        """Log one epoch."""
        self.rows.append(row)
        if self._path is not None:
            if len(self.rows) > 1 and row.keys() == self.rows[-2].keys():
                with self._path.open("a", newline="") as file:
                    csv.writer(file).writerow(row.values())
            else:
                self._rewrite()
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))

    def close(self) -> None:
        """Flush what TensorBoard holds."""
        if self._writer is not None:
            self._writer.close()

    def _rewrite(self) -> None:
        if self._path is None:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a `metrics.csv`; a figure that was not taken that epoch is absent."""
    with Path(path).open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def means(sums: Mapping[str, float], count: float, prefix: str) -> Row:
    """Sums over data as means per datum, the ELBO among them, named with a prefix."""
    mean = {name: value / count for name, value in sums.items()}
    mean["elbo"] = mean["reconstruction"] - mean["kl"]
    return {f"{prefix}_{name}": mean[name] for name in ("loss", "elbo", "reconstruction", "kl")}
