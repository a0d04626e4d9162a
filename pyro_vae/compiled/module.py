"""Any objective of any (model, guide) as a fused loss, and an objective's terms from one graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_vae.compiled.backend import resolve
from pyro_vae.compiled.fused import Call, Computation, Fused
from pyro_vae.compiled.places import Territory
from pyro_vae.compiled.program import Backend
from pyro_vae.errors import CompileError, ConfigError
from pyro_vae.objectives.base import Objective, Terms
from pyro_vae.typing import Program


def compile(loss: nn.Module, *example: Any, backend: str | Backend = "inductor") -> CompiledLoss:
    """The loss of a (model, guide) as a compiled module: `compile(objective(model, guide), x)`.

    Model, guide and parameters stay what they are; only their effect handlers are gone. The result
    is differentiable in every parameter and argument that requires a gradient (once: the gradients
    come out of the same graph as the loss), and its parameters and `state_dict` are those of
    `objective(model, guide)`. Every call draws afresh, and draws what the eager loss would draw.

    The programs must have static structure. The tensors they use may change in place, and those in
    modules, other objects, lists and dictionaries, Pyro's store, closures and globals may be
    replaced as well. A Python number there that changes, an object that is replaced, and another
    argument that is no tensor are another program, compiled at the next call. So are the entries of
    containers and of arrays of numpy, of up to 64; those of longer ones stay what they are at the
    first call, and so does what comes from the environment, an iterator or a clock, what a function
    imports as it runs, and what a library's object knows (an optimizer's learning rate, a table of
    pandas, a `ContextVar`, a weak reference). Hand such to the program as an argument. (It is
    refused where it shows: two runs on the same draws must say the same.)

    Where the values of a tensor decide a shape (`x[mask]`), a place in a list or a choice (`if
    self.flag:`), it must be one that the programs hold and do not change, a buffer or a global, and
    no parameter. It is compared at every call, and other values are another program.

    What a program leaves in Python is left when it is compiled and not again: an attribute that
    holds its last draw, or the `weight` that `torch.nn.utils.prune` and the older `weight_norm` and
    `spectral_norm` work out from others (to prune once more, run the eager loss first). Parameters
    that it makes at first use are made then too, and the generators put back. Checks of
    distributions' arguments (`pyro.enable_validation`) are made then only.

    Every program stays for as long as the result does: of dozens of shapes, pad to a few.

    On a GPU the program draws there and takes its tensors there, numbers among them, or
    `CompiledSVI` does not capture it: what the CPU does in between is not in a captured graph.

    On a CPU under glibc the process keeps up to 512 MB of memory that it frees from then on, unless
    malloc's environment variables say otherwise.

    Args:
        loss: `objective(model, guide)`, of this library's objectives or of Pyro's that have a
            `differentiable_loss` (`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceTMC_ELBO`, and
            `TraceEnum_ELBO`, which enumerates as ever), or of a subclass of one.
        example: arguments to compile for now rather than at the first call.
        backend: `"inductor"`, another of `torch.compile`'s backends, or a function like those.

    Raises:
        ConfigError: `loss` is not such a module.
        CompileError: at call (here, if there is an `example`), see `CompiledLoss`.
    """
    compiled = CompiledLoss(loss, backend)
    if example:
        compiled(*example)
    return compiled


class CompiledLoss(nn.Module):
    """`objective(model, guide)`, compiled; see `compile`.

    The first call of each kind of arguments takes seconds. It runs the eager loss as well, on the
    same draws, and compares.

    Raises:
        CompileError: at call. The program cannot be traced, because what it does depends on the
            value of a tensor or changes Python state; the message names line or attribute. Or
            the compiled loss or gradients disagree with the eager ones.
        SiteError: at call, as the objective raises it.
    """

    def __init__(self, loss: nn.Module, backend: str | Backend = "inductor") -> None:
        if not isinstance(loss, ELBOModule):
            raise ConfigError(f"compile takes objective(model, guide), got {type(loss).__name__}")
        super().__init__()
        self.model = loss.model
        self.guide = loss.guide
        self.elbo = loss.elbo
        self._backend = backend
        self._fused: Fused | None = fuse_loss(self.elbo, self.model, self.guide, backend)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, differentiable; arguments are those of model and guide."""
        if self._fused is None:  # a copy, or of other parts than before
            self._fused = fuse_loss(self.elbo, self.model, self.guide, self._backend)
        outputs, _ = self._fused(*args, **kwargs)
        return outputs[0]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("model", "guide", "elbo"):
            self._fused = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles for its own parameters
        return {**super().__getstate__(), "_fused": None}


def fuse_loss(
    objective: Any, model: Program, guide: Program, backend: str | Backend = "inductor"
) -> Fused:
    """The differentiable loss alone, compiled; of an objective, or of a function of the pair."""
    return _fuse(loss_of(objective, model, guide), objective, model, guide, backend)


