"""Pyro's SVI with the step compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vae.compiled.module import fuse_loss, loss_of
from pyro_vae.compiled.program import Backend
from pyro_vae.compiled.step import fuse_step
from pyro_vae.errors import ConfigError, NonFiniteError
from pyro_vae.typing import Program

# torch's optimizers that can update all parameters in one kernel, on the CPU and on CUDA
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


class CompiledSVI:
    """`pyro.infer.SVI`, compiled: the same arguments, the same losses, draw for draw.

    The first step with each kind of arguments takes seconds, in which the program is traced, fused
    and held against the eager loss and gradients on the same draws. `pyro_vae.compile` says what a
    program must keep to.

    Args:
        model, guide: the programs.
        optim: a `torch.optim.Optimizer` over the parameters to train, or a `pyro.optim.PyroOptim`,
            which trains every parameter that the programs register (`pyro.param`, `pyro.module`).
            torch's Adam and AdamW are much the fastest: their update becomes part of the graph, and
            on CUDA the whole step is captured and replayed as one launch. Another that has a fused
            version is told to use it, where the user did not choose.
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
        if not isinstance(optim, torch.optim.Optimizer | PyroOptim):
            raise ConfigError(
                f"optim is a torch.optim.Optimizer or a pyro.optim.PyroOptim, got {optim!r}"
            )
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self._loss = fuse_loss(loss, model, guide, backend)
        roots = {"model": model, "guide": guide, "objective": loss}
        self._step = fuse_step(loss_of(loss, model, guide), roots, optim, backend)
        if self._step is None:
            _choose_fused(optim)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step; returns the loss, in nats. Arguments go to model and guide.

        Raises:
            NonFiniteError: the loss or its gradient is NaN or infinite. Parameters and the
                optimizer's state are those from before the step.
        """
        taken = None if self._step is None else self._step(*args, **kwargs)
        if taken is None:
            loss, finite = self._step_apart(*args, **kwargs)
        else:
            loss, finite = taken.outputs[0], taken.finite
        if not finite:
            raise NonFiniteError(
                f"the loss is {loss.item()}, or its gradient is not finite: no step was taken. "
                "Look for a division by zero, a logarithm of zero or an overflow; try a lower "
                "learning rate"
            )
        return loss.item()

    def _step_apart(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss, and whether it and its gradient are finite; then the optimizer's own step."""
        with torch.enable_grad():
            results = self._loss.prepare(*args, **kwargs).run()
        is_trained = self._trained()
        trained = [
            (parameter, gradient)
            for parameter, gradient in zip(results.wanted, results.gradients, strict=True)
            if is_trained(parameter)
        ]
        loss = results.outputs[0]
        finite = torch.stack([value.isfinite().all() for value in (loss, *(g for _, g in trained))])
        if not finite.all():
            return loss, finite.all()
        parameters = [parameter for parameter, _ in trained]
        for parameter, gradient in trained:
            held = parameter.grad
            parameter.grad = gradient if held is None else held + gradient
        if isinstance(self.optim, PyroOptim):
            self.optim(parameters)
        else:
            self.optim.step()
        for parameter in parameters:
            parameter.grad = None
        return loss, finite.all()

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without a step."""
        return self._loss.prepare(*args, **kwargs).run().outputs[0].item()

    @property
    def compile_seconds(self) -> list[dict[str, float]]:
        """Seconds that each compilation so far took: `"trace"`, and `"compile"` with its check."""
        return self._loss.seconds + (self._step.seconds if self._step is not None else [])

    def _trained(self) -> Callable[[Tensor], bool]:
        """Whether a tensor is one of those that the optimizer trains."""
        if isinstance(self.optim, torch.optim.Optimizer):
            own = {id(p) for group in self.optim.param_groups for p in group["params"]}
            return lambda tensor: id(tensor) in own
        if pyro.settings.get("module_local_params"):
            return lambda tensor: isinstance(tensor, nn.Parameter)
        store = pyro.get_param_store()
        return lambda tensor: store.param_name(tensor) is not None


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
