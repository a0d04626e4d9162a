"""What a program asks of its surroundings besides the values of tensors, changed between steps."""

import types
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim import SGD, Adam

import pyro_vae as pv
from pyro_vae import precision, priors
from pyro_vae.data import hide_labels
from pyro_vae.errors import CompileError
from pyro_vae.evidence.posterior import _choose
from pyro_vae.training.batches import Resident

X = torch.linspace(-2, 2, 24, dtype=torch.float64).view(8, 3)
Change = Callable[[], Any]


def guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.3).to_event(1))


def draw(scale: Any = 1.0) -> Tensor:
    return pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))


def observe(x: Tensor, loc: Tensor, scale: Any = 1.0, size: int = 8) -> None:
    with pyro.plate("data", size, subsample=x):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


class Net(nn.Module):
    """A module with a body of one's own."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.body = body
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> None:
        self.body(self, x)


def linear(value: float = 0.5) -> nn.Linear:
    made = nn.Linear(3, 3)
    nn.init.constant_(made.weight, value)
    nn.init.zeros_(made.bias)
    return made


def one_buffer_under_two_names() -> tuple[Any, Change]:
    one = torch.ones(3)
    net = Net(lambda m, x: observe(x, draw(m.prior), m.noise), prior=one, noise=one)
    return net, lambda: setattr(net, "noise", 3 * torch.ones(3))


def one_tensor_in_a_dictionary_twice() -> tuple[Any, Change]:
    one = torch.ones(3)
    scales = {"prior": one, "noise": one}
    return (
        lambda x: observe(x, draw(scales["prior"]), scales["noise"]),
        lambda: scales.update(noise=3 * torch.ones(3)),
    )


def weights_untied() -> tuple[Any, Change]:
    net = Net(lambda m, x: observe(x, m.b(m.a(draw()))), a=linear(), b=linear())
    net.b.weight = net.a.weight
    untied = nn.Parameter(3 * net.a.weight.detach())
    return net, lambda: setattr(net.b, "weight", untied)


def data_of_another_length() -> tuple[Any, Change]:
    data = {"train": torch.zeros(100, 3)}
    return (
        lambda x: observe(x, draw(), size=data["train"].shape[0]),
        lambda: data.update(train=torch.zeros(1000, 3)),
    )


def a_flag_of_a_tensor() -> tuple[Any, Change]:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    net = Net(lambda m, x: observe(x, draw(), 3.0 if m.w.requires_grad else 1.0), w=weight)
    return net, lambda: weight.requires_grad_()


def a_tensor_that_is_none() -> tuple[Any, Change]:
    net = Net(lambda m, x: observe(x, draw(), 1.0 if m.flag is not None else 3.0))
    net.flag = torch.ones(3)
    return net, lambda: setattr(net, "flag", None)


def a_layer_appended() -> tuple[Any, Change]:
    layers = nn.Sequential(linear())
    return lambda x: observe(x, layers(draw())), lambda: layers.append(linear(3.0))


def a_layer_for_the_children() -> tuple[Any, Change]:
    def body(module: Net, x: Tensor) -> None:
        z = draw()
        for child in module.children():
            z = child(z)
        observe(x, z)

    net = Net(body, first=linear())
    return net, lambda: net.add_module("second", linear(3.0))


def a_parameter_in_a_dictionary() -> tuple[Any, Change]:
    scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
    return (
        lambda x: observe(x, sum(draw_once(list(scales.values())))),
        lambda: scales.update({"b": nn.Parameter(3 * torch.ones(3))}),
    )


def draw_once(scales: list[Tensor]) -> list[Tensor]:
    z = draw()
    return [scale * z for scale in scales]


def a_parameter_where_none_was() -> tuple[Any, Change]:
    def body(module: Net, x: Tensor) -> None:
        z = draw()
        observe(x, z * module.gain if hasattr(module, "gain") else z)

    net = Net(body)
    return net, lambda: setattr(net, "gain", nn.Parameter(3 * torch.ones(3)))


def a_head_where_none_was() -> tuple[Any, Change]:
    def body(module: Net, x: Tensor) -> None:
        head = getattr(module, "head", None)
        observe(x, draw() if head is None else head(draw()))

    net = Net(body)
    return net, lambda: setattr(net, "head", linear(3.0))


def an_attribute_of_a_function() -> tuple[Any, Change]:
    def model(x: Tensor) -> None:
        observe(x, draw(), model.scale)  # type: ignore[attr-defined]

    model.scale = 1.0  # type: ignore[attr-defined]
    return model, lambda: setattr(model, "scale", 3.0)


def behind_a_proxy() -> tuple[Any, Change]:
    config = {"scale": 1.0}
    shown = types.MappingProxyType(config)
    return lambda x: observe(x, draw(), shown["scale"]), lambda: config.update(scale=3.0)


@pytest.mark.parametrize(
    "case",
    [
        one_buffer_under_two_names, one_tensor_in_a_dictionary_twice, weights_untied,
        data_of_another_length, a_flag_of_a_tensor, a_tensor_that_is_none, a_layer_appended,
        a_layer_for_the_children, a_parameter_in_a_dictionary, a_parameter_where_none_was,
        a_head_where_none_was, an_attribute_of_a_function, behind_a_proxy,
    ],
)  # fmt: skip
def test_a_change_is_seen(case: Callable[[], tuple[Any, Change]]) -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, change = case()
        options = {} if kind is SVI else {"backend": "eager"}
        made = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)
        losses = [made.step(X), made.step(X)]
        change()
        found.append([*losses, made.step(X), made.step(X)])
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    assert len(made.compile_seconds) == 2  # no more than the change asks for


def test_two_names_that_move_together_are_one_program() -> None:
    one = torch.ones(3)
    net = Net(lambda m, x: observe(x, draw(m.prior), m.noise), prior=one, noise=one)
    made = pv.CompiledSVI(net, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), backend="eager")
    losses = []
    for scale in (1.0, 3.0, 1.0):
        net.prior = net.noise = scale * torch.ones(3)
        pyro.set_rng_seed(0)
        losses.append(made.step(X))
    assert losses[0] == losses[2] != losses[1]
    assert len(made.compile_seconds) == 1


def test_what_a_run_leaves_behind_is_not_asked_for() -> None:
    """A batch of another size leaves another shape, and both programs stay."""

    def body(module: Net, x: Tensor) -> None:
        observe(x, draw())
        module.last = x.mean(1)

    net = Net(body)
    net.last = torch.zeros(())
    made = pv.CompiledSVI(net, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="eager")
    for rows in (8, 5, 8, 5, 8):
        made.step(X[:rows])
    assert len(made.compile_seconds) == 2


def test_a_tensor_that_moves_at_its_first_use() -> None:
    """As `self.scale = self.scale.to(x.device)` does."""

    def body(module: Net, x: Tensor) -> None:
        module.scale = module.scale.to(x.dtype)
        observe(x, draw(), module.scale)

    net = Net(body)
    net.scale = torch.ones(3, dtype=torch.float32)
    made = pv.CompiledSVI(net, guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="eager")
    pyro.set_rng_seed(0)
    before = made.step(X)
    net.scale.mul_(3.0)
    pyro.set_rng_seed(0)
    assert made.step(X) != before
    assert len(made.compile_seconds) == 1


def trained(way: str, kind: Any, prepare: Callable[[Any, Any], Any]) -> list[Tensor]:
    """The weights after a step, what `prepare` does, and three more."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net = Net(lambda m, x: observe(x, m.b(m.a(draw()))), a=linear(), b=linear(0.3))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        net(x)

    optim = kind(net)
    if way == "compiled" or isinstance(optim, pyro.optim.PyroOptim):
        svi: Any = SVI if way == "eager" else pv.CompiledSVI
        options = {} if way == "eager" else {"backend": "eager"}
        made = svi(model, guide, optim, Trace_ELBO(), **options)
        step = made.step
    else:

        def step(x: Tensor) -> None:
            Trace_ELBO().differentiable_loss(model, guide, x).backward()
            optim.step()
            optim.zero_grad()

    step(X)
    prepare(net, optim)
    for _ in range(3):
        step(X)
    return [p.detach().clone() for p in net.parameters()]


