"""Wake-sleep: each phase is the gradient of its own closed form, and moves its own side only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import LATENT, gradient_of, linear_data, linear_pair, repeat, z_scores

import pyro_vae as pv
from pyro_vae.errors import SiteError


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

    class Both:
        model, guide = Model(), Guide()

    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]]).repeat(100, 1)
    run = pv.fit(
        Both(), x, objective=pv.WakeSleep(), epochs=40, batch_size=50, learning_rate=0.05,
        progress=False,
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
