"""Which rows train, validate and test: the published protocols as functions from parts to parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, DataError, ShapeError


@dataclass(frozen=True)
class Part:
    """Rows of a file before any scaling.

    Args:
        x: `(N, ...)`, numeric.
        y: labels `(N,)`, or None.
    """

    x: np.ndarray
    y: np.ndarray | None = None

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray | None, where: str) -> Part:
        """A part whose labels may come as a row or a column, as Matlab writes them.

        Raises:
            ShapeError: `x` has no rows of values, or the labels are not one a row.
        """
        if x.ndim < 2:
            raise ShapeError(f"{where}: expected a datum a row, (N, ...); found shape {x.shape}")
        if y is not None:
            if y.size != len(x):
                raise ShapeError(f"{where}: labels of shape {y.shape} for {len(x)} rows")
            y = y.reshape(-1)
        return cls(x, y)

    def __getitem__(self, rows: slice | np.ndarray) -> Part:
        """The same part, of these rows only."""
        return Part(self.x[rows], None if self.y is None else self.y[rows])


Parts = dict[str, Part]
Rule = Callable[[Parts], Parts]


@dataclass(frozen=True)
class Protocol:
    """A named way to divide a data set.

    Args:
        rule: takes the parts of the files (`train` and `test`, or `all`) and returns `train`,
            `test` and, where the protocol has one, `valid`.
        about: its sizes and where it comes from, in words.
    """

    rule: Rule
    about: str


def permutation(rows: int, seed: int = 0) -> np.ndarray:
    """A shuffle of `rows` that stays the same in every NumPy version.

    NumPy freezes the streams of `RandomState` and reserves the right to change those of
    `Generator`, and a published split has to outlive an upgrade.

    Raises:
        ConfigError: the seed is not a whole number from 0 to 2³² - 1.
    """
    number = at_least("seed", seed, 0)
    if number >= 2**32:
        raise ConfigError(f"seed must be below 2^32, got {seed!r}")
    return np.random.RandomState(number).permutation(rows)


def as_filed(parts: Parts) -> Parts:
    """The parts as the files have them."""
    return parts


def hold_out(rows: int, *, shuffled: bool = False) -> Rule:
    """Validate on the last `rows` of the training part, in its order or after a fixed shuffle."""

    def rule(parts: Parts) -> Parts:
        train = parts["train"]
        if rows >= len(train.x):
            raise DataError(f"cannot hold out {rows} of {len(train.x)} training rows")
        if shuffled:
            train = train[permutation(len(train.x))]
        cut = len(train.x) - rows
        return {"train": train[:cut], "valid": train[cut:], "test": parts["test"]}

    return rule


def cut(train: int, valid: int, test: int, *, shuffled: bool, seed: int = 0) -> Rule:
    """Divide the one part `all` into three of these sizes, in its order or after a shuffle."""

    def rule(parts: Parts) -> Parts:
        everything = parts["all"]
        total = len(everything.x)
        if train + valid + test != total:
            raise DataError(f"sizes {train} + {valid} + {test} do not add up to {total} rows")
        if shuffled:
            everything = everything[permutation(total, seed)]
        divided = {"train": everything[:train], "test": everything[train + valid :]}
        if valid:
            divided["valid"] = everything[train : train + valid]
        return divided

    return rule


def cut_by_fraction(fractions: tuple[float, ...], where: str, seed: int) -> Rule:
    """`cut` with sizes from fractions, after a shuffle drawn from `seed`.

    Test and validation sizes are rounded to whole rows, and training takes the rest.

    Args:
        where: the data come from, for the message.

    Raises:
        ConfigError: the fractions are not three, are negative, or do not add up to one.
        DataError: when the rule is used, there are too few rows for a part that was asked for.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"fractions {fractions} should be three numbers (train, valid, test) from 0 to 1 "
            "that add up to 1"
        )
    if fractions[0] == 0 or fractions[2] == 0:
        raise ConfigError(f"fractions {fractions} leave nothing to train on or to test on")

    def rule(parts: Parts) -> Parts:
        total = len(parts["all"].x)
        valid, test = (round(total * fraction) for fraction in fractions[1:])
        sizes = {"train": total - valid - test, "valid": valid, "test": test}
        asked = zip(sizes, fractions, strict=True)
        if short := [name for name, fraction in asked if fraction > 0 and sizes[name] < 1]:
            raise DataError(
                f"{where}: {total} rows divided by {fractions} leave no row for "
                f"{' and '.join(short)}"
            )
        return cut(**sizes, shuffled=True, seed=seed)(parts)

    return rule
