"""Where batches come from: arrays that live on the device, or a torch `DataLoader`.

Either is a sequence of epochs; an epoch yields tuples of tensors, the arguments of model and
guide. The order within an epoch depends on its seed alone, so that it can be taken up anywhere.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_vae.data import Split, as_tensor
from pyro_vae.errors import ConfigError, DataError
from pyro_vae.likelihoods.base import check_finite, first

Batch = tuple[Any, ...]
Check = Callable[[Tensor], None]
TAKEN = (
    'Give a Data, such as pv.datasets.load("digits"), a Split, an array or tensor (N, features) '
    "without labels, or a torch DataLoader"
)


class Batches(Protocol):
    """A source of epochs."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""

    def first(self) -> Batch:
        """A small batch to try the program on; costs the epochs nothing."""

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the `start`-th on.

        What is skipped has been skipped, and its random draws made, when this returns.
        """


class Resident:
    """Rows of an array in random order, gathered where the array lives.

    The array is kept on the device where it fits in half of the free memory, and in the host's
    otherwise. Random draws of a split (dynamic binarisation) are made anew at every visit. Its
    context comes with its rows, as the second argument of model and guide.

    Args:
        split: the data.
        batch_size: rows a batch; the last of an epoch may be smaller.
        device, dtype: of the batches.
        rank, world_size: this process and how many share each epoch.

    Raises:
        ConfigError: the batch is larger than the data.
        DataError: a number is too large for `dtype`.
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
        self.x = _real(split.x, dtype).to(home)
        self.context = split.context
        if split.context is not None:
            self.context = _move(split.context, home, dtype)
        self.draw = split.draw
        self.batch_size, self.device = batch_size, device
        self.rank, self.world_size, self.share = rank, world_size, share

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def first(self) -> Batch:
        return self._gather(torch.arange(min(2, len(self.x))))

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=generator, device="cpu")
        mine = order[self.rank :: self.world_size][: self.share].to(self.x.device)
        return map(self._gather, mine.split(self.batch_size)[start:])

    def _gather(self, rows: Tensor) -> Batch:
        rows = rows.to(self.x.device)
        x = self.x.index_select(0, rows).to(self.device, non_blocking=True)
        x = x if self.draw is None else self.draw(x, None)
        if self.context is None:
            return (x,)
        return x, self.context.index_select(0, rows).to(self.device, non_blocking=True)


