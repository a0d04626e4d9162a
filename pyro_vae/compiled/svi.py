"""Pyro's SVI with the step compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vae.compiled.module import fuse_loss
from pyro_vae.compiled.program import Backend
from pyro_vae.errors import ConfigError
from pyro_vae.typing import Program

# torch's optimizers that can update all parameters in one kernel on the CPU and on CUDA
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
            The torch optimizer is much the faster, as it updates all parameters at once; where it
            has a fused version and the user did not choose, it is told to use it.
        loss: an objective of this library, one of Pyro's that has a `differentiable_loss`, or a
            function `loss(model, guide, *args, **kwargs)` that returns a tensor.
        backend: see `pyro_vae.compile`.

    Raises:
        ConfigError: `optim` or `loss` is not as above.
        CompileError, SiteError: at a step, see `pyro_vae.compiled.CompiledLoss`.
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
        self._fused = fuse_loss(loss, model, guide, backend)
        if isinstance(optim, torch.optim.Optimizer):
            _choose_fused(optim)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step; returns the loss, in nats. Arguments go to model and guide."""
        with torch.enable_grad():
            results = self._fused.run(*args, **kwargs)
        is_trained = self._trained()
        parameters = []
        for parameter, gradient in zip(results.wanted, results.gradients, strict=True):
            if is_trained(parameter):
                held = parameter.grad
                parameter.grad = gradient if held is None else held + gradient
                parameters.append(parameter)
        if isinstance(self.optim, PyroOptim):
            self.optim(parameters)
        else:
            self.optim.step()
        for parameter in parameters:
            parameter.grad = None
        return results.outputs[0].item()

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without a step."""
        return self._fused.run(*args, **kwargs).outputs[0].item()

    @property
    def compile_seconds(self) -> list[dict[str, float]]:
        """Seconds that each compilation so far took: `"trace"`, and `"compile"` with its check."""
        return self._fused.seconds

    def _trained(self) -> Callable[[Tensor], bool]:
        """Whether a tensor is one of those that the optimizer trains."""
        if isinstance(self.optim, torch.optim.Optimizer):
            own = {id(p) for group in self.optim.param_groups for p in group["params"]}
            return lambda tensor: id(tensor) in own
        if pyro.settings.get("module_local_params"):
            return lambda tensor: isinstance(tensor, nn.Parameter)
        store = pyro.get_param_store()
        return lambda tensor: store.param_name(tensor) is not None


def _choose_fused(optim: torch.optim.Optimizer) -> None:
    """Have an optimizer that does not care how it steps step in one kernel."""
    if optim.state or type(optim) not in _FUSED:
        return
    for group in optim.param_groups:
        undecided = all(group.get(option) is None for option in ("fused", "foreach"))
        capable = all(p.is_floating_point() and p.device.type in ("cpu", "cuda")
                      for p in group["params"])  # fmt: skip
        if undecided and capable and not group["differentiable"]:
            group["fused"] = True
