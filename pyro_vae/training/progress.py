"""The progress bar: where training is, how fast, and the terms so far."""

from __future__ import annotations

import time
from types import TracebackType

from torch import Tensor
from tqdm import tqdm

SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """A bar over the batches of all epochs, with the terms of the present one.

    Args:
        total, done: batches.
        show: False hides the bar, None shows it where the output is a terminal.
    """

    def __init__(self, total: int, done: int, show: bool | None) -> None:
        self._bar = tqdm(
            total=total, initial=done, unit="batch", dynamic_ncols=True,
            disable=None if show is None else not show,
        )  # fmt: skip
        self._looked, self._data = time.monotonic(), 0

    def update(self, num_data: int, sums: Tensor, epoch: int) -> None:
        """One batch is done. Reads `sums`, and so waits for a GPU, only now and then."""
        self._bar.update()
        if self._bar.disable:
            return
        self._data += num_data
        elapsed = time.monotonic() - self._looked
        if elapsed < SECONDS_BETWEEN_LOOKS:
            return
        loss, reconstruction, kl = (sums[:3] / sums[3]).tolist()
        self._bar.set_postfix_str(
            f"epoch {epoch}, loss {loss:.2f}, reconstruction {reconstruction:.2f}, KL {kl:.2f}, "
            f"{self._data / elapsed:,.0f} data/s"
        )
        self._looked, self._data = time.monotonic(), 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
