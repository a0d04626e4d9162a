"""The models of `benchmarks.train_step` in Pyro and by hand; `step_numpyro` has them in NumPyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import pythae_peer

Step = Callable[[], float]
Take = Callable[[int], Any]  # so many steps
PIXELS, STATES, LEARNING_RATE = 784, 8, 1e-3
OURS, ALL_AT_ONCE, BY_HAND = "compiled", "compiled, steps", "PyTorch by hand"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.allow_tf32 = False  # full float32, as for products by default


@dataclass
class Case:
    """A model and its data.

    Attributes:
        pair: makes (model, guide, module with the parameters, loss by hand).
        args: of a step.
        objective: what is compiled.
        pyro: Pyro's own objectives for it.
        samples: z of a datum, where pythae has the model too.
        in_numpyro: whether `step_numpyro` has it.
    """

    pair: Callable[[], tuple[Any, Any, nn.Module, Callable[..., Tensor]]]
    args: tuple[Tensor, ...]
    objective: ELBO
    pyro: dict[str, Any]
    samples: int | None = None
    in_numpyro: bool = True


def cases() -> dict[str, Case]:
    """The settings, by name."""
    pyro_elbos = {"Trace_ELBO": Trace_ELBO(), "TraceMeanField_ELBO": TraceMeanField_ELBO()}
    renyi = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    deep = lambda k: lambda: _mlp_vae([200, 200], 50, k)  # noqa: E731
    enumeration = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(0)
    return {
        "MLP 784-400-20, batch 128": Case(
            lambda: _mlp_vae([400], 20, 1), (_images(128),), pv.ELBO(), pyro_elbos, 1
        ),
        "IWAE 784-200-200-50, batch 20, k = 1": Case(
            deep(1), (_images(20),), pv.IWAE(1), pyro_elbos, 1
        ),
        "IWAE 784-200-200-50, batch 20, k = 50": Case(
            deep(50), (_images(20),), pv.IWAE(50), {"RenyiELBO": renyi}, 50
        ),
        "convolutions 32-64, batch 128": Case(
            _conv_vae, (_images(128),), pv.ELBO(), pyro_elbos, 1, in_numpyro=False
        ),
        "Bayesian regression, AutoNormal": Case(
            _regression, _regression_data(), pv.ELBO("auto"), pyro_elbos
        ),
        "hidden Markov model, 64 x 10, 8 states": Case(
            _hidden_markov,
            (torch.randn(64, 10, device=DEVICE),),
            enumeration,
            {"TraceEnum_ELBO": enumeration},
            in_numpyro=False,
        ),
    }


def ways(case: Case) -> dict[str, Callable[[], Take]]:
    """Everyone's steps, ours first."""
    one_by_one = {way: partial(_repeated, make) for way, make in steps(case).items()}
    return {OURS: one_by_one.pop(OURS), ALL_AT_ONCE: lambda: all_at_once(case), **one_by_one}


def _repeated(make: Callable[[], Step]) -> Take:
    step = make()

    def take(count: int) -> None:
        for _ in range(count):
            step()

    return take


def steps(case: Case) -> dict[str, Callable[[], Step]]:
    """Everyone's single step."""
    made: dict[str, Callable[[], Step]] = {OURS: lambda: compiled(case)}
    for kind, loss in case.pyro.items():
        made[f"Pyro {kind}"] = partial(pyro_svi, case, loss)
    # the first of them without the checks of arguments that Pyro makes unless told otherwise
    kind, loss = next(iter(case.pyro.items()))
    made[f"Pyro {kind}, validation off"] = partial(pyro_svi, case, loss, validation=False)
    made[BY_HAND] = lambda: by_hand(case, compile=False)
    made[f"{BY_HAND}, torch.compile"] = lambda: by_hand(case, compile=True)
    if (case.samples or 1) > 1:
        made[f"{BY_HAND}, denormals flushed"] = lambda: denormals_flushed(case)
    if case.samples is not None and pythae_peer.is_installed():
        made["pythae"] = lambda: pythae(case)
    return made


def compiled(case: Case) -> Step:
    """This library's step."""
    svi = compiled_svi(case)
    return lambda: svi.step(*case.args)


def all_at_once(case: Case) -> Take:
    """This library's steps, in one call."""
    svi = compiled_svi(case)
    return lambda count: svi.steps(*(a.expand(count, *a.shape) for a in case.args))


def compiled_svi(case: Case) -> pv.CompiledSVI:
    """What takes this library's steps."""
    model, guide, module, _ = case.pair()
    optim = torch.optim.Adam(module.parameters(), LEARNING_RATE)
    return pv.CompiledSVI(model, guide, optim, case.objective)


def pyro_svi(case: Case, loss: Any, validation: bool = True) -> Step:
    """Pyro's step."""
    pyro.enable_validation(validation)
    pyro.clear_param_store()
    model, guide, _, _ = case.pair()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss)
    return lambda: svi.step(*case.args)


def by_hand(case: Case, compile: bool) -> Step:
    """A loss in a dozen lines of PyTorch, eager or through torch.compile, and fused Adam."""
    _, _, module, loss = case.pair()
    optim = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
    if compile:
        loss = torch.compile(loss, fullgraph=True)

    def step() -> float:
        value = loss(*case.args)
        optim.zero_grad()
        value.backward()
        optim.step()
        return value.item()

    return step


