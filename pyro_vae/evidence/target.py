"""A (model, guide) pair seen datum by datum: log p(x_n, z) for any rows n and many z at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae import programs
from pyro_vae.errors import ShapeError, SiteError, SupportError
from pyro_vae.evidence import kernels
from pyro_vae.likelihoods import describe
from pyro_vae.programs import PARTICLES, Pair, Site
from pyro_vae.typing import Program

PROBE_ROWS = 3


class Target:
    """The joint density of a (model, guide) pair, a datum a row.

    Args:
        model, guide: Pyro programs called with `x` and `args`; all their sites lie in one plate,
            whose index is the row.
        x: `(N, ...)`, on the device and in the precision of the programs.
        args: further arguments; tensors of length N are taken by row, as `x` is.

    Raises:
        SiteError: a site lies outside the plate of the data, a latent site is missing from the
            guide, nothing is observed, or a plate inside that of the data is subsampled.
    """

    def __init__(self, model: Program, guide: Program, x: Tensor, args: Sequence[Any] = ()) -> None:
        self.model, self.guide = model, guide
        self.arguments = (x, *args)
        self.size = len(x)
        rows = range(min(self.size, PROBE_ROWS))
        with torch.random.fork_rng(), torch.no_grad():
            self.nesting = programs.plate_nesting(model, guide, self._args(rows), {})
            run = self.pair(rows, 1).run()
        sites = [*run.model.items(), *run.guide.items()]
        self.plate = _data_plate(sites, len(rows))
        self.observed = {name for name, _ in run.observed}
        if not self.observed:
            raise SiteError("the model observes nothing: give it the data through obs=")
        self.model_sites, self.guide_sites = set(run.model), set(run.guide)
        self.event_dims = {name: len(site["fn"].event_shape) for name, site in run.guide.items()}
        self.latent_size = sum(value.numel() for value in run.values.values()) // len(rows)
        self.data_size = sum(s["value"].numel() for _, s in run.observed) // len(rows)
        self.bytes_per_pair = self._measure()

    def pair(self, rows: range, num_draws: int) -> Pair:
        """The programs on some rows, to be run for several draws at once."""
        return Pair(self.model, self.guide, self._args(rows), {}, num_draws, self.nesting)

    def log_joint(self, rows: range, values: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z), `(num_draws, rows)`.

        Args:
            values: the latent sites', `(num_draws, *batch, *event)`.

        Raises:
            SupportError: an observed value is outside the support of its distribution.
        """
        num_draws = len(next(iter(values.values())))
        if num_draws == 1:
            values = {name: value.squeeze(0) for name, value in values.items()}
        sites = self.pair(rows, num_draws).sites_at(self.model, values)
        check_same_sites(sites, self.model_sites, "model", rows)
        total: Tensor | float = 0.0
        for name, site in sites.items():
            if name in self.observed:
                _check_support(name, site, self.plate, rows)
            total = total + self.within(kernels.log_prob(site))
        return torch.as_tensor(total).expand(num_draws, len(rows))

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

    def _measure(self) -> int:
        """Memory that one (datum, draw) takes: its largest intermediate results together."""
        with torch.random.fork_rng(), torch.no_grad(), _Sizes() as sizes:
            self.pair(range(1), 1).run()
        return sum(sorted(sizes.bytes)[-4:])


def check_same_sites(
    sites: Mapping[str, Site], expected: set[str], program: str, rows: range
) -> None:
    """Raise `SiteError` where the structure of a program depends on the data or the draws."""
    if changed := sites.keys() ^ expected:
        raise SiteError(
            f"the {program}'s sites {sorted(changed)} come and go with the data: on rows "
            f"{rows.start} to {rows.stop - 1} it has {sorted(sites)}, on the first rows "
            f"{sorted(expected)}, so no rows can be weighed together"
        )


def _data_plate(sites: list[tuple[str, Site]], num_rows: int) -> int:
    """The dimension of the plate that every site is in and that has one index a row."""
    frames = [
        {f.dim: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}
        for _, site in sites
    ]
    candidates = [
        {dim for dim, frame in plates.items() if frame.size == num_rows} for plates in frames
    ]
    shared = set.intersection(*candidates)
    if not shared:
        raise _no_plate(sites, frames, candidates, num_rows)
    plate = min(shared)
    for (name, _), plates in zip(sites, frames, strict=True):
        for dim, frame in plates.items():
            if dim != plate and frame.full_size is not None and frame.full_size != frame.size:
                raise SiteError(
                    f'plate "{frame.name}" at site "{name}" is subsampled within a datum, so its '
                    "sum is an estimate and the weights of the datum are not: run it in full"
                )
    return plate


def _no_plate(
    sites: list[tuple[str, Site]],
    frames: list[dict[int, Any]],
    candidates: list[set[int]],
    num_rows: int,
) -> SiteError | ShapeError:
    lost = next((i for i, found in enumerate(candidates) if not found), 0)
    name, site = sites[lost]
    kind = "observed" if site["is_observed"] else "latent"
    plates = {frame.name: frame.size for frame in frames[lost].values()}
    if plates:
        return ShapeError(
            f'{kind} site "{name}" lies in plates of sizes {plates}, none of which is the '
            f"{num_rows} rows that the program was called with: its plate must follow the length "
            "of its argument"
        )
    return SiteError(
        f'{kind} site "{name}" lies in no plate: it is shared by all data, so log p(x) is no sum '
        "over data. Draw it within the plate of the data, or fix it with pyro.condition"
    )


def _check_support(name: str, site: Site, plate: int, rows: range) -> None:
    fn, value = site["fn"], site["value"]
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    outside = ~support.check(value)
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=value.device)
        outside = outside & mask.reshape(mask.shape + (1,) * len(fn.event_shape))
    if outside.any():
        index = outside.nonzero()[0].tolist()
        row_axis = value.dim() - len(fn.event_shape) + plate
        row = rows.start + (index[row_axis] if row_axis >= 0 else 0)
        place = [i for axis, i in enumerate(index) if axis != row_axis]
        shown = f" = {value[tuple(index)].item():g}" if outside.dim() == value.dim() else ""
        raise SupportError(
            f'observed site "{name}" takes {describe(support)}, but row {row}, position '
            f"{place}{shown} is outside"
        )


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
