"""The step as one graph: torch's Adam is the oracle of its update, the eager loss of the rest."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from compiled_models import batch_norm, binary, vae
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyro_vae as pv
from pyro_vae.compiled import step
from pyro_vae.compiled.fused import Fused
from pyro_vae.compiled.places import Territory
from pyro_vae.compiled.replay import Replayed
from pyro_vae.compiled.update import AdamUpdate
from pyro_vae.errors import CompileError, ConfigError, NonFiniteError

KINDS: dict[str, Callable[..., Any]] = {
    "Adam": Adam,
    "Adam, decay": lambda p, lr: Adam(p, lr, betas=(0.7, 0.9), eps=1e-5, weight_decay=0.1),
    "AdamW": lambda p, lr: AdamW(p, lr, weight_decay=0.3),
    "fused": lambda p, lr: Adam(p, lr, fused=True),
}


def flat(optimizer: Any) -> list[Tensor]:
    """Parameters and state of an optimizer, in order."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p.detach(), *optimizer.state[p].values()]
    return [t.clone().double() for t in found]


def by_torch(loss: nn.Module, optimizer: Any, x: Tensor) -> float:
    """One step as everybody writes it."""
    optimizer.zero_grad()
    value = loss(x)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def twins(kind: Callable[..., Any], make: Any = vae) -> tuple[Any, Any, nn.Module, Any, Tensor]:
    """A compiled SVI with its optimizer, and a loss with an optimizer, from the same start."""
    model, guide, (x,) = make()
    loss = pv.ELBO()(model, guide)
    twin = copy.deepcopy(loss)
    mine, its = (kind(m.parameters(), 0.05) for m in (loss, twin))
    svi = pv.CompiledSVI(loss.model, loss.guide, mine, loss.elbo, backend="eager")
    return svi, mine, twin, its, x


def same(got: list[Tensor], wanted: list[Tensor], rtol: float = 1e-10) -> None:
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-13)


def both_step(seed: int, svi: Any, mine: Any, twin: Any, its: Any, x: Tensor) -> None:
    """A step of each on the same draws, after which they are the same."""
    pyro.set_rng_seed(seed)
    svi.step(x)
    pyro.set_rng_seed(seed)
    by_torch(twin, its, x)
    same(flat(mine), flat(its))


