"""The compiled objective against the eager one: the same draws give the same numbers."""

import copy
import itertools
import math
import operator
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_helpers import agree, assert_same, loss_and_grads, parameters, program, programs
from compiled_models import MODELS, PARTS, batch_norm, binary, dropout, vae, weighed
from pyro.distributions.transforms import Spline
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.compiled import terms
from pyro_vae.compiled.guard import check_agreement, coarsest
from pyro_vae.compiled.trace import trace
from pyro_vae.errors import CompileError, ConfigError, PyroVAEError

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": lambda: pv.ELBO("auto"),
    "ELBO analytic": lambda: pv.ELBO("analytic", kl_weight=0.3),
    "ELBO Monte Carlo": lambda: pv.ELBO("monte_carlo"),
    "ELBO stl": lambda: pv.ELBO("monte_carlo", gradient="stl"),
    "ELBO free bits": lambda: pv.ELBO("analytic", free_bits=0.1),
    "ELBO 3 particles": lambda: pv.ELBO("auto", num_particles=3),
    "IWAE": lambda: pv.IWAE(3),
    "IWAE stl": lambda: pv.IWAE(3, "stl"),
    "IWAE dreg": lambda: pv.IWAE(3, "dreg"),
    "MIWAE": lambda: pv.MIWAE(2, 2),
    "Pyro Trace_ELBO": Trace_ELBO,
    "Pyro TraceMeanField_ELBO": TraceMeanField_ELBO,
    "Pyro TraceEnum_ELBO": lambda: TraceEnum_ELBO(
        max_plate_nesting=1, strict_enumeration_warning=False
    ),
}


class Eager(nn.Module):
    """`objective(model, guide)` for programs that need not be modules."""

    def __init__(self, objective: Any, model: Any, guide: Any) -> None:
        super().__init__()
        self.objective, self.model, self.guide = objective, model, guide

    def forward(self, *args: Any) -> Tensor:
        return self.objective.differentiable_loss(self.model, self.guide, *args)


@pytest.mark.parametrize(
    ("objective_name", "model_name"),
    [
        *((objective, model) for objective in OBJECTIVES for model in MODELS),
        *((objective, parts) for objective in ("ELBO", "IWAE dreg") for parts in PARTS),
    ],
)
def test_loss_and_gradients_are_the_eager_ones(objective_name: str, model_name: str) -> None:
    model, guide, args = (MODELS | PARTS)[model_name]()
    objective = OBJECTIVES[objective_name]()
    eager = Eager(objective, model, guide)
    compiled = pv.compile(objective(model, guide), backend="eager")
    try:
        eager(*args)
    except PyroVAEError as error:
        with pytest.raises(type(error)):
            compiled(*args)
        return
    except UserWarning:
        pytest.skip("Pyro's objective is not for this model")
    compiled(*args)
    params = parameters(model, guide)
    for seed in (1, 2):
        expected = loss_and_grads(eager, args, params, seed)
        assert_same(loss_and_grads(compiled, args, params, seed), expected, 1e-10)
        with torch.no_grad():  # as an optimizer would: in place
            for p in params:
                p -= 0.05 * (torch.zeros_like(p) if p.grad is None else p.grad.clamp(-1, 1))


def pair(**parts: Any) -> tuple[nn.Module, Tensor]:
    """A VAE's loss, and data."""
    model, guide, (x,) = vae(**parts)
    return pv.ELBO()(model, guide), x


