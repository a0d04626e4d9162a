"""What the sites of a (model, guide) must be for log p(x) to be a sum over data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import constraints
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyro_vae import programs
from pyro_vae.errors import DataError, PyroVAEError, ShapeError, SiteError, SupportError
from pyro_vae.likelihoods.base import first
from pyro_vae.programs import PARTICLES, Run, Site

REAL = (constraints.real, constraints.real_vector)


@contextmanager
def explained(program: str, args: Sequence[Any], num_draws: int) -> Iterator[None]:
    """Say of an error of a program on which arguments it came, without Pyro's table of shapes.

    Raises:
        DataError: the program raised a ValueError, RuntimeError or TypeError; errors of this
            library keep their type.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        what = str(error).split("Trace Shapes:")[0].strip()
        given = ", ".join(
            f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')}" if isinstance(a, Tensor)
            else type(a).__name__ for a in args
        )  # fmt: skip
        times = f" for {num_draws} draws at once (as in a vectorized plate)" * (num_draws > 1)
        kind = type(error) if isinstance(error, PyroVAEError) else DataError
        raise kind(
            f"the {program} does not run on the first rows of x{times}, {given}: {what}"
            f"{_not_finite(args[0])}"
        ) from error


@contextmanager
def told_of_nan(program: str, x: Any, rows: range) -> Iterator[None]:
    """Say of an error on some rows which value of theirs is not finite, if one is: a NaN shows far
    from where it came in, as a parameter that a distribution refuses.

    Raises:
        DataError: the program raised a ValueError or RuntimeError, and a value is not finite.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if _get_current_dispatch_mode() is not None:  # a trace knows no values
            raise
        culprit = _not_finite(x, rows.start)
        if isinstance(error, PyroVAEError) or not culprit:
            raise
        what = str(error).split("Trace Shapes:")[0].strip()
        raise DataError(f"the {program} does not run: {what}{culprit}") from error


def _not_finite(x: Any, start: int = 0) -> str:
    """The first value of rows from `start` on that is not finite, to end a message with."""
    if not isinstance(x, Tensor) or x.isfinite().all():
        return ""
    return f"; {first(~x.isfinite(), x, start)}"


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


def check_observed(sites: Mapping[str, Site], expected: set[str], rows: range) -> None:
    """Raise `SiteError` where a site is observed for some data only."""
    observed = {name for name, site in sites.items() if site["is_observed"]}
    if changed := observed ^ expected:
        raise SiteError(
            f"the model's sites {sorted(changed)} are observed for some data and latent for others "
            f"(rows {rows.start} to {rows.stop - 1} are unlike the first): where data are missing, "
            "mask the site instead"
        )


def check_auxiliary(run: Run) -> None:
    """Raise `SiteError` where the guide draws what is no latent site of the model."""
    for name, site in run.auxiliary:
        if not site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise SiteError(
                f'the guide draws "{name}", which is no latent site of the model, so that its '
                "density has no counterpart in p(x, z) and the weights would not average to p(x): "
                'leave it out (what other sites are made of is marked infer={"is_auxiliary": True})'
            )


def check_point_masses(guide: Mapping[str, Site]) -> None:
    """Raise `SiteError` where two draws of the guide are always the same.

    Args:
        guide: its sites, run for two draws.
    """
    for name, site in guide.items():
        fn, value = site["fn"], site["value"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, Delta) and (value[0] == value[-1]).all():
            raise SiteError(
                f'the guide\'s site "{name}" is a point mass (Delta), which has no density to '
                "weigh p(x, z) by: draw it from a distribution"
            )


def check_alike(
    once: Mapping[str, Tensor],
    again: Mapping[str, Tensor],
    apart: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Raise `SiteError` where the same values of the same rows have different densities.

    Args:
        once, again: of two runs of the model, by site.
        apart: of runs on one row each.
        tolerance: what rounding may do, relative and absolute: it differs with a product's shape.
    """
    for name, value in once.items():
        for other, told in (
            (again[name], "is another at every run: is there dropout that is always on, or a draw "
             "outside pyro.sample?"),
            (apart[name], "changes with the rows beside it: is there batch normalisation that is "
             "always training, or a sum over rows?"),
        ):  # fmt: skip
            if not torch.allclose(value, other, tolerance, tolerance, equal_nan=True):
                raise SiteError(f'the density of a row at site "{name}" {told}')


