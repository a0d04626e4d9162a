"""Models and guides that the tests of the compiled objective share: a name, and a function that
makes (model, guide, arguments)."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import zoo
from pyro import poutine
from pyro.distributions import constraints, transforms
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

import pyro_vae as pv

FEATURES, LATENT, ROWS = 6, 2, 5


def binary(rows: int = ROWS) -> Tensor:
    return (torch.rand(rows, FEATURES) < 0.4).to(torch.get_default_dtype())


def decoder(outputs: int = FEATURES) -> nn.Module:
    return pv.networks.MLP(LATENT, [4], outputs)


def encoder() -> pv.posteriors.DiagonalNormal:
    return pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES, [4], 2 * LATENT))


def vae(prior: Any = None, likelihood: Any = None, posterior: Any = None) -> tuple[Any, ...]:
    made = pv.VAE(
        prior or pv.priors.StandardNormal(LATENT),
        likelihood or pv.likelihoods.Bernoulli(decoder()),
        posterior or encoder(),
    )
    return made.model, made.guide, (binary(),)


class PyroFlow(nn.Module):
    """A posterior through one inverse autoregressive step."""

    def __init__(self) -> None:
        super().__init__()
        self.base = encoder()
        self.flow = transforms.affine_autoregressive(LATENT, hidden_dims=[4])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return dist.TransformedDistribution(self.base(x), [self.flow])


def batch_norm() -> tuple[Any, ...]:
    hidden = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh())
    network = nn.Sequential(hidden, nn.Linear(4, 2 * LATENT))
    return vae(posterior=pv.posteriors.DiagonalNormal(network))


def dropout() -> tuple[Any, ...]:
    network = nn.Sequential(nn.Linear(LATENT, 8), nn.Dropout(0.5), nn.Linear(8, FEATURES))
    return vae(likelihood=pv.likelihoods.Bernoulli(network))


class Hierarchical(nn.Module):
    """Two layers of latent variables, z2 -> z1 -> x."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 2 * LATENT), nn.Linear(LATENT, LATENT)
        self.top, self.out = nn.Linear(LATENT, 2 * LATENT), nn.Linear(LATENT, FEATURES)

    def model(self, x: Tensor) -> None:
        pyro.module("hierarchical", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.down(z2), 0.5).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.out(z1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("hierarchical", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.up(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, scale.exp()).to_event(1))
            loc, scale = self.top(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, scale.exp()).to_event(1))


def hierarchical() -> tuple[Any, ...]:
    pair = Hierarchical()
    return pair.model, pair.guide, (binary(),)


def regression(autoguide: Any) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        def model(x: Tensor, y: Tensor) -> None:
            weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal((x * weight).sum(-1), noise), obs=y)

        x = torch.randn(8, 3)
        with poutine.block():
            guide = autoguide(model)
            guide(x, x.sum(-1))
        return model, guide, (x, x.sum(-1))

    return make


