"""One objective serves any number of pairs: what it learns of one is no concern of another."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.remembered import Remembered

PARALLEL = {"enumerate": "parallel"}


class Nested:
    """z ~ N(0, 1) and x ~ N(z, 1) in as many plates as x has dimensions."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, x: Tensor, observed: bool) -> None:
        plates = [pyro.plate(f"p{d}", n, dim=d) for d, n in zip((-1, -2), x.shape, strict=False)]
        with plates[0], plates[-1]:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def model(self, x: Tensor) -> None:
        self.runs += 1
        self.run(x, True)

    def guide(self, x: Tensor) -> None:
        self.run(x, False)


def one_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one_plate_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def classes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(y.to(x), 1.0), obs=x)


def classes_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(torch.ones(2)), infer=PARALLEL)


def seeded(objective: Objective, *call: Any) -> float:
    pyro.set_rng_seed(3)
    return objective.loss(*call)


OBJECTIVES = [
    lambda: pv.IWAE(3),
    lambda: pv.MIWAE(2, 3),
    lambda: pv.ELBO(kl="auto", num_particles=4),
]


@pytest.mark.parametrize("make", OBJECTIVES, ids=["iwae", "miwae", "elbo"])
def test_pairs_of_different_plates_do_not_disturb_each_other(make: Any) -> None:
    flat, deep = torch.randn(5), torch.randn(5, 3)
    nested = Nested()
    calls = [
        (one_plate, one_plate_guide, flat),
        (nested.model, nested.guide, deep),
        (one_plate, one_plate_guide, flat),
    ]
    objective = make()
    for call in calls:
        assert seeded(objective, *call) == seeded(make(), *call)
    assert objective.max_plate_nesting == float("inf")


def test_a_pair_with_enumeration_does_not_count_the_plates_of_others() -> None:
    x, objective = torch.randn(5), pv.ELBO(kl="auto")
    exact = objective.loss(classes, classes_guide, x)
    log_p = torch.stack([dist.Normal(y, 1.0).log_prob(x) for y in (0.0, 1.0)])
    assert exact == pytest.approx(-log_p.mean(0).sum().item())  # q(y) = p(y): the KL is 0
    nested = Nested()
    objective.loss(nested.model, nested.guide, torch.randn(5, 3))
    assert nested.runs == 1
    assert objective.loss(classes, classes_guide, x) == exact


def test_methods_looked_up_anew_are_one_program() -> None:
    nested, objective, x = Nested(), pv.IWAE(2), torch.randn(4, 2)
    for _ in range(3):
        objective.loss(nested.model, nested.guide, x)
    assert nested.runs == 4  # three, and the one that counts plates


@pytest.mark.parametrize("given", [float("inf"), 1])
def test_compiled_enumerations_of_two_pairs(given: float) -> None:
    x, objective = torch.randn(5), pv.ELBO(kl="auto", max_plate_nesting=given)

    def hidden(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(y.to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def hidden_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(2)), infer=PARALLEL)
            pyro.sample("z", dist.Normal(x, 1.0))

    for pair in ((classes, classes_guide), (hidden, hidden_guide)):
        compiled = pv.compile(objective(*pair), backend="eager")
        pyro.set_rng_seed(1)
        with pyro.validation_enabled(False):  # else a first run is for validation alone
            fused = compiled(x).item()
        assert compiled(x).isfinite()
        pyro.set_rng_seed(1)
        assert fused == pytest.approx(objective.differentiable_loss(*pair, x).item())


class Program:
    """Hashable only by force, comparable to nothing."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("programs are not compared")


class Slotted:
    __slots__ = ()


def test_values_are_of_the_pair_and_die_with_it() -> None:
    kept: Remembered[int] = Remembered()
    a, b, c = Program(), Program(), Slotted()
    for number, pair in enumerate([(a, b), (b, a), (a, a), (a, c)]):
        assert kept.get(*pair) is None  # type: ignore[arg-type]
        kept.keep(*pair, number)  # type: ignore[arg-type]
    assert [kept.get(*p) for p in [(a, c), (a, a), (b, a), (a, b)]] == [3, 2, 1, 0]  # type: ignore[arg-type]
    del b, pair
    gc.collect()
    kept.keep(c, c, 9)  # type: ignore[arg-type]
    assert [value for _, value in kept._kept] == [2, 3, 9]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_objective_learns_anew(copied: Any) -> None:
    nested, x = Nested(), torch.randn(4, 2)
    objective = pv.IWAE(2)
    objective.loss(nested.model, nested.guide, x)
    again = copied(objective)
    nested.runs = 0
    assert seeded(again, nested.model, nested.guide, x) == seeded(
        objective, nested.model, nested.guide, x
    )
    assert nested.runs == 3
