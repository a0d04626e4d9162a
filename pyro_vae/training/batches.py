"""Where batches come from: arrays that live on the device, or a torch `DataLoader`.

Either is a sequence of epochs; an epoch yields tuples of tensors, the arguments of model and
guide. The order within an epoch depends on its seed alone, so that it can be taken up anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vae.data import Split
from pyro_vae.errors import ConfigError, DataError

Batch = tuple[Any, ...]
Check = Callable[[Tensor], None]


class Batches(Protocol):
    """A source of epochs."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""

    def first(self) -> Batch:
        """A small batch to try the program on; costs the epochs nothing."""

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the `start`-th on."""


class Resident:
    """Rows of an array in random order, gathered where the array lives.

    The array is kept on the device where it fits in half of the free memory, and in the host's
    otherwise. Random draws of a split (dynamic binarisation) are made anew at every visit.

    Args:
        split: the data.
        batch_size: rows a batch; the last of an epoch may be smaller.
        device, dtype: of the batches.
        rank, world_size: this process and how many share each epoch.

    Raises:
        ConfigError: the batch is larger than the data.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        share = len(split) // world_size
        if batch_size > share:
            among = f", {share} for each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"batch_size={batch_size} is larger than the data ({len(split)} rows{among})"
            )
        home = device if _fits(split.x, dtype, device) else torch.device("cpu")
        self.x = split.x.to(home, dtype)
        self.draw = split.draw
        self.batch_size, self.device = batch_size, device
        self.rank, self.world_size, self.share = rank, world_size, share

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def first(self) -> Batch:
        return self._gather(torch.arange(min(2, len(self.x))))

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=generator)
        mine = order[self.rank :: self.world_size][: self.share].to(self.x.device)
        for rows in islice(mine.split(self.batch_size), start, None):
            yield self._gather(rows)

    def _gather(self, rows: Tensor) -> Batch:
        x = self.x.index_select(0, rows.to(self.x.device)).to(self.device, non_blocking=True)
        return (x if self.draw is None else self.draw(x, None),)


class Streamed:
    """The batches of a torch `DataLoader`, checked one by one as they come.

    What the loader yields, a tensor or a tuple of them, are the arguments of model and guide. With
    several processes give the loader a distributed sampler.
    """

    def __init__(
        self, loader: DataLoader[Any], device: torch.device, dtype: torch.dtype, check: Check
    ) -> None:
        if len(loader) == 0:
            raise DataError("the DataLoader is empty")
        self.loader, self.device, self.dtype, self.check = loader, device, dtype, check

    def __len__(self) -> int:
        return len(self.loader)

    def first(self) -> Batch:
        return tuple(
            a[:2] if isinstance(a, Tensor) else a for a in self._prepare(next(iter(self.loader)), 0)
        )

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        # a loader shuffles by the global generator, which the training loop has seeded by epoch
        for i, batch in enumerate(islice(self.loader, start, None), start):
            yield self._prepare(batch, i)

    def _prepare(self, batch: Any, index: int) -> Batch:
        parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        try:
            self.check(parts[0])
        except DataError as error:
            raise type(error)(f"batch {index} of the DataLoader: {error}") from error
        return tuple(self._move(part) for part in parts)

    def _move(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        dtype = self.dtype if part.is_floating_point() else part.dtype
        return part.to(self.device, dtype, non_blocking=True)


def as_split(data: Any) -> Split:
    """A `Split` as it is; a tensor or anything `torch.as_tensor` takes, as one."""
    return data if isinstance(data, Split) else Split(torch.as_tensor(data))


def _fits(x: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return x.numel() * dtype.itemsize < free // 2
