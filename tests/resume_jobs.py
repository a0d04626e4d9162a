"""Training jobs that the tests kill: together they use everything that has a state.

A job runs in a process of its own, forked from a server that has imported the library.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from training_helpers import (
    binary,
    binary_data,
    in_training,
    intensities,
    normal_vae,
    small_vae,
)

import pyro_vae as pv

STEPS_PER_EPOCH = 6
EPOCHS = 10
Hook = Callable[[int], Any]


def run(name: str, folder: Path, at_step: Hook, epochs: int = EPOCHS) -> tuple[pv.VAE, pv.Run]:
    """Start a job, or resume it where its folder holds the configuration of one."""
    vae, data, settings = {**JOBS, **FURTHER}[name](at_step)
    if (folder / "checkpoint.safetensors").exists():  # weights that a resumed run must not keep
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.fill_(9.0)
    # a folder whose job died before it wrote its configuration holds nothing worth keeping
    start = {"resume": True} if (folder / "config.json").exists() else {"overwrite": True}
    return vae, pv.fit(vae, data, epochs=epochs, batch_size=16, out=folder, **settings, **start)


def _array(at_step: Hook) -> tuple[pv.VAE, Any, dict[str, Any]]:
    def warm_up(step: int) -> float:
        if in_training():
            at_step(step)
        return min(1.0, step / 30)

    return (
        small_vae(dropout=0.2),
        binary_data(96, dynamic=True),
        {
            "kl_schedule": warm_up,
            "patience": 3,
            "gradient_clip": 1.0,
            "learning_rate": 0.02,
            "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.5),
            "trackers": [lambda epoch: {"square": epoch**2}],
        },
    )


def _loader(at_step: Hook) -> tuple[pv.VAE, Any, dict[str, Any]]:
    class Data:
        train = _Hooked(at_step, intensities(96), torch.Generator().manual_seed(5))
        valid = DataLoader(TensorDataset(intensities(20, seed=1)), 10)

    return (
        normal_vae(scale="learned"),
        Data,
        {
            "objective": pv.ELBO(kl="monte_carlo", num_particles=2),
            "optimizer": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
            "scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        },
    )


def _shuffled(at_step: Hook) -> tuple[pv.VAE, Any, dict[str, Any]]:
    return small_vae(), _Hooked(at_step, binary(96), None), {"objective": pv.IWAE(3)}


def _workers(at_step: Hook) -> tuple[pv.VAE, Any, dict[str, Any]]:
    def count(step: int) -> float:
        if in_training():
            at_step(step)
        return 1.0

    loader: Any = DataLoader(
        _Slow(binary(96)), 16, shuffle=True, num_workers=1, persistent_workers=True
    )
    return small_vae(), loader, {"kl_schedule": count}


class _Slow(TensorDataset):
    """Training waits for it nearly all the time."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        time.sleep(0.003)
        return super().__getitem__(index)


class _Hooked(DataLoader[Any]):
    """Shuffles, adds noise from the global generator (if it has one of its own), and calls the
    hook with the number of the step."""

    def __init__(self, at_step: Hook, x: Tensor, generator: torch.Generator | None) -> None:
        super().__init__(
            TensorDataset(x), 16, shuffle=True, generator=generator,
            collate_fn=_noisy if generator is not None else None,
        )  # fmt: skip
        self.at_step, self.count = at_step, -1  # fit looks at one batch before it trains

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self.at_step(self.count)
            self.count += 1
            yield batch


def _noisy(items: list[Any]) -> Tensor:
    x = torch.stack([x for (x,) in items])
    return x + 0.01 * torch.randn(x.shape)


JOBS: dict[str, Callable[[Hook], tuple[pv.VAE, Any, dict[str, Any]]]] = {
    "array": _array,
    "loader": _loader,
    "shuffled": _shuffled,
}
FURTHER = {"workers": _workers}


def _child(name: str, folder: Path, counter: Any, log: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.setsid()  # with its children, a group that a terminal would send Ctrl-C to
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def count(_: int) -> None:
        counter.value += 1

    run(name, folder, count)


@contextmanager
def process(name: str, folder: Path) -> Iterator[tuple[Any, Any]]:
    """The job in a process of its own, and a counter of the steps it has begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_vae.training", "pandas", "pytest"])
    counter = context.Value("i", 0, lock=False)
    log = folder.with_suffix(".log")
    child = context.Process(target=_child, args=(name, folder, counter, log))
    child.start()
    try:
        yield child, counter
    finally:
        child.kill()
        child.join()
