"""Every prior against scipy and against numerical integration."""

import copy
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.special import logsumexp

import pyro_vae as pv
from pyro_vae import likelihoods, posteriors, priors
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.mixtures import NormalMixture
from pyro_vae.networks import MLP


def grid(half_width=8.0, points=161):
    """Points of a square, and the area of each."""
    edge = torch.linspace(-half_width, half_width, points)
    z = torch.stack(torch.meshgrid(edge, edge, indexing="ij"), -1).flatten(0, 1)
    return z, (edge[1] - edge[0]).item() ** 2


def expect_density_of_its_draws(p, half_width=8.0, points=161, atol=1e-6):
    """The density integrates to one, and draws and density agree on two moments."""
    z, area = grid(half_width, points)
    density = p.log_prob(z).exp() * area
    assert density.sum().item() == pytest.approx(1, abs=atol)
    draws = p.sample((4000,))
    for power in (1, 2):
        moment = (density.unsqueeze(-1) * z**power).sum(0)
        value = draws**power
        score = (value.mean(0) - moment) / (value.std(0) / len(draws) ** 0.5)
        assert score.abs().max() < 4.5  # odds 3e-5 a call


def test_standard_normal_is_scipys():
    z = torch.randn(5, 3)
    want = st.norm().logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(priors.StandardNormal(3)().log_prob(z), want)


def test_standard_normal_has_nothing_to_save():
    assert not priors.StandardNormal(3).state_dict()


def test_mixture_is_scipys():
    loc, scale = torch.randn(4, 3), torch.rand(4, 3) + 0.2
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0])
    z = torch.randn(6, 3)
    want = logsumexp(
        st.norm(loc.numpy(), scale.numpy()).logpdf(z[:, None].numpy()).sum(-1)
        + np.log(weights.numpy() / weights.sum().item()),
        axis=1,
    )
    np.testing.assert_allclose(
        priors.GaussianMixture(loc, scale, weights)().log_prob(z).detach(), want
    )


