"""Pyro's SVI with the step compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils._pytree import tree_iter

from pyro_vae.compiled.backend import resolve
from pyro_vae.compiled.fused import Computation, Fused
from pyro_vae.compiled.module import loss_of
from pyro_vae.compiled.places import Territory
from pyro_vae.compiled.program import Backend, Results
from pyro_vae.compiled.step import NOTHING_TO_TRAIN, Taken, fuse_step
from pyro_vae.errors import ConfigError, NonFiniteError
from pyro_vae.programs import modules_of
from pyro_vae.typing import Program

_PARTS = ("model", "guide", "optim", "loss")
# torch's optimizers that can update all parameters in one kernel, on the CPU and on CUDA
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class CompiledSVI:
    """`pyro.infer.SVI`, compiled: the same arguments, the same losses, draw for draw.

    (What a guide draws to set itself up, as Pyro's AutoGuides do at their first call, does not
    count: the generators are put back.) The first step with each kind of arguments takes seconds,
    in which the program is traced, fused and held against the eager loss and gradients on the same
    draws. `pyro_vae.compile` says what a program must keep to, and what compiling does to the
    process's memory. Model, guide, optimizer and loss may be exchanged for others
    (`svi.optim = ...`), which compiles anew.

    Args:
        model, guide: the programs.
        optim: a `torch.optim.Optimizer` over the parameters to train, or a `pyro.optim.PyroOptim`,
            which trains every parameter that the programs register (`pyro.param`, `pyro.module`).
            torch's Adam and AdamW are much the fastest: their update becomes part of the graph, and
            on CUDA the whole step is captured and replayed as one launch. Another that has a fused
            version is told to use it, where the user did not choose. Where parameters have hooks,
            torch takes the step, and calls them. It cannot be seen whether the nodes have any that
            add a parameter's gradient up (`AccumulateGrad`): `pyro_vae.compile` calls those.
        loss: an objective of this library, one of Pyro's that has a `differentiable_loss`, or a
            function `loss(model, guide, *args, **kwargs)` that returns a tensor.
        backend: see `pyro_vae.compile`.

    Raises:
        ConfigError: `optim` or `loss` is not as above.
        CompileError, SiteError: at a step, see `pyro_vae.compiled.CompiledLoss`.
        NonFiniteError: at a step, see `step`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: torch.optim.Optimizer | PyroOptim,
        loss: ELBO | Callable[..., Tensor],
        *,
        backend: str | Backend = "inductor",
    ) -> None:
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self._backend = backend
        self._build()

    def _build(self) -> None:
        optim = self.optim
        if not isinstance(optim, torch.optim.Optimizer | PyroOptim):
            raise ConfigError(
                f"optim is a torch.optim.Optimizer or a pyro.optim.PyroOptim, got {optim!r}"
            )
        if isinstance(optim, torch.optim.LBFGS):
            raise ConfigError("LBFGS evaluates the loss as often as it likes: use pv.compile")
        roots = {"model": self.model, "guide": self.guide, "objective": self._objective}
        computation = loss_of(self._objective, self.model, self.guide)
        self._step = fuse_step(computation, roots, optim, self._backend)
        if isinstance(optim, PyroOptim):
            computation = _registering(computation)
        self._loss = Fused(computation, Territory(roots), resolve(self._backend, self._objective))
        if self._step is None:
            _choose_fused(optim)

    @property
    def loss(self) -> Callable[..., Any]:
        """The eager loss, `loss(model, guide, *args, **kwargs)`, as Pyro's SVI has it."""
        return getattr(self._objective, "loss", self._objective)

    @loss.setter
    def loss(self, loss: ELBO | Callable[..., Tensor]) -> None:
        self._objective = loss

    @property
    def loss_and_grads(self) -> Callable[..., Any]:
        """The eager loss, whose gradients are left in the parameters, as Pyro's SVI has it."""
        return self._objective.loss_and_grads  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _PARTS and "_loss" in vars(self):
            self._build()

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles for its own parameters
        return {key: held for key, held in vars(self).items() if key not in ("_loss", "_step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._build()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step; returns the loss, in nats. Arguments go to model and guide.

        Raises:
            ConfigError: gradients are off (`torch.no_grad`).
            NonFiniteError: the loss or its gradient is NaN or infinite. Parameters and the
                optimizer's state are those from before the step; where the update is in the graph,
                buffers are too.
        """
        loss, finite = self._taken(self._step, *args, **kwargs)
        if not finite:
            raise self._not_finite(loss, args, kwargs)
        return loss.item()

    def steps(self, *args: Tensor) -> Tensor:
        """Take a step on each slice of the arguments, as `jax.lax.scan` does.

        In between nothing else is looked at, and where Adam's update is in the graph a GPU is not
        waited for, so a small model's step takes a fraction of `step`'s time. Give as many as there
        are: the whole shuffled epoch, say, or one batch again and again, without a copy:
        `svi.steps(x.expand(1000, *x.shape))`.

        Args:
            args: tensors `(n, ...)`; the i-th step is `step` of their i-th rows.

        Returns:
            The losses `(n,)`, in nats, each from before its step.

        Raises:
            ConfigError: not all are tensors of the same length, one or more; gradients are off.
            NonFiniteError: as `step` does, and names the first such step. On a GPU it is raised
                after the last: the steps that were not finite changed nothing, the others were
                taken.
        """
        count = _length(args)
        losses: list[Tensor] = []
        for i, batch in enumerate(zip(*args, strict=True)):
            take = self._step.again if i and self._step is not None else self._step
            loss, finite = self._taken(take, *batch)
            if finite.is_cuda:  # which is not waited for
                loss = torch.where(finite, loss, torch.nan)
            elif not finite:
                raise self._not_finite(loss, batch, {}, f"step {i + 1} of {count}: ")
            losses.append(loss.reshape(()))
        found = torch.stack(losses)
        bad = found.isnan().nonzero()
        if len(bad):
            i = int(bad[0])
            batch = tuple(argument[i] for argument in args)
            raise self._not_finite(found[i], batch, {}, f"step {i + 1} of {count}: ")
        return found

    def _taken(
        self, take: Callable[..., Taken | None] | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss and whether a step was taken: by `take`, or where that cannot, apart."""
        if not torch.is_grad_enabled():
            raise ConfigError(
                "a step takes a gradient, and gradients are off here (torch.no_grad, or "
                "torch.inference_mode): call evaluate_loss for the loss alone"
            )
        taken = None if take is None else take(*args, **kwargs)
        if taken is None:
            return self._step_apart(*args, **kwargs)
        return taken.outputs[0], taken.finite

    def _not_finite(self, loss: Tensor, args: Any, kwargs: Any, where: str = "") -> NonFiniteError:
        return NonFiniteError(
            f"{where}the loss is {loss.item()}, or its gradient is not finite: no step was taken. "
            f"{_culprit(args, kwargs, self.model, self.guide)}"
        )

    def _step_apart(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and whether it and its gradient are finite; then the optimizer's own step."""
        call = self._loss.prepare(*args, **kwargs)
        results = call.run()
        loss = results.outputs[0].detach()
        finite = torch.stack([t.isfinite().all() for t in (loss, *results.gradients)]).all()
        if not finite:
            return loss, finite
        if not isinstance(self.optim, PyroOptim):
            results = _reaching(results, self.optim, call.arguments)
        if results.wanted:
            call.differentiable(results)[0][0].backward()
        if isinstance(self.optim, PyroOptim):
            found = [
                call.inputs[place] if isinstance(place, int) else place.get()
                for place in call.program.static if place is not None
            ]  # fmt: skip
            # one that was tied to another since is found twice
            registered = list({id(p): p for p in found if isinstance(p, Tensor)}.values())
            self.optim(registered)
            # as Pyro's SVI leaves gradients: a parameter that a later step does not use is still
            # moved by its momentum and its decay
            for parameter in registered:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        else:
            self.optim.step()
            self.optim.zero_grad()
        return loss, finite

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without a step."""
        # Pyro's enumeration refuses to work without gradients
        with torch.set_grad_enabled(isinstance(self._objective, TraceEnum_ELBO | TraceTMC_ELBO)):
            return self._loss.prepare(*args, **kwargs).run().outputs[0].item()

    @property
    def compile_seconds(self) -> list[dict[str, float]]:
        """Seconds that each compilation so far took: `"trace"`, and `"compile"` with its check."""
        return self._loss.seconds + (self._step.seconds if self._step is not None else [])


def _length(args: tuple[Tensor, ...]) -> int:
    """How many slices the arguments have."""
    if not args or not all(isinstance(argument, Tensor) and argument.dim() for argument in args):
        kinds = ", ".join(type(argument).__name__ for argument in args) or "nothing"
        raise ConfigError(f"steps takes tensors with a row a step, got {kinds}")
    lengths = [len(argument) for argument in args]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ConfigError(f"steps takes tensors of one length, a row a step, got {lengths}")
    return lengths[0]


def _reaching(
    results: Results, optim: torch.optim.Optimizer, arguments: Sequence[Tensor]
) -> Results:
    """The results with those gradients that something is done with: of what the optimizer trains,
    or what that may have been computed from, and of arguments. Others would pile up.

    Raises:
        ConfigError: there are none, and the optimizer has something to train.
    """
    trained = [p for group in optim.param_groups for p in group["params"] if p.requires_grad]
    reached = {id(tensor) for tensor in (*trained, *arguments)}
    pairs = [
        (tensor, gradient)
        for tensor, gradient in zip(results.wanted, results.gradients, strict=True)
        if id(tensor) in reached or not tensor.is_leaf
    ]
    if trained and not pairs:
        raise ConfigError(NOTHING_TO_TRAIN)
    return results._replace(wanted=[t for t, _ in pairs], gradients=[g for _, g in pairs])


def _registering(computation: Computation) -> Computation:
    """The computation with the parameters that it registers as its static rest, as Pyro's SVI
    finds what to train."""

    def registering(*args: Any, **kwargs: Any) -> tuple[Sequence[Tensor], list[Tensor]]:
        with poutine.trace(param_only=True) as registered:
            outputs, _ = computation(*args, **kwargs)
        sites: list[Any] = [site["value"] for site in registered.trace.nodes.values()]
        # a module's own parameter, where modules keep them to themselves, is unconstrained itself
        found = [v.unconstrained() if hasattr(v, "unconstrained") else v for v in sites]
        return outputs, list({id(parameter): parameter for parameter in found}.values())

    return registering


def _culprit(args: Any, kwargs: Any, *programs: Program) -> str:
    """Which of what went in is not finite; general advice, if nothing is."""
    named = {f"argument {i}": leaf for i, leaf in enumerate(tree_iter((args, kwargs)))}
    for module in modules_of(*programs):
        named |= {f'parameter "{name}"': p for name, p in module.named_parameters()}
    named |= {f'parameter "{n}"': p for n, p in pyro.get_param_store().named_parameters()}
    for name, held in named.items():
        if isinstance(held, Tensor) and held.is_floating_point() and not held.isfinite().all():
            place = tuple((~held.isfinite()).nonzero()[0].tolist())
            return f"{name} holds {held[place].item()} at {place}"
    return (
        "Look for a division by zero, a logarithm of zero or an overflow; try a lower learning rate"
    )


def _choose_fused(optim: torch.optim.Optimizer | PyroOptim) -> None:
    """Have an optimizer that does not care how it steps step in one kernel."""
    if not isinstance(optim, torch.optim.Optimizer) or optim.state or type(optim) not in _FUSED:
        return
    for group in optim.param_groups:
        undecided = all(group.get(option) is None for option in ("fused", "foreach"))
        capable = all(p.is_floating_point() and p.device.type in ("cpu", "cuda")
                      for p in group["params"])  # fmt: skip
        if undecided and capable and not group["differentiable"]:
            group["fused"] = True
