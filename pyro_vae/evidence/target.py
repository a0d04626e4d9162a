"""A (model, guide) pair seen datum by datum: log p(x_n, z) for any rows n and many z at once."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_vae import programs
from pyro_vae.errors import SiteError
from pyro_vae.evidence import kernels
from pyro_vae.evidence.arithmetic import FastArithmetic
from pyro_vae.evidence.inner_loop import Function, InnerLoop
from pyro_vae.evidence.sites import (
    check_alike,
    check_auxiliary,
    check_enumerable,
    check_observed,
    check_same_sites,
    check_subsampling,
    check_support,
    data_plates,
    discrete_values,
    explained,
    outside_support,
    told_of_nan,
)
from pyro_vae.programs import Pair, Run, Site
from pyro_vae.seeding import derive, generators_put_back
from pyro_vae.typing import Compile, Program

PROBE_ROWS = 3


class Target:
    """The joint density of a (model, guide) pair, a datum a row.

    Args:
        model, guide: Pyro programs called with `x` and `args`; all their sites lie in one plate,
            whose index is the row.
        x: `(N, ...)`, on the device and in the precision of the programs.
        args: further arguments; tensors of length N are taken by row, as `x` is.
        enumerate_all: sum over all latent sites, which must be discrete, and leave the guide out.
        compile: whether functions given to `looped` are compiled.

    Attributes:
        ids: numbers of the rows that fix their random streams.
        evaluations: (datum, draw) pairs that the model was run on so far.

    Raises:
        SiteError: a site lies outside the plate of the data, a latent site is missing from the
            guide or the guide draws one that the model lacks or that has no density, nothing is
            observed, a plate inside that of the data is subsampled, or the density of a row is
            random or depends on the rows beside it.
        DataError: a program does not run on `x`, or not for several draws at once.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        x: Tensor,
        args: Sequence[Any] = (),
        enumerate_all: bool = False,
        compile: Compile = False,
    ) -> None:
        self.ids: Sequence[int] = range(len(x))
        self.model, self.guide = model, guide
        self.arguments = (x, *args)
        self.by_row = [isinstance(a, Tensor) and a.dim() and len(a) == len(x) for a in (x, *args)]
        self.size = len(x)
        self.evaluations = 0
        self.nesting = 0
        self.enumerate_all = enumerate_all
        self.check_support = check_support
        self.compile = compile
        rows = range(min(self.size, PROBE_ROWS))
        run = self._probe(rows, 1)
        sites = [*run.model.items(), *run.guide.items()]
        self.nesting = max(
            (-f.dim for _, s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0
        )
        self.observed = {name for name, _ in run.observed}
        if not self.observed:
            raise SiteError("the model observes nothing: give it the data through obs=")
        check_auxiliary(run)
        missing = {name: s for name, s in run.latent if name not in run.guide}
        check_enumerable(missing, sorted(run.guide), enumerate_all)
        self.plate = self._data_plate(sites, rows)
        self.supports = {name: discrete_values(name, s, self.plate) for name, s in missing.items()}
        self.model_sites, self.guide_sites = set(run.model), set(run.guide)
        self.event_dims = {name: len(s["fn"].event_shape) for name, s in run.model.items()} | {
            name: len(s["fn"].event_shape) for name, s in run.guide.items()
        }
        self.latent_size = sum(value.numel() for value in run.values.values()) // len(rows)
        self.data_size = sum(s["value"].numel() for _, s in run.observed) // len(rows)
        self._check_rows_apart(rows, run)
        if not enumerate_all:
            self._probe(rows, 2)
        self.bytes_per_pair = self._measure()
        self._prior_and_joint = self.looped(Target._weighed)

    def looped(self, function: Function) -> Function:
        """A function of a target (this one, or a subset of it), its rows and values of its sites,
        as it is run many times: compiled, if that is wanted."""
        return InnerLoop(function, self, self.compile is True) if self.compile else function

    def arguments_of(self, rows: range) -> tuple[Any, ...]:
        """What the programs are called with on some rows."""
        return self._take(slice(rows.start, rows.stop))

    def subset(self, chosen: Sequence[int]) -> Target:
        """The target of some of the rows, which keep their random streams."""
        part = copy.copy(self)
        index = torch.as_tensor(list(chosen), device=self.arguments[0].device)
        part.arguments = self._take(index)
        part.ids = [self.ids[i] for i in chosen]
        part.size, part.evaluations = len(part.ids), 0
        return part

    def seeds(self, rows: range, seed: int, *keys: int) -> list[int]:
        """A seed for each of the rows."""
        return [derive(seed, self.ids[row], *keys) for row in rows]

    def pair(self, rows: range, num_draws: int) -> Pair:
        """The programs on some rows, to be run for several draws at once."""
        return Pair(self.model, self.guide, self.arguments_of(rows), {}, num_draws, self.nesting)

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
        # a gradient is taken of the operations themselves
        weigh = Target._weighed if torch.is_grad_enabled() else self._prior_and_joint
        prior, joint = weigh(self, rows, values)
        return prior, joint

    def _weighed(self, rows: range, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
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
        with told_of_nan("model", pair.args[0], rows), FastArithmetic():
            sites = pair.sites_at(self.model, values)
        check_same_sites(sites, self.model_sites, "model", rows)
        check_observed(sites, self.observed, rows)
        prior = torch.zeros((), dtype=torch.float64, device=self.arguments[0].device)
        likelihood, outside = torch.zeros_like(prior), []
        for name, site in sites.items():
            if name in self.observed:
                self.check_support(name, site, self.plate, rows)
                likelihood = likelihood + self.within(kernels.log_prob(site))
            else:
                prior = prior + self.within(kernels.log_prob(site))
                outside += [] if (out := outside_support(site)) is None else [self.within(out) > 0]
        joint = prior + likelihood
        for out in outside:  # a guide may draw what the model cannot, where densities are NaN
            prior, joint = (torch.where(out, -math.inf, value) for value in (prior, joint))
        shape = (pair.num_particles, len(rows))
        return prior.expand(shape), joint.expand(shape)

    def within(self, value: Tensor) -> Tensor:
        """Sum a batch-shaped tensor to `(num_draws, rows)`, float64."""
        return programs.sum_within(value, [self.plate], self.nesting, torch.float64)

    def axis(self, name: str) -> int:
        """The dimension of a latent site's value that is indexed by row, from the right."""
        return self.plate - self.event_dims[name]

    def select(self, values: Mapping[str, Tensor], rows: slice, draws: slice) -> dict[str, Tensor]:
        """The values of some of the rows and draws."""
        return {
            name: value[draws].narrow(self.axis(name), rows.start, rows.stop - rows.start)
            for name, value in values.items()
        }

    def _take(self, rows: Any) -> tuple[Any, ...]:
        pairs = zip(self.arguments, self.by_row, strict=True)
        return tuple(a[rows] if by_row else a for a, by_row in pairs)

    def _probe(self, rows: range, num_draws: int) -> Run:
        """One run on the first rows; sites that the guide lacks draw from the model."""
        pair = self.pair(rows, num_draws)
        with generators_put_back(), torch.no_grad():
            with explained("guide", pair.args, num_draws):
                guide = {} if self.enumerate_all else pair.sites_at(self.guide, {})
            data_plates(list(guide.items()), len(rows))  # a guide of other rows says so itself
            values = {name: site["value"] for name, site in guide.items()}
            with explained("model", pair.args, num_draws):
                return Run(pair.sites_at(self.model, values), guide)

    def _data_plate(self, sites: Sequence[tuple[str, Site]], rows: range) -> int:
        """The plate that follows the rows, not one that happens to be as long as they are many."""
        found = data_plates(sites, len(rows))
        if len(found) > 1 and len(rows) > 1:
            fewer = self._probe(rows[:-1], 1)
            found &= data_plates([*fewer.model.items(), *fewer.guide.items()], len(rows) - 1)
        plate = min(found)
        check_subsampling(sites, plate)
        return plate

    def _check_rows_apart(self, rows: range, run: Run) -> None:
        """Raise `SiteError` unless a row's density depends on the row and on z alone."""
        values = {name: site["value"].unsqueeze(0) for name, site in run.latent}

        def terms(part: range) -> dict[str, Tensor]:
            """By site, `(1, rows)`."""
            chosen = self.select(values, slice(part.start, part.stop), slice(0, 1))
            pair = self.pair(part, 1)
            with explained("model", pair.args, 1):
                sites = pair.sites_at(self.model, {n: v.squeeze(0) for n, v in chosen.items()})
                check_same_sites(sites, self.model_sites, "model", part)
                return {
                    name: self.within(kernels.log_prob(site)).expand(1, len(part))
                    for name, site in sites.items()
                }

        with generators_put_back(), torch.no_grad():
            once, again = terms(rows), terms(rows)
            single = [terms(range(row, row + 1)) for row in rows]
        apart = {name: torch.cat([part[name] for part in single], 1) for name in once}
        x = self.arguments[0]
        rounding = torch.finfo(x.dtype).eps ** 0.5 if x.is_floating_point() else 0.0
        check_alike(once, again, apart, max(1e-3, rounding))

    def _measure(self) -> int:
        """Memory that one more (datum, draw) takes: its largest intermediate results together.

        What does not grow with their number (the encoded pseudo-inputs of a VampPrior) is left out.
        """
        few, more = self._sizes(1), self._sizes(2)
        grown = [b - a for a, b in zip(few, more, strict=False)] if len(few) == len(more) else more
        return max(1, sum(sorted(grown)[-4:]))

    def _sizes(self, num: int) -> list[int]:
        """Sizes of the intermediate results of the densities of `num` more pairs than one."""
        draws = 1 if self.enumerate_all else 1 + num
        pair = self.pair(range(min(1 + num, self.size) if self.enumerate_all else 1), draws)
        with generators_put_back(), torch.no_grad(), _Sizes() as sizes:
            for site in pair.sites_at(self.model, {}).values():
                kernels.log_prob(site)
        return sizes.bytes


class _Sizes(TorchFunctionMode):
    """Notes the size of every new tensor. (A dispatch mode would see those within functions too,
    and take seconds to import torch's compiler.)"""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {_storage(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in old:
                self.bytes.append(tensor.numel() * tensor.element_size())
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