def test_mixture_far_from_every_component_is_finite():
    p = priors.GaussianMixture(torch.zeros(2, 3), 1e-3)()
    z = torch.full((3,), 1e4, dtype=torch.float64, requires_grad=True)
    p.log_prob(z).backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_by_one_product_is_torchs_by_broadcasting(dtype):
    generator = torch.Generator().manual_seed(0)
    # tight components far from zero: in float32 the expanded square would be off by nats
    loc = 30 + torch.randn(5, 3, generator=generator, dtype=dtype)
    scale = torch.full((5, 3), 0.01, dtype=dtype)
    z = (loc[:2] + 0.02 * torch.randn(2, 3, generator=generator, dtype=dtype)).requires_grad_()
    logits = torch.randn(5, generator=generator, dtype=dtype)
    leaves = [v.requires_grad_() for v in (logits, loc.clone(), scale)]
    ours = NormalMixture(*leaves)
    theirs = dist.MixtureSameFamily(
        dist.Categorical(logits=leaves[0].double()),
        dist.Normal(leaves[1].double(), leaves[2].double()).to_event(1),
    )
    got, want = ours.log_prob(z), theirs.log_prob(z.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(got.sum(), [z, *leaves]),
        torch.autograd.grad(want.sum(), [z, *leaves]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)
    squares, means = z.detach() ** 2 @ (scale**-2).mT, z.detach() @ (loc * scale**-2).mT
    naive = -0.5 * (squares - 2 * means + (loc**2 * scale**-2).sum(-1)).detach()
    exact = -0.5 * (((z.unsqueeze(1) - loc) / scale) ** 2).sum(-1).detach()
    if dtype == torch.float32:  # the mutant
        assert (naive - exact).abs().max() > 1


def test_mixture_far_from_the_origin_loses_nothing():
    # the squares of the means are 1e12 times the variances
    loc = 1e4 + 0.05 * torch.randn(3, 2)
    p = NormalMixture(torch.zeros(3), loc, torch.full((3, 2), 0.01))
    z = loc[:, None] + 0.02 * torch.randn(4, 2)
    oracle = logsumexp(st.norm(loc, 0.01).logpdf(z[..., None, :]).sum(-1), axis=-1) - np.log(3)
    np.testing.assert_allclose(p.log_prob(z), oracle, atol=1e-7)


def test_mixture_expanded_and_batched():
    loc, z = torch.randn(4, 5, 3, 2), torch.randn(7, 4, 5, 2)
    p = NormalMixture(torch.randn(3), loc, torch.rand(4, 5, 3, 2) + 0.1)
    assert (p.batch_shape, p.event_shape, p.mean.shape) == ((4, 5), (2,), (4, 5, 2))
    one = NormalMixture(p.logits, loc[1, 2], p.scale[1, 2])
    torch.testing.assert_close(p.log_prob(z)[3, 1, 2], one.log_prob(z[3, 1, 2]))
    torch.testing.assert_close(p.expand((7, 4, 5)).log_prob(z[0])[3], p.log_prob(z[0]))
    torch.testing.assert_close(one.expand((4, 5)).log_prob(z)[6, 3], one.log_prob(z[6, 3]))
    assert one.expand((4, 5)).log_prob(z[0, 0, 0]).shape == (4, 5)
    assert p.expand((7, 4, 5)).sample((6,)).shape == (6, 7, 4, 5, 2)
    draws = p.sample((4000,))
    score = (draws.mean(0) - p.mean) / (draws.std(0) / 4000**0.5)
    assert score.abs().max() < 5  # 40 means: odds 2e-5


def test_mixture_draws():
    torch.manual_seed(1)
    expect_density_of_its_draws(priors.GaussianMixture(torch.randn(3, 2), 0.4)())


def test_mixture_keeps_nothing_of_the_tensors_it_was_given():
    loc, weights = torch.randn(4, 3), torch.tensor([1, 2, 3, 4])
    mixture = priors.GaussianMixture(loc, weights=weights, learned=False)
    before = mixture().log_prob(torch.ones(3))
    loc.add_(1.0)
    weights.add_(torch.tensor([0, 0, 0, 9]))
    torch.testing.assert_close(mixture().log_prob(torch.ones(3)), before, rtol=0, atol=0)


def test_mixture_has_its_mean_in_every_expansion_and_no_density_of_nan():
    loc = torch.randn(4, 3)
    p = priors.GaussianMixture(loc, weights=torch.tensor([1.0, 2.0, 0.5, 4.0]))()
    want = (torch.tensor([1.0, 2.0, 0.5, 4.0]) @ loc / 7.5).expand(5, 3)
    torch.testing.assert_close(p.expand((5,)).mean, want)
    with pytest.raises(ValueError, match="within the support"):
        p.expand((5,)).log_prob(torch.full((3,), float("nan")))


def test_mixture_learned_or_fixed():
    loc = torch.randn(4, 3)
    assert len(list(priors.GaussianMixture(loc).parameters())) == 3
    fixed = priors.GaussianMixture(loc, learned=False)
    assert not list(fixed.parameters())
    assert set(fixed.state_dict()) == {"loc", "log_scale", "logits"}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: priors.GaussianMixture(torch.zeros(3)), ShapeError),
        (lambda: priors.GaussianMixture(torch.zeros(3, 2), weights=torch.ones(2)), ShapeError),
        (lambda: priors.GaussianMixture(torch.zeros(0, 2)), ShapeError),
        (lambda: priors.GaussianMixture(torch.zeros(3, 2), torch.ones(3)), ShapeError),
        (lambda: priors.GaussianMixture(torch.zeros(3, 2), 0.0), ConfigError),
        (lambda: priors.GaussianMixture(torch.zeros(3, 2), float("inf")), ConfigError),
        (lambda: priors.GaussianMixture(torch.full((3, 2), float("nan"))), ConfigError),
        (lambda: priors.GaussianMixture(torch.zeros(2, 2), weights=torch.zeros(2)), ConfigError),
        (lambda: priors.VampPrior(torch.nn.Identity(), 3, torch.tensor(0.0)), ShapeError),
        (
            lambda: priors.VampPrior(torch.nn.Identity(), 1, torch.zeros(2), bounds=(1, 0)),
            ConfigError,
        ),
        (
            lambda: priors.VampPrior(
                torch.nn.Identity(), 1, torch.zeros(2), bounds=(0, float("inf"))
            ),
            ConfigError,
        ),
        (
            lambda: priors.VampPrior(torch.nn.Identity(), 1, torch.ones(1, 2) * 255, bounds=(0, 1)),
            ConfigError,
        ),
        (
            lambda: priors.VampPrior(torch.nn.Identity(), 4, torch.zeros(3, 2)),
            ConfigError,
        ),
        (lambda: priors.VampPrior(torch.nn.Identity(), 0, torch.zeros(2)), ConfigError),
        (lambda: priors.VampPrior(torch.nn.Identity(), 2.5, torch.zeros(2)), ConfigError),
        (lambda: priors.VampPrior(torch.nn.Identity(), 2, torch.zeros(2), noise=-1), ConfigError),
        (lambda: priors.Flow.spline(1), ConfigError),
        (lambda: priors.Flow.spline(2.5), ConfigError),
        (lambda: priors.Flow.spline(2, transforms=0), ConfigError),
    ],
)
def test_what_means_nothing_is_refused(make, error):
    with pytest.raises(error):
        make()


