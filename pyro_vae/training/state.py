"""Where a run stands: what a checkpoint holds beside weights, optimizer and scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pyro_vae.training.metrics import Row

# a generator's state by device, one row a process
RandomState = dict[str, Tensor]


@dataclass
class State:
    """Where a run stands.

    Attributes:
        epoch: finished epochs; `position` batches of the next are done, `step` in all.
        seconds: of training, without validation.
        sums: over the data seen this epoch, of loss, reconstruction, KL and 1; float64.
        first_loss: of the first batch, before any update.
        worse: batches on end whose loss was larger than that.
        random: of the generators, where the run was interrupted within an epoch.
        best_loss, best_epoch, best_weights: of the lowest validation loss so far.
        rows: of the metrics.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    first_loss: float | None = None
    worse: int = 0
    random: RandomState | None = None
    best_loss: float = math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def begun(self) -> int:
        """Epochs finished or begun."""
        return self.epoch + (self.position > 0)


def random_state(fabric: Fabric) -> RandomState:
    """The state of every process's generators."""
    state = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    return {
        name: _one_row_a_process(fabric.all_gather(value.to(fabric.device)), fabric).cpu()
        for name, value in state.items()
    }


def set_random_state(state: RandomState, fabric: Fabric) -> None:
    """Put this process's generators back."""
    # torch reads a state from the start of its storage, so a row must have one of its own
    torch.set_rng_state(state["cpu"][fabric.global_rank].clone())
    if "cuda" in state and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][fabric.global_rank].clone(), fabric.device)


def _one_row_a_process(gathered: object, fabric: Fabric) -> Tensor:
    assert isinstance(gathered, Tensor)
    return gathered.reshape(fabric.world_size, -1)
