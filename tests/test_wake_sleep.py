"""Wake-sleep: each phase is the gradient of its own closed form, and moves its own side only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import LATENT, gradient_of, linear_data, linear_pair, repeat, z_scores

import pyro_vae as pv
from pyro_vae.errors import SiteError
from pyro_vae.likelihoods.incomplete import ObservedValues


def phases(model, guide, x):
    """Gradients of one call: the model's, the guide's."""
    loss = pv.WakeSleep().differentiable_loss(model, guide, x)
    return gradient_of(loss, model), gradient_of(loss, guide)


def test_the_waking_gradient_is_that_of_log_p_under_the_guides_draws():
    model, guide = linear_pair()
    x = linear_data()
    mean, scale = (x @ guide.weight.T + guide.bias).detach(), guide.log_scale.exp().detach()
    # E_q log p(x, z) in closed form, its gradient by the model's parameters
    variance = model.log_sigma.exp() ** 2
    residual = x - mean @ model.weight.T - model.bias
    spread = (scale**2 * model.weight.square().sum(0)).sum()
    expected = -0.5 * ((residual.square().sum(1) + spread) / variance).sum()
    expected = expected - x.numel() * model.log_sigma
    truth = gradient_of(-expected, model)
    found = repeat(lambda: phases(model, guide, x)[0], 300)
    assert z_scores(found, truth).abs().max() < 4  # 10 numbers: odds of 1 in 1500


def test_the_sleeping_gradient_is_that_of_log_q_under_the_models_draws():
    model, guide = linear_pair()
    x = linear_data()
    w, b, sigma = model.weight.detach(), model.bias.detach(), model.log_sigma.exp().detach()
    a, c, s = guide.weight, guide.bias, guide.log_scale.exp()
    # z - (A x + c) under the model: mean -(A b + c), covariance of (I - A W) z - sigma A e
    mean = -(a @ b + c)
    gain = torch.eye(LATENT) - a @ w
    square = (gain**2).sum(1) + sigma**2 * (a**2).sum(1) + mean**2
    expected = len(x) * (-0.5 * square / s**2 - guide.log_scale).sum()
    truth = gradient_of(-expected, guide)
    found = repeat(lambda: phases(model, guide, x)[1], 300)
    assert z_scores(found, truth).abs().max() < 4


class Coins(torch.nn.Module):
    """k of three kinds, two coins each; NaN is a coin that nobody saw."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.2]]))
        self.kinds = torch.nn.Parameter(torch.tensor([0.2, -0.4, 0.9]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=self.kinds))
            fn = ObservedValues(dist.Bernoulli(logits=self.logits[k]))
            pyro.sample("x", fn.to_event(1), obs=x)


class Guess(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.5, -1.0], [0.1, 0.8], [-0.3, 0.4]]))

    def logits(self, x):
        return x.nan_to_num(0.3) @ self.weight.T

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=self.logits(x)))


def test_both_phases_are_sums_over_a_tiny_model_holes_included():
    model, guide = Coins(), Guess()
    x = torch.tensor([[1.0, 0.0], [0.0, float("nan")]])
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)  # all outcomes of the coins
    log_k = model.kinds.log_softmax(0)
    each = dist.Bernoulli(logits=model.logits)
    awake, asleep = torch.zeros(()), torch.zeros(())
    for row in x:
        seen = ~row.isnan()
        log_px = each.log_prob(row.nan_to_num(0.0))[:, seen].sum(1)
        awake = awake - (guide.logits(row).softmax(0).detach() * (log_k + log_px)).sum()
        for outcome in every:
            p = (log_k + each.log_prob(outcome).sum(1)).exp().detach()
            dream = torch.where(seen, outcome, torch.nan)
            asleep = asleep - (p * guide.logits(dream).log_softmax(0)).sum()
    found = repeat(lambda: torch.cat(phases(model, guide, x.repeat(50, 1))), 100) / 50
    truth = torch.cat([gradient_of(awake, model), gradient_of(asleep, guide)])
    assert z_scores(found, truth).abs().max() < 4  # 15 numbers: odds of 1 in 1000


def test_a_compiled_step_is_the_same_step():
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Normal(pv.networks.MLP(2, [], 3)),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(3, [], 4)),
    )
    loss = pv.WakeSleep()(vae.model, vae.guide)
    losses = []
    for step in (loss, pv.compile(loss, backend="eager")):
        torch.manual_seed(0)
        losses.append(step(linear_data()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


class Pair:
    def __init__(self, model, guide):
        self.model, self.guide = model, guide


def test_the_posterior_needs_no_sleep():
    """At q(z|x) = p(z|x) the sleeping gradient is zero in expectation."""
    model, guide = linear_pair(exact=True)
    found = repeat(lambda: phases(model, guide, linear_data())[1], 300)
    assert z_scores(found, 0.0).abs().max() < 4


def test_terms_are_those_of_the_elbo():
    model, guide = linear_pair()
    x = linear_data()

    def bound(objective):
        terms = objective.terms(model, guide, x)
        return torch.stack([terms.reconstruction, terms.kl]).detach()

    ours = repeat(lambda: bound(pv.WakeSleep()), 400)
    theirs = repeat(lambda: bound(pv.ELBO(kl="monte_carlo")), 400, seed=1)
    error = (ours.var(0) / 400 + theirs.var(0) / 400).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 4


def test_fit_trains_by_it_with_discrete_latents_too():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(4)))
                pyro.sample("x", dist.Bernoulli(logits=self.logits[k]).to_event(1), obs=x)

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Linear(6, 4)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.network(x)))

    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]]).repeat(100, 1)
    run = pv.fit(
        Pair(Model(), Guide()), x, objective=pv.WakeSleep(), epochs=40, batch_size=50,
        learning_rate=0.05, progress=False,
    )  # fmt: skip
    assert run.metrics[0]["train_elbo"] < -3.5
    assert run.metrics[-1]["train_elbo"] > -1.5  # log p(x) is at most log 1/2
    assert run.estimators == {"k": "monte_carlo"}


def test_what_cannot_be_dreamed():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(SiteError, match=r"observe that argument and nothing else.*\['x'\]"):
        pv.WakeSleep().terms(model, guide, torch.ones(3))
