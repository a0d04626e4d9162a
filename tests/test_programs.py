"""A (model, guide) pair, run and taken apart."""

import contextlib
import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import nn
from toys import Draws, LinearModel, linear_data, linear_pair

from pyro_vae import ELBO, programs
from pyro_vae.errors import SiteError
from pyro_vae.programs import Pair


def test_a_run_sorts_the_sites():
    def model(x):
        pyro.deterministic("remark", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp()))

    run = Pair(model, guide, (torch.zeros(3),)).run()
    assert [name for name, _ in run.latent] == ["z"]
    assert [name for name, _ in run.observed] == ["x"]
    assert [name for name, _ in run.auxiliary] == ["u"]
    assert list(run.values) == ["u", "z"]
    torch.testing.assert_close(run.model["z"]["value"], run.guide["u"]["value"].exp())
    torch.testing.assert_close(run.subsamples["data"], torch.arange(3))


def test_a_guide_site_that_the_model_observes_counts_as_auxiliary():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    run = Pair(model, guide, (torch.zeros(3),)).run()
    assert [name for name, _ in run.auxiliary] == ["y"]


def test_plate_nesting_is_found_and_leaves_no_trace():
    def deep(x):
        with pyro.plate("rows", 4, dim=-3), pyro.plate("columns", 5, dim=-1):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

    with poutine.trace() as tracer:
        state = torch.get_rng_state()
        assert programs.plate_nesting(deep, deep, (0,), {}) == 3
        assert torch.equal(torch.get_rng_state(), state)
    assert not tracer.trace.nodes
    assert programs.plate_nesting(lambda: None, lambda: None, (), {}) == 0


@pytest.mark.parametrize("num_particles", [1, 4])
def test_shared_plates_and_sums_within_them(num_particles):
    def program():
        with pyro.plate("group", 2, dim=-2):
            pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("item", 3, dim=-1):
                pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    run = Pair(program, program, num_particles=num_particles, nesting=2).run()
    sites = list(run.model.values())
    assert programs.shared_plates(sites) == [-2]
    assert programs.shared_plates(sites[1:]) == [-2, -1]
    assert programs.shared_plates([]) == []
    for site in sites:
        value = programs.log_prob(site)
        within = programs.sum_within(value, [-2], 2)
        assert within.shape == (num_particles, 2)
        torch.testing.assert_close(within.sum(), value.sum())


def test_values_may_be_put_in_the_place_of_draws():
    x = linear_data()
    model, guide = linear_pair()
    z = torch.ones(len(x), 2)
    sites = Pair(model, guide, (x,)).sites_at(model, {"z": z, "x": torch.zeros(4, 3)})
    assert sites["z"]["value"] is z
    assert sites["x"]["value"] is not z  # the observed stays observed
    torch.testing.assert_close(sites["x"]["value"], x)
    assert not sites["z"]["is_observed"]


def test_a_frozen_module_is_the_same_function_with_constant_parameters():
    x = linear_data()
    _, guide = linear_pair()
    before = copy.deepcopy(guide.state_dict())
    z = torch.zeros(4, 2, requires_grad=True)
    pair = Pair(guide, guide, (x,))
    stopped = programs.log_prob(programs.frozen_sites(pair, {"z": z})["z"]).sum()
    free = programs.log_prob(pair.sites_at(guide, {"z": z})["z"]).sum()
    assert stopped.item() == free.item()
    parts = (z, *guide.parameters())
    by_z, *by_parameters = torch.autograd.grad(stopped, parts, allow_unused=True)
    assert by_parameters == [None, None, None]
    torch.testing.assert_close(by_z, torch.autograd.grad(free, z)[0])
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("local", [False, True])
def test_frozen_params_stay_hidden_from_svi(local):
    """The guide's parameters move, though their constant stand-ins are announced too."""

    class PyroGuide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.zeros(2))
            self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))

    x = linear_data()
    with pyro.settings.context(module_local_params=local):
        guide = PyroGuide()
        before = copy.deepcopy(guide.state_dict())
        objective = ELBO(kl="monte_carlo", gradient="stl")
        SVI(LinearModel(), guide, pyro.optim.Adam({"lr": 0.1}), objective).step(x)
        for name, value in guide.state_dict().items():
            assert not torch.equal(value, before[name]), name


def test_evaluating_puts_every_mode_back():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    net[1].eval()
    with programs.evaluating(net, lambda: None):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, False, False]
    with contextlib.suppress(ZeroDivisionError), programs.evaluating(net):
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1.0, 1.0, True),
        (1.0, 2.0, False),
        (None, None, True),
        (None, torch.ones(2), False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (1.0, torch.tensor(1.0), True),
    ],
)
def test_equal(a, b, same):
    assert programs.equal(a, b) is same


def test_batch_shapes_are_checked_only_where_pyro_validates():
    def program():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pytest.raises(SiteError, match=r"\.to_event\(\)"):
        Pair(program, program).run()
    with pyro.validation_enabled(False):
        Pair(program, program).run()


def test_particles_are_drawn_independently():
    x = linear_data()
    with Draws() as draws:
        Pair(*linear_pair(), (x,), num_particles=3, nesting=1).run()
    in_guide, in_model = draws.values["z"]
    assert in_guide.shape == (3, 4, 2)
    assert torch.equal(in_guide, in_model)
    assert len(in_guide.flatten().unique()) == 3 * 4 * 2
