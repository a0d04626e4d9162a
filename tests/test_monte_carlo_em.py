"""Monte Carlo EM: its E-step leaves the posterior as it is, and EM ends at the maximum."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize
from toys import LinearModel, linear_data, z_scores

import pyro_vae as pv
from pyro_vae.errors import ConfigError, DataError, SiteError, SupportError
from pyro_vae.monte_carlo_em import _Joint


def test_the_transitions_leave_the_posterior_as_it_is():
    """From draws of the exact posterior, after many transitions, still draws of it."""
    model, number = LinearModel(), 3000
    x = linear_data(1).repeat(number, 1)
    w, b, variance = model.weight.detach(), model.bias.detach(), model.log_sigma.exp().item() ** 2
    covariance = torch.linalg.inv(torch.eye(2) + w.T @ w / variance)
    mean = covariance @ w.T @ (x[0] - b) / variance
    joint, rows = _Joint(model, x, ()), torch.arange(number)
    z = {"z": torch.distributions.MultivariateNormal(mean, covariance).sample((number,))}
    for _ in range(5):
        z, acceptance = joint.transition(rows, z, 0.7, 4)
    assert 0.5 < acceptance < 0.95  # a step this coarse would show without the correction
    draws = z["z"]
    assert z_scores(draws, mean).abs().max() < 3.5
    assert z_scores((draws - mean) ** 2, covariance.diagonal()).abs().max() < 3.5
    # and from elsewhere they come to it
    z = {"z": torch.zeros(number, 2)}
    for _ in range(40):
        z, _ = joint.transition(rows, z, 0.5, 5)
    assert z_scores(z["z"], mean).abs().max() < 3.5


def test_em_comes_to_the_maximum_likelihood():
    """The mean and noise of x = z + e, z ~ N(0, 1): the maximum is where the moments agree."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(0.0))
            self.log_sigma = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                fn = dist.Normal(z + self.mean, self.log_sigma.exp())
                pyro.sample("x", fn.to_event(1), obs=x)

    x = 2.0 + 1.5 * torch.randn(300, 1)
    model = Model()
    rows = pv.mcem(
        model, x, epochs=30, batch_size=100, optimizer=lambda p: torch.optim.Adam(p, 0.02)
    )

    def loss(v):
        return -dist.Normal(v[0], (1 + v[1] ** 2) ** 0.5).log_prob(x).sum().item()

    best = optimize.minimize(loss, [0.0, 1.0], method="Nelder-Mead").x
    assert model.mean.item() == pytest.approx(best[0], abs=0.1)
    assert model.log_sigma.exp().item() == pytest.approx(best[1], abs=0.1)
    assert rows[-1]["acceptance"] == pytest.approx(0.9, abs=0.08)
    assert [row["epoch"] for row in rows] == list(range(1, 31))


def test_mcem_is_reproducible_and_leaves_no_trace():
    found, state = [], torch.get_rng_state()
    for _ in range(2):
        model = LinearModel()
        found.append(pv.mcem(model, linear_data(20), epochs=2, batch_size=10))
    assert found[0] == found[1]
    assert torch.equal(state, torch.get_rng_state())
    assert not pyro.get_param_store()


def test_what_mcem_cannot_train():
    class Positive(torch.nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Gamma(1.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Shared(torch.nn.Module):
        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    with pytest.raises(SiteError, match='"z" is not real'):
        pv.mcem(Positive(), x)
    with pytest.raises(SiteError, match='"z" is not one for each row'):
        pv.mcem(Shared(), x)

    class Coins(torch.nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    for value in (0.5, float("nan")):
        with pytest.raises(SupportError, match=f"row 1, .*{value}"):
            pv.mcem(Coins(), torch.tensor([1.0, value]))
    with pytest.raises(ConfigError, match="no parameters"):
        pv.mcem(Coins(), torch.ones(3))
    with pytest.raises(DataError, match="does not run"):
        pv.mcem(Coins(), torch.ones(3), torch.ones(3))
    for epochs in (0, 2.5):
        with pytest.raises(ConfigError, match=f"epochs .* got {epochs}"):
            pv.mcem(Shared(), x, epochs=epochs)
    with pytest.raises(ConfigError, match="target_accept"):
        pv.mcem(Shared(), x, target_accept=1.0)