def test_class_means_move_the_standard_normal():
    prior = priors.ClassMeans(200, 3, spread=0.5)
    assert prior.means.std().item() == pytest.approx(0.5, rel=0.15)  # 600 numbers: 5 errors
    classes, z = torch.tensor([3, 0]), torch.randn(2, 3)
    p = prior(torch.nn.functional.one_hot(classes, 200).double())
    want = st.norm(prior.means[classes].detach()).logpdf(z).sum(-1)
    np.testing.assert_allclose(p.log_prob(z).detach(), want)
    with pytest.raises(ConfigError, match="class as its context"):
        prior()
    with pytest.raises(ShapeError, match=r"200 classes, got a context of shape \(2, 3\)"):
        prior(torch.zeros(2, 3))


# --- VampPrior -------------------------------------------------------------------------------


def test_vamp_is_the_mean_of_the_posteriors_at_its_pseudo_inputs():
    q = posteriors.DiagonalNormal(MLP(5, [6], 4))
    prior = priors.VampPrior(q, 7, torch.rand(7, 5))
    z = torch.randn(3, 2)
    components = q(prior.pseudo_inputs).base_dist
    loc, scale = components.loc.detach().numpy(), components.scale.detach().numpy()
    want = logsumexp(st.norm(loc, scale).logpdf(z[:, None].numpy()).sum(-1), axis=1) - np.log(7)
    np.testing.assert_allclose(prior().log_prob(z).detach(), want)


@pytest.mark.parametrize("family", ["diagonal", "full", "flow"])
def test_vamp_of_every_posterior_is_a_density(family):
    torch.manual_seed(2)
    q = {
        "diagonal": lambda: posteriors.DiagonalNormal(MLP(5, [6], 4)),
        "full": lambda: posteriors.FullRankNormal(MLP(5, [6], 5), 2),
        "flow": lambda: posteriors.InverseAutoregressiveFlow(MLP(5, [6], 7), 2, 3),
    }[family]()
    prior = priors.VampPrior(q, 3, 3 * torch.randn(3, 5))
    with torch.no_grad():
        expect_density_of_its_draws(prior(), atol=1e-4)


def test_vamp_trains_encoder_and_pseudo_inputs():
    q = posteriors.DiagonalNormal(MLP(5, [6], 4))
    prior = priors.VampPrior(q, 7, torch.rand(7, 5), bounds=(0, 1))
    prior().log_prob(torch.randn(2)).backward()
    assert all(p.grad.abs().sum() > 0 for p in prior.parameters())