class TestTheUpdate:
    @pytest.mark.parametrize("name", KINDS)
    def test_it_is_torchs(self, name: str) -> None:
        svi, mine, twin, its, x = twins(KINDS[name])
        for seed in range(6):
            pyro.set_rng_seed(seed)
            got = svi.step(x)
            pyro.set_rng_seed(seed)
            assert got == pytest.approx(by_torch(twin, its, x), rel=1e-10)
            same(flat(mine), flat(its))

    def test_it_is_part_of_the_graph(self) -> None:
        svi, mine, *_, x = twins(Adam)
        mine.step = None  # type: ignore[method-assign]
        svi.step(x)

    def test_the_two_take_turns(self) -> None:
        """State and counts are where torch looks for them, and the other way round."""
        svi, mine, twin, its, x = twins(Adam)
        loss = pv.ELBO()(svi.model, svi.guide)
        for seed in range(6):
            pyro.set_rng_seed(seed)
            _ = svi.step(x) if seed % 2 else by_torch(loss, mine, x)
            pyro.set_rng_seed(seed)
            by_torch(twin, its, x)
            same(flat(mine), flat(its))

    def test_options_may_change(self) -> None:
        svi, mine, twin, its, x = twins(Adam)
        for seed, (lr, beta) in enumerate([(0.1, 0.9), (0.02, 0.9), (0.02, 0.5)]):
            for optimizer in (mine, its):
                optimizer.param_groups[0].update(lr=lr, betas=(beta, 0.99))
            both_step(seed, svi, mine, twin, its, x)
        assert len(svi._step.seconds) == 1

    def test_a_schedule_of_all_options(self) -> None:
        """OneCycleLR moves betas too."""
        svi, mine, twin, its, x = twins(lambda p, lr: AdamW(p, lr, weight_decay=0.1))
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8) for o in (mine, its)
        ]
        for seed in range(5):
            both_step(seed, svi, mine, twin, its, x)
            for schedule, optimizer in zip(schedules, (mine, its), strict=True):
                schedule.step()
                optimizer.param_groups[0]["weight_decay"] *= 0.9
        assert len(svi._step.seconds) == 1

    @pytest.mark.parametrize("option", ["amsgrad", "maximize"])
    def test_an_option_that_is_torchs_own(self, option: str) -> None:
        svi, mine, twin, its, x = twins(Adam)
        for seed in range(4):
            if seed == 1:
                for optimizer in (mine, its):
                    optimizer.param_groups[0][option] = True
                    optimizer.state.clear()
            both_step(seed, svi, mine, twin, its, x)

    def test_groups_in_another_order(self) -> None:
        def grouped(parameters: Any, lr: float) -> Adam:
            *first, last = parameters
            return Adam([{"params": first}, {"params": [last], "lr": 10 * lr}], lr)

        svi, mine, twin, its, x = twins(grouped)
        for seed in range(4):
            if seed == 2:
                mine.param_groups.reverse()
                its.param_groups.reverse()
            both_step(seed, svi, mine, twin, its, x)

    def test_hooks_of_parameters_are_called(self) -> None:
        svi, mine, twin, its, x = twins(Adam)
        seen: list[int] = []
        for seed in range(4):
            if seed == 1:
                for optimizer in (mine, its):
                    p = optimizer.param_groups[0]["params"][0]
                    p.register_hook(lambda g: 3 * g)
                    p.register_post_accumulate_grad_hook(lambda p: seen.append(1))
            both_step(seed, svi, mine, twin, its, x)
        assert len(seen) == 2 * 3

    def test_complex_parameters(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.tensor([1.0 + 2.0j, -0.5 + 0.1j]))

            def forward(self, x: Tensor) -> None:
                pyro.sample("x", pyro.distributions.Normal(self.w.abs().sum(), 1.0), obs=x)

        class Empty(nn.Module):
            def forward(self, x: Tensor) -> None: ...

        svi, mine, twin, its, x = twins(Adam, lambda: (Model(), Empty(), (torch.tensor(0.3),)))
        for _ in range(3):
            svi.step(x)
            by_torch(twin, its, x)
        torch.testing.assert_close(mine.param_groups[0]["params"], its.param_groups[0]["params"])

    def test_a_loss_that_uses_none_of_the_parameters(self) -> None:
        model, guide, (x,) = vae()
        optimizer = Adam([nn.Parameter(torch.ones(1))], 0.1)
        svi = pv.CompiledSVI(model, guide, optimizer, pv.ELBO(), backend="eager")
        with pytest.raises(ConfigError, match="depends on no parameter"):
            svi.step(x)

    def test_groups_have_options_of_their_own(self) -> None:
        def grouped(parameters: Any, lr: float) -> Adam:
            first, *rest = parameters
            return Adam([{"params": [first], "lr": 10 * lr}, {"params": rest, "eps": 1e-3}], lr)

        svi, mine, twin, its, x = twins(grouped)
        for seed in range(3):
            pyro.set_rng_seed(seed)
            svi.step(x)
            pyro.set_rng_seed(seed)
            by_torch(twin, its, x)
        same(flat(mine), flat(its))

    def test_state_that_is_loaded_is_used(self) -> None:
        svi, mine, twin, its, x = twins(Adam)
        svi.step(x)
        svi.model.load_state_dict(twin.model.state_dict())
        svi.guide.load_state_dict(twin.guide.state_dict())
        for seed in range(3):
            pyro.set_rng_seed(seed)
            by_torch(twin, its, x)
        svi.model.load_state_dict(twin.model.state_dict())
        svi.guide.load_state_dict(twin.guide.state_dict())
        mine.load_state_dict(copy.deepcopy(its.state_dict()))
        pyro.set_rng_seed(9)
        svi.step(x)
        pyro.set_rng_seed(9)
        by_torch(twin, its, x)
        same(flat(mine), flat(its))

    def test_what_the_loss_does_not_use_stays(self) -> None:
        model, guide, (x,) = vae()
        idle = nn.Parameter(torch.ones(3))
        mine = AdamW([*model.parameters(), *guide.parameters(), idle], 0.1)
        pv.CompiledSVI(model, guide, mine, pv.ELBO(), backend="eager").step(x)
        assert torch.equal(idle, torch.ones(3))
        assert mine.state[idle]["step"] == 0

    def test_a_parameter_that_was_replaced_is_not_trained(self) -> None:
        """The optimizer holds the old one; as in torch, the new one is nobody's."""
        svi, *_, x = twins(Adam)
        svi.step(x)
        new = nn.Parameter(torch.randn(6))
        svi.model.likelihood.network.layers[-1].bias = new
        pyro.clear_param_store()
        before = new.detach().clone()
        svi.step(x)
        assert torch.equal(new, before)

    def test_a_gradient_that_was_there_counts(self) -> None:
        svi, mine, twin, its, x = twins(Adam)
        for optimizer in (mine, its):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
        pyro.set_rng_seed(0)
        svi.step(x)
        pyro.set_rng_seed(0)
        twin(x).backward()
        its.step()
        same(flat(mine), flat(its))

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: SGD(p, 0.1),
            lambda p: Adam(p, amsgrad=True),
            lambda p: Adam(p, maximize=True),
            lambda p: pyro.optim.Adam({"lr": 0.1}),
        ],
    )
    def test_other_optimizers_step_by_themselves(self, optimizer: Any) -> None:
        assert not AdamUpdate.supports(optimizer([nn.Parameter(torch.ones(1))]))

    def test_an_optimizer_with_a_hook_steps_by_itself(self) -> None:
        optimizer = Adam([nn.Parameter(torch.ones(1))])
        assert AdamUpdate.supports(optimizer)
        optimizer.register_step_post_hook(lambda *_: None)
        assert not AdamUpdate.supports(optimizer)


