"""IWAE and MIWAE against scipy on the same draws, quadrature, and closed forms.

Statistical tests hold the largest of at most 20 z-scores below 4.5 (see test_objectives).
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn
from toys import (
    COPIES,
    LATENT,
    Draws,
    LinearGuide,
    LinearModel,
    gradient_of,
    linear_data,
    linear_pair,
    repeat,
    z_scores,
)

from pyro_vae import ELBO, IWAE, MIWAE
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.objectives import importance
from pyro_vae.objectives.importance import _without_negligible

BOUND = 4.5


def log_weights(model: LinearModel, guide: LinearGuide, x: Tensor, z: Tensor) -> np.ndarray:
    """log p(x, z) - log q(z|x) by scipy, `(draws, data)`."""
    with torch.no_grad():
        mean_x = (z @ model.weight.T + model.bias).numpy()
        mean_z = (x @ guide.weight.T + guide.bias).numpy()
    x, z = x.numpy(), z.numpy()
    log_p = norm.logpdf(z).sum(-1) + norm.logpdf(x, mean_x, model.log_sigma.exp().item()).sum(-1)
    return log_p - norm.logpdf(z, mean_z, guide.log_scale.exp().detach().numpy()).sum(-1)


def test_what_weighs_nothing_makes_no_denormal_numbers():
    """Of draws some of which weigh as little as e^-90, in float32, beside the softmax by scipy."""
    values = [0.0, -20.0, -45.0, -50.0, -90.0, -0.5]
    log_w = torch.tensor(values, dtype=torch.float32)[None, :, None].requires_grad_()
    _without_negligible(log_w).logsumexp(1).sum().backward()
    assert log_w.grad is not None
    got, expected = log_w.grad.flatten().numpy(), softmax(values)
    nothing = [False, False, False, True, True, False]
    np.testing.assert_array_equal(got[nothing], 0.0)
    np.testing.assert_allclose(got[~np.array(nothing)], expected[~np.array(nothing)], rtol=1e-5)


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
def test_leaving_them_out_changes_no_gradient(gradient, monkeypatch):
    """What float32 leaves out, in float64, of a guide too wide by far; beside nothing left out, and
    too much."""
    x = linear_data()
    model, guide = linear_pair()
    with torch.no_grad():
        guide.log_scale += 1.0

    left_out = []

    def counted(log_w: Tensor) -> Tensor:
        found = _without_negligible(log_w)
        left_out.append(int(found.isinf().sum()))
        return found

    monkeypatch.setattr(importance, "_without_negligible", counted)

    def gradient_at(ratio: float) -> Tensor:
        monkeypatch.setattr(importance, "_negligible", lambda values: ratio)
        pyro.set_rng_seed(1)
        loss = IWAE(20, gradient, max_plate_nesting=1).differentiable_loss(model, guide, x)
        return gradient_of(loss, model, guide)

    whole = gradient_at(1e-300)
    left = gradient_at(torch.finfo(torch.float32).eps ** 3)
    assert left_out[0] == 0 < left_out[-1]
    torch.testing.assert_close(left, whole, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient_at(0.5), whole, rtol=1e-3)


def test_squares_leave_out_what_is_nothing_and_keep_what_is_not_finite():
    w = torch.tensor([[0.7, 0.3, 1e-9, 1e-20], [math.nan] * 4], dtype=torch.float32)
    found = importance._squared(w.T[None])[0].T
    expected = torch.tensor([[0.49, 0.09, 1e-18, 0.0], [math.nan] * 4], dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_weights_that_are_not_finite_stay_so():
    log_w = torch.tensor([[-math.inf, -math.inf], [0.0, math.inf], [math.nan, 1.0], [-math.inf, 2]])
    left = _without_negligible(log_w.T[None])[0].T
    torch.testing.assert_close(left[2:], log_w[2:], equal_nan=True)
    expected = log_w.logsumexp(1)
    torch.testing.assert_close(left.logsumexp(1), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("num_particles", "num_estimates"), [(1, 1), (5, 1), (5, 3), (1, 4)])
@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
def test_value_is_scipys_logsumexp_on_the_same_draws(num_particles, num_estimates, gradient):
    x = linear_data()
    model, guide = linear_pair()
    objective = MIWAE(num_particles, num_estimates, gradient)
    objective.max_plate_nesting = 1  # no other run than the one whose draws are recorded
    with Draws() as draws:
        terms = objective.terms(model, guide, x)
    z = draws.values["z"][0].reshape(num_estimates * num_particles, len(x), LATENT)
    log_w = log_weights(model, guide, x, z).reshape(num_estimates, num_particles, len(x))
    bound = (logsumexp(log_w, axis=1) - math.log(num_particles)).mean(0)
    assert -terms.loss.item() == pytest.approx(bound.sum(), rel=1e-12)
    elbo = log_w.mean((0, 1)).sum()
    assert (terms.reconstruction - terms.kl).item() == pytest.approx(elbo, rel=1e-12)


def test_the_kl_by_dimension_is_that_of_the_same_draws():
    x = linear_data()
    model, guide = linear_pair()
    for gradient in ("standard", "stl", "dreg"):
        with Draws() as draws:
            terms = MIWAE(3, 2, gradient, max_plate_nesting=1).terms(model, guide, x)
        z = draws.values["z"][0].numpy()
        loc = (x @ guide.weight.T + guide.bias).detach().numpy()
        log_q = norm.logpdf(z, loc, guide.log_scale.exp().detach().numpy())
        expected = (log_q - norm.logpdf(z)).mean(0).sum(0)
        np.testing.assert_allclose(terms.kl_per_dimension["z"], expected, rtol=1e-12)
        assert terms.kl.item() == pytest.approx(expected.sum())
        assert terms.estimators == {"z": "monte_carlo"}


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_program_may_be_frozen(gradient, frozen):
    pair = linear_pair()
    x = linear_data()
    gradients = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        loss = IWAE(3, gradient).differentiable_loss(*pair, x)
        gradients.append(gradient_of(loss, pair[1 - frozen]))
        pair[frozen].requires_grad_(False)
    torch.testing.assert_close(*gradients)


def test_one_particle_is_the_elbo():
    x = linear_data()
    pair = linear_pair()
    losses = []
    for objective in (ELBO(kl="monte_carlo"), IWAE(1)):
        pyro.set_rng_seed(5)
        losses.append(objective.loss(*pair, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_many_particles_approach_log_evidence():
    x = linear_data()
    model, guide = linear_pair()
    with torch.no_grad():
        guide.log_scale += 0.4  # wider than the posterior: weights of finite variance
    num_particles = 100_000
    objective = IWAE(num_particles, max_plate_nesting=1)
    with Draws() as draws:
        bound = -objective.loss(model, guide, x)
    weights = np.exp(log_weights(model, guide, x, draws.values["z"][0]))
    error = np.sqrt((weights.var(0) / weights.mean(0) ** 2).sum() / num_particles)
    assert error < 0.05
    assert abs(bound - model.log_evidence(x).sum()) < 4 * error
    assert abs(-IWAE(3).loss(model, guide, x) - model.log_evidence(x).sum()) > 4 * error


def test_any_number_is_exact_where_the_guide_is_the_posterior():
    x = linear_data()
    model, guide = linear_pair(exact=True)
    for gradient in ("standard", "stl", "dreg"):
        loss = MIWAE(4, 2, gradient).differentiable_loss(model, guide, x)
        assert -loss.item() == pytest.approx(model.log_evidence(x).sum(), rel=1e-12)
        still = gradient_of(loss, guide).abs().max() < 1e-10
        assert still == (gradient != "standard")


# --- gradients, against quadrature -------------------------------------------------------------


class ScalarModel(nn.Module):
    """x ~ N(w z + b, e^t), z ~ N(0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.3, 0.2, -0.3]))

    def forward(self, x: Tensor) -> None:
        w, b, t = self.theta
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w * z + b, t.exp()), obs=x)