def loss_of(objective: Any, model: Program, guide: Program) -> Computation:
    """The loss of a pair by an objective, or by a function of the pair, as a computation.

    Raises:
        ConfigError: the objective has no differentiable loss.
    """
    name = type(objective).__name__
    if isinstance(objective, TraceTailAdaptive_ELBO):
        raise ConfigError(f"{name} has gradients but no loss to check and report")
    if isinstance(objective, JitTrace_ELBO | JitTraceMeanField_ELBO | JitTraceEnum_ELBO):
        raise ConfigError(f"{name} is compiled already, by torch.jit: give Trace_ELBO, or its like")
    if isinstance(objective, ELBO):
        if not hasattr(objective, "differentiable_loss"):
            raise ConfigError(
                f"{name} has no differentiable_loss, so it cannot be compiled. Trace_ELBO, "
                "TraceMeanField_ELBO and TraceEnum_ELBO have, and this library's objectives: IWAE "
                "for RenyiELBO, WakeSleep for ReweightedWakeSleep"
            )
        if _is_nearer(type(objective), "loss_and_grads", "differentiable_loss"):
            raise ConfigError(
                f"{name} overrides loss_and_grads, which a compiled step does not call: override "
                "differentiable_loss, whose gradient it takes"
            )
    loss = getattr(objective, "differentiable_loss", objective)

    def computation(*args: Any, **kwargs: Any) -> tuple[list[Tensor], None]:
        value = loss(model, guide, *args, **kwargs)
        if not isinstance(value, Tensor | float | int):
            raise ConfigError(f"{name} returned a {type(value).__name__}, which is no loss")
        # of programs without sites Pyro's is a number
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise ConfigError(
                f"{name} returned a tensor of shape {tuple(value.shape)}, and a loss is one number"
            )
        return [value], None

    return computation


def _is_nearer(cls: type, name: str, other: str) -> bool:
    """Whether a class has one attribute from a class that is nearer to it than the other's."""
    nearest = next(base for base in cls.__mro__ if name in vars(base) or other in vars(base))
    return other not in vars(nearest)


def terms(
    objective: Objective,
    model: Program,
    guide: Program,
    compile: bool | Literal["auto"] = "auto",
    backend: str | Backend = "inductor",
) -> CompiledTerms:
    """`objective.terms(model, guide, ...)` as a function of the programs' arguments, compiled.

    Args:
        compile: `True` raises what stands in the way of compiling; `"auto"` then warns once and
            goes on eagerly; `False` is eager.
        backend: see `compile`.
    """
    fused = fuse_terms(objective, model, guide, backend) if compile else None
    return CompiledTerms(partial(objective.terms, model, guide), fused, strict=compile is True)


class CompiledTerms:
    """A function that returns `Terms`: the loss differentiable, all else numbers to report.

    Args:
        eager: what it computes.
        fused: the same, compiled; None to run eagerly.
        strict: raise `CompileError` rather than warn once and run eagerly.
    """

    def __init__(self, eager: Callable[..., Terms], fused: Fused | None, strict: bool) -> None:
        self._eager, self._fused, self._strict = eager, fused, strict

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        call = self.prepare(*args, **kwargs)
        if call is None:
            return self._eager(*args, **kwargs)
        return unpack(*call.differentiable())

    def prepare(self, *args: Any, **kwargs: Any) -> Call | None:
        """The compiled call; None where it runs eagerly."""
        if self._fused is None:
            return None
        try:
            return self._fused.prepare(*args, **kwargs)
        except CompileError as error:
            if self._strict:
                raise
            self._fused = None
            warnings.warn(f"running without compiling: {error}", stacklevel=3)
            return None


def fuse_terms(
    objective: Objective, model: Program, guide: Program, backend: str | Backend = "inductor"
) -> Fused:
    """All terms of an objective from one compiled graph; `unpack` makes `Terms` of the result."""

    def computation(*args: Any, **kwargs: Any) -> tuple[list[Tensor], Any]:
        terms = objective.terms(model, guide, *args, **kwargs)
        tensors = [terms.loss, terms.reconstruction, terms.kl, *terms.kl_per_dimension.values()]
        return tensors, (tuple(terms.kl_per_dimension), dict(terms.estimators))

    return _fuse(computation, objective, model, guide, backend)


def unpack(outputs: list[Tensor], names: Any) -> Terms:
    """The terms that a fused computation returned as a list."""
    sites, estimators = names
    loss, reconstruction, kl, *per_dimension = outputs
    return Terms(loss, reconstruction, kl, dict(zip(sites, per_dimension, strict=True)), estimators)


def _fuse(
    computation: Any, objective: Any, model: Program, guide: Program, backend: str | Backend
) -> Fused:
    territory = Territory({"model": model, "guide": guide, "objective": objective})
    return Fused(computation, territory, resolve(backend, objective))
