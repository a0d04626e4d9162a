"""Any Pyro (model, guide), run once and taken apart site by site.

Objectives and evaluators see a program only through what is here, so they serve every pair of
callables, not only this library's `VAE`. All log-densities are in nats.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor, nn

from pyro_vae.errors import SiteError
from pyro_vae.reach import reach
from pyro_vae.seeding import generators_put_back
from pyro_vae.typing import Program

Site = dict[str, Any]
PARTICLES = "num_particles_vectorized"


@dataclass(frozen=True)
class Run:
    """One joint run: the guide's sites, and the model's with the guide's values in place.

    Attributes:
        model, guide: the sample sites by name, in the order in which they ran; without those of
            `pyro.deterministic`, which have no density.
        subsamples: the rows that each plate took, by the plate's name.
        leaves: the guide's draws as constants to differentiate by, where the model was run at
            those.
        enumerated: the guide's sites that took all their values at once, and the dimension, left of
            all plates, that the values are along; in the order in which they ran.
    """

    model: Mapping[str, Site]
    guide: Mapping[str, Site]
    subsamples: Mapping[str, Tensor] = field(default_factory=dict)
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    enumerated: Mapping[str, int] = field(default_factory=dict)

    @property
    def observed(self) -> Iterator[tuple[str, Site]]:
        """The model's observed sites."""
        return ((name, site) for name, site in self.model.items() if site["is_observed"])

    @property
    def latent(self) -> Iterator[tuple[str, Site]]:
        """The model's latent sites."""
        return ((name, site) for name, site in self.model.items() if not site["is_observed"])

    @property
    def values(self) -> dict[str, Tensor]:
        """The guide's draws."""
        return {name: site["value"] for name, site in self.guide.items()}

    @property
    def auxiliary(self) -> Iterator[tuple[str, Site]]:
        """The guide's sites that are no latents of the model (an AutoGuide's unconstrained
        values)."""
        latent = dict(self.latent)
        return ((name, site) for name, site in self.guide.items() if name not in latent)


@dataclass(frozen=True)
class Pair:
    """A model and a guide with their arguments, run for several particles at once.

    Attributes:
        num_particles: draws at once, in an outermost plate left of `nesting` dimensions of others.
        enumerate: whether `run` gives the guide's sites marked `infer={"enumerate": "parallel"}`
            all their values instead of one draw.
    """

    model: Program
    guide: Program
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_particles: int = 1
    nesting: int = 0
    enumerate: bool = False

    def run(self, leaves: bool = False) -> Run:
        """Draw from the guide and replay the model at the draws.

        Args:
            leaves: replay it at the draws as constants, `Run.leaves`.

        Raises:
            SiteError: a latent site of the model has no counterpart in the guide; or, where Pyro's
                validation is on, a site has batch dimensions that no plate declares.
        """
        guide = self._vectorized(self.guide)
        if self.enumerate:
            guide = poutine.enum(guide, first_available_dim=-1 - self._dims)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        guide_sites = _sample_sites(guide_trace)
        cut = {name: _leaf(site["value"]) for name, site in guide_sites.items()} if leaves else {}
        model_trace = poutine.trace(
            poutine.replay(self._vectorized(self.model), trace=_with_values(guide_trace, cut))
        ).get_trace(*self.args, **self.kwargs)
        subsamples = {**_subsamples(guide_trace), **_subsamples(model_trace)}
        run = Run(
            _sample_sites(model_trace), guide_sites, subsamples, cut, _enumerated(guide_sites)
        )
        for name, _ in run.latent:
            if name not in run.guide:
                raise SiteError(
                    f'the model\'s latent site "{name}" is missing from the guide, whose sites '
                    f"are {sorted(run.guide)}: sample it there, or observe it in the model"
                )
        if is_validation_enabled():
            dims = self._dims if self.enumerate else sys.maxsize
            check_model_guide_match(model_trace, guide_trace, dims)
            for name, site in [*run.model.items(), *run.guide.items()]:
                _check_batch_shape(name, site, dims)
        return run

    def sites_at(self, program: Program, values: Mapping[str, Tensor]) -> dict[str, Site]:
        """The sample sites of a program run at the given values instead of draws of its own.

        A plate's name stands for the rows it takes: give `Run.subsamples` beside the draws, or a
        subsampled plate takes others.
        """
        with substitute(values):
            trace = poutine.trace(self._vectorized(program)).get_trace(*self.args, **self.kwargs)
        return _sample_sites(trace)

    @property
    def _dims(self) -> int:
        """Dimensions of plates, that of the particles included."""
        return self.nesting + (self.num_particles > 1)

    def _vectorized(self, program: Program) -> Program:
        if self.num_particles == 1:
            return program
        return pyro.plate(PARTICLES, self.num_particles, dim=-1 - self.nesting)(program)


def plate_nesting(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int:
    """How many dimensions the program's plates take, found by one run that leaves no trace.

    The generators are restored, so that looking does not change what is drawn afterwards, and the
    run is in evaluation mode, so that batch normalisation does not count it.
    """
    with (
        generators_put_back(),
        torch.no_grad(),
        poutine.block(),
        evaluating(model, guide),
    ):
        run = Pair(model, guide, args, kwargs).run()
    sites = [*run.model.values(), *run.guide.values()]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def log_prob(site: Site) -> Tensor:
    """log-density at the site's value, masked but not scaled, in the site's batch shape."""
    if "log_prob" in site:
        return site["log_prob"]
    return masked(site, site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]))


def masked(site: Site, value: Tensor) -> Tensor:
    """A batch-shaped tensor with zero where the site is masked out."""
    return scale_and_mask(value, 1.0, site["mask"])


