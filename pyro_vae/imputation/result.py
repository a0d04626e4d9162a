"""What imputing found: several completions of the data, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import ConfigError


@dataclass(frozen=True)
class Imputations:
    """Several completions of the same data, each as good a guess as any other.

    Attributes:
        values: `(M, N, ...)`: the data, holes filled; observed values as they were.
        observed: `(N, ...)`, True where a value was.
        mean: `(N, ...)`: E[x_mis|x_obs] as the average of E[x|z] over the M draws of z, which
            varies less than the average of `values`; observed values as they were. Of the codes,
            where categories are coded (see `mode`).
        method: what drew them.
        ess: `(N,)`: effective number of the `num_samples` importance draws, of which the
            imputations are made or at which the chains start; infinite where nothing is observed
            and the draws are the model's own.
        acceptance: `(N,)`: share of the guide's proposals that were accepted; 1 for "gibbs" and
            where nothing is observed, NaN for "importance".
        rhat: `(N,)`: split R-hat of E[x|z] over the M chains, the largest over the missing values
            of a datum; 1 where none is missing or nothing is observed, infinite where no chain
            moved, NaN for "importance" and after fewer than four sweeps.
        flagged: `(N,)`: where draws are not to be trusted and intervals are too narrow.
            "importance": fewer effective draws than 100 or than imputations; raise `num_samples`,
            or use "metropolis". The others: `rhat` is not below 1.1; raise `num_sweeps`.
    """

    values: Tensor
    observed: Tensor
    mean: Tensor
    method: str
    ess: Tensor
    acceptance: Tensor
    rhat: Tensor
    flagged: Tensor

    def interval(self, probability: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of every value, `(N, ...)` each.

        The quantiles are those between which a further draw lies with exactly this probability
        (k/(M + 1), type 6 of Hyndman & Fan 1996), however few draws there are.

        Raises:
            ConfigError: the probability is not in (0, 1), or M is too small for it.
        """
        if not 0 < probability < 1:
            raise ConfigError(f"a probability lies between 0 and 1, got {probability}")
        tail = (1 - probability) / 2
        needed = round(1 / tail - 1, 6)
        if needed > len(self.values):
            raise ConfigError(
                f"an interval of {probability:.0%} takes at least {needed:.0f} imputations, "
                f"there are {len(self.values)}"
            )
        ends = np.quantile(self.values.cpu(), [tail, 1 - tail], axis=0, method="weibull")
        low, high = torch.as_tensor(ends).to(self.values)
        return low, high

    def mode(self) -> Tensor:
        """The most frequent value of each entry, `(N, ...)`: for categories and counts."""
        return self.values.mode(0).values