class ScalarGuide(nn.Module):
    """z ~ N(a x + c, e^s)."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([0.2, 0.3, 0.1]))

    def forward(self, x: Tensor) -> None:
        a, c, s = self.phi
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + c, s.exp()))


def quadrature_iwae2(model: ScalarModel, guide: ScalarGuide, x: Tensor) -> Tensor:
    """E[log (w_1 + w_2) / 2] by Gauss-Hermite over both draws, summed over x; differentiable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    e, weight = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    (w, b, t), (a, c, s) = model.theta, guide.phi
    z = a * x[:, None] + c + s.exp() * e
    log_w = (
        -0.5 * z**2
        - 0.5 * ((x[:, None] - w * z - b) / t.exp()) ** 2 - t - 0.5 * math.log(2 * math.pi)
        + 0.5 * e**2 + s
    )  # fmt: skip
    pairs = torch.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
    return (pairs * weight[:, None] * weight).sum()


@pytest.mark.parametrize("gradient", ["standard", "dreg", "stl"])
@pytest.mark.parametrize("num_estimates", [1, 3])
def test_gradient_has_that_of_the_quadrature_as_expectation(gradient, num_estimates):
    x = torch.tensor([1.5, -0.7])
    model, guide = ScalarModel(), ScalarGuide()
    expected = -quadrature_iwae2(model, guide, x)
    truth = torch.cat([expected.reshape(1), gradient_of(expected, model, guide)]).detach()
    objective = MIWAE(2, num_estimates, gradient)
    copies = x.repeat(COPIES)

    def draw() -> Tensor:
        loss = objective.differentiable_loss(model, guide, copies)
        return torch.cat([loss.detach().reshape(1), gradient_of(loss, model, guide)])

    z = z_scores(repeat(draw, 300 if gradient == "stl" else 160), COPIES * truth).abs()
    assert z[:4].max() < BOUND  # the value, and the model's part
    if gradient == "stl":
        assert z[4:].max() > 8  # the documented bias
    else:
        assert z[4:].max() < BOUND


