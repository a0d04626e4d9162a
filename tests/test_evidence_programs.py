"""log_marginal on programs of many shapes: right where it can be, refused with a name where not."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import programs
from pyro_vae.errors import ConfigError, NonFiniteError, ShapeError, SiteError
from pyro_vae.evidence import Annealing
from pyro_vae.evidence.ground import undisturbed
from pyro_vae.evidence.target import Target

SHORT = Annealing(chains=4, temperatures=5, leapfrogs=2)


def model(x: Tensor) -> None:
    """x ~ N(0, 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def exact(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 2**0.5).log_prob(x)


def is_right(found: pv.Evidence, log_px: Tensor) -> bool:
    """No datum is off by more than 4.5 of its standard errors: 1 in 150,000 for each."""
    return bool((abs(found.log_px - log_px.numpy()) < 4.5 * found.se + 1e-9).all())


# ---- plates and arguments


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("others", [2, 3])
def test_a_plate_as_long_as_the_data_is_not_taken_for_theirs(rows: int, others: int) -> None:
    def two(x: Tensor) -> None:
        with pyro.plate("features", others, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("features", others, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, 0.8))

    x = torch.randn(rows, others)
    assert is_right(pv.log_marginal(two, guide, x, num_samples=500), exact(x).sum(1))


def test_an_argument_shared_by_all_rows_stays_so_when_some_are_escalated() -> None:
    """Four rows are annealed, and the shared argument happens to have four values."""

    def shifted(x: Tensor, shift: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift.sum(), 1.0).to_event(1), obs=x)

    def astray(x: Tensor, shift: Tensor) -> None:
        far = x[:, :1] > 1
        with pyro.plate("data", len(x)):
            loc = (x - shift.sum()) / 2 + 2.5 * far
            pyro.sample("z", dist.Normal(loc, torch.where(far, 0.2, 0.75)).to_event(1))

    x = torch.cat([torch.randn(9, 3).clamp_max(0.9), 1.5 + torch.rand(4, 3)])
    found = pv.log_marginal(
        shifted, astray, x, torch.full((4,), 0.25), method="auto", num_samples=1000,
        annealing=Annealing(16, 60, 3), chunk_bytes=30_000,
    )  # fmt: skip
    assert (found.method == "ais").tolist() == [False] * 9 + [True] * 4
    assert is_right(found, exact(x - 1).sum(1))


def test_pixels_in_a_plate_are_summed_in_double_precision() -> None:
    """Constant weights: whatever is missing is rounding, at 15,000 nats."""

    def pixels(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("pixels", 5000, dim=-1):
                pyro.sample("x", dist.Normal(torch.zeros((), dtype=x.dtype), 0.02), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))

    x = (0.02 * torch.randn(4, 5000)).float()
    found = pv.log_marginal(pixels, prior, x, num_samples=3, defensive=0)
    scale = float(torch.tensor(0.02).float())
    expected = scipy.stats.norm(0, scale).logpdf(x.double().numpy()).sum(1)
    np.testing.assert_allclose(found.log_px, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["is", "grid", "ais"])
def test_data_of_whole_numbers(method: str) -> None:
    """Draws and grids are real numbers all the same."""

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(20, logits=z), obs=x)

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(((x + 1) / (21 - x)).log(), 0.35))

    x = torch.tensor([0, 3, 10, 18])

    def density(z: float, n: int) -> float:
        return scipy.stats.norm.pdf(z) * scipy.stats.binom.pmf(n, 20, scipy.special.expit(z))

    expected = [math.log(scipy.integrate.quad(density, -9, 9, (n,))[0]) for n in x.tolist()]
    found = pv.log_marginal(
        counts, narrow, x.repeat(50), method=method, num_samples=400,
        annealing=Annealing(16, 10, 3), defensive=0.3,
    )  # fmt: skip
    error = (found.log_px_jackknife - np.tile(expected, 50)).reshape(50, 4)
    if method == "grid":
        assert abs(error).max() < 1e-6
    else:
        assert (abs(error.mean(0)) < 4.5 * error.std(0) / math.sqrt(50)).all()


# ---- latent variables with bounds


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(z.sqrt(), 1.0), obs=x)


