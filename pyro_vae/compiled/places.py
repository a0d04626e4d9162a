"""Where a program keeps the tensors and numbers that it uses without being handed them.

A traced graph holds nothing of its own: at every call each parameter, buffer or attribute is looked
up again at its place, so that in-place edits, `load_state_dict`, `.to(...)` and a replaced tensor
are all seen, and a number that changed is known to invalidate the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import pyro
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_vae.compiled.update import MOMENTS, AdamUpdate

# what a graph freezes: Python values that a program can branch on or compute with
CONSTANTS = (bool, int, float, complex, str, type(None))
_LIBRARIES = ("torch", "pyro", "pyro_vae", "builtins")
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}


class Place(NamedTuple):
    """One entry of one of an object's dictionaries: `getattr(owner, table)[key]`."""

    owner: Any
    table: str
    key: str
    label: str

    def get(self) -> Any:
        """What is there now; None where the entry has gone."""
        return getattr(self.owner, self.table).get(self.key)


class CellPlace(NamedTuple):
    """A variable that a function closes over."""

    cell: CellType
    label: str

    def get(self) -> Any:
        """What the variable holds now."""
        return _contents(self.cell)


class Held(NamedTuple):
    """A tensor reached by no known way (from within a list, say): the object itself."""

    tensor: Tensor
    label: str

    def get(self) -> Tensor:
        """The tensor."""
        return self.tensor


class Moment(NamedTuple):
    """A tensor in an optimizer's state."""

    optimizer: Optimizer
    parameter: Tensor
    key: str
    label: str

    def get(self) -> Any:
        """What the optimizer keeps of the parameter now."""
        return self.optimizer.state.get(self.parameter, {}).get(self.key)


AnyPlace = Place | CellPlace | Held | Moment


class Territory:
    """Everything that can be reached from some programs: their modules, and the places they use.

    Args:
        roots: named modules, functions and objectives. From them the search follows submodules,
            closures, and the globals that functions name, but enters no list or dictionary.
        update: that ends the programs' run, whose parameters and moments may change.
    """

    def __init__(self, roots: Mapping[str, Any], update: AdamUpdate | None = None) -> None:
        self.update = update
        self.modules: dict[nn.Module, str] = {}
        self._places: list[AnyPlace] = []
        self._seen: set[int] = set()
        for label, root in roots.items():
            self.visit(root, label)

    def visit(self, thing: Any, label: str) -> None:
        """Add `thing` and what it reaches."""
        if id(thing) in self._seen:
            return
        if isinstance(thing, nn.Module):
            self._seen.add(id(thing))
            self._visit_module(thing, label)
        elif isinstance(thing, FunctionType):
            self._seen.add(id(thing))
            if _is_users(thing.__module__):
                self._visit_function(thing, label)
        elif isinstance(thing, MethodType):
            self.visit(thing.__self__, label)
            self.visit(thing.__func__, label)
        elif isinstance(thing, partial):
            for i, part in enumerate((thing.func, *thing.args, *thing.keywords.values())):
                self.visit(part, f"{label}[{i}]")
        elif hasattr(thing, "__wrapped__"):
            self.visit(thing.__wrapped__, label)
        elif isinstance(thing, ELBO):
            self._seen.add(id(thing))
            self._places += [Place(thing, "__dict__", k, f"{label}.{k}") for k in vars(thing)]

    def places(self) -> Iterator[AnyPlace]:
        """Every entry that holds something now, Pyro's parameter store included."""
        yield from self._places
        for module, label in self.modules.items():
            for table in ("__dict__", "_parameters", "_buffers"):
                for key in getattr(module, table):
                    if key not in _MODULE_INTERNALS:
                        yield Place(module, table, key, f"{label}.{key}")
        store = pyro.get_param_store()
        for key in store.keys():  # noqa: SIM118
            yield Place(store, "_params", key, f'pyro.param("{key}")')
        yield from self._moments()

    def changing(self) -> list[tuple[Tensor, AnyPlace]]:
        """The tensors that a run may change: the modules' buffers, and what the update updates."""
        places: list[AnyPlace] = [
            Place(module, "_buffers", key, f"{label}.{key}")
            for module, label in self.modules.items() for key in module._buffers
        ]  # fmt: skip
        if self.update is not None:
            places += [Held(p, "a parameter") for p in self.update.parameters()]
            places += self._moments()
        return [(held, p) for p in places if isinstance(held := p.get(), Tensor)]

    def _moments(self) -> list[Moment]:
        if self.update is None:
            return []
        optimizer = self.update.optimizer
        return [
            Moment(optimizer, p, key, f"the optimizer's {key}")
            for p in self.update.parameters() for key in MOMENTS
        ]  # fmt: skip

    def _visit_module(self, module: nn.Module, label: str) -> None:
        for name, part in module.named_modules():
            self._seen.add(id(part))
            self.modules[part] = ".".join(filter(None, (label, name)))
            if _is_users(type(part).__module__):
                self.visit(type(part).forward, type(part).__qualname__)
            for key, value in vars(part).items():
                if isinstance(value, FunctionType | MethodType | partial):
                    self.visit(value, f"{self.modules[part]}.{key}")

    def _visit_function(self, function: FunctionType, label: str) -> None:
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._places.append(CellPlace(cell, f"{label}: {name}"))
            self.visit(_contents(cell), name)
        for name in _names(function.__code__):
            if name in function.__globals__:
                self._places.append(Place(function, "__globals__", name, name))
                self.visit(function.__globals__[name], name)


def constants(places: Iterable[AnyPlace]) -> list[tuple[AnyPlace, Any]]:
    """The Python values at these places."""
    return [(place, value) for place in places if isinstance(value := place.get(), CONSTANTS)]


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


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _is_users(module: str | None) -> bool:
    return (module or "").split(".")[0] not in _LIBRARIES