def distance(model: Any, guide: Any, x: Tensor) -> Tensor:
    """A loss of parameters alone."""
    return sum(((p.to(x.dtype) - x) ** 2).sum() for p in model)


class TestWhatChangesBetweenSteps:
    """The next step is prepared anew only if it has to be."""

    def start(self, *dtypes: torch.dtype, **options: Any) -> tuple[Any, ...]:
        """What trains compiled and its optimizer, and a twin of these for torch."""
        made = []
        for _ in range(2):
            held = nn.ParameterList([nn.Parameter(torch.arange(1.0, 4).to(t)) for t in dtypes])
            made += [held, Adam(held, 0.05, **options)]
        svi = pv.CompiledSVI(made[0], made[0], made[1], distance, backend="eager")
        return svi, made[1], made[2], made[3]

    def train(self, svi: Any, twin: Any, its: Any, rows: Tensor) -> None:
        for x in rows:
            svi.step(x)
            its.zero_grad()
            distance(twin, twin, x).backward()
            its.step()

    @pytest.mark.parametrize(
        "change",
        [
            lambda optim: optim.param_groups[0]["betas"].__setitem__(0, 0.1),
            lambda optim: optim.param_groups[0]["weight_decay"].fill_(2.0),
            lambda optim: optim.param_groups[0]["eps"].fill_(0.5),
            lambda optim: optim.state.clear(),
            lambda optim: optim.state.pop(optim.param_groups[0]["params"][1]),
            lambda optim: optim.state[optim.param_groups[0]["params"][1]].clear(),
        ],
        ids=["betas", "decay", "epsilon", "no state", "one without", "one emptied"],
    )
    def test_it_is_seen(self, change: Any) -> None:
        svi, mine, twin, its = self.start(torch.float64, torch.float64)
        for optimizer in (mine, its):
            optimizer.param_groups[0].update(
                betas=[0.9, 0.99], eps=torch.tensor(1e-8), weight_decay=torch.tensor(0.1)
            )
        for _ in range(2):
            self.train(svi, twin, its, torch.randn(4, 3))
            for optimizer in (mine, its):
                change(optimizer)
        self.train(svi, twin, its, torch.randn(2, 3))
        same([p.detach() for p in svi.model], [p.detach() for p in twin])

    @pytest.mark.parametrize(("option", "value"), [("eps", 0.5), ("weight_decay", 2.0)])
    def test_a_number_is_seen_too(self, option: str, value: float) -> None:
        svi, mine, twin, its = self.start(torch.float64, weight_decay=0.1)
        self.train(svi, twin, its, torch.randn(3, 3))
        for optimizer in (mine, its):
            optimizer.param_groups[0][option] = value
        self.train(svi, twin, its, torch.randn(3, 3))
        same([p.detach() for p in svi.model], [p.detach() for p in twin])

    def test_a_norm_that_overflows_where_no_gradient_does(self) -> None:
        """Clipped by it all would be zero."""
        weight = nn.Parameter(torch.ones(2))
        fused = step.fuse_step(
            lambda x: ([(weight * x).sum()], None), {"weight": nn.ParameterList([weight])},
            Adam([weight]), backend="eager", gradient_clip=1.0,
        )  # fmt: skip
        assert fused is not None
        for x, finite in ((torch.ones(2), True), (torch.full((2,), 1e200), False)):
            before = weight.detach().clone()
            taken = fused(x)
            assert taken is not None
            assert taken.outputs[0].isfinite()
            assert bool(taken.finite) == finite
            assert torch.equal(weight, before) != finite

    def test_a_hook_of_all_optimizers_is_called(self) -> None:
        svi, _, twin, its = self.start(torch.float64)
        self.train(svi, twin, its, torch.randn(2, 3))
        seen: list[int] = []
        handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
        try:
            svi.step(torch.zeros(3))
        finally:
            handle.remove()
        assert seen == [1]

    def test_parameters_of_several_dtypes(self) -> None:
        """None has its numbers in less than its own precision."""
        svi, _, twin, its = self.start(torch.float32, torch.float64, torch.float32)
        self.train(svi, twin, its, torch.randn(20, 3))
        for p, expected in zip(svi.model, twin, strict=True):
            torch.testing.assert_close(p, expected)

    def test_steps_are_counted_exactly_whatever_the_default_dtype(self) -> None:
        svi, mine, *_ = self.start(torch.float32)
        torch.set_default_dtype(torch.bfloat16)
        svi.steps(torch.zeros(300, 3))
        assert mine.state[svi.model[0]]["step"] == 300

    @pytest.mark.parametrize("kind", [Adam, SGD])
    def test_losses_are_plain_numbers(self, kind: Any) -> None:
        held = nn.ParameterList([nn.Parameter(torch.ones(3))])
        svi = pv.CompiledSVI(
            held, held, kind(held, 0.01), lambda *a: distance(*a).reshape(1), backend="eager"
        )
        assert svi.steps(torch.zeros(4, 3)).numpy().shape == (4,)


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("kind", [Adam, lambda p, lr: SGD(p, lr), "pyro"])
    def test_no_step_is_taken(self, kind: Any) -> None:
        model, guide, (x,) = vae()
        parameters = [*model.parameters(), *guide.parameters()]
        optim = pyro.optim.Adam({"lr": 0.1}) if kind == "pyro" else kind(parameters, 0.1)
        svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend="eager")
        svi.step(x)
        before = [p.detach().clone() for p in parameters]
        with pytest.raises(NonFiniteError, match=r"loss is nan.*no step was taken"):
            svi.step(torch.full_like(x, torch.nan))
        same([p.detach() for p in parameters], before)
        assert torch.tensor(svi.step(x)).isfinite()

    def test_a_bad_gradient_of_a_finite_loss(self) -> None:
        """The square root of zero has an infinite slope."""
        model, guide, (x,) = vae()
        prior = model.prior

        def rooted(z: Tensor) -> Any:
            return pyro.distributions.Bernoulli(logits=(w * 0).sqrt() + z[..., :1].expand(5, 6))

        w = nn.Parameter(torch.ones(6))
        made = pv.VAE(prior, lambda z: rooted(z).to_event(1), guide.posterior)
        made.model.register_parameter("w", w)
        optim = Adam(made.parameters(), 0.1)
        svi = pv.CompiledSVI(made.model, made.guide, optim, pv.ELBO(), backend="eager")
        with pytest.raises(NonFiniteError, match="gradient"):
            svi.step(x)
        assert torch.equal(w, torch.ones(6))
        assert all(state["step"] == 0 for state in optim.state.values())


