"""One eager run of a program, recorded: what it uses, what it changes, what it returns."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.compiled import places
from pyro_vae.compiled.places import AnyPlace, Held, Territory
from pyro_vae.compiled.recorder import Numbers, Recorder
from pyro_vae.compiled.where import REMEDY
from pyro_vae.errors import CompileError
from pyro_vae.held import is_constant

# a program as it is traced: tensors to report, the loss first, and whatever stays as it is
Run = Callable[[], tuple[Sequence[Tensor], Any]]
_ATTEMPTS = 3
STANDS_STILL = (
    "Does the program draw from a generator of its own, read a clock or an iterator, or keep count "
    "in Python? Those stand still in a compiled program. Does it draw in a torch.utils.checkpoint? "
    "Leave that out. If not, run without compiling, and please report it"
)
_REGISTERED = ("_parameters", "_buffers", "_params")


@dataclass
class Recording:
    """What one eager run did.

    Attributes:
        captured: the tensors it used besides its arguments, and where each is found.
        outputs: what it returned; `gradients` of the first for each of `wanted`, None if unused.
        changed: the tensors that it may change and did, and the values that it gave them.
        granted: of the captured, those whose values decide a shape, a place in a list or a choice.
        chosen: the truth values by which it chose, of these and of constants.
        frozen: what else a graph of it takes for granted, and where each is found.
    """

    captured: list[tuple[Tensor, AnyPlace]]
    outputs: list[Tensor]
    wanted: list[Tensor]
    gradients: list[Tensor | None]
    changed: list[Change]
    granted: list[tuple[Tensor, AnyPlace]]
    chosen: list[bool]
    frozen: list[tuple[AnyPlace, Any]] = field(default_factory=list)

    @property
    def found(self) -> list[Tensor]:
        """The gradients that are there."""
        return [gradient for gradient in self.gradients if gradient is not None]


def record(run: Run, arguments: list[Tensor], territory: Territory) -> Recording:
    """Run eagerly until nothing new turns up (parameters made on first use, say) and two runs have
    said the same, and record the last.

    Each run finds new objects in `arguments`, see `renew`. Generators, and the tensors that the
    program may change, are left as they were. Where Pyro's
    validation is on, the first run is validated; what is recorded is a run without, as the compiled
    program will be.

    Raises:
        CompileError: each run changes the program: an attribute, a tensor that is no module's
            buffer, the state of Python's or numpy's generator, or what it computes.
    """
    _refuse_distributed(territory)
    made = WeakTensorKeyDictionary()
    previous: list[Tensor] | None = None
    replaced: _Replaced | None = None
    for validation in [is_validation_enabled(), *[False] * _ATTEMPTS]:
        before, frozen = _inventory(territory), territory.frozen()
        try:
            with (
                pyro.validation_enabled(validation),
                preserved(territory, arguments) as changes,
                _found_modules(territory, changes),
            ):
                recording = _run(run, arguments, territory, changes, made, previous is not None)
        except _Replaced as error:
            replaced = error
            continue
        replaced = None
        after = _inventory(territory)
        repeated = previous is not None and _repeated(recording.outputs, previous)
        previous = recording.outputs
        if before == after and repeated and not validation:
            territory.changed |= {id(change.tensor) for change in recording.changed}
            recording.frozen = [(p, v) for p, v in frozen if places.same(p.get(), v)]
            return recording
    if replaced is not None:
        raise replaced
    changed = sorted({label for label, _ in (before - after) + (after - before)})
    if not changed:
        raise CompileError(
            "the program computes something else every time that it is run, on the same draws and "
            f"parameters. {STANDS_STILL}"
        )
    raise CompileError(
        f"{', '.join(changed[:5])} changes at every run of the program, and would stand still in a "
        "compiled one: make it a buffer that is changed in place, or an argument"
    )


def rerun(
    run: Run, arguments: list[Tensor], territory: Territory, recording: Recording
) -> Recording:
    """Record the run once more, its parameters moved by about their rounding.

    What this changes is what rounding may change.
    """
    moved = [t for t, _ in recording.captured if t.requires_grad and t.is_floating_point()]
    saved = [t.detach().clone() for t in moved]
    with preserved(territory, arguments) as changes:
        try:
            with torch.no_grad():
                for t in moved:
                    signs = 1 - 2 * (torch.arange(t.numel(), device=t.device) % 2).view(t.shape)
                    t += torch.finfo(t.dtype).eps * (1 + t.abs()) * signs
            return _run(run, arguments, territory, changes, WeakTensorKeyDictionary())
        finally:
            with torch.no_grad():
                for t, before in zip(moved, saved, strict=True):
                    t.copy_(before)


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the hooks of parameters out of a graph: who uses its gradients calls them."""
    hooks = [t._backward_hooks for t in tensors]
    try:
        for t in tensors:
            t._backward_hooks = None
        yield
    finally:
        for t, found in zip(tensors, hooks, strict=True):
            t._backward_hooks = found


