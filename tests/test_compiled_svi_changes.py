"""What a script does between steps: the compiled SVI goes on as Pyro's would."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import batch_norm, vae
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import CompileError, ConfigError, NonFiniteError

X = torch.linspace(-1, 2, 6, dtype=torch.float64)
Script = Callable[[Any], list[Any]]


def normal(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(pyro.param("mean", torch.tensor(0.5)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def svi(kind: Any, model: Any = normal, q: Any = guide, optim: Any = None) -> Any:
    options = {} if kind is SVI else {"backend": "eager"}
    return kind(model, q, optim or pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)


def stored() -> list[Any]:
    return [p.detach().clone() for _, p in sorted(pyro.get_param_store().named_parameters())]


def a_parameter_hidden(kind: Any) -> list[Any]:
    made = svi(kind, poutine.block(normal, hide=["mean"]))
    return [made.step(X) for _ in range(3)] + stored()


def a_network_registered_before(kind: Any) -> list[Any]:
    network = nn.Linear(1, 1)
    nn.init.constant_(network.weight, 0.7)
    nn.init.constant_(network.bias, 0.1)
    pyro.module("network", network)  # by an earlier phase

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(z[None])[0], 1.0), obs=x)

    made = svi(kind, model)
    return [made.step(X) for _ in range(3)] + stored()


def local_parameters(kind: Any) -> list[Any]:
    with pyro.settings.context(module_local_params=True):
        made = svi(kind)
        return [made.step(X) for _ in range(3)] + stored()


def the_store_cleared(kind: Any) -> list[Any]:
    made = svi(kind)
    found = [made.step(X) for _ in range(2)]
    pyro.clear_param_store()
    return found + [made.step(X) for _ in range(2)] + stored()


def the_store_cleared_under_an_autoguide(kind: Any) -> list[Any]:
    with poutine.block():
        q = AutoNormal(
            lambda x: normal(x), init_scale=0.3, init_loc_fn=lambda site: torch.zeros(())
        )
        q(X)
    made = svi(kind, q=q)
    found = [made.step(X) for _ in range(2)]
    pyro.clear_param_store()
    return found + [made.step(X) for _ in range(2)] + stored()


def steps_around_an_evaluation(made: Any) -> list[Any]:
    """With the store put back to what it was, as every evaluation leaves it: in other
    dictionaries."""
    store = pyro.get_param_store()
    found = [made.step(X)]
    with store.scope(store.get_state()):
        pyro.param("loc").data.add_(1.0)
    found.append(made.step(X))
    store["loc"] = torch.tensor(5.0)
    return [*found, made.step(X)]


def the_store_put_back(kind: Any) -> list[Any]:
    return steps_around_an_evaluation(svi(kind)) + stored()


def another_optimizer(kind: Any) -> list[Any]:
    made = svi(kind)
    found = [made.step(X)]
    made.optim = pyro.optim.SGD({"lr": 0.001})
    return found + [made.step(X) for _ in range(2)] + stored()


def another_loss(kind: Any) -> list[Any]:
    made = svi(kind)
    found = [made.step(X)]
    made.loss = Trace_ELBO(num_particles=3)
    if kind is SVI:  # which keeps the first loss's method
        elbo = made.loss
        made.loss_and_grads, made.loss = elbo.loss_and_grads, elbo.loss
    return found + [made.step(X) for _ in range(2)]


def a_parameter_by_another_constraint(kind: Any) -> list[Any]:
    made = svi(kind)
    losses = [made.step(X) for _ in range(2)]
    store = pyro.get_param_store()
    unconstrained, _ = store._params["scale"], store._constraints.pop("scale")
    store._constraints["scale"] = constraints.greater_than(0.4)
    assert store._params["scale"] is unconstrained
    return losses + [made.step(X) for _ in range(3)] + stored()


def heads_in_turn(optim: Any) -> Script:
    """Parameters that only every other step uses: momentum moves them at the others too."""

    def script(kind: Any) -> list[Any]:
        heads = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

        def model(x: Tensor, which: int) -> None:
            pyro.module("heads", heads)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(heads[which](z[None])[0], 1.0), obs=x)

        made = svi(kind, model, lambda x, which: guide(x), optim())
        return [made.step(X, i % 2) for i in range(6)] + stored()

    return script


def a_gradient_hook(kind: Any) -> list[Any]:
    made = svi(kind)
    found = [made.step(X)]
    pyro.param("loc").register_hook(lambda gradient: gradient * 0)
    return found + [made.step(X) for _ in range(2)] + stored()


def a_parameter_as_argument(kind: Any) -> list[Any]:
    def model(x: Tensor, at: Tensor) -> None:
        normal(x + at)

    def q(x: Tensor, at: Tensor) -> None:
        guide(x)

    made = svi(kind, model, q)
    guide(X)
    return [made.step(X, pyro.param("loc")) for _ in range(3)] + stored()


SCRIPTS = (
    a_parameter_hidden, a_network_registered_before, local_parameters, the_store_cleared,
    the_store_cleared_under_an_autoguide, the_store_put_back, another_optimizer, another_loss,
    a_gradient_hook, a_parameter_as_argument, a_parameter_by_another_constraint,
)  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script(script: Script) -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found.append([torch.as_tensor(value) for value in script(kind)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.05}),
        lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
        lambda: pyro.optim.SGD({"lr": 0.01, "weight_decay": 0.1}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 1.0}),
    ],
    ids=["Adam", "momentum", "decay", "ClippedAdam"],
)
def test_a_parameter_that_a_step_does_not_use(optim: Any) -> None:
    test_a_script(heads_in_turn(optim))


def test_a_parameter_that_has_gone() -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        unused = nn.Linear(1, 1)

        def model(x: Tensor, unused: Any = unused) -> None:
            pyro.module("unused", unused)
            normal(x)

        made = svi(kind, model)
        losses = [made.step(X)]
        unused.bias = None  # type: ignore[assignment]
        found.append(losses + [made.step(X) for _ in range(2)])
    assert found[0] == pytest.approx(found[1])


class Settings:
    def __init__(self, factor: float) -> None:
        self.factor = factor


def part_of_a_model() -> Any:
    """A module with something of each kind to change, and classes of its own."""

    class Base(nn.Module):
        scale = 1.5

        def shifted(self, z: Tensor, by: Any = (0.1,), *, further: float = 0.2) -> Tensor:
            return z + by[0] + further + sum(self.offsets.values())

    class Part(Base):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            nn.init.constant_(self.layer.weight, 0.7)
            nn.init.constant_(self.layer.bias, 0.1)
            self.offsets = defaultdict(float, {"a": 0.2, "b": 0.5})
            self.settings = Settings(2.0)

        def forward(self, z: Tensor) -> Tensor:
            return self.scale * self.layer(self.settings.factor * self.shifted(z)[None])[0]

    return Part()


def initialise_again(part: Any) -> None:
    part.layer.__init__(1, 1)
    nn.init.constant_(part.layer.weight, 0.9)
    nn.init.constant_(part.layer.bias, 0.3)
    pyro.clear_param_store()


def exchange_attributes(part: Any) -> None:
    part.settings.__dict__ = {"factor": 3.0}


def delete_an_offset(part: Any) -> None:
    del part.offsets["b"]


def change_a_default(part: Any) -> None:
    type(part).shifted.__defaults__ = ((0.4,),)


def change_a_default_by_name(part: Any) -> None:
    type(part).shifted.__kwdefaults__["further"] = 0.6


def change_code(part: Any) -> None:
    def shifted(self: Any, z: Tensor, by: Any = (), *, further: float = 0.0) -> Tensor:
        return z - further

    type(part).shifted.__code__ = shifted.__code__


def change_the_class(part: Any) -> None:
    part.__class__ = type("Other", (type(part),), {"shifted": lambda self, z: z - 1.0})


def hide_an_attribute_of_a_base(part: Any) -> None:
    type(part).scale = 2.5


def hide_a_method_of_a_base(part: Any) -> None:
    type(part).shifted = lambda self, z: z - 1.0


def hide_a_method(part: Any) -> None:
    part.shifted = lambda z: z - 1.0


def hide_forward(part: Any) -> None:
    part.forward = lambda z: part.layer(z[None])[0] - 1.0


def hide_forward_of_a_layer(part: Any) -> None:
    weight, bias = part.layer.weight, part.layer.bias
    part.layer.forward = lambda z: nn.functional.linear(z, weight, bias) - 1.0


def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def another_hook(part: Any) -> None:
    (key,) = part.layer._forward_hooks
    part.layer._forward_hooks.pop(key)
    part.layer.register_forward_hook(lambda module, inputs, output: output - 1)


def a_hook_of_gradients(part: Any) -> None:
    part.layer.register_full_backward_pre_hook(lambda module, gradients: (3 * gradients[0],))


CHANGES = (
    initialise_again, exchange_attributes, delete_an_offset, change_a_default,
    change_a_default_by_name, change_code, change_the_class, hide_an_attribute_of_a_base,
    hide_a_method_of_a_base, hide_a_method, hide_forward, hide_forward_of_a_layer,
    another_hook, a_hook_of_gradients,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps(change: Any) -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        part = part_of_a_model()
        part.layer.register_forward_hook(hook)

        def model(x: Tensor, part: Any = part) -> None:
            pyro.module("part", part)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(part(z), 1.0), obs=x)

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        made = svi(kind, model)
        steps = [made.step(X) for _ in range(2)]
        change(part)
        steps += [made.step(X) for _ in range(2)]
        found.append([torch.as_tensor(v) for v in (*steps, *part.parameters(), *stored())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


class TestGradientsOfArguments:
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
    def test_they_go_on_into_what_made_them(self, optimizer: Any) -> None:
        found = []
        for compiled in (False, True):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            encode = nn.Linear(6, 6)
            optim = optimizer(encode.parameters(), 0.01)
            made = pv.CompiledSVI(normal, guide, optim, Trace_ELBO(), backend="eager")
            for seed in range(3):
                if compiled:
                    pyro.set_rng_seed(seed)
                    made.step(encode(X))
                    continue
                optim.zero_grad()
                pyro.set_rng_seed(seed)
                Trace_ELBO().differentiable_loss(normal, guide, encode(X)).backward()
                optim.step()
            found.append([p.detach() for p in encode.parameters()])
        torch.testing.assert_close(found[1], found[0])


class TestCopies:
    def test_a_copy_trains_its_own(self) -> None:
        model, q, (x,) = vae()
        optim = torch.optim.Adam([*model.parameters(), *q.parameters()], 0.1)
        first = pv.CompiledSVI(model, q, optim, pv.ELBO(), backend="eager")
        first.step(x)
        before = copy.deepcopy([p.detach() for p in model.parameters()])
        second = copy.deepcopy(first)
        twin = copy.deepcopy((model, q, optim))
        pyro.set_rng_seed(0)
        second.step(x)
        assert all(map(torch.equal, model.parameters(), before))
        again = pv.CompiledSVI(*twin, pv.ELBO(), backend="eager")
        pyro.set_rng_seed(0)
        again.step(x)
        for mine, its in zip(second.model.parameters(), twin[0].parameters(), strict=True):
            assert torch.equal(mine, its)

    def test_another_model_in_the_compiled_loss(self) -> None:
        first, second = (vae() for _ in range(2))
        compiled = pv.compile(pv.ELBO()(*first[:2]), first[2][0], backend="eager")
        compiled.model, compiled.guide = second[:2]
        x = second[2][0]
        pyro.set_rng_seed(0)
        got = compiled(x)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(got, pv.ELBO()(*second[:2])(x))


class TestRefusals:
    def test_handlers_around_a_later_step(self) -> None:
        made = svi(pv.CompiledSVI)
        made.step(X)
        with poutine.scale(scale=0.1), pytest.raises(CompileError, match="ScaleMessenger"):
            made.step(X)

    def test_a_bias_that_is_gone(self) -> None:
        model, q, (x,) = vae()
        layer = model.likelihood.network.layers[0]
        optim = torch.optim.Adam(model.parameters(), 0.1)
        made = pv.CompiledSVI(model, q, optim, pv.ELBO(), backend="eager")
        made.step(x)
        layer.bias = None
        made.step(x)  # another program

    def test_what_has_no_step(self) -> None:
        network = nn.Linear(1, 1)
        with pytest.raises(ConfigError, match="LBFGS"):
            pv.CompiledSVI(normal, guide, torch.optim.LBFGS(network.parameters()), Trace_ELBO())

    @pytest.mark.parametrize("where", ["data", "parameter"])
    def test_what_is_not_finite_is_named(self, where: str) -> None:
        model, q, (x,) = vae()
        optim = torch.optim.Adam([*model.parameters(), *q.parameters()], 0.1)
        made = pv.CompiledSVI(model, q, optim, pv.ELBO(), backend="eager")
        made.step(x)
        bad = x.clone()
        if where == "data":
            bad[2, 1] = torch.nan
        else:
            q.posterior.network.layers[0].weight.data[1, 2] = torch.inf
        name = r"argument 0 holds nan at \(2, 1\)" if where == "data" else r"weight\" holds inf at"
        with pytest.raises(NonFiniteError, match=name):
            made.step(bad)

    def test_a_step_that_is_not_finite_leaves_buffers(self) -> None:
        model, q, (x,) = batch_norm()
        optim = torch.optim.Adam([*model.parameters(), *q.parameters()], 0.1)
        made = pv.CompiledSVI(model, q, optim, pv.ELBO(), backend="eager")
        made.step(x)
        before = {name: b.clone() for name, b in q.named_buffers()}
        bad = x.clone()
        bad[0, 0] = torch.nan
        with pytest.raises(NonFiniteError):
            made.step(bad)
        assert before
        assert all(torch.equal(b, before[name]) for name, b in q.named_buffers())


def test_a_store_put_back_to_what_it_was_is_no_other_program() -> None:
    made = svi(pv.CompiledSVI)
    steps_around_an_evaluation(made)
    assert len(made.compile_seconds) == 1


class Fleeting:
    """Gives another dictionary each time."""

    @property
    def __dict__(self) -> dict[str, float]:  # type: ignore[override]
        return {"weight": 2.0}


def test_what_is_another_each_time_is_refused() -> None:
    fleeting = Fleeting()

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(vars(fleeting)["weight"], 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(CompileError, match="each time it is looked at"):
        svi(pv.CompiledSVI, model).step(X)


class TestTheGuardNearAMinimum:
    """Where the terms of a gradient cancel, what is left of it is rounding."""

    @staticmethod
    def mutant(factor: float) -> Any:
        """A backend whose every result is wrong by rounding, or by more."""

        def backend(graph: Any, inputs: Any) -> Any:
            def run(*args: Tensor) -> list[Tensor]:
                return [v + factor * 1e-12 if v.is_floating_point() else v for v in graph(*args)]

            return run

        return backend

    @pytest.mark.parametrize("factor", [1.0, 1e6])
    def test_least_squares(self, factor: float) -> None:
        x = torch.randn(2000, 3)
        y = x.sum(-1) + torch.randn(2000)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])

            def forward(self) -> None:
                with pyro.plate("data", len(x)):
                    pyro.sample("y", dist.Normal(x @ self.w, 1.0), obs=y)

        loss = Trace_ELBO()(Model(), lambda: None)
        if factor > 1:
            with pytest.raises(CompileError, match="differ on the same draws"):
                pv.compile(loss, backend=self.mutant(factor))()
        else:
            pv.compile(loss, backend=self.mutant(factor))()

    def test_one_that_could_not_be_checked_is_made_again(self) -> None:
        def wrong(graph: Any, inputs: Any) -> Any:
            def run(*args: Tensor) -> list[Tensor]:
                loss, *gradients = graph(*args)
                return [loss + 1, *gradients]

            return run

        with pyro.validation_enabled(False):
            compiled = pv.compile(Trace_ELBO()(normal, guide), backend=wrong)
            with pytest.warns(UserWarning, match="NaN"):  # Pyro's own
                compiled(torch.full((6,), torch.nan))
            with pytest.raises(CompileError, match="differ on the same draws"):
                compiled(X)


def test_enumeration_is_evaluated_without_gradients() -> None:
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(1.0 * k, 1.0), obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    optim = pyro.optim.Adam({"lr": 0.1})
    made = pv.CompiledSVI(model, lambda x: None, optim, elbo, backend="eager")
    assert made.evaluate_loss(X) == pytest.approx(elbo.loss(model, lambda x: None, X))
