"""The containers that data travels in: `Split`, one array; `Data`, train, valid and test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.errors import DataError

Draw = Callable[[Tensor, torch.Generator | None], Tensor]
UNKNOWN = -1  # the label of a datum whose class is not known


def bernoulli_draw(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Binarise intensities in [0, 1]: each value is one with its intensity as probability.

    Burda et al. 2015 draw anew at every visit of a datum ("dynamic" binarisation), which keeps
    the encoder from learning the noise of one draw by heart.
    """
    return (torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) < x).to(
        x.dtype
    )


def as_tensor(x: Any) -> Tensor:
    """An array of numbers as a tensor, a tensor as it is. What numpy has under a mask is NaN.

    Raises:
        DataError: it is no array, or several.
    """
    if isinstance(x, Tensor):
        return x
    try:
        # numpy would stack (x, y) into one array, and read a dataset's items as rows
        if isinstance(x, Dataset) or (
            isinstance(x, tuple) and any(hasattr(part, "shape") for part in x)
        ):
            raise TypeError("which of its parts is the data, it does not say")
        if np.ma.is_masked(x):
            x = x.astype(np.promote_types(x.dtype, np.float16)).filled(np.nan)
        # torch warns of arrays that are read-only, as a data frame's are
        return torch.as_tensor(np.require(x, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data of type {type(x).__name__} is no array of numbers: {error}"
        ) from error


def check_classes(labels: Tensor, num_classes: int | None = None, name: str = "y") -> None:
    """Raise unless labels `(N,)` are classes, any number of them where none is given.

    Raises:
        DataError: a label is not one of `num_classes`; the message names it and its row.
    """
    number = math.inf if num_classes is None else num_classes
    bad = (labels < 0) | (labels >= number) | (labels != labels.floor())
    if bad.any():
        row = int(bad.nonzero()[0])
        classes, last = "classes", "on"
        if num_classes is not None:
            classes, last = f"labels of {num_classes} classes", f"to {num_classes - 1}"
        raise DataError(
            f"{classes} are the whole numbers from 0 {last}, "
            f"but {name}[{row}] = {labels[row].item():g}"
        )


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels 0, 1, ... as indicators `(N, num_classes)`, in torch's default precision.

    Raises:
        DataError: see `check_classes`.
    """
    check_classes(labels, num_classes)
    return torch.nn.functional.one_hot(labels.long(), num_classes).to(torch.get_default_dtype())


def hide_labels(labels: Tensor, keep: int | None, seed: int = 0) -> Tensor:
    """Labels `(N,)` with all but `keep` of them replaced by -1, unknown, as some may be already.

    Those kept are drawn from `seed`, as many of each class as of any other (one more of some where
    `keep` does not divide), as in Kingma et al. 2014, section 4.

    Args:
        keep: how many; None keeps all that are known.

    Raises:
        DataError: `keep` is negative, a class has too few rows, or a label is neither a class
            nor -1.
    """
    if keep is not None and keep < 0:
        raise DataError(f"keep is a number of labels, 0 or more, got {keep}")
    known = labels != UNKNOWN
    check_classes(labels.where(known, 0))
    if keep is None:
        return labels.long()
    generator = torch.Generator().manual_seed(seed)
    classes = labels[known].unique()
    hidden = torch.full(labels.shape, UNKNOWN, dtype=torch.long, device=labels.device)
    for i, label in enumerate(classes):
        rows = (labels == label).nonzero().squeeze(1)
        number = keep // len(classes) + (i < keep % len(classes))
        if number > len(rows):
            raise DataError(f"{number} labels of class {label.item()} asked for, of {len(rows)}")
        chosen = rows[
            torch.randperm(len(rows), generator=generator, device="cpu")[:number].to(rows.device)
        ]
        hidden[chosen] = labels[chosen].long()
    return hidden


@dataclass(frozen=True)
class Split:
    """One array of data, a datum a row.

    Args:
        x: `(N, features)`, real numbers, dense.
        y: labels `(N,)`, or None.
        draw: what turns rows of `x` into what the model sees, anew at every visit (dynamic
            binarisation), or None where `x` is seen as it is.
        seed: of the one draw that `fixed` makes.
        context: what each datum is conditioned on, `(N, ...)`, the second argument of model and
            guide; None where they have none.

    Raises:
        DataError: no row, complex or sparse rows, labels or contexts that are not one a row, or a
            context that is not finite.
    """

    x: Tensor
    y: Tensor | None = None
    draw: Draw | None = None
    seed: int = 0
    context: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.is_complex() or self.x.layout is not torch.strided:
            raise DataError(
                f"a split needs dense real numbers; x has {self.x.dtype} in layout {self.x.layout}"
            )
        if self.x.dim() < 2:
            raise DataError(f"a split needs one row a datum; x has shape {tuple(self.x.shape)}")
        if len(self.x) == 0:
            raise DataError(f"a split needs at least one datum; x has shape {tuple(self.x.shape)}")
        if self.y is not None and len(self.y) != len(self.x):
            raise DataError(f"{len(self.y)} labels for {len(self.x)} data")
        if self.context is not None:
            _check_context(self.context, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> Split:
        """The same split, of these rows only."""
        y, context = (None if part is None else part[rows] for part in (self.y, self.context))
        return replace(self, x=self.x[rows], y=y, context=context)

    @property
    def args(self) -> tuple[Tensor, ...]:
        """The arguments of model and guide: `x`, and the context where there is one."""
        return (self.x,) if self.context is None else (self.x, self.context)

    def fixed(self) -> Split:
        """This split with its random draw made once, from `seed`: a fixed test set."""
        if self.draw is None:
            return self
        generator = torch.Generator(self.x.device).manual_seed(self.seed)
        return replace(self, x=self.draw(self.x, generator), draw=None, seed=0)

    def given(self, context: Tensor | None) -> Split:
        """The same rows in another context."""
        return replace(self, context=context)

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

    @property
    def num_classes(self) -> int:
        """One more than the largest label.

        Raises:
            DataError: a split has no labels.
        """
        splits = [split for split in (self.train, self.valid, self.test) if split is not None]
        labels = [split.y for split in splits if split.y is not None]
        if len(labels) < len(splits):
            raise DataError(f'"{self.name}" has no labels to make classes of')
        return 1 + max(int(y.max()) for y in labels)

    def given_classes(self) -> Data:
        """The same data, each datum's class as its context: `(N, num_classes)`, one-hot.

        Raises:
            DataError: a split has no labels, or labels that are no whole numbers from 0 on.
        """
        number = self.num_classes

        def given(split: Split) -> Split:
            assert split.y is not None
            return split.given(one_hot(split.y, number).to(split.x))

        valid = None if self.valid is None else given(self.valid)
        return replace(self, train=given(self.train), valid=valid, test=given(self.test))

    def given_labels(self, keep: int | None = None, seed: int = 0) -> Data:
        """The same data, `keep` training labels as context, the others unknown (-1).

        Validation and test data are given none, so that their bound is that of log p(x).

        Args:
            keep: None keeps all that are known: those that are not -1.
            seed: see `hide_labels`.

        Raises:
            DataError: there are no labels, or too few of a class; or see `hide_labels`.
        """
        if self.train.y is None:
            raise DataError(f'"{self.name}" has no training labels to keep')
        labels = hide_labels(self.train.y, keep, seed)
        return replace(self, train=self.train.given(labels))


def _check_context(context: Tensor, rows: int) -> None:
    if context.dim() == 0 or len(context) != rows:
        raise DataError(f"{rows} data need as many contexts, got shape {tuple(context.shape)}")
    bad = ~torch.isfinite(context)
    if bad.any():
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"a context must be finite, but context[{', '.join(map(str, place))}] = "
            f"{context[place].item():g}"
        )
