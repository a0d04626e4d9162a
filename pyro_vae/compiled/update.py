"""Adam's update as part of the graph, with its state where torch keeps it.

Torch's own step costs a tenth of a millisecond of Python and passes over every parameter once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Adam, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pyro_vae.errors import ConfigError

KINDS = (Adam, AdamW)
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNT = "step"
KEPT = (*MOMENTS, COUNT)
_OPTIONS = itemgetter(
    "betas", "lr", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize",
    "differentiable",
)  # fmt: skip
# of a parameter: those that are as here want nothing special of a step
_STANDING = attrgetter("grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_PLAIN = (None, None, None)
Decay = Literal["none", "coupled", "decoupled"]


class Pending(NamedTuple):
    """A step that an optimizer is ready for.

    Attributes:
        parameters: those that want a gradient, in the order of their groups.
        numbers: their options, which may change from step to step, `(parameters, 7)`, float64:
            learning rate, log beta1, log beta2, 1 - beta1, 1 - beta2, epsilon, and the share or the
            weight of decay.
        decays: how each decays, which a graph holds on to.
    """

    parameters: list[Tensor]
    numbers: Tensor
    decays: tuple[Decay, ...]


class AdamUpdate:
    """What `torch.optim.Adam` or `AdamW` does with gradients, as operations on tensors.

    The optimizer stays the user's: its options are read at every step (a learning rate may change
    as it likes), and its state is what torch's own step would leave, so the two can take turns.

    Args:
        optimizer: for which `supports` is true.

    Attributes:
        state: what the optimizer keeps of the parameters of the next step, `KEPT` of each in turn.
    """

    def __init__(self, optimizer: Adam) -> None:
        self.optimizer = optimizer
        self.state: list[Tensor] = []
        # the last step, and what made it what it was
        self._pending: Pending | None = None
        self._options: list[tuple[Any, ...]] = []
        self._in_tensors = False
        self._state_of: list[dict[str, Any]] = []
        self._entries: tuple[list[Any], list[str]] = ([], [])

    @staticmethod
    def supports(optimizer: Any) -> bool:
        """Whether an optimizer's step is the plain algorithm (Kingma & Ba 2015, algorithm 1, or
        Loshchilov & Hutter 2019, algorithm 2) and nothing else."""
        if type(optimizer) not in KINDS or _is_hooked(optimizer):
            return False
        return not any(
            group["amsgrad"] or group["maximize"] or group["differentiable"]
            for group in optimizer.param_groups
        )

    def begin(self) -> Pending | None:
        """The next step; the state is made where it is not yet there.

        None where torch has to take it: the optimizer does something else by now; a gradient is
        there already, to be added to, or a hook, to be called; or parameters are complex or on
        several devices.
        """
        options = [_options(group) for group in self.optimizer.param_groups]
        if self._pending is None or not self._is_another_such(self._pending, options):
            self._options, self._pending = options, self._prepared()
            self._in_tensors = any(isinstance(o, Tensor) for group in options for o in group)
        return self._pending

    def _is_another_such(self, last: Pending, options: list[tuple[Any, ...]]) -> bool:
        """Whether the next step is of the same parameters by the same options, as far as can be
        told without preparing it."""
        parameters = self.parameters()
        return (
            options == self._options
            # a number in a tensor may have changed in place
            and not self._in_tensors
            and not _is_hooked(self.optimizer)
            and _are_same(parameters, last.parameters)
            # in order, since to look a tensor up costs a call of Python
            and _are_same([*self.optimizer.state.values()], self._state_of)
            and _are_same([*map(dict.get, *self._entries)], self.state)
            and [*map(_STANDING, parameters)].count(_PLAIN) == len(parameters)
        )

    def _prepared(self) -> Pending | None:
        if not self.supports(self.optimizer):
            return None
        parameters, decays = [], []
        numbers: list[float] = []
        for group in self.optimizer.param_groups:
            lr, weight = float(group["lr"]), group["weight_decay"]
            beta1, beta2 = map(float, group["betas"])
            decay: Decay = "none"
            if weight:
                decay = "decoupled" if group["decoupled_weight_decay"] else "coupled"
            share = lr * weight if decay == "decoupled" else weight
            row = [lr, _log(beta1), _log(beta2), 1 - beta1, 1 - beta2, group["eps"], share]
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                if parameter.grad is not None or _has_hooks(parameter):
                    return None
                self._make_state(parameter, group)
                parameters.append(parameter)
                numbers += row
                decays.append(decay)
        devices = {parameter.device for parameter in parameters}
        if len(devices) != 1 or any(parameter.is_complex() for parameter in parameters):
            return None
        state = self.optimizer.state
        self._state_of = [*state.values()]
        states = [state[p] for p in parameters for _ in KEPT]
        self._entries = states, [*KEPT] * len(parameters)
        self.state[:] = map(getitem, *self._entries)
        # a flat list, which torch reads several times as fast
        table = torch.tensor(numbers, dtype=torch.float64).view(len(parameters), -1)
        return Pending(parameters, table.to(devices.pop()), tuple(decays))

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient, in the order of their groups."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def written(self) -> set[int]:
        """The identities of the tensors that a step writes to."""
        return {id(tensor) for tensor in (*self.parameters(), *self.state)}

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
        parameters = self.parameters()
        counts = [self.optimizer.state[parameter][COUNT] for parameter in parameters]
        lr, log_beta1, log_beta2, toward_g, toward_square, eps, share = numbers.unbind(1)
        steps = torch.stack([count.to(numbers.dtype) for count in counts]) + 1
        # the moments start at zero; these make up for it, in the order of section 2 at its end,
        # which divides once for each number
        root = (1 - (steps * log_beta2).exp()).sqrt()
        step_size = lr * root / (1 - (steps * log_beta1).exp())
        keep = 1 - toward_square
        columns = (step_size, eps * root, toward_g, keep, toward_square, share)
        dtypes = {parameter.dtype for parameter in parameters}
        common = reduce(torch.promote_types, dtypes, torch.float32)
        table = torch.stack([column.to(common) for column in columns], 1)
        for i, (parameter, g) in enumerate(zip(parameters, gradients, strict=True)):
            if g is None:
                continue
            held = (parameter, *(self.optimizer.state[parameter][name] for name in MOMENTS))
            # as torch's fused kernels do: epsilon is nothing in 16 bits
            precision = torch.float32 if parameter.itemsize < 4 else parameter.dtype
            row = table[i].to(precision)
            step_size, eps_hat, toward_g, keep, toward_square, share = row.unbind()
            p, first, second, g = (tensor.to(precision) for tensor in (*held, g))
            if decays[i] == "decoupled":
                p = p - share * p
            elif decays[i] == "coupled":
                g = g + share * p
            m = first + toward_g * (g - first)
            v = keep * second + toward_square * g * g
            p = p - step_size * m / (v.sqrt() + eps_hat)
            for old, new in zip((*held, counts[i]), (p, m, v, counts[i] + 1), strict=True):
                old.copy_(torch.where(finite, new.to(old.dtype), old))

    def finish(self) -> None:
        """Say that the step has been taken."""
        # torch's schedulers ask
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _make_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """What torch would make at its first step; but steps are counted where the parameter is,
        which torch does as well where its step is fused."""
        state = self.optimizer.state[parameter]
        if not state:
            if is_lazy(parameter):
                raise ConfigError(
                    f"the optimizer holds a {type(parameter).__name__}: run model and guide once "
                    "before they are trained"
                )
            double = torch.get_default_dtype() == torch.float64 and not group["fused"]
            state[COUNT] = torch.zeros((), dtype=torch.float64 if double else torch.float32)
            for name in MOMENTS:
                state[name] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format, requires_grad=False
                )
        state[COUNT] = state[COUNT].to(parameter.device)


def _are_same(now: Sequence[Any], then: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(now) == len(then) and all(map(is_, now, then))


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    """A group's options, numbers and none that hold others."""
    (beta1, beta2), *rest = _OPTIONS(group)
    return beta1, beta2, *rest


def _is_hooked(optimizer: Adam) -> bool:
    """Whether anything is called before or after the optimizer's step, or instead of it."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    # torch's schedulers put one there that counts and calls the optimizer's
    step = vars(optimizer).get("step")
    instead = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return bool(own or instead or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _has_hooks(parameter: Tensor) -> bool:
    """Whether the parameter has hooks, which a graph does not call."""
    hooks: Any = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return bool(hooks)