def test_vamp_shares_the_guides_encoder_and_counts_it_once():
    q = posteriors.DiagonalNormal(MLP(4, [6], 4))
    prior = priors.VampPrior(q, 3, torch.rand(3, 4))
    vae = pv.VAE(prior, likelihoods.Bernoulli(MLP(2, [6], 4)), q)
    parameters = list(vae.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    optimizer = pyro.optim.SGD({"lr": 1.0})
    x = torch.ones(3, 4)
    torch.manual_seed(0)
    loss = pv.ELBO("monte_carlo").differentiable_loss(vae.model, vae.guide, x)
    gradients = torch.autograd.grad(loss, parameters)
    want = [p.detach() - g for p, g in zip(parameters, gradients, strict=True)]
    torch.manual_seed(0)
    SVI(vae.model, vae.guide, optimizer, pv.ELBO("monte_carlo")).step(x)
    torch.testing.assert_close(parameters, want)  # one step each, not one for model and guide both


def test_pseudo_inputs_start_at_data_and_stay_in_bounds():
    x = torch.randint(0, 2, (50, 4)).double()
    q = posteriors.DiagonalNormal(MLP(4, [], 4))
    free = priors.VampPrior(q, 20, x)
    rows = {tuple(r.tolist()) for r in x}
    assert {tuple(r.tolist()) for r in free.pseudo_inputs} <= rows
    again = priors.VampPrior(q, 20, x)
    torch.testing.assert_close(free.pseudo_inputs, again.pseudo_inputs, rtol=0, atol=0)
    bounded = priors.VampPrior(q, 20, x, bounds=(0, 1))
    torch.testing.assert_close(bounded.pseudo_inputs, free.pseudo_inputs, atol=0.021, rtol=0)
    # not at the ends, where they would stay for ever
    (slope,) = torch.autograd.grad(bounded.pseudo_inputs.sum(), bounded.raw)
    assert slope.min() > 0.01
    with torch.no_grad():
        bounded.raw.add_(1e3 * torch.randn_like(bounded.raw))
    assert ((bounded.pseudo_inputs >= 0) & (bounded.pseudo_inputs <= 1)).all()


def test_pseudo_inputs_between_any_bounds_and_at_rows_drawn_by_the_seed():
    q = posteriors.DiagonalNormal(MLP(3, [], 4))
    x = torch.linspace(-1.9, 2.9, 60).reshape(20, 3)
    prior = priors.VampPrior(q, 20, x, bounds=(-2.0, 3.0))
    torch.testing.assert_close(prior.pseudo_inputs.sort(0).values, x)
    with torch.no_grad():
        prior.raw.copy_(torch.linspace(-20, 20, 60).reshape(20, 3))
    assert -2 < prior.pseudo_inputs.min() < -1.99
    assert 2.99 < prior.pseudo_inputs.max() < 3
    some = [priors.VampPrior(q, 10, x, seed=seed).pseudo_inputs for seed in (0, 0, 1)]
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0].sort(0).values, some[2].sort(0).values)


def test_whole_numbers_serve_as_means_and_pseudo_inputs():
    mixture = priors.GaussianMixture(torch.tensor([[0, 0], [3, 1]]), 0.5)
    oracle = priors.GaussianMixture(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), 0.5)
    z = torch.randn(4, 2)
    torch.testing.assert_close(mixture().log_prob(z), oracle().log_prob(z))
    q = posteriors.DiagonalNormal(MLP(2, [], 4))
    vamp = priors.VampPrior(q, 2, torch.tensor([[0, 1], [1, 1]]))
    assert vamp().log_prob(z).shape == (4,)


def test_pseudo_inputs_start_around_the_mean():
    mean = torch.tensor([0.2, 5.0, -1.0])
    q = posteriors.DiagonalNormal(MLP(3, [], 4))
    u = priors.VampPrior(q, 500, mean, noise=0.1).pseudo_inputs.detach()
    assert ((u.mean(0) - mean).abs() < 4.5 * 0.1 / 500**0.5).all()
    assert u.std(0).numpy() == pytest.approx(0.1, rel=0.2)


def test_learning_pseudo_inputs_leaves_the_data_they_started_at():
    x, mean = torch.rand(5, 3), torch.rand(3)
    before = x.clone(), mean.clone()
    q = posteriors.DiagonalNormal(MLP(3, [], 4))
    for start in (x, mean):
        with torch.no_grad():
            priors.VampPrior(q, 5, start.requires_grad_()).raw.add_(1.0)
    assert torch.equal(x, before[0])
    assert torch.equal(mean, before[1])


def test_vamp_of_a_posterior_that_is_no_normal_though_made_of_one():
    def q(u):
        normal = dist.Normal(u[..., :2], 1.0).to_event(1)
        return dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(0.0, 3.0)])

    u, z = torch.rand(4, 3), torch.randn(6, 2)
    want = logsumexp(st.norm(3 * u[:, :2], 3.0).logpdf(z[:, None]).sum(-1), axis=1) - np.log(4)
    np.testing.assert_allclose(priors.VampPrior(q, 4, u)().log_prob(z).detach(), want)


