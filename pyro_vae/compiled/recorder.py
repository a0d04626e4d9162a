"""Listens to the operations of an eager run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.compiled.answers import SELECTING, UNKNOWN, is_answered
from pyro_vae.compiled.places import same_values
from pyro_vae.compiled.where import REMEDY, caller, where_now
from pyro_vae.errors import CompileError

aten = torch.ops.aten
# torch fills gaps between numbers by other code, which generated code does not follow
_FILLS = (aten.uniform_.default, aten.normal_.default)
_BETWEEN_PROCESSES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Recorder(TorchDispatchMode):
    """Lists the tensors that a program uses but did not make.

    Args:
        arguments: of the program.

    Attributes:
        inputs: those tensors, arguments among them, by the identity of the object.
        granted: the inputs whose values decide a shape (the mask in `x[mask]`), a place in a list
            or a choice, and a line where they do.
        drawn_on_cpu: a line that does, where there is a GPU as well.
        refused: what was refused first. The program may have caught it, and gone another way.
    """

    supports_higher_order_operators = True  # or torch refuses them, in words of its own

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}
        self.granted: dict[int, str] = {}
        self.drawn_on_cpu: str | None = None
        self.refused: CompileError | None = None
        self._arguments = {id(argument) for argument in arguments}
        self._before: dict[int, tuple[int | None, Tensor | None]] = {}
        self._made = WeakTensorKeyDictionary()
        self._memory: set[int] = set()  # that operations allocated
        self._varying: set[int] = set()  # that of arguments and parameters
        # that holds what no argument, no parameter and no draw has a part in; and what inputs have
        self._fixed: dict[int, frozenset[int]] = {}
        for argument in arguments:
            self._note_input(argument)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise self._refusal(
                f"{where_now()} cannot be compiled: torch's {func.name()} calls functions that "
                f"nothing here looks into. {REMEDY}."
            )
        if func.namespace in _BETWEEN_PROCESSES:
            raise self._refusal(
                f"{where_now()} cannot be compiled: it waits for other processes. Have them add up "
                "the gradients of the compiled loss: DistributedDataParallel(pv.compile(...))"
            )
        if kwargs.get("generator") is not None:
            raise self._refusal(
                f"{where_now()} cannot be compiled: it draws from a generator of its own, which "
                "would stand still: draw from torch's (torch.manual_seed)"
            )
        if func is aten.lift_fresh.default:  # a literal: torch.tensor(2.0)
            self._made[args[0]] = True
            self._fixed[_memory_of(args[0])] = frozenset()
        given = set()
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                given.add(_memory_of(value))
                self._note_input(value)
        if (
            func is aten.as_strided.default
            and len(args) > 3
            and _memory_of(args[0]) not in self._memory
        ):
            raise self._refusal(
                f"{where_now()} cannot be compiled: as_strided with an offset depends on where in "
                "memory a tensor begins. Leave the offset out, and give it a slice"
            )
        if func in _FILLS and not _is_dense(args[0]):
            raise self._refusal(
                f"{where_now()} cannot be compiled: {func.overloadpacket.__name__} draws into a "
                "part of a tensor that does not lie in one piece. Draw a tensor of its own, and "
                "write that into the part"
            )
        if torch.Tag.dynamic_output_shape in func.tags and caller() not in SELECTING:
            shaping = _shaping(func, args)
            self.grant(shaping, "the shape of its result depends on the values of a tensor")
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

    def _refusal(self, reason: str) -> CompileError:
        error = CompileError(reason)
        self.refused = self.refused or error
        return error

    def kept(self) -> list[Tensor]:
        """Tensors that the run made, and not from constants alone, as far as they are still there;
        without those that can be trained."""
        return [
            tensor for tensor in self._made
            if _memory_of(tensor) not in self._fixed
            and not (tensor.requires_grad and tensor.is_leaf)
        ]  # fmt: skip

    def _note_draw(self, out: Any) -> None:
        if self.drawn_on_cpu is None and all(
            value.device.type == "cpu" for value in tree_iter(out) if isinstance(value, Tensor)
        ):
            self.drawn_on_cpu = where_now()

    def _note_input(self, tensor: Tensor) -> None:
        memory = _memory_of(tensor)
        # a new nn.Parameter is another object over memory that an operation allocated
        if tensor in self._made or memory in self._memory or id(tensor) in self.inputs:
            return
        self.inputs[id(tensor)] = tensor
        # an inference tensor has no version, and of an argument `.data` may be written to
        by_value = tensor.is_inference() or id(tensor) in self._arguments
        self._before[id(tensor)] = (
            None if tensor.is_inference() else tensor._version,
            tensor.detach().clone() if by_value else None,
        )
        if id(tensor) in self._arguments or tensor.requires_grad:
            self._varying.add(memory)
            self._fixed.pop(memory, None)
        elif memory not in self._varying:
            self._fixed[memory] = self._fixed.get(memory, frozenset()) | {id(tensor)}

    def grant(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Have the graph take the values of these for granted.

        Raises:
            CompileError: they are made of arguments, parameters or draws.
        """
        for tensor in tensors:
            self._note_input(tensor)
        memories = [*map(_memory_of, tensors)]
        if not self._fixed.keys() >= set(memories):
            raise self._refusal(f"{where_now()} cannot be compiled: {reason}. {REMEDY}.")
        for key in frozenset().union(*map(self._fixed.__getitem__, memories)):
            self.granted.setdefault(key, where_now())

    def _note_fixed(self, func: Any, given: set[int], out: Any) -> None:
        touched = {_memory_of(value) for value in tree_iter(out) if isinstance(value, Tensor)}
        if func._schema.is_mutable:
            touched |= given
        if self._fixed.keys() >= given and torch.Tag.nondeterministic_seeded not in func.tags:
            parts = frozenset().union(*map(self._fixed.__getitem__, given))
            self._fixed |= dict.fromkeys(touched - self._varying, parts)
        else:
            for memory in touched:
                self._fixed.pop(memory, None)

    def changed(self, tensor: Tensor) -> bool:
        """Whether this input was changed in place."""
        version, values = self._before[id(tensor)]
        if version is not None and tensor._version != version:
            return True
        return values is not None and not same_values(tensor, values)


class Numbers(TorchFunctionMode):
    """Tells a recorder of the numbers that Python takes out of tensors to find a place in a list,
    and of the truth values by which it chooses.

    Args:
        recorder: that of the run.

    Attributes:
        chosen: those truth values, one after the other.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.chosen: list[bool] = []
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__index__:
            self._recorder.grant(args, "it asks for the value of a tensor, as a Python number")
        value = func(*args, **(kwargs or {}))
        # Pyro validates more than a compiled program does
        if func is Tensor.__bool__ and not is_validation_enabled() and not is_answered(func):
            self._recorder.grant(args, UNKNOWN)
            self.chosen.append(value)
        return value


def _shaping(func: Any, args: Any) -> Sequence[Tensor]:
    """The arguments whose values decide the shape of what an operation returns."""
    if func is aten.index.Tensor:
        return [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    return args[1:] if func is aten.masked_select.default else args[:1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie side by side in memory, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