@pytest.mark.parametrize("method", ["is", "grid", "ais"])
def test_draws_that_the_prior_cannot_make_weigh_nothing(method: str) -> None:
    """A Normal guide of a Gamma: below zero its density is NaN, and so is that of x."""
    x = torch.tensor([-0.5, 0.3, 2.0]).repeat(40)
    found = pv.log_marginal(
        positive, guide, x, method=method, num_samples=500, annealing=Annealing(8, 20, 3)
    )

    def density(z: float, x: float) -> float:
        return scipy.stats.gamma.pdf(z, 2, scale=0.5) * scipy.stats.norm.pdf(x, math.sqrt(z))

    expected = [math.log(scipy.integrate.quad(density, 0, 30, (v,))[0]) for v in x[:3].tolist()]
    ratio = np.exp(found.log_px - np.tile(expected, 40)).reshape(40, 3)
    if method == "grid":
        np.testing.assert_allclose(ratio, 1, atol=2e-3)  # the density has a corner at zero
    else:
        assert (abs(ratio.mean(0) - 1) < 4.5 * ratio.std(0) / math.sqrt(40)).all()


def test_a_guide_of_the_transformed_posterior_is_exact() -> None:
    """Dirichlet and categories, Beta and coins, one draw each: the guide is the posterior."""
    prior = torch.tensor([1.0, 2.0, 3.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(prior))
            r = pyro.sample("r", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Categorical(p), obs=x)
            pyro.sample("y", dist.Bernoulli(r), obs=(x > 0).double())

    def guide(x: Tensor) -> None:
        y = (x > 0).double()
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Dirichlet(prior + nn.functional.one_hot(x, 3)))
            pyro.sample("r", dist.Beta(2 + y, 4 - y))

    x = torch.tensor([0, 1, 2, 1])
    expected = (prior / 6)[x].log() + torch.where(x > 0, 0.4, 0.6).log()
    found = pv.log_marginal(model, guide, x, num_samples=1)
    np.testing.assert_allclose(found.log_px, expected, atol=1e-10)


# ---- guides


def with_rows(x: Tensor, rows: Tensor) -> None:
    with pyro.plate("data", 6, subsample=rows):
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_an_autoguide_that_is_told_its_rows() -> None:
    x, rows = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.7]), torch.arange(6)

    def plate(x: Tensor, rows: Tensor) -> pyro.plate:
        return pyro.plate("data", 6, subsample=rows)

    start = init_to_value(values={"z": torch.full((6,), 0.7)})
    auto = AutoNormal(with_rows, init_loc_fn=start, init_scale=1.0, create_plates=plate)
    with pytest.raises(ConfigError, match="AutoNormal has no parameters yet"):
        pv.log_marginal(with_rows, auto, x, rows)
    assert auto.prototype_trace is None, "an evaluation sets up no guide"
    auto(x, rows)
    found = pv.log_marginal(with_rows, auto, x, rows, num_samples=2000)

    def density(z: float, x: float) -> float:
        return scipy.stats.gamma.pdf(z, 2, scale=0.5) * scipy.stats.norm.pdf(x, z)

    expected = [math.log(scipy.integrate.quad(density, 0, 30, (v,))[0]) for v in x.tolist()]
    assert is_right(found, torch.tensor(expected))


def test_guides_that_cannot_be_weighed_name_the_site() -> None:
    x = torch.randn(6)

    def fails(error: type, match: str, guide: Callable, model: Callable = model) -> None:
        with pytest.raises(error, match=match):
            pv.log_marginal(model, guide, x, num_samples=10)

    def more(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(a + x / 2, 1.0))

    fails(SiteError, r'draws "a", which is no latent site of the model', more)

    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    fails(SiteError, r'"z" is a point mass \(Delta\)', point)
    for kind in (AutoNormal, AutoDelta):
        (auto := kind(model))(x)
        fails(ShapeError, r"plates of sizes \{'data': 6\}, none of which is the 3 rows", auto)


def test_what_a_guide_draws_on_the_way_is_marked_auxiliary() -> None:
    def skewed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x / 3, 0.9), infer={"is_auxiliary": True})
            log_det = (3 * u.square() / 10 + 1).log()
            pyro.sample("z", dist.Delta(u + u**3 / 10, log_density=-log_det))

    x = torch.randn(20)
    assert is_right(pv.log_marginal(model, skewed, x, num_samples=1000), exact(x))


