"""Every prior x likelihood x posterior under every way that it is used."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from zoo import FEATURES, LATENT, LIKELIHOODS, POSTERIORS, PRIORS, N, encoder

import pyro_vae as pv
from pyro_vae.errors import AnalyticKLError

OBJECTIVES = [
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    pv.ELBO(kl="auto"),
    pv.ELBO(kl="monte_carlo", gradient="stl", num_particles=2),
    pv.IWAE(2),
    pv.IWAE(2, gradient="stl"),
    pv.IWAE(2, gradient="dreg"),
    pv.MIWAE(2, 2),
]
ANALYTIC = {
    ("standard normal", "diagonal normal"),
    ("standard normal", "full-rank normal"),
    ("Laplace callable", "diagonal normal"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


combinations = pytest.mark.parametrize(
    ("prior", "likelihood", "posterior"),
    [(p, x, q) for p in PRIORS for x in LIKELIHOODS for q in POSTERIORS],
)


def build(prior, likelihood, posterior, seed=0):
    """A VAE of these parts with weights away from their start, and three data for it."""
    torch.manual_seed(seed)
    make, x = LIKELIHOODS[likelihood]
    q = POSTERIORS[posterior]()
    vae = pv.VAE(PRIORS[prior](q), make(), q)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.tensor(x)
    vae.check(x)
    vae.check_shape(x)
    return vae, x


@combinations
def test_shapes_under_extra_leading_dimensions(prior, likelihood, posterior):
    vae, x = build(prior, likelihood, posterior)
    q = vae.encode(x.expand(2, 5, N, FEATURES))
    assert (q.batch_shape, q.event_shape) == ((2, 5, N), (LATENT,))
    z = q.rsample((4,))
    assert z.shape == (4, 2, 5, N, LATENT)
    assert q.log_prob(z).shape == (4, 2, 5, N)
    p = vae.decode(z)
    assert (p.batch_shape, p.event_shape) == ((4, 2, 5, N), (FEATURES,))
    assert p.mean.shape == (4, 2, 5, N, FEATURES)
    assert p.log_prob(x).shape == (4, 2, 5, N)
    prior_at_z = vae.prior()
    assert (prior_at_z.batch_shape, prior_at_z.event_shape) == ((), (LATENT,))
    assert prior_at_z.log_prob(z).shape == (4, 2, 5, N)
    assert prior_at_z.expand((5, N)).sample().shape == (5, N, LATENT)
    generated = vae.generate(6, seed=0)
    assert generated.mean.shape == generated.sample().shape == (6, FEATURES)
    # the same datum at another place in the batch has the same density
    torch.testing.assert_close(p.log_prob(x)[1, 1, 2], vae.decode(z[1, 1, 2]).log_prob(x))


@combinations
def test_one_step_with_gradients_to_every_parameter(prior, likelihood, posterior):
    vae, x = build(prior, likelihood, posterior)
    for objective in (Trace_ELBO(), *OBJECTIVES):
        before = {name: p.detach().clone() for name, p in vae.named_parameters()}
        svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), objective)
        assert math.isfinite(svi.step(x))
        for name, parameter in vae.named_parameters():  # moves by its gradient
            assert parameter.isfinite().all(), (objective, name)
            assert not torch.equal(before[name], parameter), (objective, name)


@combinations
def test_analytic_kl_is_the_expectation_of_the_monte_carlo_kl(prior, likelihood, posterior):
    vae, x = build(prior, likelihood, posterior)
    if (prior, posterior) not in ANALYTIC:
        with pytest.raises(AnalyticKLError):
            pv.ELBO(kl="analytic").terms(vae.model, vae.guide, x)
        return
    with torch.no_grad():
        q, p = vae.encode(x), vae.prior()
        z = q.sample((2000,))
        draws = (q.log_prob(z) - p.log_prob(z)).sum(-1)
        terms = pv.ELBO(kl="analytic").terms(vae.model, vae.guide, x)
    assert terms.estimators == {"z": "analytic"}
    z_score = (draws.mean() - terms.kl) / (draws.std() / len(draws) ** 0.5)
    assert abs(z_score.item()) < 4.5  # 30 cases at 7e-6 each: odds 2e-4


@combinations
def test_state_dict_round_trip(prior, likelihood, posterior):
    vae, x = build(prior, likelihood, posterior, seed=1)
    other, _ = build(prior, likelihood, posterior, seed=2)
    other.load_state_dict(vae.state_dict())
    losses = []
    for each in (vae, other):
        torch.manual_seed(0)
        losses.append(pv.IWAE(3).loss(each.model, each.guide, x))
    if prior == "fixed mixture":
        torch.testing.assert_close(vae.prior.loc, other.prior.loc)
    assert losses[0] == losses[1]


@combinations
def test_the_elbo_is_below_log_p(prior, likelihood, posterior):
    """log p(x) by quadrature over the two latent dimensions, the ELBO within its Monte Carlo error
    of log p(x, z) - log q(z|x) at draws of our own."""
    vae, x = build(prior, likelihood, posterior)
    with torch.no_grad():
        elbo = -pv.ELBO("monte_carlo", num_particles=200).terms(vae.model, vae.guide, x).loss
        q = vae.encode(x)
        z = q.sample((200,))
        draws = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - q.log_prob(z)
        error = draws.sum(1).std() / 200**0.5
        assert abs(elbo - draws.sum(1).mean()) < 5 * 2**0.5 * error  # odds 2e-4 for all cases
        assert elbo < log_marginal(vae, x) + 5 * error


def log_marginal(vae, x, half_width=10.0, points=101):
    """log p(x), summed over the data, by a sum over a grid."""
    edge = torch.linspace(-half_width, half_width, points)
    z = torch.stack(torch.meshgrid(edge, edge, indexing="ij"), -1).flatten(0, 1)
    cell = (edge[1] - edge[0]) ** 2
    log_joint = vae.prior().log_prob(z).unsqueeze(-1) + vae.decode(z.unsqueeze(1)).log_prob(x)
    return (log_joint.logsumexp(0) + cell.log()).sum()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_path_derivatives_in_single_precision(posterior):
    """The loss is that of the standard gradient on the same draws; a flow is inverted for it, and
    its rounding must not be taken for another guide's density."""
    torch.manual_seed(0)
    if posterior == "inverse autoregressive flow":
        q = pv.posteriors.InverseAutoregressiveFlow(
            encoder(2 * LATENT + 2), LATENT, 2, steps=8, hidden=(64,)
        )
    else:
        q = POSTERIORS[posterior]()
    likelihood, _ = LIKELIHOODS["Normal learned"]
    vae = pv.VAE(PRIORS["standard normal"](q), likelihood(), q).float()
    x = torch.randn(500, FEATURES, dtype=torch.float32)
    for objectives in (
        [pv.ELBO("monte_carlo"), pv.ELBO("monte_carlo", "stl")],
        [pv.IWAE(3), pv.IWAE(3, "stl"), pv.IWAE(3, "dreg")],
    ):
        losses = []
        for objective in objectives:
            objective.max_plate_nesting = 1
            torch.manual_seed(1)
            losses.append(objective.differentiable_loss(vae.model, vae.guide, x).item())
        assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)


@pytest.mark.cuda
@combinations
def test_cuda_gives_the_same_densities(prior, likelihood, posterior):
    vae, x = build(prior, likelihood, posterior)
    z = vae.encode(x).sample()

    def densities(device):
        at = vae.to(device)
        found = [at.encode(x.to(device)).log_prob(z.to(device))]
        found.append(at.decode(z.to(device)).log_prob(x.to(device)))
        if "callable" not in prior:  # a plain function makes its tensors where it says
            found.append(at.prior().log_prob(z.to(device)))
        return [value.detach().cpu() for value in found]

    torch.testing.assert_close(densities("cuda"), densities("cpu"))