class NeuralRegression(PyroModule):
    """Random weights in a PyroModule, and a learned constrained noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * self.weight).sum(-1), self.noise), obs=y)


def pyro_module() -> tuple[Any, ...]:
    model = NeuralRegression()
    guide = AutoNormal(model)
    x = torch.randn(8, 3)
    guide(x, x.sum(-1))
    return model, guide, (x, x.sum(-1))


def subsampled() -> tuple[Any, ...]:
    network = nn.Linear(LATENT, FEATURES)

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=network(z)).to_event(1), obs=x[rows])

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(len(x), LATENT))
        scale = pyro.param(
            "scale", lambda: torch.full((len(x), LATENT), 0.5), constraint=constraints.positive
        )
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(loc[rows], scale[rows]).to_event(1))

    return model, guide, (binary(),)


def masked() -> tuple[Any, ...]:
    """Half of the data unobserved, by poutine.mask, under a poutine.scale of both programs."""
    model, guide, (x,) = vae()
    seen = torch.arange(len(x)) % 2 == 0
    return (
        poutine.scale(poutine.mask(model, mask=seen), scale=3.0),
        poutine.scale(poutine.mask(guide, mask=seen), scale=3.0),
        (x,),
    )


class Weighed:
    """A program whose data count by a weight and a mask, worked out of them at each call."""

    def __init__(self, program: Any, weight: Callable[[Tensor], Tensor]) -> None:
        self.program, self.weight = program, weight

    def __call__(self, x: Tensor) -> None:
        with poutine.scale(scale=self.weight(x)), poutine.mask(mask=x[:, 1] == x[:, 2]):
            self.program(x)


def by_first(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] > 0, 3.0, 0.5)


def weighed(
    of_model: Callable[[Tensor], Tensor] = by_first, of_guide: Callable[[Tensor], Tensor] = by_first
) -> tuple[Any, ...]:
    """Scales and masks that model and guide each make for themselves, alike."""
    model, guide, args = vae()
    return Weighed(model, of_model), Weighed(guide, of_guide), args


def of_the_zoo(prior: str, likelihood: str, posterior: str) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        q = zoo.POSTERIORS[posterior]()
        decode, rows = zoo.LIKELIHOODS[likelihood]
        made = pv.VAE(zoo.PRIORS[prior](q), decode(), q)
        return made.model, made.guide, (torch.tensor(rows),)

    return make


NORMAL, DIAGONAL = "standard normal", "diagonal normal"
ZOO = [
    *(
        (NORMAL, likelihood, DIAGONAL)
        for likelihood in zoo.LIKELIHOODS
        if likelihood != "Bernoulli"
    ),
    *((prior, "Bernoulli", DIAGONAL) for prior in zoo.PRIORS if prior != NORMAL),
    *((NORMAL, "Bernoulli", posterior) for posterior in zoo.POSTERIORS if posterior != DIAGONAL),
]


def mixture() -> tuple[Any, ...]:
    """A discrete cluster that the ELBO sums over."""
    clusters = 3
    made = pv.variants.GaussianMixtureVAE(
        pv.likelihoods.Bernoulli(decoder()),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES + clusters, [4], 2 * LATENT)),
        clusters, LATENT, pv.posteriors.Classifier(pv.networks.MLP(FEATURES, [4], clusters)),
    )  # fmt: skip
    return made.model, made.guide, (binary(),)


class Mixture(nn.Module):
    """A cluster a datum, enumerated in the guide, which holds one cluster for impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.classify = nn.Parameter(torch.randn(3)), nn.Linear(1, 3)
        self.register_buffer("possible", torch.tensor([0.0, -torch.inf, 0.0]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=self.possible))
            pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = dist.Categorical(logits=self.classify(x[:, None]) + self.possible)
            pyro.sample("k", k, infer={"enumerate": "parallel"})


def impossible_cluster() -> tuple[Any, ...]:
    pair = Mixture()
    return pair.model, pair.guide, (torch.randn(ROWS),)


class HiddenMarkov(nn.Module):
    """A chain of states that are enumerated in the model, and a guide for their locations."""

    def __init__(self) -> None:
        super().__init__()
        self.transition = nn.Parameter(torch.randn(2, 2))
        self.guess = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        loc, state = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1)), 0
        for t in pyro.markov(range(len(x))):
            states = dist.Categorical(logits=self.transition[state])
            state = pyro.sample(f"state {t}", states, infer={"enumerate": "parallel"})
            pyro.sample(f"x {t}", dist.Normal(loc[..., state], 1.0), obs=x[t])

    def guide(self, x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(self.guess, 0.5).to_event(1))


def hidden_markov() -> tuple[Any, ...]:
    pair = HiddenMarkov()
    return pair.model, pair.guide, (torch.randn(4),)


MODELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "bernoulli": vae,
    "Pyro's flow": lambda: vae(posterior=PyroFlow()),
    "batch norm": batch_norm,
    "dropout": dropout,
    "hierarchical": hierarchical,
    "subsampled": subsampled,
    "masked and scaled": masked,
    "scaled and masked by the data": weighed,
    "enumerated mixture": mixture,
    "enumerated impossible cluster": impossible_cluster,
    "enumerated chain in the model": hidden_markov,
    "AutoNormal": regression(AutoNormal),
    "AutoLowRank": regression(lambda m: AutoLowRankMultivariateNormal(m, rank=2)),
    "PyroModule": pyro_module,
}
PARTS = {"/".join(names): of_the_zoo(*names) for names in ZOO}