def test_tied_between_steps_a_weight_is_updated_once() -> None:
    def tie(net: Any, _: Any) -> None:
        net.b.weight = net.a.weight

    eager, compiled = (
        trained(way, lambda _: pyro.optim.SGD({"lr": 0.01}), tie) for way in ("eager", "compiled")
    )
    for got, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_a_step_of_ones_own_is_taken(kind: Any) -> None:
    def wrap(net: Any, optim: Any) -> None:
        step = optim.step

        def clipped(*args: Any, **kwargs: Any) -> Any:
            nn.utils.clip_grad_value_(net.parameters(), 1e-4)
            return step(*args, **kwargs)

        optim.step = clipped

    eager, compiled = (
        trained(way, lambda net: kind(net.parameters(), 0.1), wrap) for way in ("eager", "compiled")
    )
    for got, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_scheduler_leaves_the_update_in_the_graph() -> None:
    net = Net(lambda m, x: observe(x, m.a(draw())), a=linear())
    optim = Adam(net.parameters(), 0.1)
    torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
    made = pv.CompiledSVI(net, guide, optim, Trace_ELBO(), backend="eager")
    made.step(X)
    assert made._step is not None
    assert made._step._last is not None


def test_the_imaginary_part_of_a_conjugate() -> None:
    """A view whose numbers are the negatives of what lies in memory."""
    loss = pv.ELBO()(lambda x: observe(x, draw()), guide)
    compiled = pv.compile(loss, backend="aot_eager")
    for part in (torch.complex(X, X / 2).imag, torch.complex(X, X / 2).conj().imag):
        pyro.set_rng_seed(1)
        wanted = loss(part)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(compiled(part), wanted)