class _Replaced(CompileError):
    """A run left another tensor where it had found one. Some do so once: `.to(x.device)`."""


class Change(NamedTuple):
    """A tensor that a run changed in place, with its values before and after."""

    tensor: Tensor
    before: Tensor
    after: Tensor


class Changes:
    """The values of the tensors that a program may change, to be put back."""

    def __init__(self, territory: Territory) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor, AnyPlace]] = {}
        for tensor, place in territory.changing():
            self._save(tensor, place)

    def save(self, module: nn.Module) -> None:
        """Remember this module's own buffers, unless they are known."""
        for place in places.buffers_of(module, type(module).__name__):
            self._save(place.get(), place)

    def found(self) -> list[Change]:
        """The tensors whose values differ from what was saved; without those that a module held
        only for a while (`functional_call`)."""
        return [
            Change(tensor, saved, tensor.detach().clone())
            for tensor, saved, place in self._saved.values()
            if place.get() is tensor and not torch.equal(tensor, saved)
        ]

    def _save(self, tensor: Tensor, place: AnyPlace) -> None:
        if id(tensor) not in self._saved:
            self._saved[id(tensor)] = (tensor, tensor.detach().clone(), place)

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._saved

    def restore(self) -> None:
        """Put the values back."""
        with torch.no_grad():
            for tensor, saved, _ in self._saved.values():
                if not torch.equal(tensor, saved):
                    tensor.copy_(saved)