def denormals_flushed(case: Case) -> Step:
    """The step by hand in a process that takes numbers below 1e-38 for zero."""
    torch.set_flush_denormal(True)
    return by_hand(case, compile=False)


def pythae(case: Case) -> Step:
    """What pythae's trainer does with a batch, by its default optimizer, Adam."""
    assert case.samples is not None
    _, _, vae, _ = case.pair()
    encoder, decoder = vae.posterior.network, vae.likelihood.network
    latent = vae.prior.loc.shape[-1]
    model = pythae_peer.model(encoder, decoder, latent, case.samples).to(DEVICE)
    optim = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    batch = {"data": pythae_peer.images(case.args[0])}

    def step() -> float:
        optim.zero_grad()
        value = model(batch).loss
        value.backward()
        optim.step()
        return value.item()

    return step


def _mlp_vae(hidden: Sequence[int], latent: int, k: int) -> tuple[Any, ...]:
    encoder = pv.networks.MLP(PIXELS, hidden, 2 * latent)
    decoder = pv.networks.MLP(latent, list(reversed(hidden)), PIXELS)
    return _vae(encoder, decoder, latent, k)


def _conv_vae() -> tuple[Any, ...]:
    encoder = pv.networks.ConvEncoder((28, 28), [32, 64], 2 * 20)
    decoder = pv.networks.ConvDecoder(20, [64, 32], (28, 28))
    return _vae(encoder, decoder, 20, 1)


def _vae(encoder: nn.Module, decoder: nn.Module, latent: int, k: int) -> tuple[Any, ...]:
    vae = pv.VAE(
        pv.priors.StandardNormal(latent),
        pv.likelihoods.Bernoulli(decoder),
        pv.posteriors.DiagonalNormal(encoder),
    ).to(DEVICE)

    def loss(x: Tensor) -> Tensor:
        loc, log_variance = encoder(x).chunk(2, -1)
        noise = torch.randn(k, *loc.shape, device=loc.device)
        z = loc + (0.5 * log_variance).exp() * noise
        log_px = -nn.functional.binary_cross_entropy_with_logits(
            decoder(z), x.expand(k, *x.shape), reduction="none"
        ).sum(-1)
        if k == 1:
            kl = 0.5 * (loc**2 + log_variance.exp() - 1 - log_variance).sum()
            return kl - log_px.sum()
        log_ratio = 0.5 * (noise**2 - z**2 + log_variance).sum(-1)
        return -((log_px + log_ratio).logsumexp(0) - math.log(k)).sum()

    return vae.model, vae.guide, vae, loss


def _regression() -> tuple[Any, ...]:
    x, _ = _regression_data()

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(x.new_zeros(()), 10.0))
        noise = pyro.sample("noise", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight + bias, noise), obs=y)

    guide = AutoNormal(model)
    guide(*_regression_data())
    sizes = {"weight": x.shape[1], "bias": 1, "noise": 1}
    own = nn.ParameterDict({n: nn.Parameter(torch.zeros(2, size)) for n, size in sizes.items()})

    def loss(x: Tensor, y: Tensor) -> Tensor:
        total: Any = 0.0
        draws = {}
        for name, prior_scale in (("weight", 1.0), ("bias", 10.0), ("noise", 1.0)):
            loc, raw = own[name]
            q = torch.distributions.Normal(loc, nn.functional.softplus(raw), validate_args=False)
            p = torch.distributions.Normal(0.0, prior_scale, validate_args=False)
            draws[name] = q.rsample()
            total = total + (q.log_prob(draws[name]) - p.log_prob(draws[name])).sum()
        mean = x @ draws["weight"] + draws["bias"]
        y_given = torch.distributions.Normal(mean, draws["noise"].exp(), validate_args=False)
        return total - y_given.log_prob(y).sum()

    module = nn.ModuleList([guide, own]).to(DEVICE)
    return model, guide, module, loss


def _regression_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 10, generator=generator)
    y = x.sum(-1) + torch.randn(500, generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


class _HiddenMarkov(nn.Module):
    """Sequences of values about the locations of hidden states, which Pyro sums over."""

    def __init__(self) -> None:
        super().__init__()
        self.transition = nn.Parameter(torch.zeros(STATES, STATES))
        self.loc = nn.Parameter(torch.linspace(-2, 2, STATES))

    def forward(self, x: Tensor) -> None:
        pyro.module("hidden_markov", self)
        state: Any = 0
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                states = dist.Categorical(logits=self.transition[state])
                state = pyro.sample(f"state_{t}", states, infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(self.loc[state], 1.0), obs=x[:, t])

    def loss(self, x: Tensor) -> Tensor:
        """By the forward algorithm."""
        log_transition = self.transition.log_softmax(-1)
        normal = torch.distributions.Normal(self.loc, 1.0, validate_args=False)
        log_px = normal.log_prob(x[..., None])
        forward = log_transition[0] + log_px[:, 0]
        for t in range(1, x.shape[1]):
            forward = (forward[..., None] + log_transition).logsumexp(-2) + log_px[:, t]
        return -forward.logsumexp(-1).sum()


def _hidden_markov() -> tuple[Any, ...]:
    model = _HiddenMarkov().to(DEVICE)
    return model, lambda x: None, model, model.loss


def _images(batch: int) -> Tensor:
    return (torch.rand(batch, PIXELS, device=DEVICE) < 0.3).float()
