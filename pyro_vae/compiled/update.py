"""Adam's update as part of the graph, with its state where torch keeps it.

Torch's own step costs a tenth of a millisecond of Python and passes over every parameter once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

KINDS = (Adam, AdamW)
MOMENTS = ("exp_avg", "exp_avg_sq")
Options = tuple[float, float, float, float, bool]


class Pending(NamedTuple):
    """A step that an optimizer is ready for.

    Attributes:
        parameters: those that want a gradient, in the order of their groups.
        counts: of the steps that each has taken, the optimizer's own tensors.
        numbers: what changes from step to step, `(parameters, 3)`: the step size over the first
            moment's correction, the root of the second's, and the share of decay.
        options: what a graph may hold on to, a row a parameter: both betas, epsilon, decay, and
            whether decay is decoupled from the gradient.
    """

    parameters: list[Tensor]
    counts: list[Tensor]
    numbers: Tensor
    options: tuple[Options, ...]


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
            group["amsgrad"] or group["maximize"] or group["differentiable"] or group["capturable"]
            for group in optimizer.param_groups
        )

    def begin(self) -> Pending | None:
        """The next step; the state is made where it is not yet there.

        None where torch has to take it: a gradient is there already, to be added to; parameters
        are on several devices; or steps are counted on a GPU, which would have to be waited for.
        """
        parameters, counts, rows, options = [], [], [], []
        for group in self.optimizer.param_groups:
            lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
            frozen = (beta1, beta2, group["eps"], decay, group["decoupled_weight_decay"])
            row, last = (0.0, 0.0, 0.0), -1.0
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                steps = self._state(parameter)["step"]
                if parameter.grad is not None or steps.device.type != "cpu":
                    return None
                count = steps.item() + 1
                if count != last:
                    row, last = (
                        (lr / (1 - beta1**count), (1 - beta2**count) ** 0.5, lr * decay),
                        count,
                    )
                parameters.append(parameter)
                counts.append(steps)
                rows.append(row)
                options.append(frozen)
        if len({parameter.device for parameter in parameters}) != 1:
            return None
        numbers = torch.tensor(rows, dtype=torch.float64)
        if parameters[0].device.type != "cpu":
            numbers = numbers.to(parameters[0].device, non_blocking=True)
        return Pending(parameters, counts, numbers, tuple(options))

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient, in the order of their groups."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def moved(self) -> dict[int, Tensor]:
        """The first moment of each parameter, by the identity of the parameter."""
        return {id(p): self._state(p)[MOMENTS[0]] for p in self.parameters()}

    @torch.no_grad()
    def apply(
        self,
        gradients: Sequence[Tensor | None],
        numbers: Tensor,
        options: Sequence[Options],
        finite: Tensor,
    ) -> None:
        """Update parameters and moments in place; where not `finite`, leave all as it is."""
        for i, (parameter, g) in enumerate(zip(self.parameters(), gradients, strict=True)):
            if g is None:
                continue
            step_size, root, decay = numbers[i].to(parameter.dtype).unbind()
            beta1, beta2, eps, weight_decay, decoupled = options[i]
            first, second = (self.optimizer.state[parameter][name] for name in MOMENTS)
            p = parameter
            if weight_decay and decoupled:
                p = p - decay * p
            elif weight_decay:
                g = g + weight_decay * p
            m = torch.lerp(first, g, 1 - beta1)
            v = beta2 * second + (1 - beta2) * g * g
            p = p - step_size * m / (v.sqrt() / root + eps)
            for held, new in ((parameter, p), (first, m), (second, v)):
                held.copy_(torch.where(finite, new, held))

    def finish(self, pending: Pending, updated: Sequence[int]) -> None:
        """Say that these parameters, by number, have taken the step."""
        for i in updated:
            pending.counts[i].add_(1)
        # torch's schedulers ask whether a step was taken
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.get_default_dtype())
            for name in MOMENTS:
                state[name] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format, requires_grad=False
                )
        return state