def same_scale(a: Site, b: Site) -> bool:
    """Whether two sites carry the same scale and the same mask."""
    return equal(a["scale"], b["scale"]) and equal(a["mask"], b["mask"])


def shared_plates(sites: Sequence[Site]) -> list[int]:
    """The dimensions (negative, ascending) of the plates that every one of these sites is in.

    Given the plates' arguments, the program's joint density factorises over these dimensions: each
    index is a datum with latent variables of its own.
    """
    plates = [
        {(f.dim, f.name) for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}
        for site in sites
    ]
    return sorted(dim for dim, _ in set.intersection(*plates)) if plates else []


def sum_within(
    value: Tensor, plates: Sequence[int], nesting: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum a batch-shaped tensor over all plates but these: `(num_particles, *sizes of plates)`."""
    value = value.reshape((1,) * (1 + nesting - value.dim()) + value.shape)
    inner = [dim for dim in range(-nesting, 0) if dim not in plates]
    return value.sum(inner, dtype=dtype) if inner else value.to(dtype or value.dtype)


def frozen_sites(pair: Pair, values: Mapping[str, Tensor]) -> dict[str, Site]:
    """The guide's sites at `values`, and their log-densities, its parameters being constants.

    Gradients still flow through the values; this is the stopped log q of the path-derivative
    estimators (Roeder et al. 2017). The guide's param messages stay within, so that SVI moves the
    parameters themselves and not their constant stand-ins; so do its buffers, of which batch
    normalisation would otherwise count the batch twice.

    Raises:
        SiteError: a plain function uses parameters that nobody can reach from outside
            (`pyro.module` within a function).
    """
    is_module = isinstance(pair.guide, nn.Module)
    weigh = _Weigh(pair.guide)
    stopped = {name: p.detach() for name, p in weigh.named_parameters()}
    stopped |= {name: b.clone() for name, b in weigh.named_buffers()}
    with (
        poutine.block(hide_types=["param"]),
        _DetachParams(refuse_modules=not is_module),
        warnings.catch_warnings(),
    ):
        # pyro.module remarks on every parameter that it finds without a gradient
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        return torch.func.functional_call(weigh, stopped, (pair, values))


class _Weigh(nn.Module):
    """Runs a program at given values and takes the log-densities before it returns: a flow's
    density runs its network when it is asked for, and must find the parameters swapped then."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, pair: Pair, values: Mapping[str, Tensor]) -> dict[str, Site]:
        sites = pair.sites_at(self.program, values)
        return {name: {**site, "log_prob": log_prob(site)} for name, site in sites.items()}


class substitute(Messenger):
    """Give sample sites the values by name, without observing them."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class _DetachParams(Messenger):
    """Cut the gradient at every `pyro.param`."""

    def __init__(self, refuse_modules: bool = False) -> None:
        super().__init__()
        self.refuse_modules = refuse_modules

    def _pyro_post_param(self, msg: Any) -> None:
        if self.refuse_modules and "$$$" in msg["name"]:
            raise SiteError(
                f'parameter "{msg["name"]}" belongs to a module inside a plain function, where its '
                "gradient cannot be stopped: make the guide an nn.Module"
            )
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def modules_of(*programs: Program) -> list[nn.Module]:
    """The outermost modules that programs are made of: a module itself, the owner of a bound
    method, and what functions (handlers of `poutine` among them) and plain objects hold, in
    closures, partials, globals, attributes, lists and dictionaries."""
    found = reach({f"program {i}": program for i, program in enumerate(programs)}).modules
    within = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in within]


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """The modules of `programs` in evaluation mode, and every submodule as it was afterwards."""
    modules = [m for module in modules_of(*programs) for m in module.modules()]
    modes = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    nodes = prune_subsample_sites(trace).nodes
    return {
        name: dict(site)
        for name, site in nodes.items()
        if site["type"] == "sample" and not (site["infer"] or {}).get("_deterministic")
    }


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _with_values(trace: poutine.Trace, values: Mapping[str, Tensor]) -> poutine.Trace:
    """A copy of a trace with other values at some of its sites."""
    other = trace.copy()
    for name, value in values.items():
        other.nodes[name] = {**trace.nodes[name], "value": value}
    return other


def _subsamples(trace: poutine.Trace) -> dict[str, Any]:
    nodes = trace.nodes.items()
    return {name: site["value"] for name, site in nodes if site_is_subsample(site)}


def _enumerated(guide: Mapping[str, Site]) -> dict[str, int]:
    dims = {
        n: s["infer"]["_enumerate_dim"] for n, s in guide.items() if "_enumerate_dim" in s["infer"]
    }
    if len(set(dims.values())) < len(dims):
        raise SiteError(
            f"the enumerated sites {list(dims)} share dimensions, as pyro.markov lets them: leave "
            "pyro.markov out, or use pyro.infer.TraceEnum_ELBO"
        )
    return dims


def _check_batch_shape(name: str, site: Site, dims: int) -> None:
    """Left of `dims` dimensions are enumerated values, which no plate declares."""
    declared = {f.dim for f in site["cond_indep_stack"] if f.vectorized}
    batch_shape = site["fn"].batch_shape
    for dim in range(-min(len(batch_shape), dims), 0):
        if batch_shape[dim] != 1 and dim not in declared:
            raise SiteError(
                f'site "{name}" has batch shape {tuple(batch_shape)}, and no plate declares its '
                f"dimension {dim}: put the site in a pyro.plate, or make the dimension part of "
                "the event with .to_event()"
            )


def equal(a: Any, b: Any) -> bool:
    """Whether two scales or masks (numbers, tensors or None) are the same."""
    if a is b or a is None or b is None:
        return a is b
    same = getattr(a, "shape", ()) == getattr(b, "shape", ()) and a == b
    return bool(same.all() if isinstance(same, Tensor) else same)
