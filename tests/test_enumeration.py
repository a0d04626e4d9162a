"""Discrete guide sites summed over exactly: against enumeration by hand and Pyro's TraceEnum_ELBO.

Statistical tests hold the largest of at most 30 z-scores below 4.5: with a right estimator one of
them fails with a probability below 3e-4, and the seeds are fixed.
"""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor, nn
from toys import COPIES, gradient_of, repeat, z_score_between, z_scores

import pyro_vae as pv
from pyro_vae import ELBO, IWAE
from pyro_vae.errors import SiteError
from pyro_vae.objectives.expectation import Expectation

BOUND = 4.5
CLASSES = 3
PARALLEL = {"enumerate": "parallel"}


class ClassModel(nn.Module):
    """y ~ Categorical, z ~ N(m_y, 1), x ~ N(a z + b_y, s^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.5, 0.1]))
        self.means = nn.Parameter(torch.tensor([-1.0, 0.3, 1.2]))
        self.offsets = nn.Parameter(torch.tensor([0.5, -0.2, 0.0]))
        self.slope = nn.Parameter(torch.tensor(0.7))
        self.log_s = nn.Parameter(torch.tensor(-0.3))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, size: int | None = None,
        rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        with pyro.plate("data", size or len(x), subsample=rows, dim=-1) as rows:
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.means[y], 1.0))
            loc = self.slope * z + self.offsets[y]
            pyro.sample("x", dist.Normal(loc, self.log_s.exp()), obs=x[rows])


class ClassGuide(nn.Module):
    """q(y|x) = softmax, or the label where there is one; q(z|x, y) = N(c x + d_y, t^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.4, -0.6, 0.3]))
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.offsets = nn.Parameter(torch.tensor([-0.4, 0.1, 0.6]))
        self.log_t = nn.Parameter(torch.tensor(-0.2))

    def logits(self, x: Tensor, labels: Tensor | None) -> Tensor:
        logits = x[:, None] * self.weight
        if labels is None:
            return logits
        others = torch.arange(CLASSES) != labels[:, None]
        return logits.masked_fill((labels >= 0)[:, None] & others, float("-inf"))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, size: int | None = None,
        rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        with pyro.plate("data", size or len(x), subsample=rows, dim=-1) as rows:
            known = None if labels is None else labels[rows]
            fn = dist.Categorical(logits=self.logits(x[rows], known))
            y = pyro.sample("y", fn, infer=PARALLEL)
            mean = self.slope * x[rows] + self.offsets[y]
            pyro.sample("z", dist.Normal(mean, self.log_t.exp()))


def by_hand(model: ClassModel, guide: ClassGuide, x: Tensor, labels: Tensor | None = None):
    """E_q[log p(x|z, y)] and KL, a sum over the rows and classes, each term a closed form."""
    log_q = guide.logits(x, labels).log_softmax(-1)
    log_p = model.logits.log_softmax(-1)
    total = {"reconstruction": 0.0, "y": 0.0, "z": 0.0}
    s2, t2 = (2 * model.log_s).exp(), (2 * guide.log_t).exp()
    for n, y in itertools.product(range(len(x)), range(CLASSES)):
        q = log_q[n, y].exp()
        if q == 0:
            continue
        mean = guide.slope * x[n] + guide.offsets[y]
        residual = x[n] - model.slope * mean - model.offsets[y]
        square = (residual**2 + model.slope**2 * t2) / s2
        total["reconstruction"] += q * -0.5 * ((2 * torch.pi * s2).log() + square)
        total["y"] += q * (log_q[n, y] - log_p[y])
        total["z"] += q * 0.5 * (t2 + (mean - model.means[y]) ** 2 - 1 - 2 * guide.log_t)
    return total


X = torch.tensor([0.3, -1.1, 2.0, 0.7])
SOME = torch.tensor([-1, 2, 0, -1])


def pair() -> tuple[ClassModel, ClassGuide]:
    return ClassModel(), ClassGuide()


def loss_and_gradient(objective, *program_and_args) -> Tensor:
    model, guide, *args = program_and_args
    loss = objective.differentiable_loss(model, guide, *args)
    return torch.cat([loss.detach().reshape(1), gradient_of(loss, model, guide)])


def x() -> Tensor:
    return X.to(torch.get_default_dtype())


def copies(data: Tensor | None) -> Tensor | None:
    return None if data is None else data.repeat(COPIES)


