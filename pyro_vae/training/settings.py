"""What makes a run that run: the settings that are written, and compared when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from pyro_vae.objectives import Objective
from pyro_vae.provenance import fingerprint
from pyro_vae.training.batches import as_split
from pyro_vae.training.folder import describe
from pyro_vae.typing import Compile

# how torch computes an update, which another device may do otherwise
IMPLEMENTATION = ("foreach", "fused", "capturable")
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
PROBES = (0, 1, 10, 100, 1000, 10_000)


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that make a run that run; see there for each."""

    objective: Objective
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: MakeOptimizer | None
    scheduler: MakeScheduler | None
    kl_schedule: Callable[[int], float] | None
    gradient_clip: float | None
    patience: int | None
    compile: Compile
    devices: int
    precision: str
    seed: int

    def to_json(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        data: Any,
        batches: int,
        device: torch.device,
    ) -> dict[str, Any]:
        """What is written, and compared when the run is resumed.

        Args:
            optimizer, scheduler: as made, and not used yet.
            batches: in an epoch.
        """
        names = ("epochs", "batch_size", "learning_rate", "gradient_clip", "patience", "compile",
                 "devices", "precision", "seed")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "batches": batches,
            "objective": describe(self.objective),
            "kl_schedule": schedule_settings(self.kl_schedule),
            "device": str(device),
            **optimizer_settings(optimizer, scheduler),
            **data_settings(data),
        }


def data_settings(data: Any) -> dict[str, Any]:
    """Fingerprints of the training and validation data; None for a `DataLoader`."""
    train, valid = getattr(data, "train", data), getattr(data, "valid", None)
    return {"train_data": _fingerprint(train), "valid_data": _fingerprint(valid)}


def optimizer_settings(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """The kind and the options of a new optimizer and of its scheduler."""
    groups = [
        {k: v for k, v in g.items() if k not in ("params", *IMPLEMENTATION)}
        for g in optimizer.param_groups
    ]
    return {
        "optimizer": type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "optimizer_options": plain(groups),
        "scheduler_options": None if scheduler is None else plain(scheduler.state_dict()),
    }


def schedule_settings(schedule: Callable[[int], float] | None) -> list[float | str] | None:
    """A schedule by its values at a few steps, for a function itself cannot be compared."""
    return None if schedule is None else [_probe(schedule, step) for step in PROBES]


def plain(value: Any) -> Any:
    """A tree as JSON has it; what is no number, text or container only by the name of its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return type(value).__name__


def _probe(schedule: Callable[[int], float], step: int) -> float | str:
    try:
        return float(schedule(step))
    except Exception as error:  # a list of weights may well end before the last probe
        return type(error).__name__


def _fingerprint(data: Any) -> str | None:
    if data is None or isinstance(data, DataLoader):
        return None
    split = as_split(data)
    return fingerprint(*split.args) + ("" if split.draw is None else ", drawn anew")
