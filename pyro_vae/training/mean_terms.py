"""The objective of a training run, per datum of a batch; compiled where that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_vae.objectives import Objective, Terms
from pyro_vae.training.batches import Batch
from pyro_vae.typing import Compile

if TYPE_CHECKING:
    from pyro_vae.compiled.step import Step


class MeanTerms(nn.Module):
    """An objective of a (model, guide) as a module: the loss per datum, and a row to sum up: loss,
    reconstruction and KL per datum, and 1.

    Args:
        compile: see `fit`.
    """

    def __init__(
        self, objective: Objective, model: nn.Module, guide: nn.Module, compile: Compile = False
    ) -> None:
        super().__init__()
        self.objective, self.model, self.guide = objective, model, guide
        self.compiling = compile
        self.eager: Callable[..., Terms] = partial(objective.terms, model, guide)
        self.terms: Callable[..., Terms] = self.eager
        if compile:
            from pyro_vae.compiled import terms

            self.terms = terms(objective, model, guide, compile)

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        return self._mean(self.terms, batch)

    def step(self, optimizer: Optimizer, gradient_clip: float | None) -> Step | None:
        """Terms, gradient and update as one graph, where compiling is asked for and they can be.

        It takes the sums so far and a batch, and returns the loss and the sums with the batch's.
        """
        if not self.compiling:
            return None
        from pyro_vae.compiled.step import fuse_step

        def computation(sums: Tensor, *batch: Any) -> tuple[list[Tensor], None]:
            loss, row = self._mean(self.eager, batch)
            return [loss, sums + len(batch[0]) * row.to(sums)], None

        roots = {"model": self.model, "guide": self.guide, "objective": self.objective}
        return fuse_step(computation, roots, optimizer, gradient_clip=gradient_clip)

    def run_eagerly(self, error: Exception) -> None:
        """Go on without compiling, and say why, where that is allowed.

        Raises:
            Exception: the error, where compiling is a must.
        """
        if self.compiling is True:
            raise error
        self.terms = self.eager
        warnings.warn(f"running without compiling: {error}", stacklevel=2)

    @staticmethod
    def _mean(terms: Callable[..., Terms], batch: Batch) -> tuple[Tensor, Tensor]:
        found, n = terms(*batch), len(batch[0])
        loss = found.loss / n
        row = (loss, found.reconstruction / n, found.kl / n, torch.ones_like(loss))
        return loss, torch.stack(row).detach()
