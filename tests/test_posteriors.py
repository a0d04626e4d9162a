"""Every posterior against scipy, autograd's Jacobian and numerical integration."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import posteriors
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.networks import MLP
from pyro_vae.posteriors import AutoregressiveStep

RAW = nn.Identity()  # an encoder that hands its input on: x is the network's outputs


def test_diagonal_normal_is_scipys():
    raw = torch.tensor([0.3, -1.0, 0.5, -2.0])
    z = torch.randn(5, 2)
    want = st.norm([0.3, -1.0], np.exp([0.25, -1.0])).logpdf(z.numpy()).sum(-1)
    # well within its range the bound on the log-variance is the identity, to 1e-4
    np.testing.assert_allclose(posteriors.DiagonalNormal(RAW)(raw).log_prob(z), want, atol=2e-3)


@pytest.mark.parametrize("value", [-1e30, -1e3, 1e3, 1e30])
def test_no_weights_make_a_scale_of_zero_or_infinity(value):
    for module, below in (
        (posteriors.DiagonalNormal(RAW), []),
        (posteriors.FullRankNormal(RAW, 2), [0.5]),
    ):
        raw = torch.tensor([0.5, -0.5, value, value, *below], requires_grad=True)
        q = module(raw)
        z = q.rsample()
        (slope,) = torch.autograd.grad(q.log_prob(z), raw)
        assert torch.isfinite(z).all()
        assert torch.isfinite(slope).all()


def every_posterior(outputs, **options):
    """One of each over two latent dimensions, of a network with so many outputs more."""
    full = posteriors.FullRankNormal
    flow = posteriors.InverseAutoregressiveFlow
    return {
        "diagonal": posteriors.DiagonalNormal(outputs(4), **options),
        "full rank": full(outputs(full.outputs(2)), 2, **options),
        "flow": flow(outputs(4 + 1), 2, 1, hidden=(4,), **options),
    }


@pytest.mark.parametrize("name", ["diagonal", "full rank", "flow"])
def test_log_variances_pass_through_the_bound(name):
    """A softplus at each end, of the range that is asked for."""
    q = every_posterior(lambda _: RAW, log_variance_range=(-2.0, 1.0))[name]
    raw = torch.tensor([0.3, -0.4, 0.5, -3.0, *[0.0] * (name != "diagonal")])
    below = -2 + np.logaddexp(0, raw[2:4].numpy() + 2)
    want = np.exp(0.5 * (1 - np.logaddexp(0, 1 - below)))
    p = q(raw)
    scale = {"diagonal": lambda: p.stddev, "full rank": lambda: p.scale_tril.diagonal()}
    found = scale.get(name, lambda: p.base_dist.stddev)()
    np.testing.assert_allclose(found.detach(), want)


@pytest.mark.parametrize("name", ["diagonal", "full rank", "flow"])
def test_a_context_goes_into_the_network(name):
    torch.manual_seed(0)
    q = every_posterior(lambda outputs: nn.Linear(3 + 2, outputs))[name]
    x, context, z = torch.randn(4, 3), torch.randn(6, 1, 2), torch.randn(6, 4, 2)
    log_q = q(x, context).log_prob(z)
    assert log_q.shape == (6, 4)
    torch.testing.assert_close(log_q[5, 2], q(x[2], context[5, 0]).log_prob(z[5, 2]))
    assert (log_q - q(x, context + 1).log_prob(z)).abs().min() > 1e-6


def test_a_classifier_is_a_softmax_of_its_network():
    network = nn.Linear(3 + 2, 4)
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    logits = network(torch.cat([x, context], -1)).detach().numpy()
    p = posteriors.Classifier(network)(x, context).probs.detach()
    np.testing.assert_allclose(p, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


# --- full rank -------------------------------------------------------------------------------


def full_rank(latent=3, rows=4):
    return posteriors.FullRankNormal(RAW, latent)(
        torch.randn(rows, posteriors.FullRankNormal.outputs(latent))
    )


def test_full_rank_normal_is_scipys():
    q = full_rank()
    z = torch.randn(4, 3)
    covariance = (q.scale_tril @ q.scale_tril.mT).numpy()
    assert (covariance[:, 0, 1] != 0).all()
    for i in range(4):
        want = st.multivariate_normal(q.loc[i].numpy(), covariance[i]).logpdf(z[i].numpy())
        assert q.log_prob(z)[i].item() == pytest.approx(want, rel=1e-10)


def test_full_rank_outputs_fill_the_triangle():
    raw = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2, 3])
    factor = posteriors.FullRankNormal(RAW, 3)(raw).scale_tril
    want = torch.tensor([[1.0, 0, 0], [1, 1, 0], [2, 3, 1]])
    torch.testing.assert_close(factor, want, atol=1e-3, rtol=0)
    # the diagonal's logarithms are doubled: log-variances where the rest is zero
    raw = torch.tensor([0.0, 0, 0, -4, 1, 2, 0, 0, 0])
    variance = posteriors.FullRankNormal(RAW, 3)(raw).variance
    torch.testing.assert_close(variance.log(), torch.tensor([-4.0, 1, 2]), atol=1e-3, rtol=0)


def test_full_rank_kl_to_a_product_is_torchs_kl_to_the_same_full_normal():
    q = full_rank()
    m, s = torch.randn(3), torch.rand(3) + 0.3
    product = dist.Normal(m, s).to_event(1)
    same = dist.MultivariateNormal(m, scale_tril=s.diag())
    torch.testing.assert_close(kl_divergence(q, product), kl_divergence(q, same))
    torch.testing.assert_close(
        kl_divergence(q, product.expand((4,))), kl_divergence(q, same.expand((4,)))
    )


def test_full_rank_kl_to_another_product_is_not_invented():
    with pytest.raises(NotImplementedError):
        kl_divergence(full_rank(), dist.Laplace(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(full_rank(), dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))


# --- inverse autoregressive flow -------------------------------------------------------------


def flow(latent=3, rows=4, steps=2, seed=0):
    """A flow well away from the identity, at `rows` data."""
    torch.manual_seed(seed)
    module = posteriors.InverseAutoregressiveFlow(
        RAW, latent, context_features=2, steps=steps, hidden=(8, 8)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module, torch.randn(rows, 2 * latent + 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_draws_remember_what_the_inverse_would_find(steps):
    module, x = flow(steps=steps)
    drawn, fresh = module(x), module(x)
    z = drawn.rsample((5,))
    remembered = drawn.log_prob(z)
    inverted = fresh.log_prob(z.clone())
    torch.testing.assert_close(remembered, inverted, rtol=1e-9, atol=1e-9)
    assert abs(remembered.std().item()) > 0.1
    other = torch.randn(5, 4, 3)  # not that of the draw
    torch.testing.assert_close(drawn.log_prob(other), fresh.log_prob(other))


def test_log_density_is_that_of_autograds_jacobian():
    module, x = flow(rows=1)
    q = module(x[0])
    noise = torch.randn(3)

    def push(e):
        z = q.base_dist.base_dist.loc + q.base_dist.base_dist.scale * e
        for step in q.transforms:
            z = step(z)
        return z

    jacobian = torch.autograd.functional.jacobian(push, noise)
    want = st.norm().logpdf(noise.numpy()).sum() - torch.linalg.slogdet(jacobian)[1].item()
    assert module(x[0]).log_prob(push(noise).detach()).item() == pytest.approx(want, rel=1e-9)
    # autoregressive both ways round, so no dimension is left out
    assert (jacobian.tril(-1).abs().sum() > 1e-3) & (jacobian.triu(1).abs().sum() > 1e-3)


def test_a_step_of_zero_weights_is_a_multiple_of_its_input():
    """y = s x with s = sigmoid(1.5) = 0.82, near the identity (Kingma et al. 2016, app. C.2)."""
    module, x = flow(rows=1, steps=1)
    with torch.no_grad():
        for parameter in module.networks.parameters():
            parameter.zero_()
    (step,) = module(x[0]).transforms
    z = torch.randn(3)
    torch.testing.assert_close(step(z), z / (1 + math.exp(-1.5)))


def test_one_step_is_triangular():
    module, x = flow(rows=1, steps=1)
    (step,) = module(x[0]).transforms
    jacobian = torch.autograd.functional.jacobian(step, torch.randn(3))
    assert jacobian.triu(1).abs().max() == 0
    assert jacobian.tril(-1).abs().max() > 1e-3


def test_flow_integrates_to_one():
    module, x = flow(latent=2, rows=1)
    edge = torch.linspace(-12, 12, 401)
    z = torch.stack(torch.meshgrid(edge, edge, indexing="ij"), -1).flatten(0, 1)
    with torch.no_grad():
        total = module(x[0]).log_prob(z).exp().sum() * (edge[1] - edge[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_gradients_are_the_same_with_and_without_the_inverse():
    module, x = flow()
    x.requires_grad_()
    torch.manual_seed(0)
    drawn = module(x)
    z = drawn.rsample()
    leaves = [x, *module.parameters()]
    remembered = torch.autograd.grad(drawn.log_prob(z).sum(), leaves, retain_graph=True)
    inverted = torch.autograd.grad(module(x).log_prob(z + 0).sum(), leaves)
    torch.testing.assert_close(remembered, inverted, rtol=1e-7, atol=1e-9)


def count_passes(module, run):
    passes = 0

    def hook(*_):
        nonlocal passes
        passes += 1

    handles = [network.register_forward_hook(hook) for network in module.networks]
    run()
    for handle in handles:
        handle.remove()
    return passes


def test_what_a_density_costs_in_passes():
    module, x = flow(latent=3, steps=2)

    def guide():
        with pyro.plate("particles", 5, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", module(x))

    def trace():
        pyro.poutine.trace(guide).get_trace().compute_log_prob()

    assert count_passes(module, trace) == 2  # as the draw, and nothing for its density
    z = torch.randn(len(x), 3)
    assert count_passes(module, lambda: module(x).log_prob(z)) == 2 * (3 + 1)


def test_flow_expands_and_broadcasts():
    module, x = flow(rows=4)
    z = torch.randn(7, 4, 3)
    expanded = module(x).expand((7, 4)).log_prob(z)
    torch.testing.assert_close(expanded[2], module(x).log_prob(z[2]))
    # one z under many data, as in a VampPrior
    torch.testing.assert_close(
        module(x).log_prob(z[0, 0]), module(x).log_prob(z[0, 0].expand(4, 3))
    )


def test_the_context_matters():
    module, x = flow()
    other = x.clone()
    other[:, -1] += 1
    z = torch.randn(4, 3)
    assert (module(x).log_prob(z) - module(other).log_prob(z)).abs().min() > 1e-4


def test_a_step_far_out_stays_finite():
    class FarOut(nn.Module):
        def forward(self, x, _):
            return x * 0 + 3, x * 0 - 200

    step = AutoregressiveStep(FarOut(), torch.zeros(1), [0, 1])
    x = torch.ones(2)
    assert torch.isfinite(step.log_abs_det_jacobian(x, step(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 1, 2),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 2, 0),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 2, 2, steps=0),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 5, 2, hidden=(4,)),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 5, 2, hidden=()),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 2.5, 2),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 2, 2, steps=1.5),
        lambda: posteriors.FullRankNormal(RAW, 0),
        lambda: posteriors.DiagonalNormal(RAW, (10.0, -15.0)),
        lambda: posteriors.DiagonalNormal(RAW, (-15.0, float("inf"))),
        lambda: posteriors.FullRankNormal(RAW, 2, (1.0, 1.0)),
        lambda: posteriors.InverseAutoregressiveFlow(RAW, 2, 2, log_variance_range=(2.0, 1.0)),
    ],
)
def test_sizes_that_mean_nothing_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    "module",
    [
        posteriors.FullRankNormal(MLP(4, [], 6), 2),
        posteriors.InverseAutoregressiveFlow(MLP(4, [], 6), 2, 3),
    ],
)
def test_a_network_of_another_size_is_refused(module):
    with pytest.raises(ShapeError, match="network outputs"):
        module.to(torch.float64)(torch.zeros(3, 4))