@pytest.mark.parametrize("labels", [None, SOME, torch.tensor([0, 1, 2, 0])], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kl": "analytic"},
        {"kl": "monte_carlo"},
        {"kl": "monte_carlo", "gradient": "stl"},
        {"kl": "auto", "num_particles": 3},
        {"kl": "analytic", "kl_weight": 0.3},
    ],
    ids=str,
)
def test_value_and_gradient_have_the_sum_by_hand_as_expectation(options, labels):
    model, guide = pair()
    hand = by_hand(model, guide, x(), labels)
    weight = options.get("kl_weight", 1.0)
    expected = weight * (hand["y"] + hand["z"]) - hand["reconstruction"]
    truth = torch.cat([expected.detach().reshape(1), gradient_of(expected, model, guide)])
    objective = ELBO(**options)
    data = copies(x()), copies(labels)
    draws = repeat(lambda: loss_and_gradient(objective, model, guide, *data), 100)
    assert z_scores(draws, COPIES * truth).abs().max() < BOUND


def exact_pair() -> tuple[ClassModel, ClassGuide]:
    """z is its mean, so that there is no noise."""
    model, guide = pair()
    with torch.no_grad():
        guide.log_t.fill_(-30.0)
    return model, guide


@pytest.mark.parametrize("mutant", [False, True])
def test_the_gradient_goes_through_the_probabilities(mutant, monkeypatch):
    model, guide = exact_pair()
    hand = by_hand(model, guide, x(), None)
    truth = gradient_of(hand["y"] + hand["z"] - hand["reconstruction"], model, guide)

    class Constants(Expectation):
        def __init__(self, *args):
            super().__init__(*args)
            self.sums = [(dim, probability.detach(), y) for dim, probability, y in self.sums]

    if mutant:
        monkeypatch.setattr("pyro_vae.objectives.elbo.Expectation", Constants)
    slope = gradient_of(ELBO().differentiable_loss(model, guide, x()), model, guide)
    assert torch.allclose(slope, truth, rtol=1e-6, atol=1e-6) != mutant


def test_terms_are_those_by_hand():
    model, guide = pair()
    hand = by_hand(model, guide, x(), SOME)
    terms = ELBO(num_particles=4).terms(model, guide, x(), SOME)
    assert terms.kl.item() == pytest.approx((hand["y"] + hand["z"]).item(), rel=1e-12)
    assert terms.estimators == {"y": "enumerated", "z": "analytic"}
    assert terms.kl_per_dimension["y"].item() == pytest.approx(hand["y"].item(), rel=1e-12)
    path = ELBO("monte_carlo", gradient="stl").terms(model, guide, x(), SOME)
    assert path.estimators == {"y": "enumerated", "z": "monte_carlo"}
    # a label costs -log p(y) and no entropy
    known = ELBO().terms(model, guide, x(), torch.tensor([0, 1, 2, 0]))
    prior = model.logits.log_softmax(0)
    hand = by_hand(model, guide, x(), torch.tensor([0, 1, 2, 0]))
    assert hand["y"].item() == pytest.approx(-(prior.sum() + prior[0]).item())
    assert known.kl.item() == pytest.approx((hand["y"] + hand["z"]).item(), rel=1e-12)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("labels", [None, SOME], ids=["none", "some"])
def test_equals_traceenum_in_expectation(labels, num_particles):
    model, guide = pair()
    ours = ELBO(kl="monte_carlo", num_particles=num_particles)
    theirs = TraceEnum_ELBO(
        num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1
    )
    data = copies(x()), copies(labels)
    a = repeat(lambda: loss_and_gradient(ours, model, guide, *data), 60)
    b = repeat(lambda: loss_and_gradient(theirs, model, guide, *data), 60, seed=1)
    exact = a.std(0) < 1e-9  # of the entropy and the prior of y
    torch.testing.assert_close(a[0][exact], b[0][exact])
    assert z_score_between(a, b)[~exact].abs().max() < BOUND


# --- discrete sites alone: no noise, so every draw is the exact sum ----------------------------


def chain(logits: Tensor, table: Tensor, infer: dict | None):
    """a ~ p(a), b ~ p(b|a), x ~ N(b - a, 1), in plates of data and of items of a datum."""

    def program(x: Tensor, observe: bool = True) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=logits), infer=infer)
            with pyro.plate("item", len(x), dim=-2):
                b = pyro.sample("b", dist.Categorical(logits=table[a]), infer=infer)
                if infer is None:
                    pyro.sample("x", dist.Normal((b - a).to(x), 1.0), obs=x)

    return program


def chain_pair():
    torch.manual_seed(2)
    model = chain(torch.randn(3), torch.randn(3, 2), None)
    logits, table = torch.randn(3).requires_grad_(), torch.randn(3, 2).requires_grad_()
    return model, chain(logits, table, PARALLEL), (logits, table)