class TestWhatInvalidatesAGraph:
    @pytest.fixture
    def loss(self) -> nn.Module:
        return pair(
            likelihood=pv.likelihoods.Bernoulli(nn.Sequential(nn.Dropout(0.4), nn.Linear(2, 6)))
        )[0]

    @pytest.fixture
    def compiled(self, loss: nn.Module) -> Any:
        return pv.compile(loss, binary(), backend="eager")

    def test_the_same_kind_of_arguments_does_not(self, compiled: Any) -> None:
        compiled(binary())
        assert programs(compiled) == 1

    def test_a_ragged_batch_does_once(self, loss: nn.Module, compiled: Any) -> None:
        for rows in (3, 5, 3):
            agree(loss, compiled, binary(rows))
        assert programs(compiled) == 2

    def test_a_layout_does(self, loss: nn.Module, compiled: Any) -> None:
        agree(loss, compiled, torch.zeros(6, 5).T)
        assert programs(compiled) == 2

    def test_train_and_evaluation_mode_do(self, loss: nn.Module, compiled: Any) -> None:
        for module in (compiled.eval(), compiled.train(), compiled.eval()):
            agree(loss, module, binary())
        assert programs(compiled) == 2

    def test_a_submodules_attribute_does(self, loss: Any, compiled: Any) -> None:
        loss.model.likelihood.network[0].p = 0.9
        agree(loss, compiled, binary())
        assert programs(compiled) == 2

    def test_a_change_of_precision_does(self, loss: nn.Module, compiled: Any) -> None:
        x = binary()
        compiled.float()
        pyro.clear_param_store()
        loss(x.float())
        assert compiled(x.float()).dtype == torch.float32
        pyro.clear_param_store()
        compiled.double()
        agree(loss, compiled, x)

    def test_autocast_does(self, loss: nn.Module, compiled: Any) -> None:
        x = binary().float()
        pyro.clear_param_store()
        loss.float()
        agree(loss, compiled, x)
        full = loss_and_grads(compiled, (x,), parameters(loss), 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agree(loss, compiled, x)
            mixed = loss_and_grads(compiled, (x,), parameters(loss), 5)
        assert programs(compiled) == 3
        assert full[0] != mixed[0]  # there was something to cast

    def test_which_libraries_compute_does(self, loss: nn.Module, compiled: Any) -> None:
        """Their results are laid out in memory as each likes."""
        for switch, usual in (
            (torch._C._set_mkldnn_enabled, True),
            (torch._C._set_cudnn_enabled, True),
            (torch.use_deterministic_algorithms, False),
        ):
            try:
                switch(not usual)
                agree(loss, compiled, binary())
            finally:
                switch(usual)
            agree(loss, compiled, binary())
        assert programs(compiled) == 4

    def test_no_grad_does(self, compiled: Any) -> None:
        with torch.no_grad():
            assert not compiled(binary()).requires_grad
        assert compiled(binary()).requires_grad
        assert programs(compiled) == 2

    def test_the_kl_weight_does_not(self, loss: Any, compiled: Any) -> None:
        for weight in (0.0, 0.5, 2.0):
            loss.elbo.kl_weight = weight
            agree(loss, compiled, binary())
        assert programs(compiled) == 1

    def test_new_values_of_parameters_do_not(self, loss: Any, compiled: Any) -> None:
        other = copy.deepcopy(loss.state_dict())
        loss.load_state_dict({key: value + 0.1 for key, value in other.items()})
        agree(loss, compiled, binary())
        assert programs(compiled) == 1

    def test_another_parameter_in_the_same_place_does_not(self, loss: Any, compiled: Any) -> None:
        loss.model.likelihood.network[1].weight = nn.Parameter(torch.randn(6, 2))
        pyro.get_param_store()._params.clear()  # else Pyro would go on with the old one
        agree(loss, compiled, binary())
        assert programs(compiled) == 1

    def test_a_frozen_parameter_does(self, loss: Any, compiled: Any) -> None:
        loss.model.requires_grad_(False).eval()
        agree(loss, compiled, binary())
        assert all(p.grad is None for p in loss.model.parameters())

    def test_a_python_argument_does(self) -> None:
        model, guide, _ = MODELS["AutoNormal"]()

        def scaled(x: Tensor, y: Tensor, factor: float = 1.0) -> None:
            model(x, y * factor)

        def guided(x: Tensor, y: Tensor, factor: float = 1.0) -> None:
            guide(x, y)

        x, y = torch.randn(8, 3), torch.randn(8)
        loss = pv.ELBO("auto")(scaled, guided)
        compiled = pv.compile(loss, backend="eager")
        for factor in (1.0, 2.0, 1.0):
            pyro.set_rng_seed(0)
            expected = loss(x, y, factor=factor)
            pyro.set_rng_seed(0)
            torch.testing.assert_close(compiled(x, y, factor=factor), expected)
        assert programs(compiled) == 2

    def test_a_closure_does_where_it_must(self) -> None:
        weight, offset = torch.tensor(1.0, requires_grad=True), 0.0

        def model(x: Tensor) -> None:
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight + offset, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            pyro.sample("z", dist.Normal(weight, 1.0))

        loss = pv.ELBO()(model, guide)
        compiled = pv.compile(loss, torch.tensor(0.3), backend="eager")
        for weight, offset in (
            (torch.tensor(2.0, requires_grad=True), 0.0),
            (torch.tensor(2.0, requires_grad=True), 3.0),
        ):
            got = compiled(torch.tensor(0.3))
            pyro.set_rng_seed(0)
            torch.testing.assert_close(got, loss(torch.tensor(0.3)))
            (slope,) = torch.autograd.grad(got, [weight])
            assert slope == pytest.approx(2 * weight.item() + offset - 0.3)
        assert programs(compiled) == 2


class TestWhatIsStatic:
    """Programs that look as if they depended on values, and do not."""

    @pytest.mark.parametrize(
        "compute",
        [
            lambda x: torch.stack([2 * i * x[i] for i in pyro.plate("rows", 3)]),
            lambda x: nn.functional.one_hot((x > 0).long(), 4).sum(-1) * x,
            lambda x: x.repeat_interleave(2)[:3],
        ],
        ids=["a plate row by row", "one_hot", "repeat_interleave"],
    )
    def test_it_compiles(self, compute: Callable[[Tensor], Tensor]) -> None:
        loss = program(compute)
        compiled = pv.compile(loss, torch.tensor([0.3, -1.0, 2.0]), backend="eager")
        x = torch.tensor([-0.7, 1.0, 0.5])  # other values than it was traced with
        pyro.set_rng_seed(0)
        expected = loss(x)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(compiled(x), expected)

    def test_a_network_made_at_first_use(self) -> None:
        made: list[nn.Module] = []

        def guide(x: Tensor) -> None:
            if not made:
                made.append(nn.Linear(3, 1))
            loc = pyro.module("network", made[0])(x)
            pyro.sample("z", dist.Normal(loc[0], 1.0))

        def model(x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

        loss, x = pv.ELBO("monte_carlo")(model, guide), torch.ones(3)
        compiled = pv.compile(loss, x, backend="eager")
        assert len(made) == 1
        pyro.set_rng_seed(0)
        expected = loss(x)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(compiled(x), expected)


class TestBuffersAndDraws:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_batch_norm_advances_as_eagerly(self, backend: str) -> None:
        model, guide, (x,) = batch_norm()
        loss = pv.ELBO()(model, guide)
        twin = copy.deepcopy(loss)
        compiled = pv.compile(loss, backend=backend)
        for seed in range(3):
            assert_same(
                loss_and_grads(compiled, (x,), list(loss.parameters()), seed),
                loss_and_grads(twin, (x,), list(twin.parameters()), seed),
                1e-10,
            )
        for (name, mine), (_, its) in zip(loss.named_buffers(), twin.named_buffers(), strict=True):
            torch.testing.assert_close(mine, its, msg=name)
        assert dict(loss.named_buffers())["guide.posterior.network.0.1.num_batches_tracked"] == 3

    def test_compiling_draws_nothing(self) -> None:
        model, guide, (x,) = dropout()
        state = torch.get_rng_state()
        compiled = pv.compile(pv.ELBO()(model, guide), backend="eager")
        first = compiled(x)
        torch.set_rng_state(state)
        assert compiled(x) == first

    def test_draws_differ_from_call_to_call(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, backend="eager")
        assert compiled(x) != compiled(x)


class TestTheModule:
    def test_its_state_dict_is_that_of_the_loss(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, x, backend="eager")
        assert compiled.state_dict().keys() == loss.state_dict().keys()

    def test_a_copy_has_parameters_of_its_own(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, x, backend="eager")
        twin = copy.deepcopy(compiled)
        for p in twin.parameters():
            p.data.zero_()
        pyro.set_rng_seed(0)
        theirs = twin(x)
        theirs.backward()
        assert all(p.grad is None for p in compiled.parameters())
        pyro.set_rng_seed(0)
        assert compiled(x) != theirs

    def test_gradients_of_the_arguments(self) -> None:
        model, guide, (x, y) = MODELS["AutoNormal"]()
        loss = pv.ELBO("auto")(model, guide)
        x.requires_grad_()
        compiled = pv.compile(loss, x, y, backend="eager")
        slopes = []
        for f in (loss, compiled):
            pyro.set_rng_seed(0)
            slopes += torch.autograd.grad(3.0 * f(x, y), [x])
        torch.testing.assert_close(*slopes)

    def test_gradients_add_up_over_calls(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, x, backend="eager")
        params = parameters(loss)
        one = loss_and_grads(compiled, (x,), params, 0)[1:]
        two = loss_and_grads(compiled, (x,), params, 1)[1:]

        def both(x: Tensor) -> Tensor:
            pyro.set_rng_seed(0)
            first = compiled(x)
            pyro.set_rng_seed(1)
            return first + 2.0 * compiled(x)

        total = loss_and_grads(both, (x,), params, 0)[1:]
        assert_same(total, [a + 2.0 * b for a, b in zip(one, two, strict=True)], 1e-12)  # type: ignore[operator]

    def test_it_cannot_be_differentiated_twice(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, x, backend="eager")
        with pytest.raises(CompileError, match="differentiated once"):
            torch.autograd.grad(compiled(x), parameters(loss)[:1], create_graph=True)

    def test_transforms_of_torch_func_are_refused(self) -> None:
        loss, x = pair()
        compiled = pv.compile(loss, x, backend="eager")
        with pytest.raises(CompileError, match=r"no transform of torch\.func"):
            torch.func.grad(compiled)(x)

    def test_it_takes_an_objective_of_a_pair(self) -> None:
        with pytest.raises(ConfigError, match="objective\\(model, guide\\), got Linear"):
            pv.compile(nn.Linear(2, 2))

    def test_it_takes_tensors_and_plain_values(self) -> None:
        loss, x = pair()
        with pytest.raises(CompileError, match="got ndarray: pass torch"):
            pv.compile(loss, x.numpy(), backend="eager")
        with pytest.raises(
            CompileError, match="got range: pass its parts, or have the program hold it"
        ):
            pv.compile(loss, x, range(3), backend="eager")

    def test_a_number_that_is_none_is_one_program(self) -> None:
        def model(x: Tensor, by: float) -> None:
            pyro.factor("x", x.sum() * math.copysign(1.0, by))

        compiled = pv.compile(Trace_ELBO()(model, lambda x, by: None), backend="eager")
        for by in (math.nan, float("nan"), 0.0, 0.0):
            compiled(torch.ones(3), by)
        assert programs(compiled) == 2
        compiled(torch.ones(3), -0.0)
        assert programs(compiled) == 3


class TestWhatCannotBeCompiled:
    @pytest.mark.parametrize(
        ("body", "line"),
        [
            (lambda x: x if x.sum() > 0 else x.exp(), r"x if x\.sum\(\) > 0"),
            (lambda x: x * x.max().item(), r"x\.max\(\)\.item\(\)"),
            (lambda x: x * float(x[0]), r"float\(x\[0\]\)"),
            (lambda x: x.numpy().sum(), r"x\.numpy\(\)"),
            (lambda x: x.tolist(), r"x\.tolist\(\)"),
            (lambda x: np.from_dlpack(x).sum(), r"np\.from_dlpack\(x\)"),
            (lambda x: x[x > 0], "x > 0"),
        ],
    )
    def test_asking_for_a_value_names_the_line(self, body: Any, line: str) -> None:
        with pytest.raises(CompileError, match=line):
            pv.compile(program(body), torch.ones(3), backend="eager")

    @pytest.mark.parametrize(
        ("of_model", "of_guide"),
        [
            (lambda x: 1 + 0 * x[:, 0], lambda x: torch.ones(len(x))),
            (lambda x: x[:, 0].clone().add_(1), lambda x: x[:, 0].clone().add_(1)),
            (lambda x: torch.rand(len(x)).ceil(), lambda x: torch.rand(len(x)).ceil()),
        ],
        ids=["only the values tell", "changed in place", "drawn"],
    )
    def test_scales_that_may_differ(self, of_model: Any, of_guide: Any) -> None:
        model, guide, args = weighed(of_model, of_guide)
        with pytest.raises(CompileError, match="two scales or masks"):
            pv.compile(pv.ELBO(kl="analytic")(model, guide), *args, backend="eager")

    def test_a_tensor_of_unknown_origin_would_be_frozen(self) -> None:
        x, stray = torch.ones(3), torch.ones(3)
        with pytest.raises(CompileError, match="would be frozen"):
            trace(lambda: [x * stray], [x])

    @pytest.mark.parametrize(
        ("holder", "draw"),
        [
            (np.random, "rand"),
            (random, "random"),
            (np.random.default_rng(0), "random"),
            (np.random.RandomState(0), "rand"),
            (random.Random(0), "random"),
        ],
        ids=["numpy", "Python", "numpy's Generator", "RandomState", "Random"],
    )
    def test_random_numbers_not_of_torch_would_be_frozen(self, holder: Any, draw: str) -> None:
        with pytest.raises(CompileError, match="numpy's generators"):
            pv.compile(
                program(lambda x: x * getattr(holder, draw)()), torch.ones(3), backend="eager"
            )

    def test_an_attribute_that_counts_the_calls(self) -> None:
        class Counter(nn.Module):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return x / self.calls

        with pytest.raises(CompileError, match=r"calls changes at every run"):
            pv.compile(program(Counter()), torch.ones(3), backend="eager")

    @pytest.mark.parametrize("factor", [1 + 1e-9, 1.01, 2.0])
    @pytest.mark.parametrize("validated", [True, False])
    def test_a_number_that_an_iterator_gives(self, factor: float, validated: bool) -> None:
        """However fast it changes: by next to nothing, or by more than any difference to come."""
        weights = itertools.accumulate(itertools.repeat(factor), operator.mul)
        drifting = program(lambda x: x * next(weights))
        with (
            pyro.validation_enabled(validated),
            pytest.raises(CompileError, match="something else every time"),
        ):
            pv.compile(drifting, torch.ones(3), backend="eager")

    def test_what_a_first_run_sets_up_is_no_drift(self) -> None:
        made: list[Tensor] = []

        def scaled(x: Tensor) -> Tensor:
            if not made:
                made.append(torch.randn(()))
            return x * made[0] * torch.randn(3)

        compiled = pv.compile(program(scaled), torch.ones(3), backend="eager")
        assert programs(compiled) == 1

    def test_an_attribute_that_remembers_a_tensor(self) -> None:
        class Memory(nn.Module):
            last = torch.zeros(3)

            def forward(self, x: Tensor) -> Tensor:
                self.last = 0.9 * self.last + x
                return self.last

        with pytest.raises(CompileError, match=r"last while it runs|a tensor \(3,\) while"):
            pv.compile(program(Memory()), torch.ones(3), backend="eager")

    def test_an_argument_changed_in_place(self) -> None:
        with pytest.raises(CompileError, match="an argument while it runs"):
            pv.compile(program(lambda x: x.add_(1)), torch.ones(3), backend="eager")

    def test_modules_made_on_the_way_are_no_obstacle(self) -> None:
        compiled = pv.compile(program(lambda x: nn.Softplus()(x)), torch.ones(3), backend="eager")
        assert programs(compiled) == 1

    def test_a_module_hidden_in_a_list_has_a_mode(self) -> None:
        hidden = [nn.Dropout(0.5)]
        compiled = pv.compile(program(lambda x: hidden[0](x)), torch.ones(99), backend="eager")
        hidden[0].eval()
        compiled(torch.ones(99))
        assert programs(compiled) == 2

    def test_enumeration_names_the_site(self) -> None:
        model, _, (x,) = vae()

        def guide(x: Tensor) -> None:
            pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

        with pytest.raises(PyroVAEError, match=r'"k"|"z"'):
            pv.compile(pv.IWAE(3)(model, guide), x, backend="eager")

    def test_handlers_around_the_call(self) -> None:
        loss, x = pair()
        with (
            pyro.poutine.scale(scale=2.0),
            pytest.raises(CompileError, match=r"ScaleMessenger.*inside the model"),
        ):
            pv.compile(loss, x, backend="eager")

    def test_a_generator_of_its_own(self) -> None:
        drawn = torch.Generator()
        with pytest.raises(CompileError, match=r"torch\.randn.*a generator of its own"):
            pv.compile(
                program(lambda x: x + torch.randn(3, generator=drawn)),
                torch.ones(3),
                backend="eager",
            )

    def test_the_line_is_the_programs(self) -> None:
        """Where no line of the model's is to blame, one of the library, and not who compiles."""

        def masked(x: Tensor) -> None:
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.NanMaskedMultivariateNormal(torch.zeros(3), torch.eye(3)), obs=x)

        loss = pv.ELBO()(masked, program(torch.sum).guide)
        with pytest.raises(CompileError, match=r"nanmasked\.py.*cannot be compiled"):
            pv.compile(loss, torch.ones(3), backend="eager")

    def test_a_subsampled_plate_row_by_row(self) -> None:
        def rows(x: Tensor) -> Tensor:
            return torch.stack([x[i] for i in pyro.plate("rows", 3, subsample_size=2)])

        with pytest.raises(CompileError, match="it asks for the value of a tensor"):
            pv.compile(program(rows), torch.ones(3), backend="eager")

    def test_control_flow_of_torchs(self) -> None:
        def chosen(x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)).sum()

        with pytest.raises(CompileError, match=r'"return torch\.cond\(.*compiled: .*cond calls'):
            pv.compile(program(chosen), torch.ones(3), backend="eager")

    @pytest.mark.parametrize("order", ["linear", "quadratic"])
    @pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
    def test_splines(self, order: str, inverse: bool) -> None:
        """Pyro's select what lies outside of their bounds, and some of this does."""
        spline = Spline(3, count_bins=4, bound=1.0, order=order)
        x = 2 * torch.randn(3)

        def body(x: Tensor) -> Tensor:
            spline.clear_cache()
            z = x + pyro.param("loc", torch.tensor(0.5))
            y = spline.inv(z) if inverse else spline(z)
            volume = spline.inv.log_abs_det_jacobian if inverse else spline.log_abs_det_jacobian
            return y + volume(z, y)

        loss = program(body)
        compiled = pv.compile(loss, x, backend="eager")
        for scale in (1.0, 0.1, 3.0):  # others are outside
            agree(loss, compiled, scale * x)
        assert programs(compiled) == 1

    def test_one_hot_of_unknown_length(self) -> None:
        one_hot = lambda x: nn.functional.one_hot(x.long())  # noqa: E731
        with pytest.raises(CompileError, match="num_classes"):
            pv.compile(program(one_hot), torch.ones(3), backend="eager")

    def test_score_functions_are_pyros(self) -> None:
        """A Pyro objective that treats a site without rsample is traced with its surrogate."""

        def model(x: Tensor) -> None:
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
            pyro.sample("k", dist.Bernoulli(p))

        eager = Eager(Trace_ELBO(), model, guide)
        args = (torch.tensor(0.7),)
        eager(*args)
        compiled = pv.compile(Trace_ELBO()(model, guide), *args, backend="eager")
        for seed in range(4):
            expected = loss_and_grads(eager, args, parameters(), seed)
            assert_same(loss_and_grads(compiled, args, parameters(), seed), expected, 1e-10)

    def test_a_pyro_objective_without_a_differentiable_loss(self) -> None:
        loss, _ = pair()
        with pytest.raises(ConfigError, match="TraceGraph_ELBO has no differentiable_loss"):
            pv.compile(TraceGraph_ELBO()(loss.model, loss.guide))


