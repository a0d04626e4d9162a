"""Adam's update as part of the graph, with its state where torch keeps it.

Torch's own step costs a tenth of a millisecond of Python and passes over every parameter once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Adam, AdamW

from pyro_vae.errors import ConfigError

KINDS = (Adam, AdamW)
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNT = "step"
_NUMBERS = 7
# steps whose numbers a GPU is sent at once
AHEAD = 64
Decay = Literal["none", "coupled", "decoupled"]


class Pending(NamedTuple):
    """A step that an optimizer is ready for.

    Attributes:
        parameters: those that want a gradient, in the order of their groups.
        counts: of the steps that each has taken, the optimizer's own tensors.
        numbers: what may change from step to step, `(steps, parameters, 7)`: the step size over the
            first moment's correction, the root of the second's, 1 - beta1, beta2, 1 - beta2,
            epsilon, and the share or the weight of decay. Of this step, and on a GPU also of those
            after it, as they are if no option changes.
        decays: how each decays, which a graph holds on to.
    """

    parameters: list[Tensor]
    counts: list[Tensor]
    numbers: Tensor
    decays: tuple[Decay, ...]


class AdamUpdate:
    """What `torch.optim.Adam` or `AdamW` does with gradients, as operations on tensors.

    The optimizer stays the user's: its options are read at every step (a learning rate may change
    as it likes), and its state is what torch's own step would leave, so the two can take turns.

    Args:
        optimizer: for which `supports` is true.
    """

    def __init__(self, optimizer: Adam) -> None:
        self.optimizer = optimizer

    @staticmethod
    def supports(optimizer: Any) -> bool:
        """Whether an optimizer's step is the plain algorithm (Kingma & Ba 2015, algorithm 1, or
        Loshchilov & Hutter 2019, algorithm 2) and nothing else."""
        if type(optimizer) not in KINDS:
            return False
        hooks = (*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks)
        return not hooks and not any(
            group["amsgrad"] or group["maximize"] or group["differentiable"]
            for group in optimizer.param_groups
        )

    def begin(self) -> Pending | None:
        """The next step; the state is made where it is not yet there.

        None where torch has to take it: the optimizer does something else by now; a gradient is
        there already, to be added to, or a hook, to be called; or parameters are complex or on
        several devices.
        """
        if not self.supports(self.optimizer):
            return None
        parameters, counts, decays = [], [], []
        options: list[tuple[float, float, float, float, float]] = []
        for group in self.optimizer.param_groups:
            lr, (beta1, beta2), weight = float(group["lr"]), group["betas"], group["weight_decay"]
            decay: Decay = "none"
            if weight:
                decay = "decoupled" if group["decoupled_weight_decay"] else "coupled"
            share = lr * weight if decay == "decoupled" else weight
            of_group = (lr, beta1, beta2, group["eps"], share)
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                if parameter.grad is not None or _has_hooks(parameter):
                    return None
                parameters.append(parameter)
                counts.append(self._state(parameter, group)[COUNT])
                options.append(of_group)
                decays.append(decay)
        dtypes = {parameter.dtype for parameter in parameters}
        devices = {parameter.device for parameter in parameters}
        if len(devices) != 1 or any(dtype.is_complex for dtype in dtypes):
            return None
        device = devices.pop()
        taken = _values(counts, device)
        numbers = _numbers(taken, options, 1 if device.type == "cpu" else AHEAD)
        table = torch.tensor(numbers, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float64)
        table = table.to(device, non_blocking=True).view(-1, len(parameters), _NUMBERS)
        return Pending(parameters, counts, table, tuple(decays))

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient, in the order of their groups."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def moved(self) -> dict[int, Tensor]:
        """The first moment of each parameter, by the identity of the parameter."""
        return {id(p): self.optimizer.state[p][MOMENTS[0]] for p in self.parameters()}

    @torch.no_grad()
    def apply(
        self,
        gradients: Sequence[Tensor | None],
        numbers: Tensor,
        decays: Sequence[Decay],
        finite: Tensor,
    ) -> None:
        """Update parameters and moments in place; where not `finite`, leave all as it is."""
        for i, (parameter, g) in enumerate(zip(self.parameters(), gradients, strict=True)):
            if g is None:
                continue
            step_size, root, toward_g, keep, toward_square, eps, share = (
                numbers[i].to(parameter.dtype).unbind()
            )
            first, second = (self.optimizer.state[parameter][name] for name in MOMENTS)
            p = parameter
            if decays[i] == "decoupled":
                p = p - share * p
            elif decays[i] == "coupled":
                g = g + share * p
            m = first + toward_g * (g - first)
            v = keep * second + toward_square * g * g
            p = p - step_size * m / (v.sqrt() / root + eps)
            for held, new in ((parameter, p), (first, m), (second, v)):
                held.copy_(torch.where(finite, new, held))
            if parameter.is_cpu:
                count = self.optimizer.state[parameter][COUNT]
                count.copy_(torch.where(finite, count + 1, count))

    def finish(self, pending: Pending, updated: Sequence[int]) -> None:
        """Say that these parameters, by number, have taken the step.

        On a GPU they are counted here, where torch may count on the CPU, which the graph, once
        captured, can't change.
        """
        if not pending.parameters[0].is_cpu:
            torch._foreach_add_([pending.counts[i] for i in updated], 1)
        # torch's schedulers ask whether a step was taken
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter, made as torch makes it where it is not there."""
        state = self.optimizer.state[parameter]
        if not state:
            if is_lazy(parameter):
                raise ConfigError(
                    f"the optimizer holds a {type(parameter).__name__}: run model and guide once "
                    "before they are trained"
                )
            beside = parameter.device if group["fused"] or group["capturable"] else None
            dtype = torch.float32 if group["fused"] else torch.get_default_dtype()
            state[COUNT] = torch.zeros((), dtype=dtype, device=beside)
            for name in MOMENTS:
                state[name] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format, requires_grad=False
                )
        return state


def _values(counts: Sequence[Tensor], device: torch.device) -> list[float]:
    """The counts as numbers; those on a GPU are waited for, all at once."""
    if all(count.is_cpu for count in counts):
        return [count.item() for count in counts]
    return torch.stack([count.to(device) for count in counts]).tolist()


def _numbers(
    taken: Sequence[float], options: Sequence[tuple[float, ...]], steps: int
) -> list[float]:
    """The rows of `Pending.numbers` on end: a flat list, which torch reads several times as fast.

    Args:
        taken: steps, by each parameter.
        options: learning rate, beta1, beta2, epsilon and decay, of each parameter.
        steps: from the next on.
    """
    rows: list[float] = []
    for ahead in range(1, steps + 1):
        row, known = [0.0] * _NUMBERS, None
        for now in zip(taken, options, strict=True):
            if now != known:
                count, (lr, beta1, beta2, eps, share) = now
                count += ahead
                step_size, root = lr / (1 - beta1**count), (1 - beta2**count) ** 0.5
                row = [step_size, root, 1 - beta1, beta2, 1 - beta2, eps, share]
                known = now
            rows += row
    return rows


def _has_hooks(parameter: Tensor) -> bool:
    """Whether the parameter has hooks, which a graph does not call."""
    hooks: Any = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return bool(hooks)
