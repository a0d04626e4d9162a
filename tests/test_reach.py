"""What a program reaches: whatever of it changes, the compiled loss is the eager one again."""

import collections
import dataclasses
import fractions
import functools
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform

import pyro_vae as pv
from pyro_vae.programs import modules_of
from pyro_vae.reach import LONGEST, reach

Change = Callable[[], None]


def scaled(weight: Callable[[], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 * weight()).expand(x.shape).to_event(1), obs=x)

    return model


def guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))


class WithDefault(nn.Module):
    beta = 1.0

    def forward(self, x: Tensor) -> None:
        scaled(lambda: self.beta)(x)


def a_default_overridden() -> tuple[Any, Change]:
    model = WithDefault()
    return model, lambda: setattr(model, "beta", 2.0)


def a_class_attribute() -> tuple[Any, Change]:
    class Model(WithDefault):
        beta = 1.0

    return Model(), lambda: setattr(Model, "beta", 2.0)


class Plain:
    def __init__(self, weight: Any = 1.0) -> None:
        self.weight = weight

    def scale(self) -> Any:
        return self.weight

    def model(self, x: Tensor) -> None:
        scaled(lambda: self.scale())(x)


def a_plain_objects_attribute() -> tuple[Any, Change]:
    plain = Plain()
    return plain.model, lambda: setattr(plain, "weight", 2.0)


def a_plain_objects_tensor() -> tuple[Any, Change]:
    plain = Plain(torch.tensor(1.0))
    return plain.model, lambda: setattr(plain, "weight", torch.tensor(2.0))


def a_number_that_becomes_a_tensor() -> tuple[Any, Change]:
    plain = Plain()
    return plain.model, lambda: setattr(plain, "weight", torch.linspace(1, 2, 4))


def an_attribute_asked_for() -> tuple[Any, Change]:
    plain = Plain()
    return scaled(lambda: getattr(plain, "late", 1.0)), lambda: setattr(plain, "late", 2.0)


def a_numpy_scalar() -> tuple[Any, Change]:
    plain = Plain(np.float32(1.0))
    return scaled(lambda: torch.ones(()) * plain.scale()), lambda: setattr(
        plain, "weight", np.float32(2.0)
    )


def a_numpy_array() -> tuple[Any, Change]:
    plain = Plain(np.ones(4))
    return scaled(lambda: torch.tensor(plain.weight)), lambda: setattr(
        plain, "weight", 2 * np.ones(4)
    )


SETTINGS: Any = None


def from_settings(made: Any, read: Callable[[], Any], change: Callable[[Any], None]) -> Any:
    def make() -> tuple[Any, Change]:
        global SETTINGS
        SETTINGS = made()
        return scaled(read), lambda: change(SETTINGS)

    return make


@dataclasses.dataclass
class Record:
    beta: float = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    beta: float = 1.0


class Entry(NamedTuple):
    beta: float = 1.0


def replace(value: Any) -> Callable[[Any], None]:
    def change(_: Any) -> None:
        global SETTINGS
        SETTINGS = value

    return change


def user_module() -> types.ModuleType:
    module = types.ModuleType("config_of_a_user")
    module.beta = 1.0  # type: ignore[attr-defined]
    return module


def beta_2(settings: Any) -> None:
    settings.beta = 2.0


def item_2(key: Any) -> Callable[[Any], None]:
    return lambda settings: settings.__setitem__(key, 2.0)


def a_submodule() -> tuple[Any, Change]:
    network = nn.Sequential(nn.Linear(1, 1), nn.Softplus())

    def change() -> None:
        network[1] = nn.Sigmoid()

    return scaled(lambda: network(torch.ones(1))), change


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation: Any = torch.exp

    def forward(self, x: Tensor) -> None:
        scaled(lambda: self.activation(torch.tensor(0.7)))(x)


def a_function() -> tuple[Any, Change]:
    model = Activated()
    return model, lambda: setattr(model, "activation", torch.sigmoid)


def a_forward_hook() -> tuple[Any, Change]:
    layer = nn.Softplus()
    hook = lambda *results: results[-1] * 2  # noqa: E731
    return scaled(
        lambda: layer(torch.tensor(0.7))
    ), lambda: layer.register_forward_hook(hook) and None