class TestTheGuard:
    def test_a_backend_that_updates_otherwise_is_caught(self) -> None:
        def mutant(graph: Any, inputs: list[Tensor]) -> Any:
            def run(*args: Tensor) -> Any:
                parameters = [a for a in args if a.requires_grad]
                before = [p.clone() for p in parameters]
                out = graph(*args)
                for p, b in zip(parameters, before, strict=True):
                    p.add_(0.01 * (p - b))
                return out

            return run

        model, guide, (x,) = vae()
        optim = Adam([*model.parameters(), *guide.parameters()], 1e-3)
        svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend=mutant)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(CompileError, match="updates differ on the same draws"):
            svi.step(x)
        same([p.detach() for p in model.parameters()], before)

    def test_rounding_of_a_gradient_that_is_zero_is_not_taken_for_a_fault(self) -> None:
        """A bias before batch normalisation has none: which way Adam moves it is chance."""

        def noisy(graph: Any, inputs: list[Tensor]) -> Any:
            def run(*args: Tensor) -> Any:
                rounded = [a * (1 + 1e-7) if a.shape == (5, 6) else a for a in args]
                return graph(*rounded)

            return run

        torch.set_default_dtype(torch.float32)
        model, guide, (x,) = batch_norm()
        optim = Adam([*model.parameters(), *guide.parameters()], 1e-3)
        svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend=noisy)
        assert torch.tensor(svi.step(x.float())).isfinite()

    def test_compiling_takes_no_step(self) -> None:
        svi, mine, twin, its, x = twins(Adam)
        pyro.set_rng_seed(0)
        svi.step(x)
        pyro.set_rng_seed(0)
        by_torch(twin, its, x)
        same(flat(mine), flat(its))


