"""What programs reach from where they start: their modules, and the places of what they use.

Python code finds a thing by its name, in an object, a class, a closure or the globals. So of the
user's own objects those entries count that some code names which the program can come to, or all,
where the code looks names up itself (`getattr`, `vars`); of modules of torch, Pyro and this
library, whose code is not read, all count.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import sys
import types
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial, partialmethod, singledispatchmethod
from itertools import combinations
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_vae.held import AnyPlace, CellPlace, Item, Place, Slot, Summary, is_constant

_LIBRARIES = {"torch", "pyro", "pyro_vae", "numpy", *sys.stdlib_module_names}
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN_BASES = {"Module", "PyroModule", "object", "ABC", "Generic", "Protocol"}
_RECORDS = types.SimpleNamespace | argparse.Namespace | UserDict | UserList | ChainMap
# of the libraries' objects, those whose attributes a program's numbers are kept in
_OPEN = ELBO | Messenger | ReparamHandler | Reparam | Distribution | Transform | _RECORDS
# what makes an instance: of a class that code names
_CONSTRUCTORS = ("__new__", "__init__", "__post_init__")
# Python calls the special methods for syntax that names none (`a[i]`, `with a`, `float(a)`), but
# these only to make, show, copy or keep an object
_ASIDE = frozenset(_CONSTRUCTORS) | {
    f"__{name}__" for name in (
        "del", "init_subclass", "class_getitem", "set_name", "repr", "dir", "hash", "sizeof",
        "copy", "deepcopy", "reduce", "reduce_ex", "getstate", "setstate", "getnewargs",
        "getnewargs_ex",
    )
}  # fmt: skip
# an attribute that is asked for by its name, which the code that asks has
_BY_NAME = ("__getattr__", "__getattribute__", "__setattr__", "__delattr__")
_WRITES = ("STORE_ATTR", "DELETE_ATTR")
# what transforms remember of their last call
_REMEMBERED = ("_cached_x_y", "_inv")
# by which code finds what it does not name
_LOOKUPS = {"getattr", "hasattr", "vars", "__dict__", "asdict", "attrgetter", "eval", "exec"}
# of a list, a dictionary, a set or an array; the entries of a longer one are not watched
LONGEST = 64


class Reached(NamedTuple):
    """What was found.

    Attributes:
        modules: every module and the name of the way to it.
        places: what holds modules, tensors, numbers and objects, in the order of the search.
    """

    modules: dict[nn.Module, str]
    places: list[AnyPlace]


def reach(roots: Mapping[str, Any]) -> Reached:
    """Everything that can be reached from these modules, functions, objects and objectives now."""
    names = _Names(set(), set())
    while True:
        search, known = _Search(names), names.number
        search.walk(roots)
        if names.number == known:
            return Reached(search.modules, [*search.places, *search.hiding()])


class _Names(NamedTuple):
    """What the code seen so far names.

    Attributes:
        read: attributes.
        asked: texts in code that asks for attributes by their text, there or not (`getattr`).
    """

    read: set[str]
    asked: set[str]

    def includes(self, key: str) -> bool:
        """Whether some code may read an attribute of this name."""
        return key in self.read or not self.read.isdisjoint(_LOOKUPS)

    @property
    def number(self) -> int:
        """How many names there are."""
        return len(self.read) + len(self.asked)


class _Search:
    """One walk, which enters the entries that are named by the code seen so far."""

    def __init__(self, names: _Names) -> None:
        self.modules: dict[nn.Module, str] = {}
        self.places: list[AnyPlace] = []
        self.seen: dict[int, Any] = {}  # the things too, so that none makes room for another
        self._names = names
        self._ahead: deque[tuple[Callable[[Any, str], None], Any, str]] = deque()
        self._instances: list[tuple[Any, str]] = []  # of the user's classes

    def walk(self, roots: Mapping[str, Any]) -> None:
        """Enter the roots, and whatever is found."""
        for label, root in roots.items():
            self._visit(root, label)
        while self._ahead:
            enter, thing, label = self._ahead.popleft()
            enter(thing, label)

    def hiding(self) -> Iterator[Place]:
        """Where something may come to hide what an object has from its class: in the object, or in
        a class that is nearer to it. After the walk, when all names are known."""
        classes = {id(type(thing)): type(thing) for thing, _ in self._instances}
        bases = {id(base): base for cls in classes.values() for base in _bases(cls)}
        offered = {i: self._offered(base) for i, base in bases.items()}
        in_objects: dict[int, set[str]] = {i: set() for i in classes}
        in_classes: dict[int, set[str]] = {i: set() for i in bases}
        for i, cls in classes.items():
            in_objects[i].update(*(offered[id(base)] for base in _bases(cls)))
            for near, base in combinations(_bases(cls), 2):
                in_classes[id(near)] |= offered[id(base)]
        for thing, label in self._instances:
            if hasattr(thing, "__dict__"):
                for key in sorted(in_objects[id(type(thing))] - _vars_of(thing).keys()):
                    yield Place(thing, "__dict__", key, f"{label}.{key}")
        for i, near in bases.items():
            for key in sorted(in_classes[i] - vars(near).keys()):
                yield Place(near, "__dict__", key, f"{near.__qualname__}.{key}")

    def _offered(self, base: type) -> set[str]:
        """What instances have from this class, and what code asks them for."""
        defaults = {
            k for k, v in vars(base).items()
            if (self._names.includes(k) or k == "forward")
            and (is_constant(v) or isinstance(v, FunctionType))
        }  # fmt: skip
        return defaults | self._names.asked

    def _visit(self, thing: Any, label: str) -> None:
        if id(thing) in self.seen:
            return
        enter = self._way_into(thing)
        if enter is not None:
            self.seen[id(thing)] = thing
            self._ahead.append((enter, thing, label))

    def _way_into(self, thing: Any) -> Callable[[Any, str], None] | None:
        if isinstance(thing, nn.Module):
            return self._module
        if isinstance(thing, FunctionType):
            return self._function
        if isinstance(thing, MethodType):
            return self._method
        if isinstance(thing, partial):
            return self._partial
        if isinstance(thing, dict | MappingProxyType | list | tuple | deque):
            return self._container
        if isinstance(thing, set | frozenset):
            return self._set
        if type(thing) is np.ndarray:
            return self._array
        if isinstance(thing, type):
            return self._class if _is_users(thing.__module__) else None
        if isinstance(thing, ModuleType):
            return self._imported if _is_users(thing.__name__) else None
        if isinstance(thing, _OPEN) or _is_users(type(thing).__module__):
            return self._object
        return self._wrapper if hasattr(thing, "__wrapped__") else None

    def _module(self, module: nn.Module, label: str) -> None:
        self.modules[module] = label
        if isinstance(module, torch.jit.ScriptModule):  # which keeps what it has to itself
            return
        foreign = not _is_users(type(module).__module__)
        for table in ("_parameters", "_buffers", "_modules"):
            entries = getattr(module, table)
            if entries or not foreign:  # torch's layers do not ask for what they lack
                self.places.append(Summary(len, entries, f"the number of {label}.{table}"))
            for key in entries:
                self._hold(Place(module, table, key, f"{label}.{key}"))
        for key in getattr(module, "_pyro_params", ()):  # with their constraints
            self._hold(Item(module._pyro_params, key, f"{label}.{key}"))
        for hooks in _HOOKS:
            self._container(getattr(module, hooks), f"{label}.{hooks}")
        own = [key for key in vars(module) if key not in _MODULE_INTERNALS]
        if foreign:  # what may come to hide the class's
            self._hold(Place(module, "__dict__", "forward", f"{label}.forward"))
        for key in own:
            # what the library's own containers hold comes by itself, as modules and tensors
            place = Place(module, "__dict__", key, f"{label}.{key}")
            if foreign and isinstance(place.get(), dict | list | tuple):
                self.places.append(place)
            elif self._counts(type(module), key):
                self._hold(place)
        self._inherited(module, label)

    def _object(self, thing: Any, label: str) -> None:
        for key in getattr(thing, "__dict__", {}):
            if self._counts(type(thing), key):
                self._hold(Place(thing, "__dict__", key, f"{label}.{key}"))
        for base in type(thing).__mro__:
            for key in _slots(base):
                if self._counts(type(thing), key):
                    self._hold(Slot(thing, key, f"{label}.{key}"))
        self._inherited(thing, label)

    def _inherited(self, thing: Any, label: str) -> None:
        """What an object has from its class."""
        self.places.append(Slot(thing, "__class__", f"{label}.__class__"))
        self._instances.append((thing, label))
        for base in _bases(type(thing)):
            self._visit(base, base.__qualname__)

    def _class(self, cls: type, label: str) -> None:
        for key, value in list(vars(cls).items()):
            special = callable(value) and _is_special(cls, key)
            if key == "forward" or special or self._names.includes(key):
                self._hold(Place(cls, "__dict__", key, f"{label}.{key}"))
                for part in _functions(value):
                    self._visit(part, f"{label}.{key}")

    def _function(self, function: FunctionType, label: str) -> None:
        users = _is_users(function.__globals__.get("__name__", ""))
        closure = function.__code__.co_freevars
        for name, cell in zip(closure, function.__closure__ or (), strict=True):
            place = CellPlace(cell, f"{label}: {name}")
            if users:
                self._hold(place, name)
            else:
                self._visit(place.get(), name)
        if not users:
            return
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            self._hold(Slot(function, part, f"{label}.{part}"))
        for key in vars(function):
            if self._names.includes(key):
                self._hold(Place(function, "__dict__", key, f"{label}.{key}"))
        names = _names(function.__code__)
        by_name = function.__name__ in _BY_NAME
        self._names.read.update(names.attributes - _LOOKUPS if by_name else names.attributes)
        self._names.asked.update(names.asked)
        for name in sorted(names.variables):
            if name in function.__globals__:
                self._hold(Place(function, "__globals__", name, name), name)

    def _method(self, method: MethodType, label: str) -> None:
        self._visit(method.__self__, label)
        self._visit(method.__func__, label)

    def _partial(self, thing: partial[Any], label: str) -> None:
        self._visit(thing.func, f"{label}.func")
        self._container(thing.args, label)
        self._container(thing.keywords, label)

    def _wrapper(self, thing: Any, label: str) -> None:
        self._visit(thing.__wrapped__, label)

    def _container(self, container: Any, label: str) -> None:
        if len(container) > LONGEST or is_constant(container):
            return
        self.places.append(Summary(len, container, f"len({label})"))
        named = isinstance(container, dict | MappingProxyType)
        for key in list(container) if named else range(len(container)):
            self._hold(Item(container, key, f"{label}[{key!r}]"))

    def _set(self, things: Any, label: str) -> None:
        if len(things) > LONGEST:
            return
        self.places.append(Summary(tuple, things, label))
        for thing in list(things):
            self._visit(thing, label)

    def _array(self, array: Any, label: str) -> None:
        if array.size <= LONGEST:
            self.places.append(Summary(np.ndarray.tobytes, array, label))

    def _imported(self, module: ModuleType, label: str) -> None:
        for key in list(vars(module)):
            if key in self._names.read or key in self._names.asked:
                self._hold(Place(module, "__dict__", key, f"{label}.{key}"))

    def _hold(self, place: AnyPlace, name: str = "") -> None:
        self.places.append(place)
        thing = place.get()
        self._visit(thing, name or place.label)
        if isinstance(thing, type) and name != "__class__":  # which `super()` asks for
            self._constructors(thing)

    def _constructors(self, cls: type) -> None:
        for base in _bases(cls):
            for key in _CONSTRUCTORS:
                self._visit(vars(base).get(key), f"{base.__qualname__}.{key}")

    def _counts(self, cls: type, key: str) -> bool:
        """Whether some code may read this attribute of an instance of the class."""
        if issubclass(cls, Transform) and key in _REMEMBERED:
            return False
        records = issubclass(cls, _RECORDS) or dataclasses.is_dataclass(cls)
        return records or _has_foreign_code(cls) or self._names.includes(key)


def _vars_of(thing: Any) -> Mapping[str, Any]:
    """An object's own attributes, those of a module's tables included."""
    own: Mapping[str, Any] = thing.__dict__
    if not isinstance(thing, nn.Module):
        return own
    return {**own, **thing._parameters, **thing._buffers, **thing._modules}


def _bases(cls: type) -> list[type]:
    """The user's own of a class's bases, and itself, the nearest first."""
    return [base for base in cls.__mro__ if _is_users(base.__module__)]


def _has_foreign_code(cls: type) -> bool:
    """Whether a class has code of a library that reads attributes of its own accord."""
    return any(not _is_users(b.__module__) and b.__name__ not in _PLAIN_BASES for b in cls.__mro__)


def _functions(value: Any) -> Iterator[Any]:
    """The functions that a class keeps under a descriptor."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from filter(None, (value.fget, value.fset))
    elif isinstance(value, partialmethod | cached_property):
        yield value.func
    elif isinstance(value, singledispatchmethod):
        yield from value.dispatcher.registry.values()