class TestTheGuard:
    @pytest.mark.parametrize("wrong", [0, 1, -1])
    def test_a_backend_that_computes_something_else_is_caught(self, wrong: int) -> None:
        def mutant(graph: Any, inputs: Any) -> Any:
            def run(*args: Tensor) -> list[Tensor]:
                values = list(graph(*args))
                values[wrong] = values[wrong] * (1 + 1e-6)
                return values

            return run

        loss, x = pair()
        with pytest.raises(CompileError, match="differ on the same draws"):
            pv.compile(loss, x, backend=mutant)

    def test_sums_in_float64_of_what_is_float32_are_as_coarse_as_that(self) -> None:
        x = torch.randn(5)
        single = torch.tensor(2.0, dtype=torch.float32)
        assert coarsest(make_fx(lambda x: 2 * x.double())(x.half())) == torch.float64
        assert coarsest(make_fx(lambda x: (2 * x.float()).double())(x)) == torch.float32
        assert coarsest(make_fx(lambda x: x * single)(x)) == torch.float64
        for error, coarse, caught in (
            (1e-7, torch.float64, True),
            (1e-7, torch.float32, False),
            (1e-2, torch.float32, True),
        ):
            with pytest.raises(CompileError) if caught else nullcontext():
                check_agreement("outputs", [x * (1 + error)], [x], coarse=coarse)

    def test_the_same_infinity_agrees_and_hides_nothing(self) -> None:
        x, outside = torch.tensor([-math.inf, 1.0, 2.0]), torch.tensor([True])
        check_agreement("outputs", [outside, x], [outside, x.clone()])
        with pytest.raises(CompileError, match=r"number 1, of shape \(3,\)"):
            check_agreement("outputs", [outside, 1.001 * x], [outside, x])
        with pytest.raises(CompileError, match="number 0"):
            check_agreement("outputs", [~outside, x], [outside, x])
        nan = torch.tensor([math.nan])
        check_agreement("outputs", [nan, x], [nan, x.clone()])
        for wrong, right in ((1.001 * x, x), (~outside, outside)):
            with pytest.raises(CompileError, match="number 1"):
                check_agreement("outputs", [nan, wrong], [nan, right])

    def test_a_backend_that_loses_a_buffers_change_is_caught(self) -> None:
        def mutant(graph: Any, inputs: Any) -> Any:
            return lambda *args: graph(*(a.clone() for a in args))

        model, guide, (x,) = batch_norm()
        with pytest.raises(CompileError, match=r"eager buffers differ on the same draws"):
            pv.compile(pv.ELBO()(model, guide), x, backend=mutant)