def remembered(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Stands in for a CUDA graph: it repeats the function, on the very buffers it was given."""
    remembered.count += 1  # type: ignore[attr-defined]
    return function


remembered.count = 0  # type: ignore[attr-defined]


class TestReplay:
    """The logic around a captured graph, with a stand-in that runs on the CPU."""

    @pytest.fixture(autouse=True)
    def _count(self) -> None:
        remembered.count = 0  # type: ignore[attr-defined]

    @pytest.fixture
    def replayed(self) -> Replayed:
        return Replayed(remembered, "cpu")

    @pytest.fixture
    def weight(self) -> nn.Linear:
        return nn.Linear(3, 1)

    @pytest.fixture
    def fused(self, weight: nn.Linear) -> Fused:
        return Fused(
            lambda x: ([weight(x).sum()], None), Territory({"w": weight}), lambda graph, _: graph
        )

    def run(self, replayed: Replayed, fused: Fused, x: Tensor) -> Tensor:
        return replayed(fused.prepare(x))[0]

    def test_it_settles_and_is_captured_once(
        self, replayed: Replayed, fused: Fused, weight: nn.Linear
    ) -> None:
        for _ in range(8):
            x = torch.randn(2, 3)  # other memory every time
            torch.testing.assert_close(self.run(replayed, fused, x), weight(x).sum())
            with torch.no_grad():
                weight.weight.add_(1.0)  # in place: the graph reads it where it is
        assert remembered.count == 1  # type: ignore[attr-defined]

    def test_another_shape_is_another_graph(
        self, replayed: Replayed, fused: Fused, weight: nn.Linear
    ) -> None:
        for _ in range(5):
            for rows in (2, 3):
                x = torch.randn(rows, 3)
                torch.testing.assert_close(self.run(replayed, fused, x), weight(x).sum())
        assert remembered.count == 2  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "part",
        [
            lambda data: data[:, 1:],  # its rows lie apart
            lambda data: data[:, 3],
            lambda data: data[0, 2:].expand(5, 2),  # its rows are one
            lambda data: data.T,
            lambda data: data[0].unfold(0, 2, 1),  # what overlaps
            lambda data: data[:0],
            lambda data: data[1, 1],
        ],
        ids=["columns", "column", "expanded", "transposed", "overlapping", "empty", "number"],
    )
    def test_an_argument_keeps_its_strides(self, replayed: Replayed, part: Any) -> None:
        weights = torch.arange(20.0)

        def computation(x: Tensor) -> tuple[list[Tensor], None]:
            return [(x * weights[: x.numel()].view(x.shape)).sum()], None

        def backend(graph: Any, inputs: list[Tensor]) -> Any:
            shape, strides = inputs[where].shape, inputs[where].stride()

            def run(*given: Tensor) -> Any:
                # as compiled code does, which has the strides in it
                laid = given[where].as_strided(shape, strides)
                return graph(*given[:where], laid, *given[where + 1 :])

            return run

        where = 0
        fused = Fused(computation, Territory({"computation": computation}), backend)
        for _ in range(6):
            x = part(torch.randn(5, 4))
            torch.testing.assert_close(self.run(replayed, fused, x), computation(x)[0][0])
        assert remembered.count == 1  # type: ignore[attr-defined]

    def test_a_number_that_is_nan_is_the_same_number(self) -> None:
        replayed = Replayed(remembered, "cuda")
        nan = torch.tensor(torch.nan)
        assert replayed._address(nan) == replayed._address(nan.clone())

    def test_what_stands_in_the_way_is_told(
        self, replayed: Replayed, fused: Fused, weight: nn.Linear
    ) -> None:
        x = torch.ones(2, 3)
        fused.prepare(x).program.obstacle = "an argument is on the CPU"
        for _ in range(3):
            self.run(replayed, fused, x)
        with pytest.warns(UserWarning, match="without a captured CUDA graph: an argument is on"):
            self.run(replayed, fused, x)
        for _ in range(3):  # and told once
            torch.testing.assert_close(self.run(replayed, fused, x), weight(x).sum())
        assert remembered.count == 0  # type: ignore[attr-defined]
        for _ in range(6):  # of another program nothing is said
            self.run(replayed, fused, torch.ones(4, 3))
        assert remembered.count == 1  # type: ignore[attr-defined]

    def test_what_has_moved_is_captured_anew(
        self, replayed: Replayed, fused: Fused, weight: nn.Linear
    ) -> None:
        kept = []
        for _ in range(3):
            kept.append(weight.weight)  # the allocator must not give its memory out again
            weight.weight = nn.Parameter(torch.randn(1, 3))
            for _ in range(5):
                x = torch.randn(2, 3)
                torch.testing.assert_close(self.run(replayed, fused, x), weight(x).sum())
        assert remembered.count == 3  # type: ignore[attr-defined]

    def test_what_cannot_be_captured_runs_with_one_warning(self, fused: Fused) -> None:
        def refuse(function: Any, device: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        replayed = Replayed(refuse, "cpu")
        for _ in range(3):
            self.run(replayed, fused, torch.ones(2, 3))
        with pytest.warns(UserWarning, match="without a captured CUDA graph: operation not perm"):
            self.run(replayed, fused, torch.ones(2, 3))
        assert self.run(replayed, fused, torch.ones(2, 3)).isfinite()

    def test_svi_trains_the_same_by_it(self) -> None:
        outcomes = []
        for kind in ("cpu", "cuda"):
            pyro.set_rng_seed(0)
            model, guide, _ = vae()
            optim = Adam([*model.parameters(), *guide.parameters()], 0.05)
            svi = pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend="eager")
            svi._step._replayed = Replayed(remembered, kind)  # type: ignore[union-attr]
            pyro.set_rng_seed(7)
            losses = []
            for n in range(12):
                optim.param_groups[0]["lr"] = 0.1 / (1 + n)
                losses.append(svi.step(binary(4 + n % 2)))
            outcomes.append([torch.tensor(losses), *flat(optim)])
        same(*outcomes)
        assert remembered.count == 2  # type: ignore[attr-defined]


class TestStepsInOneCall:
    """`CompiledSVI.steps`, and steps taken again without a look."""

    def pair(self, kind: Callable[..., Any] = Adam) -> tuple[Any, Any]:
        pyro.set_rng_seed(0)
        model, guide, _ = vae()
        optim = kind([*model.parameters(), *guide.parameters()], 0.05)
        return pv.CompiledSVI(model, guide, optim, pv.ELBO(), backend="eager"), optim

    @pytest.mark.parametrize("kind", [Adam, SGD])
    def test_they_are_steps(self, kind: Callable[..., Any]) -> None:
        outcomes = []
        for at_once in (False, True):
            svi, optim = self.pair(kind)
            x = binary(35).view(7, 5, 6)
            pyro.set_rng_seed(7)
            losses = svi.steps(x) if at_once else torch.tensor([svi.step(row) for row in x])
            outcomes.append([losses, *flat(optim)])
        same(*outcomes)

    def test_one_batch_again_and_again(self) -> None:
        svi, _ = self.pair()
        losses = svi.steps(binary(5).expand(60, 5, 6))
        assert losses.shape == (60,)
        assert losses[-10:].mean() < losses[:10].mean()

    @pytest.fixture
    def captured(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """As on a GPU, with a stand-in for the captured graph; returns a list that grows by each
        full look."""
        looks: list[int] = []
        prepare = Fused.prepare

        def looking(self: Fused, *args: Any, **kwargs: Any) -> Any:
            looks.append(1)
            return prepare(self, *args, **kwargs)

        monkeypatch.setattr(Fused, "prepare", looking)
        monkeypatch.setattr(step, "Replayed", lambda: Replayed(remembered, "cpu"))
        return looks

    def test_captured_ones_look_once(self, captured: list[int]) -> None:
        outcomes = []
        for at_once in (False, True):
            svi, optim = self.pair(lambda p, lr: AdamW(p, lr, weight_decay=0.1))
            x = binary(13 * 5).view(13, 5, 6)
            pyro.set_rng_seed(7)
            losses = []
            for lr in (0.1, 0.01):  # a change between the calls is seen
                optim.param_groups[0]["lr"] = lr
                captured.clear()
                losses.append(svi.steps(x) if at_once else torch.tensor([*map(svi.step, x)]))
            outcomes.append([torch.cat(losses), *flat(optim)])
        same(*outcomes)
        assert len(captured) == 1  # of thirteen steps

    def test_other_arguments_are_looked_at(self, captured: list[int]) -> None:
        svi, _ = self.pair()
        own = svi._step
        assert own is not None
        x, twin = binary(5), binary(4)
        for _ in range(5):
            own(x)
        looks = len(captured)
        for batch, looked in ((x, 0), (twin, 1), (twin, 1)):
            assert own.again(batch) is not None
            assert len(captured) == looks + looked

    def test_a_row_that_is_not_finite(self) -> None:
        svi, optim = self.pair()
        x = binary(30).view(6, 5, 6)
        pyro.set_rng_seed(3)
        svi.steps(x[:3])
        state = [t.clone() for t in flat(optim)]
        svi, optim = self.pair()
        bad = x.clone()
        bad[3, 1, 2] = torch.nan
        pyro.set_rng_seed(3)
        with pytest.raises(
            NonFiniteError, match=r"step 4 of 6: .*argument 0 holds nan at \(1, 2\)"
        ):
            svi.steps(bad)
        same(flat(optim), state)

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ((), "got nothing"),
            ((3,), "got int"),
            ((torch.tensor(3.0),), "got Tensor"),
            ((torch.ones(2, 3), torch.ones(3, 3)), r"got \[2, 3\]"),
            ((torch.ones(0, 3),), r"got \[0\]"),
        ],
    )
    def test_what_has_no_rows(self, args: Any, said: str) -> None:
        svi, _ = self.pair()
        with pytest.raises(ConfigError, match=said):
            svi.steps(*args)
