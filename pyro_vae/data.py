"""The containers that data travels in: `Split`, one array; `Data`, train, valid and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import DataError

Draw = Callable[[Tensor, torch.Generator | None], Tensor]


def bernoulli_draw(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binarise intensities in [0, 1]: each value is one with its intensity as probability.

    Burda et al. 2015 draw anew at every visit of a datum ("dynamic" binarisation), which keeps
    the encoder from learning the noise of one draw by heart.
    """
    return (torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) < x).to(
        x.dtype
    )


@dataclass(frozen=True)
class Split:
    """One array of data, a datum a row.

    Args:
        x: `(N, features)`, floating point.
        y: labels `(N,)`, or None.
        draw: what turns rows of `x` into what the model sees, anew at every visit (dynamic
            binarisation), or None where `x` is seen as it is.
        seed: of the one draw that `fixed` makes.
    """

    x: Tensor
    y: Tensor | None = None
    draw: Draw | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.x.dim() < 2:
            raise DataError(f"a split needs one row a datum; x has shape {tuple(self.x.shape)}")
        if len(self.x) == 0:
            raise DataError(f"a split needs at least one datum; x has shape {tuple(self.x.shape)}")
        if self.y is not None and len(self.y) != len(self.x):
            raise DataError(f"{len(self.y)} labels for {len(self.x)} data")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> Split:
        """The same split, of these rows only."""
        y = None if self.y is None else self.y[rows]
        return Split(self.x[rows], y, self.draw, self.seed)

    def fixed(self) -> Split:
        """This split with its random draw made once, from `seed`: a fixed test set."""
        if self.draw is None:
            return self
        generator = torch.Generator(self.x.device).manual_seed(self.seed)
        return Split(self.draw(self.x, generator), self.y)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `numpy.asarray` sees: the fixed data."""
        return np.array(self.fixed().x.cpu().numpy(), dtype=dtype, copy=copy)


@dataclass(frozen=True)
class Data:
    """A data set in its published splits.

    Args:
        train, valid, test: `valid` is None where the protocol has none.
        name: of the data set.
        image_shape: `(height, width)` or `(channels, height, width)` of a row seen as an image,
            None where it is none.
        preparation: how the rows were made (binarised how, scaled how): provenance, in words.
    """

    train: Split
    valid: Split | None
    test: Split
    name: str = "data"
    image_shape: tuple[int, ...] | None = None
    preparation: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> int:
        """Number of values in a datum."""
        return self.train.x[0].numel()

    def train_mean(self) -> Tensor:
        """Mean of the training data, `(features,)`: the decoder's initial output. Of the observed
        values, where NaN marks missing ones."""
        return self.train.x.nanmean(0)