class Streamed:
    """The batches of a torch `DataLoader`, checked one by one as they come.

    What the loader yields, a tensor or a tuple of them, are the arguments of model and guide. Its
    order follows from the epoch's seed: a generator or distributed sampler of its own is seeded
    anew at every epoch. With several processes give the loader a distributed sampler. What a data
    set draws by NumPy or `random`, or in persistent workers, is not seeded here.

    Args:
        loader: of known length.
        device, dtype: of the batches; integers in further parts stay integers.
        check: raises on a first tensor that the likelihood does not take.
        check_context: raises on a further one that model and guide do not take.

    Raises:
        ConfigError: the loader does not know its length.
        DataError: the loader is empty; at iteration, a batch is not fit for training.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device,
        dtype: torch.dtype,
        check: Check,
        check_context: Check = check_finite,
    ) -> None:
        try:
            length = len(loader)
        except TypeError as error:
            raise ConfigError(f"the DataLoader needs a length, for its epochs: {error}") from error
        if length == 0:
            raise DataError("the DataLoader is empty")
        self.loader, self.device, self.dtype = loader, device, dtype
        self.check, self.check_context = check, check_context

    def __len__(self) -> int:
        return len(self.loader)

    def first(self) -> Batch:
        with _out_of_earshot():
            batches = iter(self.loader)
        batch = self._prepare(0, next(batches))
        return tuple(part[:2] if isinstance(part, Tensor) else part for part in batch)

    def epoch(self, seed: int, start: int = 0) -> Iterator[Batch]:
        self._seed(seed)
        with _out_of_earshot():
            batches = enumerate(self.loader)
        for _ in islice(batches, start):
            pass
        return (self._prepare(index, batch) for index, batch in batches)

    def _seed(self, seed: int) -> None:
        # a loader without a generator shuffles by the global one, which the training loop seeds
        sampler = self.loader.sampler
        for generator in (self.loader.generator, getattr(sampler, "generator", None)):
            if generator is not None:
                generator.manual_seed(seed)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(seed)

    def _prepare(self, index: int, batch: Any) -> Batch:
        parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        if not parts or not isinstance(parts[0], Tensor):
            raise DataError(
                "a DataLoader yields a tensor or a tuple that begins with one, "
                f"this one yields {type(batch).__name__}"
            )
        try:
            self.check(parts[0])
            for part in parts[1:]:
                if isinstance(part, Tensor):
                    self.check_context(part)
            parts = _real(parts[0], self.dtype), *parts[1:]
            return tuple(
                _move(part, self.device, self.dtype) if isinstance(part, Tensor) else part
                for part in parts
            )
        except DataError as error:
            raise type(error)(f"batch {index} of the DataLoader: {error}") from error


def sources(
    vae: Any, data: Any, batch_size: int, fabric: Fabric, dtype: torch.dtype
) -> tuple[Batches, Batches | None]:
    """Batches for training and, where `data` has a `valid`, for validation, all checked.

    Validation data are drawn once, and seen whole by every process.

    Raises:
        ConfigError, DataError, SupportError: the data are not fit for this `vae`.
    """
    checks = getattr(vae, "check", check_finite), getattr(vae, "check_context", check_finite)
    train, valid = getattr(data, "train", data), getattr(data, "valid", None)
    return (
        _source(train, batch_size, fabric, dtype, *checks),
        None if valid is None else _fixed_source(valid, batch_size, fabric, dtype, *checks),
    )


def _source(
    data: Any,
    batch_size: int,
    fabric: Fabric,
    dtype: torch.dtype,
    check: Check,
    check_context: Check,
) -> Any:
    if isinstance(data, DataLoader):
        return Streamed(data, fabric.device, dtype, check, check_context)
    split = as_split(data)
    if split.draw is not None:
        check_finite(split.x)  # a draw may make numbers of NaN
    check(split.fixed().x)
    if split.context is not None:
        check_context(split.context)
    return Resident(split, batch_size, fabric.device, dtype, fabric.global_rank, fabric.world_size)


def _fixed_source(
    data: Any,
    batch_size: int,
    fabric: Fabric,
    dtype: torch.dtype,
    check: Check,
    check_context: Check,
) -> Any:
    if isinstance(data, DataLoader):
        return Streamed(data, fabric.device, dtype, check, check_context)
    split = as_split(data).fixed()
    check(split.x)
    if split.context is not None:
        check_context(split.context)
    return Resident(split, min(batch_size, len(split)), fabric.device, dtype)


@contextmanager
def _out_of_earshot() -> Iterator[None]:
    """Processes started within it do not hear Ctrl-C, which a terminal sends to all of them: a
    loader whose workers died of it could not serve the step that training is to finish."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def as_split(data: Any) -> Split:
    """A `Split` as it is; a tensor, or what numpy makes an array of, as one.

    Raises:
        DataError: it is no array of numbers.
    """
    if isinstance(data, Split):
        return data
    try:
        x = as_tensor(data)
    except DataError as error:
        raise DataError(f"{error}. {TAKEN}") from error
    return Split(x)


def _move(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, and real numbers in the precision; integers stay integers."""
    part = _real(part, dtype) if part.is_floating_point() else part
    return part.to(device, non_blocking=True)


def _real(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Data in the precision of training.

    Raises:
        DataError: a finite number is too large for it.
    """
    made = x.to(dtype)
    if x.dtype == torch.float64 and made.dtype != torch.float64:
        overflown = made.isinf() & x.isfinite()
        if overflown.any():
            name = str(dtype).removeprefix("torch.")
            raise DataError(f"data must be finite in {name}, but {first(overflown, x)}")
    return made


def _fits(x: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return x.numel() * dtype.itemsize < free // 2