def chain_pair() -> tuple[nn.Module, nn.Module]:
    class Model(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                top = pyro.sample("top", dist.Normal(0.0, 1.0))
                low = pyro.sample("low", dist.Normal(1.5 * top, 0.5))
                pyro.sample("x", dist.Normal(low, 0.7), obs=x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = nn.Parameter(torch.tensor([0.7, -0.2, 0.5, -0.6]))

        def forward(self, x):
            a, s, b, t = self.phi
            with pyro.plate("data", len(x)):
                low = pyro.sample("low", dist.Normal(a * x, s.exp()))
                pyro.sample("top", dist.Normal(b * low, t.exp()))

    return Model(), Guide()


@pytest.mark.parametrize("objective", [IWAE, ELBO])
def test_path_derivatives_follow_a_chain_of_latents(objective):
    x = torch.tensor([1.5, -0.7]).repeat(COPIES)
    model, guide = chain_pair()
    if objective is IWAE:
        plain, path = IWAE(4), IWAE(4, "dreg")
    else:
        plain, path = ELBO("monte_carlo"), ELBO("monte_carlo", gradient="stl")

    def slope(which) -> Tensor:
        return gradient_of(which.differentiable_loss(model, guide, x), guide)

    reference = repeat(lambda: slope(plain), 160)
    ours = repeat(lambda: slope(path), 80, seed=1)
    error = (ours.var(0) / len(ours) + reference.var(0) / len(reference)).sqrt()
    assert ((ours.mean(0) - reference.mean(0)) / error).abs().max() < BOUND
    assert (ours.var(0) < reference.var(0)).all()


# --- plates, scales, masks ---------------------------------------------------------------------


class Subsampled(nn.Module):
    """A linear program that takes two rows of six; Pyro makes the model follow the guide."""

    def __init__(self, program: LinearModel | LinearGuide) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, rows: Tensor | None) -> None:
        with pyro.plate("data", 6, subsample_size=2, subsample=rows, dim=-1) as taken:
            pass
        self.program(x, 6, taken, name="rows")


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), None])
def test_the_scale_of_a_subsample_multiplies_the_logarithm(gradient, rows):
    x = linear_data(6)
    model, guide = linear_pair(exact=True)
    with Draws() as draws:
        pair = Subsampled(model), Subsampled(guide)
        loss = IWAE(3, gradient, max_plate_nesting=1).differentiable_loss(*pair, x, rows)
    first, *others = draws.values["data"]
    assert all(torch.equal(first, other) for other in others)
    assert -loss.item() == pytest.approx(3 * model.log_evidence(x[first]).sum())
    still = gradient_of(loss, guide).abs().max() < 1e-10
    assert still == (gradient != "standard")