def test_a_script_module_with_buffers() -> None:
    found = []
    for kind in (SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
            network = torch.jit.script(nn.Sequential(linear(), nn.BatchNorm1d(3)))

        def model(x: Tensor, network: Any = network) -> None:
            observe(x, network(draw() + x))

        options = {} if kind is SVI else {"backend": "eager"}
        made = kind(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)
        found.append(
            [*(made.step(X) for _ in range(3)), *(b.sum().item() for b in network.buffers())]
        )
    assert found[1] == pytest.approx(found[0])


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)

    def model(x: Tensor) -> None:
        observe(x, draw() + table(torch.arange(4)).sum(0))

    compiled = pv.compile(pv.ELBO()(model, guide), backend="eager")
    with pytest.raises(CompileError, match="sparse=False"):
        compiled(X)


def test_anomaly_detection_does_not_stand_in_the_way() -> None:
    loss = pv.ELBO()(lambda x: observe(x, draw()), guide)
    with torch.autograd.set_detect_anomaly(True):
        compiled = pv.compile(loss, X, backend="eager")
        assert torch.is_anomaly_enabled()
    pyro.set_rng_seed(1)
    wanted = loss(X)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(compiled(X), wanted)


class TestPrecision:
    """Torch is told in a word, or by parts, after which it has no word for it."""

    @pytest.fixture(autouse=True)
    def _put_back(self) -> Any:
        before = precision.of_products()
        yield
        torch.set_float32_matmul_precision("highest")
        precision.put_back(before)

    def test_a_program_compiles_however_it_was_set(self) -> None:
        compiled = pv.compile(pv.ELBO()(lambda x: observe(x, draw()), guide), X, backend="eager")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        compiled(X)
        assert sum(map(len, compiled._fused._programs.values())) == 2  # type: ignore[union-attr]

    @pytest.mark.parametrize("by_parts", [False, True])
    def test_an_evaluation_is_exact_and_puts_it_back(self, by_parts: bool) -> None:
        seen = []

        def model(x: Tensor) -> None:
            seen.append(precision.of_products())
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample(
                    "x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x
                )

        def q(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.mean(1), 0.7))

        if by_parts:
            torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
        else:
            torch.set_float32_matmul_precision("medium")
        before = precision.of_products()
        try:
            pv.log_marginal(model, q, X, num_samples=5)
            assert precision.of_products() == before
        finally:
            torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        assert {part for state in seen for part in state} <= {"ieee", "none"}

    def test_of_which_products(self) -> None:
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert precision.is_reduced(gpu, convolutions=True)  # cuDNN's are TF32 by default
        for device in (cpu, gpu):
            assert not precision.is_reduced(device, convolutions=False)
        torch.set_float32_matmul_precision("high")
        assert precision.is_reduced(gpu, convolutions=False)


def test_generators_of_the_cpu_draw_there_whatever_the_default_device() -> None:
    """Under `torch.set_default_device("cuda")`, for which "meta" stands in."""
    split, labels = pv.Split(X), torch.arange(8) % 2
    batches = Resident(split, 3, X.device, X.dtype)

    def drawn() -> list[Tensor]:
        jitter = priors._pseudo_inputs(2, X.mean(0), 0.1, seed=1)
        rows = priors._pseudo_inputs(2, X, 0.1, seed=1)
        hidden = hide_labels(labels, 4, seed=1)
        chosen = _choose(torch.linspace(-1, 1, 5, device="cpu"), 3, seed=1)
        return [jitter, rows, hidden, chosen, *(x for (x,) in batches.epoch(0))]

    wanted = drawn()
    with torch.device("meta"):
        found = drawn()
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)
