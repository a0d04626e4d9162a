"""Where a program keeps the tensors and numbers that it uses without being handed them.

A traced graph holds nothing of its own: at every call each parameter, buffer or attribute is looked
up again at its place, so that in-place edits, `load_state_dict`, `.to(...)` and a replaced tensor
are all seen; and a number, a module or a function that changed is known to invalidate the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import call, getitem
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import held, reach
from pyro_vae.compiled.update import KEPT, AdamUpdate
from pyro_vae.held import Place, Reading, is_constant


class Held(NamedTuple):
    """A tensor reached by no known way: the object itself."""

    tensor: Tensor
    label: str

    def get(self) -> Tensor:
        """The tensor."""
        return self.tensor

    def reading(self) -> Reading:
        """`get`."""
        return call, (self.get,)


class Moment(NamedTuple):
    """A tensor in an optimizer's state, as an update has found it."""

    state: list[Tensor]
    position: int
    label: str

    def get(self) -> Tensor:
        """What the optimizer keeps now."""
        return self.state[self.position]

    def reading(self) -> Reading:
        """`get`; a LookupError once it keeps nothing there."""
        return getitem, (self.state, self.position)


AnyPlace = held.AnyPlace | Held | Moment


class Territory:
    """Everything that can be reached from some programs: their modules, and the places they use.

    Args:
        roots: named modules, functions and objectives, see `pyro_vae.reach`.
        update: that ends the programs' run, whose parameters and moments may change.

    Attributes:
        changed: the identities of the tensors that recorded runs changed.
    """

    def __init__(self, roots: Mapping[str, Any], update: AdamUpdate | None = None) -> None:
        self.update = update
        self.changed: set[int] = set()
        self._roots = dict(roots)

    def add(self, module: nn.Module) -> None:
        """Have another module, which the search does not find by itself."""
        self._roots[f"{type(module).__name__} {len(self._roots)}"] = module

    @property
    def modules(self) -> dict[nn.Module, str]:
        """Every module, and the name of the way to it."""
        return reach.reach(self._roots).modules

    def places(self) -> list[AnyPlace]:
        """Every entry that holds something now, Pyro's parameter store included."""
        return [*reach.reach(self._roots).places, *_stored(), *self._moments()]

    def frozen(self) -> list[tuple[AnyPlace, Any]]:
        """What a graph takes for granted, as it is now: Python's values, that objects of any other
        kind are the same ones, and what tensors are alike in that are no inputs of it."""
        places = (*reach.reach(self._roots).places, *_constraints())
        return [(place, place.get()) for place in places]

    def changing(self) -> list[tuple[Tensor, AnyPlace]]:
        """The tensors that a run may change: the modules' buffers, and what the update updates."""
        places = [p for module, label in self.modules.items() for p in buffers_of(module, label)]
        if self.update is not None:
            places += [Held(p, "a parameter") for p in self.update.parameters()]
            places += self._moments()
        return [(held, p) for p in places if isinstance(held := p.get(), Tensor)]

    def changed_buffers(self) -> list[Tensor]:
        """The modules' buffers that a recorded run changed, each once."""
        found = tensors_at(p for m, label in self.modules.items() for p in buffers_of(m, label))
        return list({id(buffer): buffer for buffer in found if id(buffer) in self.changed}.values())

    def _moments(self) -> list[Moment]:
        if self.update is None:
            return []
        state = self.update.state
        return [
            Moment(state, i, f"the optimizer's {KEPT[i % len(KEPT)]}") for i in range(len(state))
        ]


def buffers_of(module: nn.Module, label: str) -> list[AnyPlace]:
    """Where a module has its own buffers. A ScriptModule has them to itself, its parts' too."""
    alone = isinstance(module, torch.jit.ScriptModule)
    return [
        Held(buffer, f"{label}.{key}") if alone
        else Place(module, "_buffers", key, f"{label}.{key}")
        for key, buffer in module.named_buffers(recurse=alone)
    ]  # fmt: skip


def _stored() -> Iterator[Place]:
    store = pyro.get_param_store()
    for key in store.keys():  # noqa: SIM118
        yield Place(store, "_params", key, f'pyro.param("{key}")')


def _constraints() -> Iterator[Place]:
    store = pyro.get_param_store()
    for key in store.keys():  # noqa: SIM118
        yield Place(store, "_constraints", key, f'the constraint of pyro.param("{key}")')


def same(now: Any, then: Any) -> bool:
    """Whether what was taken for granted still holds: the same object, or a Python value that reads
    the same, or a tuple of such."""
    if now is then or type(now) is not type(then):
        return now is then
    if is_constant(now):
        return repr(now) == repr(then)
    return type(now) is tuple and len(now) == len(then) and all(map(same, now, then))


def same_values(now: Tensor, then: Tensor) -> bool:
    """Whether two tensors that are alike hold the same bits, so that NaN is equal to itself."""
    return torch.equal(_bits(now), _bits(then))


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.itemsize])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stands_for_another(tensor: Tensor) -> bool:
    """Whether torch reads this as the conjugate or the negative of what is in memory."""
    return tensor.is_conj() or tensor.is_neg()


def tensors_at(places: Iterable[AnyPlace]) -> list[Tensor]:
    """The tensors at these places."""
    return [value for place in places if isinstance(value := place.get(), Tensor)]


def tensors(places: Iterable[AnyPlace]) -> dict[int, AnyPlace]:
    """The tensors at these places, by the identity of the object; the first place counts."""
    found: dict[int, AnyPlace] = {}
    for place in places:
        value = place.get()
        if isinstance(value, Tensor):
            found.setdefault(id(value), place)
    return found
