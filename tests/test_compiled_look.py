"""Places read all at once: each as it reads itself, and whatever happens to them is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.compiled.look import Look
from pyro_vae.compiled.places import AnyPlace, Held, Moment
from pyro_vae.held import CellPlace, Item, Place, Slot, Summary


class Plain:
    def __init__(self) -> None:
        self.a = 1


class Doubled(dict[str, float]):
    def __getitem__(self, key: str) -> float:
        return 2 * super().__getitem__(key)


class Slotted:
    __slots__ = ("value",)


def everywhere() -> tuple[SimpleNamespace, list[AnyPlace]]:
    """Things, and a place of each kind in them."""
    value: Any = 1.5

    def closure() -> Any:
        return value

    slotted = Slotted()
    slotted.value = 3
    pyro.get_param_store().clear()
    pyro.param("scale", torch.tensor(2.0))
    it = SimpleNamespace(
        layer=nn.Linear(2, 2), list=[1, "b"], dict={"k": 2.5}, state=[torch.zeros(2)],
        slotted=slotted, own=SimpleNamespace(a=1), plain=Plain(),
        doubled=Doubled(k=2.5), kind=type("Kind", (), {"weight": 1.0}),
    )  # fmt: skip

    def unbound() -> Any:
        return later

    if not it.list:
        later = 1
    assert closure.__closure__ is not None
    assert unbound.__closure__ is not None
    return it, [
        Slot(slotted, "value", ""),
        Slot(closure, "__code__", ""),
        Place(it.kind, "__dict__", "weight", ""),
        Place(it.kind, "__dict__", "hidden", ""),
        CellPlace(unbound.__closure__[0], ""),
        Place(it.layer, "_parameters", "weight", ""),
        Summary(len, it.list, ""),
        CellPlace(closure.__closure__[0], ""),
        Item(it.list, 1, ""),
        Place(it.own, "__dict__", "a", ""),
        Place(it.plain, "__dict__", "a", ""),
        Place(it.own, "__dict__", "absent", ""),
        Item(it.dict, "k", ""),
        Item(it.doubled, "k", ""),
        Place(pyro.get_param_store(), "_params", "scale", ""),
        Moment(it.state, 0, ""),
        Held(torch.ones(1), ""),
        Summary(len, it.dict, ""),
    ]


def test_each_is_read_as_it_reads_itself() -> None:
    it, places = everywhere()
    look = Look(places)
    assert sorted(look.order) == list(range(len(places)))

    def check() -> None:
        now = look()
        assert now is not None
        assert [id(n) for n in now] == [id(places[n].get()) for n in look.order]

    check()
    it.layer.weight = nn.Parameter(torch.ones(2, 2))
    it.list[1] = "c"
    it.list.append(4)
    it.dict["k"] = 7.5
    it.own.a, it.own.absent = None, "there"
    it.state[0] = torch.ones(2)
    it.slotted.value = 4
    it.kind.weight, it.kind.hidden = 2.0, 3.0
    store = pyro.get_param_store()
    store["scale"] = torch.tensor(5.0)
    check()
    del it.own.absent, it.slotted.value, it.kind.hidden
    check()
    it.plain.__dict__ = {"a": 2}
    with store.scope(store.get_state()):  # leaves other dictionaries behind
        check()
    check()
    it.plain.a = 3
    store["scale"] = torch.tensor(6.0)
    check()


def test_what_has_gone_is_told() -> None:
    for forget in (
        lambda it: it.list.clear(),
        lambda it: it.dict.clear(),
        lambda it: delattr(it.own, "a"),
        lambda it: delattr(it.layer, "weight"),
        lambda it: it.state.clear(),
        lambda it: setattr(it.plain, "__dict__", {}),
        lambda it: setattr(it.own, "absent", 1) or setattr(it.plain, "__dict__", {"b": 1}),
        lambda it: pyro.get_param_store().clear(),
    ):
        it, places = everywhere()
        look = Look(places)
        assert look() is not None
        forget(it)
        assert look() is None
        assert look() is None