def a_handlers_number() -> tuple[Any, Change]:
    handler = poutine.scale(scale=1.0)
    return handler(scaled(lambda: 1.0)), lambda: setattr(handler, "scale", 2.0)


def a_handlers_data() -> tuple[Any, Change]:
    data = {"w": torch.tensor(1.0)}
    model = poutine.condition(scaled(lambda: pyro.sample("w", dist.LogNormal(0.0, 1.0))), data=data)
    return model, lambda: data.update(w=torch.tensor(2.0))


class Constrained(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = PyroParam(torch.tensor(1.5), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        scaled(lambda: self.w)(x)


def a_constraint() -> tuple[Any, Change]:
    model = Constrained()

    def change() -> None:
        pyro.clear_param_store()
        model.w = PyroParam(torch.tensor(1.5), constraint=constraints.greater_than(1.0))
        model.w_unconstrained.data.add_(1.0)

    return model, change


def a_parameters_hook() -> tuple[Any, Change]:
    def change() -> None:
        pyro.param("loc").register_hook(lambda gradient: gradient * 0)

    return scaled(lambda: 1.0), change


CHANGES = {
    function.__name__: function
    for function in (
        a_default_overridden, a_class_attribute, a_plain_objects_attribute, a_plain_objects_tensor,
        a_number_that_becomes_a_tensor, an_attribute_asked_for, a_numpy_scalar,
        a_numpy_array, a_submodule, a_function, a_forward_hook, a_handlers_number, a_handlers_data,
        a_constraint, a_parameters_hook,
    )
} | {
    "a namespace": from_settings(
        lambda: SimpleNamespace(beta=1.0), lambda: SETTINGS.beta, beta_2
    ),
    "a dataclass": from_settings(Record, lambda: SETTINGS.beta, beta_2),
    "a dataclass with slots": from_settings(Slotted, lambda: SETTINGS.beta, beta_2),
    "a dataclass by getattr": from_settings(Record, lambda: getattr(SETTINGS, "be" + "ta"), beta_2),
    "a named tuple": from_settings(Entry, lambda: SETTINGS.beta, replace(Entry(2.0))),
    "a module": from_settings(user_module, lambda: SETTINGS.beta, beta_2),
    "a list": from_settings(lambda: [1.0], lambda: SETTINGS[0], item_2(0)),
    "a list that grows": from_settings(
        lambda: [1.0], lambda: float(len(SETTINGS)), lambda s: s.append(0.0)
    ),
    "a dictionary": from_settings(lambda: {"b": 1.0}, lambda: SETTINGS["b"], item_2("b")),
    "a list of tensors": from_settings(
        lambda: [torch.tensor(1.0)], lambda: SETTINGS[0],
        lambda s: s.__setitem__(0, torch.tensor(2.0)),
    ),
    "an object replaced": from_settings(Record, lambda: SETTINGS.beta, replace(Record(2.0))),
}  # fmt: skip


class Special:
    """Says what it holds to syntax that names no method."""

    def __init__(self) -> None:
        self._hidden = 1.0

    def __getitem__(self, key: Any) -> float:
        return self._hidden

    def __float__(self) -> float:
        return self._hidden

    def __len__(self) -> int:
        return int(self._hidden)

    def __iter__(self) -> Any:
        return iter([self._hidden])

    def __mul__(self, other: float) -> float:
        return self._hidden * other

    def __enter__(self) -> float:
        return self._hidden

    def __exit__(self, *error: Any) -> None:
        pass

    def __contains__(self, key: Any) -> bool:
        return self._hidden > 1.5

    def __eq__(self, other: object) -> bool:
        return self._hidden > 1.5

    __hash__ = None  # type: ignore[assignment]


class Configuration:
    def __init__(self) -> None:
        self._store = {"beta": 1.0}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store[name]


class Doubled:
    def __get__(self, instance: Any, owner: Any) -> Any:
        return instance._hidden


class Described(Special):
    beta = Doubled()

    def times(self, factor: float) -> float:
        return self._hidden * factor

    once = functools.partialmethod(times, 1.0)

    @functools.singledispatchmethod
    def of(self, kind: Any) -> float:
        return self._hidden

    @functools.cached_property
    def kept(self) -> float:
        return self._hidden


def entered(settings: Any) -> Any:
    with settings as value:
        return value


def hidden_2(settings: Any) -> None:
    settings._hidden = 2.0


SYNTAX: dict[str, Callable[[Any], Any]] = {
    "x[i]": lambda s: s[0], "float(x)": float, "len(x)": len, "iteration": sum,
    "x * 1": lambda s: s * 1.0, "with x": entered, "i in x": lambda s: 2.0 if 1 in s else 1.0,
    "x == 1": lambda s: 2.0 if s == 1 else 1.0, "a descriptor": lambda s: s.beta,
    "a partial method": lambda s: s.once(), "a method by type": lambda s: s.of(1),
}  # fmt: skip
CHANGES |= {
    name: from_settings(Described, lambda read=read: read(SETTINGS), hidden_2)
    for name, read in SYNTAX.items()
}


class Scaled(dist.Normal):
    """Made anew by the program, of a global."""

    def __init__(self, loc: Any) -> None:
        super().__init__(loc, SETTINGS)


class Box(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value * SETTINGS)


def boxed() -> Any:
    box = Box()
    box["b"] = 1.0
    return box["b"]


class Defaulted:
    beta: Any = 2.0


CHANGES |= {
    "a global that a constructor reads": from_settings(
        lambda: 1.0, lambda: Scaled(0.0).scale, replace(2.0)
    ),
    "a global that an assignment reads": from_settings(lambda: 1.0, boxed, replace(2.0)),
    "a None that hides a default": from_settings(
        Defaulted, lambda: SETTINGS.beta or 1.0, lambda s: setattr(s, "beta", None)
    ),
    "a cached property": from_settings(
        Described, lambda: SETTINGS.kept, lambda s: vars(s).update(kept=2.0)
    ),
    "__getattr__": from_settings(
        Configuration, lambda: SETTINGS.beta, lambda s: s._store.update(beta=2.0)
    ),
    "a set": from_settings(lambda: {1.0}, lambda: sum(SETTINGS), lambda s: s.add(2.0)),
    "a deque": from_settings(
        lambda: collections.deque([1.0], maxlen=1), lambda: SETTINGS[0], lambda s: s.append(2.0)
    ),
    "a user's dictionary": from_settings(
        lambda: collections.UserDict(b=1.0), lambda: SETTINGS["b"], item_2("b")
    ),
    "within a numpy array": from_settings(
        lambda: np.ones(3), lambda: torch.tensor(SETTINGS[1]), item_2(1)
    ),
    "what a partial was given": from_settings(
        lambda: functools.partial(lambda b: b, b=1.0), lambda: SETTINGS(),
        lambda s: s.keywords.update(b=2.0),
    ),
    "a fraction": from_settings(
        lambda: fractions.Fraction(1), lambda: float(SETTINGS), replace(fractions.Fraction(2))
    ),
    "a slice": from_settings(
        lambda: slice(1), lambda: torch.ones(3)[SETTINGS].sum(), replace(slice(2))
    ),
    "a distribution": from_settings(
        lambda: torch.distributions.Normal(0.0, 1.0), lambda: SETTINGS.scale,
        replace(torch.distributions.Normal(0.0, 2.0)),
    ),
    "within a distribution": from_settings(
        lambda: dist.Normal(0.0, 1.0), lambda: SETTINGS.scale,
        lambda s: setattr(s, "scale", torch.tensor(2.0)),
    ),
    "a transform": from_settings(
        lambda: AffineTransform(0.0, 1.0), lambda: SETTINGS(torch.tensor(1.0)),
        lambda s: setattr(s, "scale", 2.0),
    ),
    "a part of a transform": from_settings(
        lambda: ComposeTransform([AffineTransform(0.0, 1.0)]), lambda: SETTINGS(torch.tensor(1.0)),
        lambda s: s.parts.__setitem__(0, AffineTransform(0.0, 2.0)),
    ),
    "the type of a number": from_settings(
        lambda: (1.0, 1), lambda: 2.0 if isinstance(SETTINGS[1], bool) else 1.0,
        replace((1.0, True)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    check_that_it_is_seen(*CHANGES[name](), guide)


def test_how_a_site_is_reparametrised_is_seen() -> None:
    kind = LocScaleReparam(centered=0.2)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.3, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)

    def decentered(x: Tensor) -> None:
        pyro.sample("z_decentered", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))

    reparametrised = poutine.reparam(model, config={"z": kind})
    check_that_it_is_seen(reparametrised, lambda: setattr(kind, "centered", 0.8), decentered)


def check_that_it_is_seen(model: Any, change: Change, guide: Any) -> None:
    objective, x = pv.ELBO("monte_carlo"), torch.linspace(-1, 1, 4)
    compiled = pv.compile(objective(model, guide), x, backend="eager")

    def both() -> tuple[list[Tensor], list[Tensor]]:
        found = []
        for loss in (compiled, objective(model, guide)):
            pyro.set_rng_seed(0)
            value = loss(x)
            found.append([value, *torch.autograd.grad(value, [pyro.param("loc")])])
        return found[0], found[1]

    before, expected = both()
    torch.testing.assert_close(before, expected)
    change()
    after, expected = both()
    assert any(a != b for a, b in zip(expected, before, strict=True))  # something to see
    torch.testing.assert_close(after, expected)


class TestWhatIsNotUsed:
    """What no code of the program names may change at every step, and is no other program."""

    def programs(self, model: Any, change: Callable[[int], None]) -> int:
        x = torch.ones(4)
        compiled = pv.compile(pv.ELBO("monte_carlo")(model, guide), x, backend="eager")
        for i in range(3):
            change(i)
            compiled(x)
        return sum(map(len, compiled._fused._programs.values()))  # type: ignore[union-attr]

    def test_a_counter_of_the_trainer(self) -> None:
        class Trainer(Plain):
            steps = 0

            def train(self) -> None:
                self.steps += 1

        trainer = Trainer()
        assert self.programs(trainer.model, lambda i: trainer.train()) == 1

    def test_a_global_by_the_name_of_a_method(self) -> None:
        scope: dict[str, Any] = {**globals(), "mean": 0.0, "__name__": "a_script"}
        exec(
            "def model(x):\n"
            "    z = pyro.sample('z', dist.Normal(x.mean(), 1.0))\n"
            "    pyro.sample('x', dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)\n",
            scope,
        )
        assert self.programs(scope["model"], lambda i: scope.update(mean=float(i))) == 1

    def test_what_a_transform_remembers(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.warp = ExpTransform(cache_size=1)

            def forward(self, x: Tensor) -> None:
                scaled(lambda: self.warp(torch.tensor(0.3)))(x)

        model = Model()
        assert self.programs(model, lambda i: model.warp.inv(model.warp(torch.rand(2)))) == 1

    def test_a_counter_beside_an_attribute_asked_for_by_its_name(self) -> None:
        class Delegating:
            def __init__(self) -> None:
                self.inner, self.steps = Plain(1.0), 0

            def __getattr__(self, name: str) -> Any:
                return getattr(self.__dict__["inner"], name)

        it = Delegating()
        model = scaled(lambda: it.weight)
        assert self.programs(model, lambda i: setattr(it, "steps", i)) == 1


class TestWhatIsNotEntered:
    def test_an_installed_library(self) -> None:
        figure = Figure()
        found = reach({"program": lambda: 1.0 if figure else 2.0})
        assert len(found.places) < 100

    def test_a_long_set(self) -> None:
        long = set(range(LONGEST + 1))
        assert len(reach({"program": lambda: sum(long)}).places) < 10

    def test_a_masked_array(self) -> None:
        masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
        loss = pv.ELBO("monte_carlo")(scaled(lambda: float(masked.sum())), guide)
        pv.compile(loss, torch.ones(4), backend="eager")


class TestModulesOf:
    def test_wherever_they_are(self) -> None:
        layers = [nn.Linear(1, 1) for _ in range(6)]
        kept = {"a": [layers[0]], "b": (layers[1], {layers[2]})}
        plain = Plain(layers[3])

        def program() -> None:
            kept["a"][0](layers[4](plain.scale()))

        found = modules_of(program, nn.Sequential(layers[5]), torch.nn.functional.dropout)
        assert set(layers) - {layers[5]} <= set(found)
        assert layers[5] not in found  # its container is there
        assert len(found) == len(set(found))

    def test_a_long_list_is_not_searched(self) -> None:
        long = [nn.Linear(1, 1) for _ in range(LONGEST + 1)]
        assert not reach({"program": lambda: long[0]}).modules