class TestTerms:
    def test_they_are_the_eager_ones(self) -> None:
        model, guide, (x,) = vae()
        objective = pv.ELBO(kl_weight=0.5)
        compiled = terms(objective, model, guide, compile=True, backend="eager")
        compiled(x)
        pyro.set_rng_seed(0)
        got = compiled(x)
        pyro.set_rng_seed(0)
        expected = objective.terms(model, guide, x)
        for name in ("loss", "reconstruction", "kl"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name))
        torch.testing.assert_close(got.kl_per_dimension["z"], expected.kl_per_dimension["z"])
        assert got.estimators == expected.estimators == {"z": "analytic"}
        got.loss.backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_auto_falls_back_with_one_warning(self) -> None:
        loss = program(lambda x: x * x.max().item())
        run = terms(loss.elbo, loss.model, loss.guide, compile="auto", backend="eager")
        with pytest.warns(UserWarning, match=r"running without compiling: .*item"):
            first = run(torch.ones(3))
        assert first.loss.isfinite()
        assert run(torch.ones(3)).loss.isfinite()

    def test_compile_true_does_not(self) -> None:
        loss = program(lambda x: x * x.max().item())
        run = terms(loss.elbo, loss.model, loss.guide, compile=True, backend="eager")
        with pytest.raises(CompileError):
            run(torch.ones(3))

    def test_compile_false_is_eager(self) -> None:
        loss = program(lambda x: x * x.max().item())
        assert terms(loss.elbo, loss.model, loss.guide, compile=False)(torch.ones(3)).kl.isfinite()