def check_enumerable(sites: Mapping[str, Site], guide: list[str], enumerate_all: bool) -> None:
    """Raise `SiteError` unless every one of the sites has finitely many values to sum over."""
    for name, site in sites.items():
        if site["fn"].has_enumerate_support:
            continue
        kind = type(site["fn"]).__name__
        if enumerate_all:
            raise SiteError(
                f'latent site "{name}" is drawn from {kind}, whose values cannot be enumerated: '
                'method="enumerate" needs every latent site discrete and finite'
            )
        raise SiteError(
            f'the model\'s latent site "{name}" is missing from the guide, whose sites are '
            f"{guide}: sample it there, or observe it in the model. Only discrete sites with "
            "finitely many values may be left to the model"
        )


def discrete_values(name: str, site: Site, plate: int) -> Tensor:
    """All values of a discrete site, `(number, *event)`."""
    fn = site["fn"]
    if any(size > 1 for dim, size in enumerate(reversed(fn.batch_shape), 1) if -dim != plate):
        raise SiteError(
            f'discrete site "{name}" has several values a datum (batch shape '
            f"{tuple(fn.batch_shape)}): give each a site of its own, or draw them in the guide"
        )
    support = fn.enumerate_support(expand=False)
    return support.reshape(len(support), *fn.event_shape)


def data_plates(sites: Sequence[tuple[str, Site]], num_rows: int) -> set[int]:
    """The dimensions of the plates that every site is in and that have one index a row.

    Raises:
        SiteError, ShapeError: there are sites, and none.
    """
    if not sites:
        return set()
    frames = [_plates(site) for _, site in sites]
    candidates = [
        {dim for dim, frame in plates.items() if frame.size == num_rows} for plates in frames
    ]
    shared = set.intersection(*candidates)
    if not shared:
        raise _no_plate(sites, frames, candidates, num_rows)
    return shared


def check_subsampling(sites: Sequence[tuple[str, Site]], plate: int) -> None:
    """Raise `SiteError` where another plate than that of the data takes some of its indices."""
    for name, site in sites:
        for dim, frame in _plates(site).items():
            if dim != plate and frame.full_size is not None and frame.full_size != frame.size:
                raise SiteError(
                    f'plate "{frame.name}" at site "{name}" is subsampled within a datum, so its '
                    "sum is an estimate and the weights of the datum are not: run it in full"
                )


def _plates(site: Site) -> dict[int, Any]:
    frames = site["cond_indep_stack"]
    return {f.dim: f for f in frames if f.vectorized and f.name != PARTICLES}


def _no_plate(
    sites: Sequence[tuple[str, Site]],
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
            "of its argument, since not all rows are evaluated at once"
        )
    return SiteError(
        f'{kind} site "{name}" lies in no plate: it is shared by all data, so log p(x) is no sum '
        "over data. Draw it within the plate of the data, or fix it with pyro.condition"
    )


def plain_support(fn: Any) -> constraints.Constraint:
    """The support of a distribution's single values, without the wrapping of events; all of the
    real line where the distribution does not tell."""
    try:
        support = fn.support
    except NotImplementedError:
        return constraints.real
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def outside_support(site: Site) -> Tensor | None:
    """1 where a value is impossible, in the site's batch shape; None where every value is possible.

    Densities are not to be asked there: a Gamma's is NaN at a negative number.
    """
    fn, support = site["fn"], plain_support(site["fn"])
    if support in REAL or constraints.is_dependent(support):
        return None
    return programs.masked(site, (~fn.support.check(site["value"])).double())


def outside_observed(site: Site) -> Tensor:
    """Which observed values are outside their distribution's support, and not masked."""
    fn, value = site["fn"], site["value"]
    outside = ~plain_support(fn).check(value)
    if site["mask"] is None:
        return outside
    mask = torch.as_tensor(site["mask"], device=value.device)
    return outside & mask.reshape(mask.shape + (1,) * len(fn.event_shape))


def check_support(name: str, site: Site, plate: int, rows: range) -> None:
    """Raise `SupportError` where an observed value is outside its distribution's support.

    Args:
        plate: the dimension of the data's plate, to name the row by.
        rows: those that the site was run on.
    """
    fn, value = site["fn"], site["value"]
    outside = outside_observed(site)
    if outside.any():
        index = outside.nonzero()[0].tolist()
        row_axis = value.dim() - len(fn.event_shape) + plate
        row = rows.start + (index[row_axis] if row_axis >= 0 else 0)
        place = [i for axis, i in enumerate(index) if axis != row_axis]
        shown = f" = {value[tuple(index)].item():g}" if outside.dim() == value.dim() else ""
        raise SupportError(
            f'observed site "{name}" takes values in {plain_support(fn)}, but row {row}, position '
            f"{place}{shown} is outside"
        )