def _is_special(cls: type, key: str) -> bool:
    """Whether Python calls a method of this name for syntax that does not name it; of a class that
    is installed, `__call__` alone (its code would lead through all of a library)."""
    if key == "__call__":
        return True
    special = key.startswith("__") and key.endswith("__") and key not in _ASIDE
    return special and not _is_installed(cls.__module__)


@cache
def _is_installed(module: str) -> bool:
    """Whether a module comes from where packages are installed."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _slots(cls: type) -> Iterable[str]:
    slots = vars(cls).get("__slots__", ()) if _is_users(cls.__module__) else ()
    return (slots,) if isinstance(slots, str) else slots


class _Code(NamedTuple):
    """What code names, that within it included."""

    attributes: set[str]
    variables: set[str]
    asked: set[str]


@cache
def _names(code: CodeType) -> _Code:
    attributes, variables, asked = _Code(set(), set(), set())
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif instruction.opcode in dis.hasname and instruction.opname not in _WRITES:
            attributes.add(instruction.argval)
    attributes |= variables & _LOOKUPS
    if variables & {"getattr", "hasattr"}:
        asked |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    for inner in (_names(c) for c in code.co_consts if isinstance(c, CodeType)):
        attributes |= inner.attributes
        variables |= inner.variables
        asked |= inner.asked
    return _Code(attributes, variables, asked)


@cache
def _is_users(module: str | None) -> bool:
    return (module or "").split(".")[0] not in _LIBRARIES
