"""A likelihood for tables whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import distributions
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.likelihoods.base import Likelihood, check_finite
from pyro_vae.typing import Distribution


class Columns(Likelihood):
    """Each column of a table under its own likelihood, independent given z.

        kinds = [Normal()] * 3 + [Bernoulli(), Categorical(num_categories=5), Poisson()]
        likelihood = Columns(MLP(latent, [50], Columns.outputs(kinds)), kinds)

    One and the same object in adjacent columns makes a block: its learned scale is shared (with
    `Normal(scale="per_feature", features=3)`, one each).

    Args:
        network: maps `(..., latent)` to `(..., Columns.outputs(columns))`, block by block.
        columns: a likelihood without a network for every column, in order.

    Raises:
        ConfigError: there are no columns, or one has a network or an offset.
    """

    def __init__(self, network: nn.Module, columns: Sequence[Likelihood]) -> None:
        super().__init__(network)
        if not columns:
            raise ConfigError("Columns needs at least one column, got none")
        for i, column in enumerate(columns):
            if column.network is not None or getattr(column, "offset", False):
                raise ConfigError(
                    f"column {i}, {type(column).__name__}, has a network or an offset of its own: "
                    "the network of Columns serves all columns"
                )
        blocks = [list(same) for _, same in groupby(columns, key=id)]
        self.kinds = nn.ModuleList(block[0] for block in blocks)
        self.sizes = [len(block) for block in blocks]
        self.support = constraints.cat([b[0].support for b in blocks], -1, self.sizes)

    @staticmethod
    def outputs(columns: Sequence[Likelihood]) -> int:
        """How many network outputs these columns need."""
        return sum(column.outputs_per_feature for column in columns)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z): batch shape `z.shape[:-1]`, event shape `(columns,)`.

        Raises:
            ShapeError: the network has not `Columns.outputs` outputs.
        """
        outputs, _ = self.outputs_at(z, context)
        widths = [
            size * kind.outputs_per_feature
            for kind, size in zip(self._kinds, self.sizes, strict=True)
        ]
        if outputs.shape[-1] != sum(widths):
            raise ShapeError(
                f"these columns need {sum(widths)} network outputs, got {outputs.shape[-1]}"
            )
        parts = [
            kind.distribution(*block.chunk(kind.outputs_per_feature, -1))
            for kind, block in zip(self._kinds, outputs.split(widths, -1), strict=True)
        ]
        return distributions.Columnwise(parts).to_event(1)

    def check(self, x: Tensor) -> None:
        """Raise unless every value is finite and in the support of its column.

        Raises:
            DataError, SupportError: see `Likelihood.check`.
            ShapeError: `x` has another number of columns.
        """
        check_finite(x)
        if x.shape[-1] != sum(self.sizes):
            raise ShapeError(f"there are {sum(self.sizes)} columns, got {x.shape[-1]} in the data")
        start = 0
        for kind, size in zip(self._kinds, self.sizes, strict=True):
            block = slice(start, start + size)
            outside = torch.zeros_like(x, dtype=torch.bool)
            outside[..., block] = ~kind.support.check(x[..., block])
            kind.refuse(x, outside)
            start += size

    def bias_of_mean(self, mean: Tensor) -> Tensor:
        """Block by block: that of the columns, then zeros for their other outputs."""
        pieces = []
        for kind, block in zip(self._kinds, mean.split(self.sizes, -1), strict=True):
            others = block.new_zeros((kind.outputs_per_feature - 1) * len(block))
            pieces += [kind.bias_of_mean(block), others]
        return torch.cat(pieces)

    @property
    def _kinds(self) -> list[Likelihood]:
        return [kind for kind in self.kinds if isinstance(kind, Likelihood)]
