"""Adam's update as part of the graph, with its state where torch keeps it.

Torch's own step costs a tenth of a millisecond of Python and passes over every parameter once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

KINDS = (Adam, AdamW)
MOMENTS = ("exp_avg", "exp_avg_sq")
Options = tuple[float, float, float, float, bool]


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

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._grouped()[0][1].device

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient, in the order of their groups."""
        return [p for _, p in self._grouped()]

    def has_gradients(self) -> bool:
        """Whether some parameter holds a gradient already, which a step would have to add to."""
        return any(parameter.grad is not None for parameter in self.parameters())

    def moved(self) -> dict[int, Tensor]:
        """The first moment of each parameter, by the identity of the parameter."""
        return {id(p): self.optimizer.state[p][MOMENTS[0]] for p in self.parameters()}

    def ready(self) -> bool:
        """Whether all is on one device, and the state there, made now where it is not, its counts
        being such as can be read without waiting for a GPU."""
        grouped = self._grouped()
        if len({parameter.device for _, parameter in grouped}) != 1:
            return False
        for _, parameter in grouped:
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.get_default_dtype())
                for name in MOMENTS:
                    state[name] = torch.zeros_like(
                        parameter, memory_format=torch.preserve_format, requires_grad=False
                    )
            if state["step"].device.type != "cpu":
                return False
        return True

    def arguments(self) -> tuple[Tensor, list[Options]]:
        """What `apply` needs for the next step: numbers that change from step to step, and options
        that a graph may hold on to.

        Returns:
            For each parameter the step size over the first moment's correction, the root of the
            second's, and the share of decay, `(parameters, 3)`; and both betas, epsilon, decay, and
            whether decay is decoupled from the gradient.
        """
        rows, options = [], []
        for group, parameter in self._grouped():
            count = self.optimizer.state[parameter]["step"].item() + 1
            lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
            rows.append((lr / (1 - beta1**count), (1 - beta2**count) ** 0.5, lr * decay))
            options.append((beta1, beta2, group["eps"], decay, group["decoupled_weight_decay"]))
        return torch.tensor(rows, dtype=torch.float64), options

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

    def count(self, updated: Sequence[int]) -> None:
        """Say that these parameters, by number, have taken a step."""
        parameters = self.parameters()
        torch._foreach_add_([self.optimizer.state[parameters[i]]["step"] for i in updated], 1)

    def _grouped(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [
            (group, p)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