def test_dependent_sites_in_nested_plates_equal_traceenum():
    model, guide, parameters = chain_pair()
    data = torch.tensor([[0.1, -1.0, 2.0, 0.4], [0.5, 0.2, -0.3, 1.5]])
    results = []
    for objective in (ELBO(), TraceEnum_ELBO(max_plate_nesting=2)):
        loss = objective.differentiable_loss(model, guide, data)
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ELBO(num_particles=5).loss(model, guide, data) == pytest.approx(results[0][0].item())


def test_the_optimal_guide_gives_the_evidence():
    """With q(y|x) = p(y|x) the bound is log p(x) = log sum_y p(y) p(x|y), whatever is drawn."""
    logits = torch.tensor([0.3, -0.2, 0.8])
    loc = torch.tensor([-1.0, 0.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(loc[y], 0.5), obs=x)

    def guide(x):
        joint = logits + dist.Normal(loc, 0.5).log_prob(x[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=joint), infer=PARALLEL)

    mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, 0.5))
    expected = mixture.log_prob(x()).sum().item()
    assert -ELBO().loss(model, guide, x()) == pytest.approx(expected, rel=1e-12)


def test_subsampled_plates_are_unbiased():
    """The mean over all subsamples of two rows is the bound of all rows: here, exactly."""
    model, guide = exact_pair()
    objective = ELBO(kl="analytic")
    whole = objective.loss(model, guide, x(), SOME)
    parts = [
        objective.loss(model, guide, x(), SOME, len(X), torch.tensor(rows))
        for rows in itertools.combinations(range(len(X)), 2)
    ]
    assert sum(parts) / len(parts) == pytest.approx(whole, rel=1e-9)


def test_masked_rows_do_not_count():
    model, guide = exact_pair()
    keep = torch.tensor([True, False, True, False])

    def masked(program):
        return lambda *args: poutine.mask(program, keep)(*args)

    some = ELBO().loss(masked(model), masked(guide), x())
    assert some == pytest.approx(ELBO().loss(model, guide, x()[keep]), rel=1e-9)


def test_scaled_sites_are_weighed():
    model, guide = exact_pair()
    scaled = poutine.scale(model, 3.0), poutine.scale(guide, 3.0)
    expected = 3 * ELBO().loss(model, guide, x())
    assert ELBO().loss(*scaled, x()) == pytest.approx(expected, rel=1e-9)


# --- programs that are no sum over a datum's values --------------------------------------------


def test_a_site_outside_the_plate_is_refused():
    def program(x, infer=None):
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Bernoulli(0.3 * torch.ones(3)), infer=infer)
        if infer is None:
            pyro.sample("x", dist.Normal(y.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x):
        program(x, PARALLEL)

    with pyro.validation_enabled(False), pytest.raises(SiteError, match=r"\"x\".*outside.*data"):
        ELBO().loss(program, guide, torch.zeros(1))


def test_markov_chains_are_refused():
    def program(x, infer=None):
        state = 0
        for t in pyro.markov(range(4)):
            probs = torch.tensor([0.3, 0.6])[state]
            state = pyro.sample(f"s{t}", dist.Bernoulli(probs), infer=infer).long()

    with pytest.raises(SiteError, match=r"markov"):
        ELBO().loss(program, lambda x: program(x, PARALLEL), None)


@pytest.mark.parametrize(
    ("objective", "infer"), [(IWAE(3), PARALLEL), (ELBO(), {"enumerate": "sequential"})]
)
def test_other_objectives_and_marks_are_refused(objective, infer):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(0.5), infer=infer)

    with pytest.raises(SiteError, match=r"ELBO with infer"):
        objective.loss(guide, guide, x())


# --- through the other tools -------------------------------------------------------------------


def test_svi_and_fit_train_on_it():
    model, guide = pair()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ELBO())
    losses = [svi.step(x(), SOME) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_first_call_draws_what_the_others_draw():
    """Though it runs twice, to see what is marked and to sum."""
    model, guide, x = ClassModel(), ClassGuide(), torch.tensor([0.3, -1.0])
    objective, found = ELBO(), []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append((objective.loss(model, guide, x), torch.rand(()).item()))
    assert found[0] == found[1]


def test_the_compiled_objective_is_the_same():
    model, guide = pair()
    eager, compiled = ELBO()(model, guide), pv.compile(ELBO()(model, guide))
    eager(x(), SOME)  # the first call looks at the program first
    results = []
    for loss in (eager, compiled):
        pyro.set_rng_seed(4)
        value = loss(x(), SOME)
        results.append(torch.cat([value.detach().reshape(1), gradient_of(value, model, guide)]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