@contextmanager
def preserved(territory: Territory, tensors: Sequence[Tensor]) -> Iterator[Changes]:
    """Put torch's generators, and the tensors that programs may change, back afterwards."""
    changes = Changes(territory)
    used = [*tensors, *places.tensors_at(territory.places())]
    devices = sorted({t.device.index or 0 for t in used if t.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield changes
        finally:
            changes.restore()


@contextmanager
def _found_modules(territory: Territory, changes: Changes) -> Iterator[None]:
    """Add modules that the search did not find (they hide in a list, say) as they are called.

    Those that a run makes for itself and lets go are nobody's: their attributes follow from others.
    """
    found: list[weakref.ref[nn.Module]] = []
    known = set(territory.modules)

    def called(module: nn.Module, _: Any) -> None:
        if module not in known:
            found.append(weakref.ref(module))
            for part in module.modules():
                changes.save(part)

    handle = register_module_forward_pre_hook(called)
    try:
        yield
    finally:
        handle.remove()
    if any(reference() is not None for reference in found):
        gc.collect()
    for reference in found:
        module = reference()
        if module is not None:
            territory.add(module)


def renew(arguments: list[Tensor]) -> None:
    """Put new objects over the same memory in the place of the arguments.

    So an argument is told from a parameter that is handed over; and a loop of one's own, too, hands
    over others at every step. The caches of Pyro's transforms go by the object, and what they hold
    of one run is not for the next.
    """
    arguments[:] = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in arguments]


def _run(
    run: Run,
    arguments: list[Tensor],
    territory: Territory,
    changes: Changes,
    made: WeakTensorKeyDictionary,
    settled: bool = True,
) -> Recording:
    """Record a run.

    Args:
        made: what the runs before made; what this one makes is added.
        settled: whether it is to choose as it will. As it makes itself up (an AutoGuide does, at
            its first call) it may ask for values as it likes.
    """
    renew(arguments)
    known = places.tensors(territory.places())
    before = _foreign_draws(territory)
    recorder = Recorder(arguments)
    numbers = Numbers(recorder)
    with recorder, numbers if settled else nullcontext():
        outputs = list(run()[0])
    if recorder.refused is not None:
        raise recorder.refused
    if _foreign_draws(territory) != before:
        raise CompileError(
            "the program draws from Python's or numpy's generators, and its draws would be frozen: "
            "draw with torch or with pyro.sample"
        )
    if recorder.drawn_on_cpu and any(t.is_cuda for t in recorder.inputs.values()):
        raise CompileError(  # TorchInductor would move it, to another generator's draws
            f"{recorder.drawn_on_cpu} cannot be compiled: it draws on the CPU, and the program is "
            "on a GPU. Put what it draws from there (a distribution's parameters; a plate's "
            "`device=`)"
        )
    own = {id(t): Held(t, "an argument") for t in arguments}
    captured = []
    for key, tensor in recorder.inputs.items():
        place = own.get(key) or known.get(key)
        if place is None and tensor in made:
            raise CompileError(
                f"the program keeps a tensor of shape {tuple(tensor.shape)} that it has made where "
                "nothing finds it (in a cache?), and it would stand still: make it anew at every "
                "run, or keep it in a buffer that is changed in place"
            )
        place = place or Held(tensor, f"a tensor {tuple(tensor.shape)}")
        replaced = place.get() is not tensor
        if replaced or (recorder.changed(tensor) and tensor not in changes):
            raise (_Replaced if replaced else CompileError)(
                f"the program changes {place.label} while it runs, or what shares its memory: only "
                "modules' buffers may change, in place (register_buffer, and copy_ or add_)"
            )
        if key in recorder.granted and recorder.changed(tensor):
            raise CompileError(
                f"{recorder.granted[key]} cannot be compiled: it asks for the values of "
                f"{place.label}, which the program changes. {REMEDY}."
            )
        if key not in own:
            _refuse_strange(tensor, place)
            captured.append((tensor, place))
    for tensor in recorder.kept():
        made[tensor] = True
    wanted = [t for t in (*arguments, *(t for t, _ in captured)) if t.requires_grad]
    with without_hooks(wanted):
        gradients = gradients_of(outputs[0], wanted)
    return Recording(
        captured,
        [output.detach() for output in outputs],
        wanted,
        gradients,
        changes.found(),
        [(tensor, place) for tensor, place in captured if id(tensor) in recorder.granted],
        numbers.chosen,
    )


def _refuse_strange(tensor: Tensor, place: AnyPlace) -> None:
    """Refuse what is no longer there, or is not what lies in memory."""
    if places.stands_for_another(tensor):
        raise CompileError(
            f"{place.label} is a view that stands for its conjugate or its negative: keep what "
            "resolve_conj() and resolve_neg() return"
        )
    if tensor.layout is torch.strided and tensor.numel() and not tensor.untyped_storage().size():
        raise CompileError(
            f"{place.label} has lost its memory after the run (is it sharded?): run without "
            "compiling"
        )


def _refuse_distributed(territory: Territory) -> None:
    """Refuse modules that talk to other processes as they run: a graph of them does not."""
    for module, label in territory.modules.items():
        if isinstance(module, DistributedDataParallel):
            raise CompileError(
                f"{label} is a DistributedDataParallel, which waits for its forward to be called: "
                "put it around the whole, DistributedDataParallel(pv.compile(...))"
            )
        for name, parameter in module.named_parameters(recurse=False):
            if is_traceable_wrapper_subclass(parameter):
                raise CompileError(
                    f"{label}.{name} is a {type(parameter).__name__}, and a compiled program takes "
                    "plain tensors: run sharded modules without compiling"
                )


def _repeated(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether a run said what the one before did, but for the order in which a GPU adds up."""
    return len(outputs) == len(before) and all(map(_about_equal, outputs, before))


def _about_equal(now: Tensor, then: Tensor) -> bool:
    if now.shape != then.shape or now.dtype != then.dtype:
        return False
    if not now.is_floating_point():
        return torch.equal(now, then)
    rounding = 100 * torch.finfo(now.dtype).eps
    largest = then.abs().nan_to_num(posinf=0.0).max().item() if then.numel() else 0.0
    return torch.allclose(now, then, rtol=rounding, atol=rounding * largest, equal_nan=True)


def gradients_of(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """d loss / d each, None for those that it does not depend on or where gradients are off."""
    if not (torch.is_grad_enabled() and loss.requires_grad and wanted):
        return [None] * len(wanted)
    # as torch advises, or what opts out of autocast would do so forwards only
    with torch._C._DisableAutocast():
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def _inventory(territory: Territory) -> Counter[tuple[str, Any]]:
    """What the program could see of its surroundings: constants, parameters and buffers.

    Other attributes may be replaced: many modules leave their last results in one (`_run` asks
    whether they are read again).
    """
    entries: Counter[tuple[str, Any]] = Counter()
    for place in territory.places():
        value = place.get()
        if is_constant(value):
            entries[place.label, repr(value)] += 1
        elif isinstance(value, Tensor) and getattr(place, "table", None) in _REGISTERED:
            entries[place.label, id(value)] += 1
    return entries


def _foreign_draws(territory: Territory) -> list[str]:
    """The states of the generators that are not torch's, those that the program holds included."""
    held = [place.get() for place in territory.places()]
    return [
        repr(random.getstate()),
        repr(np.random.get_state(legacy=False)),  # noqa: NPY002
        *(repr(g.getstate()) for g in held if isinstance(g, random.Random)),
        *(repr(g.bit_generator.state) for g in held if isinstance(g, np.random.Generator)),
        *(repr(g.get_state(legacy=False)) for g in held if isinstance(g, np.random.RandomState)),
    ]