def test_vamp_of_latent_matrices():
    def q(u):
        return dist.Normal(u.unflatten(-1, (2, 2)), 1.0).to_event(2)

    u, z = torch.rand(4, 4), torch.randn(6, 2, 2)
    p = priors.VampPrior(q, 4, u)()
    want = logsumexp(st.norm(u).logpdf(z.flatten(1)[:, None]).sum(-1), axis=1) - np.log(4)
    np.testing.assert_allclose(p.log_prob(z).detach(), want)


def test_vamp_with_a_context_encodes_the_pseudo_inputs_with_it():
    q = posteriors.DiagonalNormal(MLP(4 + 2, [6], 4))
    prior = priors.VampPrior(q, 3, torch.rand(3, 4))
    context, z = torch.randn(5, 2), torch.randn(5, 2)
    p = prior(context)
    assert p.batch_shape == (5,)
    for i in range(5):
        alone = torch.stack([q(u, context[i]).log_prob(z[i]) for u in prior.pseudo_inputs])
        torch.testing.assert_close(p.log_prob(z)[i], alone.logsumexp(0) - np.log(3))


# --- flows -----------------------------------------------------------------------------------


def flows():
    import zuko

    return {
        "spline": priors.Flow.spline(2, transforms=2, hidden=(8,)),
        "any of zuko's": priors.Flow(zuko.flows.MAF(2, transforms=2, hidden_features=(8,))),
    }


@pytest.mark.parametrize("name", ["spline", "any of zuko's"])
def test_flow_is_a_density(name):
    torch.manual_seed(0)
    flow = flows()[name]
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expect_density_of_its_draws(flow(), points=401, atol=1e-3)


def test_a_spline_flow_couples_halves_so_that_draws_take_one_pass():
    flow = priors.Flow.spline(4, transforms=1, hidden=(8,))
    z = torch.randn(4, requires_grad=True)
    at = flow.flow().transform(z)
    jacobian = torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0] for v in at])
    on = jacobian != 0
    # two dimensions depend on themselves alone, two on themselves and those: no chain
    assert sorted(on.sum(1).tolist()) == [1, 1, 3, 3]


def test_a_spline_flow_has_the_couplings_it_was_asked_for():
    for number in (1, 4):
        flow = priors.Flow.spline(2, transforms=number, hidden=(8,))
        assert len(flow.flow.transform.transforms) == number


def test_flow_in_plates_and_with_a_context():
    flow = priors.Flow.spline(3, hidden=(8,), context_features=2)
    context, z = torch.randn(5, 2), torch.randn(7, 5, 3)
    p = flow(context)
    assert (p.batch_shape, p.event_shape) == ((5,), (3,))
    expanded = p.expand((7, 5))
    torch.testing.assert_close(expanded.log_prob(z)[3], p.log_prob(z[3]))
    assert expanded.rsample((2,)).shape == (2, 7, 5, 3)

    def model():
        with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("z", flow(context))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (7, 5)


def test_a_flow_can_be_copied_after_a_step():
    # why zuko: Pyro's own transforms keep the last draw and its graph in the module
    flow = priors.Flow.spline(2)
    flow().log_prob(flow().rsample()).backward()
    copied = copy.deepcopy(flow)
    torch.testing.assert_close(copied().log_prob(torch.ones(2)), flow().log_prob(torch.ones(2)))


def test_loading_zuko_leaves_validation_as_it_was():
    code = (
        "import sys, torch, pyro_vae as pv\n"
        "assert 'zuko' not in sys.modules\n"
        "assert torch.distributions.Distribution._validate_args\n"
        "pv.priors.Flow.spline(2)\n"
        "assert 'zuko' in sys.modules\n"
        "assert torch.distributions.Distribution._validate_args\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_any_callable_serves():
    q = posteriors.DiagonalNormal(MLP(4, [6], 4))
    prior = lambda: dist.StudentT(4.0, torch.zeros(2)).to_event(1)  # noqa: E731
    vae = pv.VAE(prior, likelihoods.Bernoulli(MLP(2, [6], 4)), q)
    assert np.isfinite(
        SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()).step(torch.ones(3, 4))
    )
    assert vae.generate(5).mean.shape == (5, 4)
