"""Importance sampling of log p(x) for every datum: K weights each, in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from pyro_vae.errors import ConfigError
from pyro_vae.evidence.diagnostics import Summary, summarize
from pyro_vae.evidence.draws import Draws, Guide
from pyro_vae.evidence.ground import refuse_nan
from pyro_vae.evidence.target import Target

# draws that the guide makes at once for a datum; part of what a seed means, so it is fixed
DRAWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Proposal:
    """What the draws come from.

    A share of the draws is made with the guide's noise inflated, and all are weighed by the
    density of the mixture, so that no weight exceeds p(x, z) / ((1 - share) q(z|x)), and tails
    that a narrow guide misses are covered (defensive mixture: Hesterberg 1995).

    Attributes:
        share: of the inflated draws; 0 draws from the guide alone. K draws hold floor(share * K).
        inflation: factor on the noise.
    """

    share: float = 0.1
    inflation: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.share, Real) or not 0 <= self.share < 1:
            raise ConfigError(f"defensive is a share in [0, 1), got {self.share!r}")

    def wide(self, num_samples: int) -> Tensor:
        """Which of the draws are inflated, spread evenly: `(num_samples,)`."""
        # the tiny shift keeps 10 * 0.1 at 1 in floating point
        steps = torch.arange(num_samples + 1, dtype=torch.float64)
        counts = (steps * self.share + 1e-9).floor()
        return counts.diff() > 0


@dataclass(frozen=True)
class Weights:
    """The weights of some rows.

    Attributes:
        log_w: by the density of the proposal, `(rows, K)`, float64.
        log_plain: log p(x, z) - log q(z|x), `(rows, K)`, float64.
        wide: which draws are inflated, `(K,)`.
    """

    log_w: Tensor
    log_plain: Tensor
    wide: Tensor

    def summary(self) -> Summary:
        """The estimate of every row, with its error and diagnostics."""
        return summarize(self.log_w, self.wide)

    def elbo(self) -> Tensor:
        """Mean of log p(x, z) - log q(z|x) over the draws from the guide itself: `(rows,)`."""
        return self.log_plain[:, ~self.wide].mean(1)


class Sampler:
    """Draws and weighs; rows and draws are divided to keep within a budget of memory.

    Args:
        target: the densities.
        num_samples: K, the weights of every datum.
        seed: with the row's number, fixes the draws of a row.
        chunk_bytes: budget for the intermediate results of one call of the model. It is halved
            whenever memory runs out all the same.
        proposal: what to draw from; the guide alone where it cannot be inflated.
    """

    def __init__(
        self, target: Target, num_samples: int, seed: int, chunk_bytes: int, proposal: Proposal
    ) -> None:
        self.target, self.num_samples, self.seed = target, num_samples, seed
        self.guide, self.proposal = Guide(target), proposal
        if proposal.share and not self.guide.is_map:
            self.proposal = Proposal(share=0.0)
        self.budget = chunk_bytes

    def chunks(self) -> list[range]:
        """The rows, divided so that the draws and weights of a part fit the budget."""
        element = self.target.arguments[0].element_size()
        held = min(self.num_samples, DRAWS_AT_ONCE)
        per_row = 4 * element * self.target.latent_size * held + 32 * self.num_samples
        step = max(1, self.budget // per_row)
        return [
            range(start, min(start + step, self.target.size))
            for start in range(0, self.target.size, step)
        ]

    def weights(self, rows: range) -> Weights:
        """K weights for each of the rows.

        Raises:
            NonFiniteError: a weight is NaN.
        """
        wide = self.proposal.wide(self.num_samples)
        log_w, log_plain = [], []
        for draws, log_joint in self._blocks(rows, wide):
            log_w.append(log_joint - self._log_proposal(draws, wide))
            log_plain.append(log_joint - draws.log_q.double())
        return Weights(_by_row(log_w, rows), _by_row(log_plain, rows), wide)

    def weighted_draws(self, rows: range) -> tuple[Tensor, dict[str, Tensor]]:
        """The log weights `(rows, K)` and the draws that they belong to."""
        wide = self.proposal.wide(self.num_samples)
        log_w, values = [], []
        for draws, log_joint in self._blocks(rows, wide):
            log_w.append(log_joint - self._log_proposal(draws, wide))
            values.append(draws.values)
        joined = {name: torch.cat([v[name] for v in values]) for name in values[0]}
        return _by_row(log_w, rows), joined

    def _blocks(self, rows: range, wide: Tensor) -> Iterator[tuple[Draws, Tensor]]:
        """All K draws of the rows, some at a time, with log p(x, z)."""
        for start in range(0, self.num_samples, DRAWS_AT_ONCE):
            draws = self._draw(rows, start, wide[start : start + DRAWS_AT_ONCE])
            yield draws, self.log_joint(rows, draws)

    def _draw(self, rows: range, start: int, wide: Tensor) -> Draws:
        scales = torch.where(wide, self.proposal.inflation, 1.0).to(self.target.arguments[0].device)
        seeds = self.target.seeds(rows, self.seed, start)
        return self.guide.draw(rows, len(wide), seeds, scales, self.proposal.inflation)

    def _log_proposal(self, draws: Draws, wide: Tensor) -> Tensor:
        """log-density of the mixture whose parts have as many draws as they really have."""
        log_q = draws.log_q.double()
        share = wide.double().mean().item()
        if share == 0 or draws.log_wide is None:
            return log_q
        parts = torch.stack([log_q, draws.log_wide.double()])
        logs = torch.tensor([1 - share, share], dtype=torch.float64, device=log_q.device).log()
        return (parts + logs[:, None, None]).logsumexp(0)

    def log_joint(self, rows: range, draws: Draws) -> Tensor:
        """log p(x, z) of all draws of the rows, in pieces, `(draws, rows)`, float64."""
        num_draws = len(draws.log_q)
        out = torch.empty_like(draws.log_q, dtype=torch.float64)
        for part_rows, part_draws in self._pieces(len(rows), num_draws):
            taken = range(rows.start + part_rows.start, rows.start + part_rows.stop)
            values = self.target.select(draws.values, part_rows, part_draws)
            piece = self._within_budget(taken, values)
            out[part_draws, part_rows] = piece.double()
        return out

    def _pieces(self, num_rows: int, num_draws: int) -> list[tuple[slice, slice]]:
        """Slices of rows and of draws whose product fits the budget."""
        pairs = max(1, self.budget // self.target.bytes_per_pair)
        by_draws = min(num_draws, pairs)
        by_rows = max(1, pairs // num_draws)
        return [
            (slice(r, min(r + by_rows, num_rows)), slice(k, min(k + by_draws, num_draws)))
            for r in range(0, num_rows, by_rows)
            for k in range(0, num_draws, by_draws)
        ]

    def _within_budget(self, rows: range, values: dict[str, Tensor]) -> Tensor:
        """The model's log-density, halving the work where memory runs out."""
        try:
            return self.target.log_joint(rows, values)
        except RuntimeError as error:
            num_draws = len(next(iter(values.values())))
            if not _out_of_memory(error) or num_draws * len(rows) == 1:
                raise
        self.budget = max(self.target.bytes_per_pair, self.budget // 2)
        if num_draws > 1:
            cut, every = num_draws // 2, slice(0, len(rows))
            halves = [(every, slice(0, cut)), (every, slice(cut, num_draws))]
        else:
            cut, every = len(rows) // 2, slice(0, num_draws)
            halves = [(slice(0, cut), every), (slice(cut, len(rows)), every)]
        parts = [
            self._within_budget(
                range(rows.start + r.start, rows.start + r.stop), self.target.select(values, r, k)
            )
            for r, k in halves
        ]
        return torch.cat(parts, 0 if num_draws > 1 else 1)


def _by_row(blocks: list[Tensor], rows: range) -> Tensor:
    """Blocks of `(draws, rows)` as one `(rows, K)`."""
    return refuse_nan(torch.cat(blocks).T.contiguous().cpu(), rows)


def _out_of_memory(error: RuntimeError) -> bool:
    # on CPU torch raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
