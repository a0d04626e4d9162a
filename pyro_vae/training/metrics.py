"""The per-epoch metrics of a run: rows of a table, on disk as CSV and, if asked, TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae.errors import ConfigError
from pyro_vae.training.folder import METRICS, TENSORBOARD

Row = dict[str, float]


class MetricsLog:
    """Appends a row an epoch to `metrics.csv`, and mirrors it to TensorBoard where asked.

    Args:
        folder: of the run; None keeps rows in memory only.
        rows: already logged (a resumed run); the file is rewritten to hold just these.
        tensorboard: also write TensorBoard event files, into `folder/tensorboard`.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path | None, rows: Sequence[Row] = (), tensorboard: bool = False
    ) -> None:
        self.rows = list(rows)
        self._columns: list[str] = []
        self._path = None if folder is None else folder / METRICS
        self._writer: Any = None
        if tensorboard and folder is not None:
            # events of epochs that a killed run logged but did not save are hidden
            self._writer = summary_writer()(folder / TENSORBOARD, purge_step=len(self.rows) + 1)
        self._rewrite()

    def append(self, row: Row) -> None:
        """Log one epoch."""
        self.rows.append(row)
        if self._path is not None:
            if row.keys() <= set(self._columns):
                with self._path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
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
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if self._path is None:
            return
        if not self.rows:
            self._path.unlink(missing_ok=True)
            return
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter`.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True needs the package tensorboard: pip install 'pyro-vae[tensorboard]'"
        ) from error
    return SummaryWriter


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a `metrics.csv`; a figure that was not taken that epoch is absent."""
    with Path(path).open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def means(sums: Tensor, prefix: str) -> Row:
    """Means per datum, the ELBO among them, named with a prefix.

    Args:
        sums: over data, of loss, reconstruction, KL and 1.
    """
    loss, reconstruction, kl = (sums[:3] / sums[3]).tolist()
    mean = {"loss": loss, "elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
    return {f"{prefix}_{name}": value for name, value in mean.items()}
