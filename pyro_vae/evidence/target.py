"""A (model, guide) pair seen datum by datum: log p(x_n, z) for any rows n and many z at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae import programs
from pyro_vae.errors import SiteError
from pyro_vae.evidence import kernels
from pyro_vae.evidence.arithmetic import FastArithmetic
from pyro_vae.evidence.sites import (
    check_enumerable,
    check_same_sites,
    check_support,
    data_plate,
    discrete_values,
    explained,
)
from pyro_vae.programs import Pair, Run
from pyro_vae.seeding import derive
from pyro_vae.typing import Program

PROBE_ROWS = 3


class Target:
    """The joint density of a (model, guide) pair, a datum a row.

    Args:
        model, guide: Pyro programs called with `x` and `args`; all their sites lie in one plate,
            whose index is the row.
        x: `(N, ...)`, on the device and in the precision of the programs.
        args: further arguments; tensors of length N are taken by row, as `x` is.
        enumerate_all: sum over all latent sites, which must be discrete, and leave the guide out.
        ids: numbers of the rows that fix their random streams; by default 0, 1, ...

    Attributes:
        evaluations: (datum, draw) pairs that the model was run on so far.

    Raises:
        SiteError: a site lies outside the plate of the data, a latent site is missing from the
            guide, nothing is observed, or a plate inside that of the data is subsampled.
        DataError: a program does not run on `x`, or not for several draws at once.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        x: Tensor,
        args: Sequence[Any] = (),
        enumerate_all: bool = False,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.ids = range(len(x)) if ids is None else ids
        self.model, self.guide = model, guide
        self.arguments = (x, *args)
        self.size = len(x)
        self.evaluations = 0
        self.nesting = 0
        self.enumerate_all = enumerate_all
        rows = range(min(self.size, PROBE_ROWS))
        run = self._probe(rows, 1)
        sites = [*run.model.items(), *run.guide.items()]
        self.nesting = max(
            (-f.dim for _, s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0
        )
        self.observed = {name for name, _ in run.observed}
        if not self.observed:
            raise SiteError("the model observes nothing: give it the data through obs=")
        missing = {name: s for name, s in run.latent if name not in run.guide}
        check_enumerable(missing, sorted(run.guide), enumerate_all)
        self.plate = data_plate(sites, len(rows))
        self.supports = {name: discrete_values(name, s, self.plate) for name, s in missing.items()}
        self.model_sites, self.guide_sites = set(run.model), set(run.guide)
        self.event_dims = {name: len(s["fn"].event_shape) for name, s in run.model.items()} | {
            name: len(s["fn"].event_shape) for name, s in run.guide.items()
        }
        self.latent_size = sum(value.numel() for value in run.values.values()) // len(rows)
        self.data_size = sum(s["value"].numel() for _, s in run.observed) // len(rows)
        self.bytes_per_pair = self._measure()
        if not enumerate_all:
            self._probe(rows, 2)

    def subset(self, chosen: Sequence[int]) -> Target:
        """The target of some of the rows, which keep their random streams."""
        index = torch.as_tensor(list(chosen), device=self.arguments[0].device)
        x, *args = (
            a[index] if isinstance(a, Tensor) and a.dim() and len(a) == self.size else a
            for a in self.arguments
        )
        ids = [self.ids[i] for i in chosen]
        return Target(self.model, self.guide, x, args, self.enumerate_all, ids)

    def seeds(self, rows: range, seed: int, *keys: int) -> list[int]:
        """A seed for each of the rows."""
        return [derive(seed, self.ids[row], *keys) for row in rows]

    def pair(self, rows: range, num_draws: int) -> Pair:
        """The programs on some rows, to be run for several draws at once."""
        return Pair(self.model, self.guide, self._args(rows), {}, num_draws, self.nesting)

    def log_joint(self, rows: range, values: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z), `(num_draws, rows)`, summed over the discrete sites that the guide lacks.

        Args:
            values: the guide's sites', `(num_draws, *batch, *event)`.

        Raises:
            SupportError: an observed value is outside the support of its distribution.
        """
        return self.log_prior_and_joint(rows, values)[1]

    def log_prior_and_joint(
        self, rows: range, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x, z), as `log_joint`."""
        parts = [(prior, joint) for _, prior, joint in self.by_state(rows, values)]
        if len(parts) == 1:
            return parts[0]
        prior, joint = (torch.stack(part).logsumexp(0) for part in zip(*parts, strict=True))
        return prior, joint

    def by_state(
        self, rows: range, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """log p(z, c) and log p(x, z, c) for every value c of the discrete sites that the guide
        lacks: c by site, `(*event)`, and the two densities, as in `log_joint`."""
        num_draws = len(next(iter(values.values()))) if values else 1
        if num_draws == 1:
            values = {name: value.squeeze(0) for name, value in values.items()}
        pair = self.pair(rows, num_draws)
        lead = (num_draws,) if num_draws > 1 else ()
        batch = (*lead, *(len(rows) if d == self.plate else 1 for d in range(-self.nesting, 0)))
        for states in itertools.product(*self.supports.values()):
            chosen = dict(zip(self.supports, states, strict=True))
            copies = {name: c.expand(*batch, *c.shape) for name, c in chosen.items()}
            yield chosen, *self._densities(pair, rows, {**values, **copies})

    def _densities(
        self, pair: Pair, rows: range, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        self.evaluations += pair.num_particles * len(rows)
        with FastArithmetic():
            sites = pair.sites_at(self.model, values)
        check_same_sites(sites, self.model_sites, "model", rows)
        prior = torch.zeros((), device=self.arguments[0].device)
        likelihood = torch.zeros_like(prior)
        for name, site in sites.items():
            if name in self.observed:
                check_support(name, site, self.plate, rows)
                likelihood = likelihood + self.within(kernels.log_prob(site))
            else:
                prior = prior + self.within(kernels.log_prob(site))
        shape = (pair.num_particles, len(rows))
        return prior.expand(shape), (prior + likelihood).expand(shape)

    def within(self, value: Tensor) -> Tensor:
        """Sum a batch-shaped tensor to `(num_draws, rows)`."""
        return programs.sum_within(value, [self.plate], self.nesting)

    def axis(self, name: str) -> int:
        """The dimension of a latent site's value that is indexed by row, from the right."""
        return self.plate - self.event_dims[name]

    def select(self, values: Mapping[str, Tensor], rows: slice, draws: slice) -> dict[str, Tensor]:
        """The values of some of the rows and draws."""
        return {
            name: value[draws].narrow(self.axis(name), rows.start, rows.stop - rows.start)
            for name, value in values.items()
        }

    def _args(self, rows: range) -> tuple[Any, ...]:
        taken = slice(rows.start, rows.stop)
        return tuple(
            a[taken] if isinstance(a, Tensor) and a.dim() and len(a) == self.size else a
            for a in self.arguments
        )

    def _probe(self, rows: range, num_draws: int) -> Run:
        """One run on the first rows; sites that the guide lacks draw from the model."""
        pair = self.pair(rows, num_draws)
        with torch.random.fork_rng(), torch.no_grad():
            with explained("guide", pair.args, num_draws):
                guide = {} if self.enumerate_all else pair.sites_at(self.guide, {})
            values = {name: site["value"] for name, site in guide.items()}
            with explained("model", pair.args, num_draws):
                return Run(pair.sites_at(self.model, values), guide)

    def _measure(self) -> int:
        """Memory that one (datum, draw) takes: its largest intermediate results together."""
        with torch.random.fork_rng(), torch.no_grad(), _Sizes() as sizes:
            self.pair(range(1), 1).sites_at(self.model, {})
        return sum(sorted(sizes.bytes)[-4:])


class _Sizes(TorchDispatchMode):
    """Notes the size of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {_storage(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in old:
                self.bytes.append(tensor.numel() * tensor.element_size())
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