def test_masks_and_scales_that_all_sites_share():
    x = linear_data(6)
    model, guide = linear_pair(exact=True)
    evidence = model.log_evidence(x)
    mask = torch.tensor([True, False, True, True, False, True])
    by_row = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1])
    for wrap, weight in (
        (lambda p: poutine.mask(p, mask=mask), mask.numpy()),
        (lambda p: poutine.scale(p, scale=0.25), np.full(6, 0.25)),
        (lambda p: poutine.scale(p, scale=by_row), by_row.numpy()),
    ):
        loss = MIWAE(3, 2).loss(wrap(model), wrap(guide), x)
        assert -loss == pytest.approx((weight * evidence).sum())


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
def test_data_that_are_masked_leave_the_prior_over_the_guide(gradient):
    """A mask of the observed site alone: of those data the weights are p(z) / q(z)."""
    x = linear_data()
    model, guide = linear_pair()
    keep = torch.tensor([True, False, True, False])

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
                fn = dist.Normal(z @ model.weight.T + model.bias, model.log_sigma.exp())
                with poutine.mask(mask=keep):
                    pyro.sample("x", fn.to_event(1), obs=x)

    objective = IWAE(5, gradient, max_plate_nesting=1)
    with Draws() as draws:
        loss = objective.differentiable_loss(Masked(), guide, x)
    z = draws.values["z"][0]
    with torch.no_grad():
        mean = (z @ model.weight.T + model.bias).numpy()
    log_px = norm.logpdf(x.numpy(), mean, model.log_sigma.exp().item()).sum(-1)
    log_w = log_weights(model, guide, x, z) - np.where(keep, 0.0, log_px)
    assert -loss.item() == pytest.approx((logsumexp(log_w, axis=0) - math.log(5)).sum())
    assert gradient_of(loss, guide).isfinite().all()


