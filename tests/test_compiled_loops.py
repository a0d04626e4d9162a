"""In loops of torch's: other optimizers, tensors of other kinds, hooks on all modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_helpers import agree, loss_and_grads, parameters, program, programs
from compiled_models import LATENT, binary, decoder, encoder
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.optim import SGD, Adam, AdamW
from torch.testing._internal.two_tensor import TwoTensor

import pyro_vae as pv
from pyro_vae.errors import CompileError, ConfigError

X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def compiled(loss: Any, *example: Tensor) -> Any:
    return pv.compile(loss, *example, backend="eager")


def made() -> pv.VAE:
    """With a posterior and a likelihood that have parameters."""
    return pv.VAE(pv.priors.StandardNormal(LATENT), pv.likelihoods.Bernoulli(decoder()), encoder())


class TestWhatIsNotTrained:
    @pytest.mark.parametrize(
        "optimizer", [Adam, SGD, lambda p, lr: Adam(p, lr, amsgrad=True)],
        ids=["in the graph", "apart", "apart, Adam"],
    )  # fmt: skip
    def test_gets_no_gradient(self, optimizer: Any) -> None:
        vae, x = made(), binary()
        svi = pv.CompiledSVI(
            vae.model,
            vae.guide,
            optimizer(vae.posterior.parameters(), lr=0.1),
            pv.ELBO(),
            backend="eager",
        )
        before = [p.clone() for p in vae.likelihood.parameters()]
        for _ in range(3):
            svi.step(x)
        assert all(p.grad is None for p in vae.likelihood.parameters())
        assert all(map(torch.equal, before, vae.likelihood.parameters()))

    def test_keeps_the_gradient_that_it_has(self) -> None:
        vae, x = made(), binary()
        svi = pv.CompiledSVI(
            vae.model, vae.guide, SGD(vae.posterior.parameters(), 0.1), pv.ELBO(), backend="eager"
        )
        for p in vae.likelihood.parameters():
            p.grad = torch.ones_like(p)
        svi.step(x)
        assert all((p.grad == 1).all() for p in vae.likelihood.parameters())

    @pytest.mark.parametrize("optimizer", [Adam, SGD])
    def test_arguments_and_what_they_are_made_of_do(self, optimizer: Any) -> None:
        vae, x = made(), binary()
        svi = pv.CompiledSVI(
            vae.model, vae.guide, optimizer(vae.parameters(), lr=0.0), pv.ELBO(),
            backend="eager",
        )  # fmt: skip
        scale = torch.tensor(1.0, requires_grad=True)
        found = []
        for step in (svi.step, lambda x: pv.ELBO()(vae.model, vae.guide)(x).backward()):
            pyro.set_rng_seed(0)
            step(x * scale)
            assert scale.grad is not None
            found.append(scale.grad.clone())
            scale.grad = None
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("optimizer", [Adam, SGD])
    def test_nothing_to_train_is_told(self, optimizer: Any) -> None:
        vae, x = made(), binary()
        other = nn.Parameter(torch.zeros(2))
        svi = pv.CompiledSVI(
            vae.model, vae.guide, optimizer([other], lr=0.1), pv.ELBO(), backend="eager"
        )
        with pytest.raises(ConfigError, match="depends on no parameter that the optimizer trains"):
            svi.step(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_parameters_of_16_bits_move_as_by_torchs_kernel(kind: Any, dtype: torch.dtype) -> None:
    """Whose epsilon, 1e-8, is not nothing."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.linspace(-1, 1, 7).to(dtype))

        def model(self, x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            # of the last there is no gradient: 0 / (0 + epsilon)
            loc = torch.cat([self.loc[:-1], self.loc[-1:].detach()])
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x, found = torch.linspace(0, 2, 7).to(dtype), []
    for compile in (True, False):
        pair = Pair()
        optimizer = kind(pair.parameters(), 0.01, fused=True)
        loss = Trace_ELBO()(pair.model, pair.guide)
        svi = pv.CompiledSVI(pair.model, pair.guide, optimizer, Trace_ELBO(), backend="eager")
        pyro.set_rng_seed(0)
        for _ in range(30):
            if compile:
                svi.step(x)
            else:
                optimizer.zero_grad()
                loss(x).backward()
                optimizer.step()
        assert pair.loc.isfinite().all()
        found.append(pair.loc.detach().float())
    torch.testing.assert_close(*found, atol=2 * torch.finfo(dtype).eps, rtol=0)


def forward(factor: float) -> Any:
    return modules.register_module_forward_hook(lambda m, i, o: factor * o)


def before_forward(factor: float) -> Any:
    return modules.register_module_forward_pre_hook(lambda m, i: (factor * i[0],))


def backward(factor: float) -> Any:
    return modules.register_module_full_backward_hook(lambda m, i, o: (factor * i[0],))


def before_backward(factor: float) -> Any:
    return modules.register_module_full_backward_pre_hook(lambda m, o: (factor * o[0],))


@pytest.mark.parametrize(
    "hook", [forward, before_forward, backward, before_backward], ids=lambda f: f.__name__
)
def test_hooks_on_all_modules_are_seen(hook: Callable[[float], Any]) -> None:
    linear = nn.Linear(3, 3)
    loss = program(lambda x: linear(pyro.param("in", torch.ones(3)) * x).sum())
    x = X.clone().requires_grad_()  # or torch warns of the hooks
    loss(x)
    fused = compiled(loss, x)
    plain = loss_and_grads(fused, (x,), parameters(loss, linear), 5)
    handle = hook(1.5)
    try:
        agree(loss, fused, x)
        hooked = loss_and_grads(fused, (x,), parameters(loss, linear), 5)
    finally:
        handle.remove()
    agree(loss, fused, x)
    assert any(not torch.equal(a, b) for a, b in zip(plain, hooked, strict=True) if b is not None)
    assert programs(fused) == 2


@dataclass
class Scaled:
    """A hook that is compared by value, and so has no hash."""

    factor: float

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.factor * output


def test_hooks_on_all_modules_need_no_hash() -> None:
    linear = nn.Linear(3, 3)
    loss = program(lambda x: linear(x).sum())
    fused = compiled(loss, X)
    for factor in (2.0, 3.0):
        handle = modules.register_module_forward_hook(Scaled(factor))
        try:
            agree(loss, fused, X)
        finally:
            handle.remove()
    agree(loss, fused, X)
    assert programs(fused) == 3


class TestOtherTensors:
    def test_of_inference(self) -> None:
        vae = made()
        loss = pv.ELBO()(vae.model, vae.guide)
        fused = compiled(loss)
        with torch.inference_mode():
            x = binary() / 1.0
            assert x.is_inference()
            found = []
            for value in (fused, loss):
                pyro.set_rng_seed(0)
                found.append(value(x))
            torch.testing.assert_close(*found)
        x = binary()
        agree(loss, fused, x)

    def test_of_inference_that_the_program_changes(self) -> None:
        def body(x: Tensor) -> Tensor:
            return x.add_(1.0)

        with torch.inference_mode():
            x = torch.ones(3)
            with pytest.raises(CompileError, match="changes an argument"):
                compiled(program(body), x)

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.expand(4, 3),
            lambda x: x.unfold(0, 2, 1),
            lambda x: torch.stack([x, x])[:, ::2],
            lambda x: x[:, None],
        ],
        ids=["expanded", "overlapping", "with gaps", "plain"],
    )
    def test_gradients_of_views(self, view: Any) -> None:
        loss = program(lambda x: (x * torch.arange(1.0, x.numel() + 1).view(x.shape)).exp())
        fused, found = compiled(loss), []
        for value in (fused, loss):
            x = X.clone().requires_grad_()
            pyro.set_rng_seed(0)
            given = view(x)
            given.retain_grad()
            value(given).backward()
            found.append((x.grad, given.grad))
        torch.testing.assert_close(*found)

    def test_of_a_conjugate(self) -> None:
        loss = program(lambda z: z.imag + z.real)
        z = torch.complex(X, X.flip(0))
        agree(loss, compiled(loss, z.conj()), z)
        agree(loss, compiled(loss, z), z.conj())

    @pytest.mark.parametrize("before", [True, False], ids=["first", "later"])
    def test_what_is_held_is_no_view_of_a_conjugate(self, before: bool) -> None:
        held = nn.Module()
        z = torch.complex(X, X.flip(0))
        loss = program(lambda x: x * held.z)
        held.register_buffer("z", z.imag)
        fused = compiled(loss)
        if not before:
            agree(loss, fused, X)
        held.z = z.conj().imag
        with pytest.raises(CompileError, match=r"z is a view that stands for its conjugate"):
            fused(X)

    def test_by_where_they_begin_in_memory(self) -> None:
        with pytest.raises(CompileError, match=r"x\.as_strided.*Leave the offset out"):
            compiled(program(lambda x: x.as_strided((2,), (1,), 1)), X)
        loss = program(lambda x: x.as_strided((2,), (1,)))
        fused = compiled(loss, X[:2])
        agree(loss, fused, X[1:])

    def test_of_a_forward_derivative(self) -> None:
        fused = compiled(program(lambda x: x.exp()), X)
        with forward_ad.dual_level(), pytest.raises(CompileError, match="no forward-mode"):
            fused(X)

    def test_that_stand_for_others_as_parameters(self) -> None:
        """As those of sharded modules do."""
        linear = nn.Linear(3, 3)
        linear.weight = nn.Parameter(TwoTensor(torch.eye(3), torch.eye(3)))
        with pytest.raises(CompileError, match=r"weight is a TwoTensor.*without compiling"):
            compiled(program(lambda x: linear.bias * x), X)

    def test_that_lose_their_memory(self) -> None:
        weight = torch.ones(3)

        def body(x: Tensor) -> Tensor:
            weight.untyped_storage().resize_(24)
            with torch.no_grad():
                y = x * weight.detach()
            weight.untyped_storage().resize_(0)
            return y

        with pytest.raises(CompileError, match="lost its memory"):
            compiled(program(body), X)


@pytest.mark.parametrize("optimizer", [Adam, SGD])
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda *_: None, "returned a NoneType"),
        (lambda *_: torch.zeros(3, requires_grad=True), r"tensor of shape \(3,\)"),
    ],
)
def test_what_is_no_loss(loss: Any, told: str, optimizer: Any) -> None:
    vae, x = made(), binary()
    optim = optimizer(vae.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=told):
        pv.CompiledSVI(vae.model, vae.guide, optim, loss, backend="eager").step(x)