def test_a_factor_of_the_guide_is_part_of_its_density() -> None:
    def skewed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x / 3, 0.9), infer={"is_auxiliary": True})
            pyro.factor("jacobian", -(3 * u.square() / 10 + 1).log(), has_rsample=True)
            pyro.sample("z", dist.Delta(u + u**3 / 10))

    x = torch.randn(20)
    assert is_right(pv.log_marginal(model, skewed, x, num_samples=1000), exact(x))


# ---- what makes a row's density depend on more than the row


class Held:
    """No module, but it holds some: in attributes, lists and dictionaries."""

    def __init__(self, layer: nn.Module) -> None:
        self.parts = {"layers": [layer]}

    def __call__(self, x: Tensor) -> None:
        (layer,) = self.parts["layers"]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            flat = layer(z.reshape(-1, 2)).reshape(z.shape)
            pyro.sample("x", dist.Normal(flat, 1.0).to_event(1), obs=x)

    def model(self, x: Tensor) -> None:
        self(x)


def pairs_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))


@pytest.mark.parametrize(
    "make", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(2, eps=0)], ids=["dropout", "norm"]
)
@pytest.mark.parametrize("way", ["method", "object", "closure"])
def test_modules_are_found_wherever_a_program_keeps_them(
    make: Callable[[], nn.Module], way: str
) -> None:
    """Where training mode is left on, the density is not that of x ~ N(0, 2)."""
    layer = make().train()
    held = Held(layer)

    def within(x: Tensor) -> None:
        [held(part) for part in [x]]

    program = {"method": held.model, "object": held, "closure": within}[way]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 2)
    found = pv.log_marginal(program, pairs_guide, x, num_samples=1, defensive=0)
    np.testing.assert_allclose(found.log_px, exact(x).sum(1), atol=1e-12)
    assert layer.training
    assert all((value == before[name]).all() for name, value in layer.state_dict().items())


def test_functions_of_libraries_are_not_searched() -> None:
    """One that a program imports may reach all of torch."""
    layer = nn.Linear(2, 2)
    scaled = pyro.poutine.scale(Held(layer).model, 2.0)
    assert programs.modules_of(scaled, torch.nn.functional.dropout, pyro.sample) == [layer]


def test_densities_that_depend_on_more_than_the_row_are_refused() -> None:
    def always(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = nn.functional.dropout(z)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def coupled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z - z.mean(-2, keepdim=True), 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    with pytest.raises(SiteError, match=r'site "x" is another at every run: is there dropout'):
        pv.log_marginal(always, pairs_guide, x)
    with pytest.raises(SiteError, match=r'site "x" changes with the rows beside it'):
        pv.log_marginal(coupled, pairs_guide, x)


def test_a_site_observed_for_some_data_only_is_refused() -> None:
    def partly(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if (x < 9).all() else None)

    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    with pytest.raises(SiteError, match=r"\['x'\] are observed for some data and latent for"):
        pv.log_marginal(partly, guide, x, num_samples=10)


# ---- NaN


@pytest.mark.parametrize("method", ["is", "ais", "grid", "auto"])
def test_nan_is_an_error_whatever_the_method(method: str) -> None:
    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(x > 9, math.nan, z), 1.0), obs=x)

    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    with pytest.raises(NonFiniteError, match="log weights of row 4 are NaN"):
        pv.log_marginal(broken, guide, x, method=method, num_samples=300, annealing=SHORT)


def test_nan_is_an_error_of_enumeration_too() -> None:
    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(torch.where(x > 9, math.nan, c), 1.0), obs=x)

    with pytest.raises(NonFiniteError, match="row 1 are NaN"):
        pv.log_marginal(broken, guide, torch.tensor([0.0, 10.0]), method="enumerate")


# ---- memory


def test_memory_a_pair_is_what_one_more_pair_takes() -> None:
    """Not what is computed once for all of them, such as the pseudo-inputs of a VampPrior."""

    def model(x: Tensor) -> None:
        table = torch.ones(1000, 1000).exp().mean()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            loc = z.mean(-1, keepdim=True).expand(*z.shape[:-1], 50) * table
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :4], 1.0).to_event(1))

    x = torch.randn(3, 50)
    with undisturbed(model, guide):
        target = Target(model, guide, x)
    # up to four intermediate results of 50 doubles each
    assert 50 * 8 <= target.bytes_per_pair <= 4 * 50 * 8