def pixels_model(x: Tensor) -> None:
    """One latent a datum, several values of it: the plates are nested, and "data" is the outer."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def pixels_guide(x: Tensor) -> None:
    """The posterior."""
    precision = 1 + x.shape[1]
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / precision, precision**-0.5))


@pytest.mark.parametrize("gradient", ["standard", "stl", "dreg"])
def test_scales_and_masks_of_data_in_an_outer_plate(gradient):
    x = linear_data()
    covariance = np.eye(3) + np.ones((3, 3))
    evidence = multivariate_normal(np.zeros(3), covariance).logpdf(x)
    by_row = torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    keep = torch.tensor([[True], [False], [True], [True]])
    for wrap, weight in (
        (lambda p: p, torch.ones(4, 1)),
        (lambda p: poutine.scale(p, scale=by_row), by_row),
        (lambda p: poutine.mask(p, mask=keep), keep),
    ):
        pair = wrap(pixels_model), wrap(pixels_guide)
        loss = MIWAE(3, 2, gradient).differentiable_loss(*pair, x)
        assert -loss.item() == pytest.approx((weight[:, 0].numpy() * evidence).sum())


def test_a_scale_that_differs_within_a_datum_is_refused():
    by_pixel = torch.tensor([1.0, 2.0, 0.5])
    pair = (poutine.scale(p, scale=by_pixel) for p in (pixels_model, pixels_guide))
    with pytest.raises(SiteError, match=r"shape \(3,\), differs within a datum"):
        IWAE(3).loss(*pair, linear_data())


def test_differing_scales_are_refused():
    model, guide = linear_pair()
    with pytest.raises(SiteError, match="carry different scales"):
        IWAE(3).loss(poutine.scale(model, scale=0.5), guide, linear_data())


def global_pair(subsample_size: int | None):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])

    def guide(x):
        pyro.sample("mu", dist.Normal(0.3, 0.5))

    return model, guide


def test_global_latents_have_joint_weights_and_no_subsample():
    x = torch.tensor([0.3, 0.9, -0.4])
    with Draws() as draws:
        loss = IWAE(5, max_plate_nesting=1).loss(*global_pair(None), x)
    mu = draws.values["mu"][0].numpy().reshape(5, 1)
    log_p = norm.logpdf(mu[:, 0]) + norm.logpdf(x.numpy(), mu).sum(1)
    log_w = log_p - norm.logpdf(mu[:, 0], 0.3, 0.5)
    assert -loss == pytest.approx(logsumexp(log_w) - math.log(5))
    with pytest.raises(SiteError, match=r'plate "data" at site "x" is subsampled.*global'):
        IWAE(5).loss(*global_pair(2), x)


def test_a_deterministic_site_does_not_join_the_weights():
    model, guide = linear_pair()
    x = linear_data()

    def with_remark(x):
        pyro.deterministic("remark", torch.tensor(1.0))
        model(x)

    losses = []
    for program in (model, with_remark):
        pyro.set_rng_seed(2)
        losses.append(IWAE(4).loss(program, guide, x))
    assert losses[0] == losses[1]


def test_autonormal():
    x = linear_data()
    model, posterior = linear_pair(exact=True)
    guide = AutoNormal(model)
    guide(x)
    with torch.no_grad():
        guide.locs.z = x @ posterior.weight.T + posterior.bias
        guide.scales.z = posterior.log_scale.exp().expand(len(x), LATENT)
    loss = IWAE(3, "dreg").differentiable_loss(model, guide, x)
    assert -loss.item() == pytest.approx(model.log_evidence(x).sum())
    assert gradient_of(loss, guide).abs().max() < 1e-10


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_a_discrete_latent_whose_guide_does_not_learn(gradient):
    """It is a constant of the path derivatives; the weights of the draws are scipy's."""
    x = torch.tensor([0.4, -1.0])

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([0.3, -0.2]))

        def forward(self, x):
            with pyro.plate("data", 2):
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])))
                pyro.sample("z", dist.Normal(self.loc + k, 1.0))

    def model(x):
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
            z = pyro.sample("z", dist.Normal(k.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Guide()
    objective = IWAE(4, gradient, max_plate_nesting=1)
    with Draws() as draws:
        loss = objective.differentiable_loss(model, guide, x)
    k, z = (draws.values[name][0].numpy() for name in ("k", "z"))
    log_w = np.log(np.where(k == 1, 0.6 / 0.3, 0.4 / 0.7)) + norm.logpdf(z, k)
    log_w += norm.logpdf(x.numpy(), z) - norm.logpdf(z, guide.loc.detach().numpy() + k)
    assert -loss.item() == pytest.approx((logsumexp(log_w, axis=0) - math.log(4)).sum())
    # d log w / dz at fixed k, by each weight squared for dreg and once for stl
    slope = (x.numpy() - z) + (k - z) + (z - guide.loc.detach().numpy() - k)
    share = np.exp(log_w - logsumexp(log_w, axis=0)) ** (2 if gradient == "dreg" else 1)
    np.testing.assert_allclose(-gradient_of(loss, guide), (share * slope).sum(0))


def test_a_model_that_observes_nothing_has_no_reconstruction():
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for gradient in ("standard", "stl", "dreg"):
        terms = MIWAE(3, 2, gradient).terms(program, program, torch.zeros(4))
        assert terms.loss == terms.reconstruction == terms.kl == 0


def test_two_subsampled_plates_that_all_sites_are_in():
    """Their scales multiply, and the logarithm; the guide is the posterior, so nothing varies."""
    x = torch.randn(4, 5)
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])

    def plates():
        return (
            pyro.plate("rows", 4, subsample=rows, dim=-2),
            pyro.plate("columns", 5, subsample=columns, dim=-1),
        )

    def model():
        over_rows, over_columns = plates()
        with over_rows as i, over_columns as j:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i][:, j])

    def guide():
        over_rows, over_columns = plates()
        with over_rows as i, over_columns as j:
            pyro.sample("z", dist.Normal(x[i][:, j] / 2, 0.5**0.5))

    evidence = 4 / 2 * 5 / 3 * norm(0, 2**0.5).logpdf(x[rows][:, columns])
    by_column = torch.tensor([1.0, 2.0, 0.5])
    scaled = [poutine.scale(p, scale=by_column) for p in (model, guide)]
    for objective in (ELBO("monte_carlo"), IWAE(3), IWAE(3, "dreg"), MIWAE(2, 2, "stl")):
        assert -objective.loss(model, guide) == pytest.approx(evidence.sum())
        assert -objective.loss(*scaled) == pytest.approx((by_column.numpy() * evidence).sum())


