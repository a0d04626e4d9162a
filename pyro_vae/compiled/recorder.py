"""Listens to the operations of an eager run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.compiled.answers import SELECTING
from pyro_vae.compiled.where import REMEDY, caller, where_now
from pyro_vae.errors import CompileError


class Recorder(TorchDispatchMode):
    """Lists the tensors that a program uses but did not make."""

    supports_higher_order_operators = True  # or torch refuses them, in words of its own

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}
        self.drawn_on_cpu: str | None = None  # a line that does, where there is a GPU as well
        self._versions: dict[int, int] = {}
        self._made = WeakTensorKeyDictionary()
        self._memory: set[int] = set()  # that operations allocated
        self._fixed: set[int] = set()  # that holds what no input and no draw has a part in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise CompileError(
                f"{where_now()} cannot be compiled: torch's {func.name()} calls functions that "
                f"nothing here looks into. {REMEDY}."
            )
        if kwargs.get("generator") is not None:
            raise CompileError(
                f"{where_now()} cannot be compiled: it draws from a generator of its own, which "
                "would stand still: draw from torch's (torch.manual_seed)"
            )
        if func is torch.ops.aten.lift_fresh.default:  # a literal: torch.tensor(2.0)
            self._made[args[0]] = True
            self._fixed.add(_memory_of(args[0]))
        given = set()
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                given.add(_memory_of(value))
                # a new nn.Parameter is another object over memory that an operation allocated
                if value not in self._made and _memory_of(value) not in self._memory:
                    self.inputs.setdefault(id(value), value)
                    self._versions.setdefault(id(value), value._version)
        if (
            torch.Tag.dynamic_output_shape in func.tags
            and not self._is_of_known_shape(func, args)
            and caller() not in SELECTING
        ):
            raise CompileError(
                f"{where_now()} cannot be compiled: the shape of its result depends on the values "
                f"of a tensor. {REMEDY}."
            )
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and torch.cuda.is_initialized():
            self._note_draw(out)
        self._note_fixed(func, given, out)
        for value in tree_iter(out):
            # an in-place operation returns the tensor it was given
            if isinstance(value, Tensor) and id(value) not in self.inputs:
                self._made[value] = True
                if _memory_of(value) not in given:
                    self._memory.add(_memory_of(value))
        return out

    def _note_draw(self, out: Any) -> None:
        if self.drawn_on_cpu is None and all(
            value.device.type == "cpu" for value in tree_iter(out) if isinstance(value, Tensor)
        ):
            self.drawn_on_cpu = where_now()

    def _is_of_known_shape(self, func: Any, args: Any) -> bool:
        """Whether this is `x[indices]` by numbers, or by masks that are the same in every run."""
        return func is torch.ops.aten.index.Tensor and not any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            and _memory_of(index) not in self._fixed
            for index in args[1]
        )  # fmt: skip

    def _note_fixed(self, func: Any, given: set[int], out: Any) -> None:
        touched = {_memory_of(value) for value in tree_iter(out) if isinstance(value, Tensor)}
        if func._schema.is_mutable:
            touched |= given
        if given <= self._fixed and torch.Tag.nondeterministic_seeded not in func.tags:
            self._fixed |= touched
        else:
            self._fixed -= touched

    def changed(self, tensor: Tensor) -> bool:
        """Whether this input was changed in place."""
        return tensor._version != self._versions[id(tensor)]


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
