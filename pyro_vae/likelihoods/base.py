"""What every likelihood shares: its network, its support, and how it refuses data."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.errors import ConfigError, DataError, ShapeError, SupportError
from pyro_vae.networks import concatenate
from pyro_vae.typing import Distribution


class Likelihood(nn.Module):
    """Base: runs the network and splits its outputs into the parameters of `distribution`.

    A likelihood of one's own is a subclass with `support` and `distribution`.

    Args:
        network: maps rows `(n, latent)` to `(n, outputs_per_feature * features)`; the first
            `features` outputs are the first parameter, the next the second, and so on. None makes
            a description without a network, for a column of `Columns`.

    Attributes:
        support: of one value of a datum.
        takes: the support in words.
        outputs_per_feature: network outputs for one value of a datum.
        advice: what to do with data outside the support.
    """

    support: constraints.Constraint
    takes: str = ""
    advice: ClassVar[str] = ""
    outputs_per_feature: int = 1

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network

    @property
    def _features(self) -> int | None:
        """Number of values in a datum, where the network tells how many outputs it has."""
        outputs = getattr(self.network, "out_features", None)
        return None if outputs is None else outputs // self.outputs_per_feature

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z): batch shape `z.shape[:-1]`.

        Raises:
            ConfigError: this likelihood has no network.
            ShapeError: the network's outputs do not divide into `outputs_per_feature`.
        """
        parameters, event_dim = self.parameters_at(z, context)
        return self.distribution(*parameters).to_event(event_dim)

    def parameters_at(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], int]:
        """The network's outputs at z, one tensor a parameter, and their event dimensions."""
        outputs, event_dim = self.outputs_at(z, context)
        size, parts = outputs.shape[-event_dim], self.outputs_per_feature
        if size % parts:
            raise ShapeError(
                f"{type(self).__name__} needs {parts} network outputs for each value of a datum, "
                f"got {size} outputs in all"
            )
        return outputs.chunk(parts, dim=-event_dim), event_dim

    def outputs_at(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, int]:
        """The network's outputs at z, and how many of their dimensions are a datum's.

        The network is given rows, whatever the leading dimensions: batch normalisation takes any
        other dimension for its channels.
        """
        if self.network is None:
            raise ConfigError(f"{type(self).__name__} has no network: give it one, or use Columns")
        inputs = concatenate(z, context)
        rows = self.network(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], *rows.shape[1:]), rows.dim() - 1

    def distribution(self, *parameters: Tensor) -> Distribution:
        """The distribution of every value of a datum, given the network's outputs for it."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise unless every value of `x`, a datum a row, is finite and in the support.

        Raises:
            DataError: a value is NaN or infinite; the message names value and place.
            SupportError: a value is outside the support; the message adds what to do.
        """
        check_finite(x)
        self.refuse(x, ~self.support.check(x))

    def refuse(self, x: Tensor, outside: Tensor) -> None:
        """Raise `SupportError` naming the first value of `x` where `outside` holds."""
        if outside.any():
            takes = self.takes or f"values in {self.support}"
            raise SupportError(
                f"{type(self).__name__} takes {takes}, but {first(outside, x)}. "
                f"{self.advice}".rstrip()
            )

    def initialize(self, train_mean: Tensor) -> None:
        """Set the network's output bias so that training starts at E[x|z] = the data's mean.

        Does nothing where the network exposes no `set_output_bias`.
        """
        set_output_bias = getattr(self.network, "set_output_bias", None)
        if set_output_bias is not None:
            set_output_bias(self.bias_of_mean(train_mean))

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        """The value of the first network output at which the distribution has this mean, the
        other outputs being zero; zero where the mean does not tell."""
        return torch.zeros_like(mean)


def check_finite(x: Tensor) -> None:
    """Raise `DataError` naming the first NaN or infinity in `x` and its place."""
    bad = ~torch.isfinite(x)
    if bad.any():
        raise DataError(f"data must be finite, but {first(bad, x)}")


def first(bad: Tensor, x: Tensor, start: int = 0) -> str:
    """The first value of `x` where `bad` holds, in words: value, row and column, and how many.

    `x` are rows from number `start` on.
    """
    local = tuple(int(i) for i in bad.nonzero()[0])
    index = (local[0] + start, *local[1:])
    place = f"row {index[0]}" + (f", column {index[1]}" if len(index) == 2 else "")
    others = int(bad.sum()) - 1
    more = f" (and {others} more)" if others else ""
    return f"x[{', '.join(map(str, index))}] = {x[local].item():g} ({place}){more}"