def test_two_plates_in_one_dimension_are_not_the_same_data():
    """No plate holds all sites, so the weights are of everything together."""
    x = {"a": torch.tensor([0.3, 0.9]), "b": torch.tensor([-0.4, 1.2])}

    def model():
        for name, observed in x.items():
            with pyro.plate(name, 2, dim=-1):
                z = pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=observed)

    def guide():
        for name in x:
            with pyro.plate(name, 2, dim=-1):
                pyro.sample(f"z_{name}", dist.Normal(0.2, 0.8))

    with Draws() as draws:
        loss = IWAE(3, max_plate_nesting=1).loss(model, guide)
    log_w = np.zeros(3)
    for name, observed in x.items():
        z = draws.values[f"z_{name}"][0].numpy()
        log_w += (norm.logpdf(z) + norm.logpdf(observed, z) - norm.logpdf(z, 0.2, 0.8)).sum(1)
    assert -loss == pytest.approx(logsumexp(log_w) - math.log(3))


def test_a_guide_that_draws_all_data_at_once_has_joint_weights():
    x = torch.tensor([0.3, 0.9, -0.4])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoMultivariateNormal(model)
    guide(x)
    with Draws() as draws:
        loss = IWAE(5, max_plate_nesting=1).loss(model, guide, x)
    z = draws.values["z"][0].numpy().reshape(5, 3)
    factor = (guide.scale[:, None] * guide.scale_tril).detach().numpy()
    log_q = multivariate_normal(guide.loc.detach().numpy(), factor @ factor.T).logpdf(z)
    log_w = (norm.logpdf(z) + norm.logpdf(x.numpy(), z)).sum(1) - log_q
    assert -loss == pytest.approx(logsumexp(log_w) - math.log(5))


def test_too_small_a_plate_nesting_is_refused():
    model, guide = linear_pair()
    with pytest.raises(ConfigError, match=r'plate "data" at site "z" is in dimension -1'):
        IWAE(1, max_plate_nesting=0).loss(model, guide, linear_data())


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (2.5, 1), (2, 1.5), (2, 1, "reinforce")])
def test_options_that_mean_nothing(arguments):
    with pytest.raises(ConfigError):
        MIWAE(*arguments)
