"""Every likelihood against scipy, mpmath, numerical integration, and R's count regressions."""

from functools import partial

import mpmath
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from scipy.integrate import quad
from torch import nn

import pyro_vae as pv
from pyro_vae import distributions as D
from pyro_vae import likelihoods as L
from pyro_vae.errors import ConfigError, DataError, ShapeError, SupportError

RAW = nn.Identity()  # a decoder that hands its input on: z is the network's outputs
FLOOR = 1e-3


def softplus(x):
    return np.logaddexp(0, x)


def start(initial=1.0):
    return np.log(np.expm1(initial - FLOOR))


def expit(x):
    return 1 / (1 + np.exp(-x))


def log_bin(x, loc, scale):
    lower = x - 0.125 if x > 0 else -np.inf
    upper = x + 0.125 if x < 1 else np.inf
    if x > loc:  # the tail that does not cancel
        lower, upper, loc = -upper, -lower, -loc
    return np.log(np.diff(st.logistic(loc, scale).cdf([lower, upper]))[0])


# name: how to make the likelihood, its log-density (or mass) at the raw outputs, values to try
CASES = {
    "bernoulli": (
        lambda: L.Bernoulli(RAW),
        lambda x, a: st.bernoulli(expit(a)).logpmf(x),
        [0.0, 1.0],
    ),
    "continuous bernoulli": (
        lambda: L.ContinuousBernoulli(RAW),
        # its density is that of an exponential of rate -a truncated to [0, 1]
        lambda x, a: st.truncexpon(b=abs(a), scale=1 / abs(a)).logpdf(x if a < 0 else 1 - x),
        [0.0, 0.3, 1.0],
    ),
    "normal": (
        lambda: L.Normal(RAW, 0.7),
        lambda x, a: st.norm(a, 0.7).logpdf(x),
        [-1.0, 0.0, 2.5],
    ),
    "normal learned": (
        lambda: L.Normal(RAW),
        lambda x, a: st.norm(a, 1.0).logpdf(x),
        [-1.0, 0.0, 2.5],
    ),
    "normal predicted": (
        lambda: L.Normal(RAW, "predicted"),
        lambda x, a, b: st.norm(a, FLOOR + softplus(start() + b)).logpdf(x),
        [-1.0, 0.0, 2.5],
    ),
    "laplace": (
        lambda: L.Laplace(RAW, 0.7),
        lambda x, a: st.laplace(a, 0.7).logpdf(x),
        [-1.0, 2.5],
    ),
    "student": (
        lambda: L.StudentT(RAW, "predicted", df=3),
        lambda x, a, b: st.t(3, a, FLOOR + softplus(start() + b)).logpdf(x),
        [-10.0, 0.0, 2.5],
    ),
    "student of 30": (
        lambda: L.StudentT(RAW, 0.7, df=30.0),
        lambda x, a: st.t(30, a, 0.7).logpdf(x),
        [-1.0, 2.5],
    ),
    "binomial": (
        lambda: L.Binomial(RAW, 7),
        lambda x, a: st.binom(7, expit(a)).logpmf(x),
        [0.0, 3.0, 7.0],
    ),
    "categorical": (
        lambda: L.Categorical(RAW, 3),
        lambda x, *a: np.log(np.exp(a[int(x)]) / np.exp(a).sum()),
        [0.0, 1.0, 2.0],
    ),
    "discretized logistic": (
        lambda: L.DiscretizedLogistic(RAW, "predicted", levels=5),
        lambda x, a, b: log_bin(x, a, FLOOR + softplus(start(0.1) + b)),
        [0.0, 0.25, 1.0],
    ),
    "poisson": (
        lambda: L.Poisson(RAW),
        lambda x, a: st.poisson(np.exp(a)).logpmf(x),
        [0.0, 1.0, 12.0],
    ),
    "negative binomial": (
        lambda: L.NegativeBinomial(RAW, 2.3),
        lambda x, a: st.nbinom(2.3, 2.3 / (2.3 + np.exp(a))).logpmf(x),
        [0.0, 1.0, 12.0],
    ),
    "negative binomial predicted": (
        lambda: L.NegativeBinomial(RAW, "predicted"),
        lambda x, a, b: nbinom(np.exp(a), FLOOR + softplus(start() + b)).logpmf(x),
        [0.0, 1.0, 12.0],
    ),
    "zero-inflated": (
        lambda: L.ZeroInflatedNegativeBinomial(RAW, 2.3),
        lambda x, a, g: np.log(
            expit(g) * (x == 0) + (1 - expit(g)) * nbinom(np.exp(a), 2.3).pmf(x)
        ),
        [0.0, 1.0, 12.0],
    ),
}
DISCRETE = {
    "bernoulli": [0, 1],
    "binomial": range(8),
    "categorical": range(3),
    "discretized logistic": [0, 0.25, 0.5, 0.75, 1],
    "poisson": range(300),
    "negative binomial": range(3000),
    "negative binomial predicted": range(3000),
    "zero-inflated": range(3000),
}
RANGE = {"continuous bernoulli": (0, 1)}


def nbinom(mean, theta):
    return st.nbinom(theta, theta / (theta + mean))


def raws(likelihood, rows=6):
    generator = torch.Generator().manual_seed(3)
    return 1.5 * torch.randn(rows, likelihood.outputs_per_feature, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_log_density_is_scipys(name):
    make, oracle, values = CASES[name]
    likelihood = make()
    for raw in raws(likelihood):
        for value in values:
            ours = likelihood(raw).log_prob(torch.tensor([value])).item()
            assert ours == pytest.approx(oracle(value, *raw.numpy()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_density_integrates_to_one_and_mean_is_its_first_moment(name):
    likelihood = CASES[name][0]()
    for raw in raws(likelihood, 3):
        p = likelihood(raw)

        def density(x, p=p):
            return p.log_prob(torch.tensor([float(x)])).exp().item()

        if name in DISCRETE:
            grid = torch.tensor([float(x) for x in DISCRETE[name]])
            mass = p.expand((len(grid),)).log_prob(grid.unsqueeze(-1)).exp()
            total, mean = mass.sum().item(), (mass * grid).sum().item()
        else:
            ends = RANGE.get(name, (-np.inf, np.inf))
            total = quad(density, *ends, epsabs=1e-10)[0]
            mean = quad(lambda x, f=density: x * f(x), *ends, epsabs=1e-10)[0]
        assert total == pytest.approx(1, abs=1e-7)
        assert p.mean.item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_mean_and_lie_in_the_support(name):
    likelihood = CASES[name][0]()
    p = likelihood(raws(likelihood, 1)[0])
    x = p.sample((20_000,)).double()
    likelihood.check(x)
    z = (x.mean() - p.mean) / (x.std() / len(x) ** 0.5)
    assert abs(z.item()) < 4.5  # odds 7e-6 a case


@pytest.mark.parametrize("name", CASES)
def test_draws_are_as_frequent_as_the_density_says(name):
    torch.manual_seed(1)
    make, oracle, values = CASES[name]
    likelihood = make()
    raw = raws(likelihood, 1)[0]
    x = likelihood(raw).sample((20_000,)).squeeze(-1)
    for value in values[:-1]:
        if name in DISCRETE:
            below = [v for v in DISCRETE[name] if v <= value]
            share = sum(np.exp(oracle(v, *raw.numpy())) for v in below)
        else:
            low = RANGE.get(name, (-np.inf,))[0]
            share = quad(lambda v: np.exp(oracle(v, *raw.numpy())), low, value)[0]
        error = (share * (1 - share) / len(x)) ** 0.5
        # 33 shares: odds of one beyond 4.5 are 2e-4
        assert abs((x <= value).double().mean().item() - share) <= 4.5 * error, value


@pytest.mark.parametrize("name", CASES)
def test_a_value_outside_the_support_has_no_density(name):
    likelihood = CASES[name][0]()
    outside = {"normal": np.nan, "laplace": np.nan, "student": np.nan}.get(name.split()[0], -0.5)
    p = likelihood(raws(likelihood, 1)[0])
    assert not p.support.check(torch.tensor([outside]))
    for q in (p, p.expand((2,))):
        with pytest.raises(ValueError, match="within the support"):
            q.log_prob(torch.tensor([outside]))


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_leading_dimensions(name):
    make, _, values = CASES[name]
    likelihood = make()
    raw = torch.randn(4, 2, 3, likelihood.outputs_per_feature * 5)
    p = likelihood(raw)
    assert p.batch_shape == (4, 2, 3)
    assert p.event_shape == p.mean.shape[-1:] == (5,)
    x = torch.full((3, 5), values[0])
    log_p = p.log_prob(x)
    assert log_p.shape == (4, 2, 3)
    torch.testing.assert_close(log_p[1, 1, 2], likelihood(raw[1, 1, 2]).log_prob(x[2]))
    expanded = likelihood(raw[0, 0]).expand((4, 2, 3))
    torch.testing.assert_close(expanded.log_prob(x)[3, 1], likelihood(raw[0, 0]).log_prob(x))
    assert expanded.sample().shape == (4, 2, 3, 5)


@pytest.mark.parametrize("name", CASES)
def test_bias_of_mean_makes_that_mean(name):
    if name == "categorical":
        pytest.skip("a mean does not tell the probabilities of the categories")
    likelihood = CASES[name][0]()
    target = torch.tensor([0.11, 0.5, 0.83])
    raw = torch.zeros(likelihood.outputs_per_feature, 3)
    raw[0] = likelihood.bias_of_mean(target)
    mean = likelihood(raw.flatten()).mean
    # a logistic cut off at 0 and 1 has a mean a little inside its location
    torch.testing.assert_close(mean, target, atol=0.08 if "logistic" in name else 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("likelihood", "mean", "least"),
    [
        (L.Bernoulli(RAW), [0.0, 1.0], [1e-3, 1 - 1e-3]),
        (L.ContinuousBernoulli(RAW), [0.0, 0.02, 0.98, 1.0], [0.01, 0.02, 0.98, 0.99]),
        (L.Binomial(RAW, 7), [0.0, 7.0], [7e-3, 7 - 7e-3]),
        (L.Poisson(RAW), [0.0, 2.0], [1e-3, 2.0]),
        (L.NegativeBinomial(RAW, 2.3), [0.0, 2.0], [1e-3, 2.0]),
        (L.Normal(RAW, 0.5, mean_activation=torch.sigmoid), [0.0, 0.3, 1.0], [1e-3, 0.3, 0.999]),
    ],
)
def test_a_mean_at_the_edge_makes_a_finite_bias(likelihood, mean, least):
    bias = likelihood.bias_of_mean(torch.tensor(mean))
    torch.testing.assert_close(likelihood(bias).mean, torch.tensor(least), rtol=1e-3, atol=1e-12)


def test_an_activation_bends_the_locations_and_not_the_scales():
    raw = torch.tensor([0.3, -2.0, 0.5, 1.5])
    p = L.Normal(RAW, "predicted", mean_activation=torch.sigmoid)(raw).base_dist
    np.testing.assert_allclose(p.loc, expit(raw[:2].numpy()))
    np.testing.assert_allclose(p.scale, FLOOR + softplus(start() + raw[2:].numpy()))
    # of any other activation the inverse is not known
    assert not L.Normal(RAW, mean_activation=torch.tanh).bias_of_mean(torch.rand(3)).any()


EXTREME = {
    "continuous bernoulli": (D.ContinuousBernoulli, [(a,) for a in (0, 1e-30, 500, -500, 1e6)]),
    "discretized logistic": (
        D.DiscretizedLogistic,
        [(0.5, 1e-3), (-50.0, 1e-3), (0.5, 1e6), (1e4, 0.1)],
    ),
    "poisson": (D.Poisson, [(-1e4,), (-200.0,), (30.0,)]),
    "negative binomial": (
        D.NegativeBinomial,
        [(-1e4, 1.0), (60.0, 1.0), (1e4, 1.0), (0.0, 1e-9), (0.0, 1e8), (5.0, 1e30)],
    ),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_outputs_leave_log_density_and_gradient_finite(name, dtype):
    family, parameters = EXTREME[name]
    for given in parameters:
        leaves = [torch.tensor([float(v)], dtype=dtype, requires_grad=True) for v in given]
        for x in (0.0, 1.0):
            log_p = family(*leaves).log_prob(torch.tensor([x], dtype=dtype))
            gradients = torch.autograd.grad(log_p.sum(), leaves)
            assert torch.isfinite(log_p).all(), (given, x)
            assert all(torch.isfinite(g).all() for g in gradients), (given, x)


def mp_continuous_bernoulli(x, a):
    a, x = mpmath.mpf(a), mpmath.mpf(x)
    return a * x - (mpmath.log(mpmath.expm1(a) / a) if a else 0)


# the series ends at 0.2
@pytest.mark.parametrize(
    "logit", [0.0, 1e-9, -1e-4, 1e-3, 0.04, 0.1999, 0.2001, 0.599, -0.601, 3.0, -40.0, 400.0]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_near_one_half_and_far_out(logit, dtype):
    eps = torch.finfo(dtype).eps
    a = torch.tensor(logit, dtype=dtype, requires_grad=True)
    exact = a.item()
    for x in (0.0, 0.25, 1.0):
        p = D.ContinuousBernoulli(a)
        log_p = p.log_prob(torch.tensor(x, dtype=dtype))
        (slope,) = torch.autograd.grad(log_p, a)
        with mpmath.workdps(60):
            want = mp_continuous_bernoulli(x, exact)
            h = mpmath.mpf(10) ** -20
            want_slope = (
                mp_continuous_bernoulli(x, exact + h) - mp_continuous_bernoulli(x, exact - h)
            ) / (2 * h)
        scale = max(1.0, abs(exact))
        assert abs(log_p.item() - float(want)) < 40 * eps * scale
        assert abs(slope.item() - float(want_slope)) < 40 * eps * max(1.0, 10 * scale / 40)
        # d log p / d logit = x - E[x]
        assert abs(slope.item() - (x - p.mean.item())) < 40 * eps


def test_clamped_probabilities_would_be_wrong_by_nats():
    # the mutant: torch's density goes through a probability clamped to (eps, 1 - eps)
    a, x = torch.tensor(20.0, dtype=torch.float32), torch.tensor(0.25, dtype=torch.float32)
    with mpmath.workdps(50):
        want = float(mp_continuous_bernoulli(0.25, 20))
    assert abs(D.ContinuousBernoulli(a).log_prob(x).item() - want) < 1e-6
    assert abs(dist.ContinuousBernoulli(logits=a).log_prob(x).item() - want) > 0.2


def mp_negative_binomial(x, log_rate, theta):
    mu = mpmath.exp(log_rate)
    return (
        mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        + theta * mpmath.log(theta / (theta + mu)) + x * mpmath.log(mu / (theta + mu))
    )  # fmt: skip


def mp_poisson(x, log_rate):
    return x * log_rate - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


def expect_exact(family, oracle, count, log_rate, *parameters):
    """Value and slope by the log-rate, to a few roundings of a number of the size of the result
    (and of the square root of the count, which a rounding of the log-rate is worth)."""
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor(log_rate, dtype=dtype, requires_grad=True)
        others = [torch.tensor(p, dtype=dtype) for p in parameters]
        ours = family(a, *others).log_prob(torch.tensor(float(count), dtype=dtype))
        (slope,) = torch.autograd.grad(ours, a)
        with mpmath.workdps(50):
            at = [mpmath.mpf(v.item()) for v in (a, *others)]
            want = float(oracle(mpmath.mpf(count), *at))
            slope_of = partial(mpmath.diff, lambda r, *rest: oracle(mpmath.mpf(count), r, *rest))
            want_slope = float(slope_of(tuple(at), (1, *[0] * len(others))))
        eps = torch.finfo(dtype).eps
        assert abs(ours.item() - want) < 60 * eps * max(1.0, abs(want), count**0.5)
        assert abs(slope.item() - want_slope) < 30 * eps * max(1.0, abs(want_slope), count)


COUNTS = [0, 1, 7, 16, 17, 500, 10**5, 10**7]
# log of the rate over the count: far below, near and far above
RATIOS = [-12.0, -1.0, -1e-3, 1e-3, 0.5, 8.0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("count", COUNTS)
def test_poisson_in_both_precisions(count, ratio):
    expect_exact(D.Poisson, mp_poisson, count, np.log(max(count, 1)) + ratio)


@pytest.mark.parametrize("theta", [1e-2, 1.0, 15.9, 16.1, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("count", COUNTS)
def test_negative_binomial_in_both_precisions(theta, count):
    for ratio in RATIOS:
        log_rate = np.log(max(count, 1)) + ratio
        expect_exact(D.NegativeBinomial, mp_negative_binomial, count, log_rate, theta)


def test_float32_counts_by_their_log_gammas_would_be_wrong_by_nats():
    # the mutant: the log-mass of a million counts is a difference of terms around 1.3e7
    log_rate = torch.tensor(np.log(1e6), dtype=torch.float32)
    with mpmath.workdps(50):
        want = float(mp_poisson(10**6, mpmath.mpf(log_rate.item())))
    x = torch.tensor(1e6, dtype=torch.float32)
    naive = dist.Poisson(log_rate.exp()).log_prob(x).item()
    assert abs(naive - want) > 0.3
    assert D.Poisson(log_rate).log_prob(x).item() == pytest.approx(want, abs=1e-3)


def test_the_naive_negative_binomial_fails_in_float32():
    # the mutant: the two log-gammas of theta = 1e6 differ by less than their rounding
    mean, theta = torch.tensor(5.0), torch.tensor(1e6)
    x = torch.tensor(7.0, dtype=torch.float32)
    want = st.poisson(5.0).logpmf(7)  # the limit, within 1e-5
    naive = dist.NegativeBinomial(theta.float(), logits=(mean / theta).log().float())
    ours = D.NegativeBinomial(mean.log().float(), theta.float())
    assert abs(naive.log_prob(x).item() - want) > 0.05
    assert ours.log_prob(x).item() == pytest.approx(want, abs=3e-5)


def test_256_levels_sum_to_one_wherever_the_logistic_lies():
    levels = torch.arange(256) / 255
    for loc, scale in [(0.3, 0.05), (-2.0, 0.01), (1.5, 0.3), (0.5, 1e-3), (0.0, 50.0)]:
        p = D.DiscretizedLogistic(torch.tensor(loc), torch.tensor(scale))
        assert p.log_prob(levels).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_levels_are_equally_spaced_within_the_ends():
    levels = D.Levels(256)
    k = torch.arange(256) / 255
    assert levels.check(k).all()
    for outside in (k + 0.1 / 255, k - 0.1 / 255, torch.tensor([-1 / 255, 256 / 255])):
        assert not levels.check(outside).any()


def test_draws_near_one_half_are_uniform_where_tiny_numbers_are_flushed_to_zero():
    torch.set_flush_denormal(True)
    try:
        for logit in (0.0, 1e-30, -1e-9):
            x = D.ContinuousBernoulli(torch.full((2000,), logit).float()).sample()
            assert st.kstest(x.numpy(), "uniform").pvalue > 1e-4
    finally:
        torch.set_flush_denormal(False)


# --- R ---------------------------------------------------------------------------------------


def biochemists(folder, model):
    """Counts, linear predictors at R's coefficients, theta, and R's fitted values."""
    table = pd.read_csv(folder / "counts" / "biochemists.tsv", sep="\t")
    coefficients = pd.read_csv(folder / "counts" / f"biochemists-{model}-coef.tsv", sep="\t")
    coefficients = coefficients.set_index("coef")
    fitted = pd.read_csv(folder / "counts" / f"biochemists-{model}-predictions.tsv", sep="\t")
    x = table.drop(columns="art").assign(intercept=1.0)
    beta = torch.tensor(coefficients.loc[x.columns].to_numpy(), requires_grad=True)
    raw = torch.tensor(x.to_numpy(dtype=float)) @ beta  # log-rates, then gate logits if there are
    counts = torch.tensor(table[["art"]].to_numpy(dtype=float))
    theta = float(coefficients.loc["theta"].iloc[0])
    return counts, raw, beta, theta, fitted


@pytest.mark.data
def test_negative_binomial_is_rs(real_data):
    counts, raw, beta, theta, fitted = biochemists(real_data, "nb")
    p = L.NegativeBinomial(RAW, theta)(raw)
    np.testing.assert_allclose(p.mean[:, 0].detach(), fitted["count"], rtol=1e-9)
    log_p = p.log_prob(counts).sum()
    # log-likelihood of this regression as Long 1997 and Stata's manual print it
    assert log_p.item() == pytest.approx(-1560.958, abs=1e-3)
    # and R's coefficients are its maximum: the slope is that of R's stopping rule
    (slope,) = torch.autograd.grad(log_p, beta)
    assert slope.abs().max() < 1e-2


@pytest.mark.data
def test_zero_inflated_negative_binomial_is_rs(real_data):
    counts, raw, beta, theta, fitted = biochemists(real_data, "zinb")
    p = L.ZeroInflatedNegativeBinomial(RAW, theta)(raw)
    np.testing.assert_allclose(p.base_dist.gate[:, 0].detach(), fitted["zero"], atol=1e-12)
    np.testing.assert_allclose(p.base_dist.base_dist.mean[:, 0].detach(), fitted["count"])
    log_p = p.log_prob(counts).sum()
    assert log_p.item() == pytest.approx(-1549.991, abs=1e-3)
    (slope,) = torch.autograd.grad(log_p, beta)
    assert slope.abs().max() < 2e-2


# --- what is refused -------------------------------------------------------------------------

REFUSED = [
    (L.Bernoulli(RAW), 0.5, "takes the values 0 and 1, but x[1, 2] = 0.5 (row 1, column 2)"),
    (L.ContinuousBernoulli(RAW), 255.0, "takes values in [0, 1], but x[1, 2] = 255"),
    (L.Binomial(RAW, 3), 4.0, "takes whole numbers from 0 to 3, but x[1, 2] = 4"),
    (L.Categorical(RAW, 3), 3.0, "takes the codes 0 to 2, but x[1, 2] = 3"),
    (L.Categorical(RAW, 3), 0.5, "takes the codes 0 to 2, but x[1, 2] = 0.5"),
    (L.DiscretizedLogistic(RAW), 0.5, "takes the 256 levels k/255, but x[1, 2] = 0.5"),
    (L.Poisson(RAW), -1.0, "takes whole numbers 0, 1, 2, ..., but x[1, 2] = -1"),
    (L.NegativeBinomial(RAW, 1.0), 1.5, "takes whole numbers 0, 1, 2, ..., but x[1, 2] = 1.5"),
]


@pytest.mark.parametrize(("likelihood", "value", "message"), REFUSED)
def test_data_outside_the_support_is_named(likelihood, value, message):
    x = torch.zeros(3, 4)
    likelihood.check(x)
    x[1, 2] = value
    with pytest.raises(SupportError) as error:
        likelihood.check(x)
    assert f"{type(likelihood).__name__} {message}" in str(error.value)


def test_float32_grey_levels_are_levels():
    L.DiscretizedLogistic(RAW).check((torch.arange(256, dtype=torch.float32) / 255)[None])


@pytest.mark.parametrize(
    "likelihood", [L.Normal(RAW), L.Poisson(RAW), L.Columns(RAW, [L.Normal(), L.Poisson()])]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_data_are_named(likelihood, value):
    x = torch.tensor([[0.0, value], [0.0, value]])
    with pytest.raises(
        DataError, match=rf"must be finite, but x\[0, 1\] = {value} .*1 more"
    ) as error:
        likelihood.check(x)
    assert not isinstance(error.value, SupportError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Normal(RAW, -1.0),
        lambda: L.Normal(RAW, "free"),
        lambda: L.Normal(RAW, float("inf")),
        lambda: L.Normal(RAW, True),
        lambda: L.Normal(RAW, "per_feature"),
        lambda: L.Normal(RAW, "per_feature", features=0),
        lambda: L.Normal(RAW, "per_feature", features=2.5),
        lambda: L.Normal(RAW, min_scale=0),
        lambda: L.Normal(RAW, min_scale=1.0),
        lambda: L.StudentT(RAW, df=1),
        lambda: L.StudentT(RAW, df=float("inf")),
        lambda: L.Binomial(RAW, 0),
        lambda: L.Binomial(RAW, 2.5),
        lambda: L.Categorical(RAW, 2.5),
        lambda: L.Categorical(RAW, 3.0),
        lambda: L.Categorical(RAW, 1),
        lambda: L.DiscretizedLogistic(RAW, levels=1),
        lambda: L.NegativeBinomial(RAW, 0.0),
        lambda: L.Columns(RAW, []),
        lambda: L.Columns(RAW, [L.Normal(RAW)]),
        lambda: L.Columns(RAW, [L.Poisson(offset=True)]),
        lambda: L.Normal()(torch.zeros(2)),
        lambda: L.Poisson(RAW, offset=True)(torch.zeros(2)),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_outputs_that_do_not_divide_are_refused():
    with pytest.raises(ShapeError, match="needs 2 network outputs for each value"):
        L.Normal(RAW, "predicted")(torch.zeros(5))


def test_a_scale_for_another_number_of_values_is_refused():
    two = L.Normal(scale="per_feature", features=2)
    for likelihood in (
        L.Normal(RAW, "per_feature", features=3),
        L.NegativeBinomial(RAW, features=3),
        L.Columns(RAW, [two, L.Bernoulli(), L.Bernoulli(), two]),
    ):
        with pytest.raises(ShapeError, match=r"features=[23], but the network gives [14] values"):
            likelihood(torch.zeros(4))


# --- scales, offsets, columns ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [L.Normal, L.Laplace, L.StudentT, L.DiscretizedLogistic])
def test_the_four_forms_of_a_scale(kind):
    network = pv.networks.MLP(2, [], 3)
    shapes = {
        0.2: [], "learned": [()], "per_feature": [(3,)],
    }  # fmt: skip
    for form, shape in shapes.items():
        scale = kind(network, form).scale
        assert [p.shape for p in scale.parameters()] == [torch.Size(s) for s in shape]
        expected = form if isinstance(form, float) else kind.initial_scale
        torch.testing.assert_close(scale().unique(), torch.tensor([expected]))
    predicted = kind(pv.networks.MLP(2, [], 6), "predicted")
    assert predicted.outputs_per_feature == 2
    assert predicted(torch.zeros(7, 2)).event_shape == (3,)
    torch.testing.assert_close(predicted.scale(torch.zeros(())).item(), kind.initial_scale)
    assert predicted.scale(torch.tensor(-1e9)).item() == pytest.approx(FLOOR)


@pytest.mark.parametrize("kind", [L.NegativeBinomial, L.ZeroInflatedNegativeBinomial])
def test_the_four_forms_of_a_concentration(kind):
    per_value = kind.outputs_per_feature
    per_feature = kind(pv.networks.MLP(2, [], 3 * per_value))  # told by the network
    assert per_feature.concentration.raw.shape == (3,)
    assert per_feature(torch.zeros(7, 2)).event_shape == (3,)
    assert kind(RAW, "learned").concentration.raw.shape == ()
    assert kind(RAW, 2.5).concentration().item() == 2.5
    predicted = kind(RAW, "predicted", min_concentration=0.25)
    assert predicted.outputs_per_feature == per_value + 1
    assert predicted.concentration(torch.tensor(-1e9)).item() == pytest.approx(0.25)


def test_images_keep_their_channels_together():
    decoder = nn.Sequential(nn.Linear(2, 4 * 3 * 3), nn.Unflatten(-1, (4, 3, 3)))
    p = L.Normal(decoder, "predicted")(torch.zeros(5, 2))
    assert (p.batch_shape, p.event_shape) == ((5,), (2, 3, 3))


@pytest.mark.parametrize("kind", [L.Poisson, L.NegativeBinomial, L.ZeroInflatedNegativeBinomial])
def test_an_offset_multiplies_the_rate_and_stays_from_the_network(kind):
    more = {} if kind is L.Poisson else {"features": 2}
    outputs = 2 * kind(**more).outputs_per_feature
    network = nn.Linear(2 + 1, outputs)  # z and one covariate, not the offset
    z, covariate, library = torch.randn(4, 6, 2), torch.randn(6, 1), torch.rand(6, 1) * 1e4
    offset = kind(network, offset=True, **more)
    plain = kind(network, **more)
    p = offset(z, torch.cat([covariate, library.log()], -1))
    torch.testing.assert_close(p.mean, plain(z, covariate).mean * library)
    alone = kind(nn.Linear(2, outputs), offset=True, **more)
    assert alone(z, library.log()).batch_shape == (4, 6)
    # the shares of the library are what initialize() sets
    mean = torch.tensor([30.0, 10.0])
    torch.testing.assert_close(
        offset.bias_of_mean(mean) - plain.bias_of_mean(mean), -mean.sum().log().expand(2)
    )


def table():
    normal = L.Normal(scale=0.5)
    kinds = [normal, normal, L.Bernoulli(), L.Categorical(num_categories=4), L.Poisson()]
    kinds += [L.NegativeBinomial(concentration="predicted")]
    x = torch.tensor([[0.3, -2.0, 1.0, 3.0, 2.0, 5.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    return kinds, x


def test_columns_are_the_sum_of_their_kinds():
    kinds, x = table()
    outputs = L.Columns.outputs(kinds)
    assert outputs == 1 + 1 + 1 + 4 + 1 + 2
    raw = torch.randn(3, 2, outputs)
    p = L.Columns(RAW, kinds)(raw)
    assert (p.batch_shape, p.event_shape) == ((3, 2), (6,))
    a = raw.numpy()
    want = (
        st.norm(a[..., :2], 0.5).logpdf(x[:, :2]).sum(-1)
        + st.bernoulli(expit(a[..., 2])).logpmf(x[:, 2])
        + np.take_along_axis(
            a[..., 3:7] - np.log(np.exp(a[..., 3:7]).sum(-1, keepdims=True)),
            np.broadcast_to(x[:, 3, None].numpy().astype(int), (3, 2, 1)),
            -1,
        )[..., 0]
        + st.poisson(np.exp(a[..., 7])).logpmf(x[:, 4])
        + nbinom(np.exp(a[..., 8]), FLOOR + softplus(start() + a[..., 9])).logpmf(x[:, 5])
    )
    np.testing.assert_allclose(p.log_prob(x), want)
    # value by value, for masks
    assert p.base_dist.log_prob(x).shape == (3, 2, 6)
    torch.testing.assert_close(p.base_dist.log_prob(x).sum(-1), p.log_prob(x))
    torch.testing.assert_close(p.expand((7, 3, 2)).log_prob(x)[4], p.log_prob(x))
    draws = p.sample((4000,))
    L.Columns(RAW, kinds).check(draws.flatten(0, -2))
    z = (draws.mean(0) - p.mean) / (draws.std(0) / 4000**0.5)
    assert z.abs().max() < 5  # 36 means: odds 2e-5


def test_columns_of_every_kind_under_particles_and_holes():
    kinds = [
        L.Normal(scale="predicted"), L.Laplace(), L.StudentT(df=2.5), L.Bernoulli(),
        L.ContinuousBernoulli(), L.Binomial(total_count=9), L.Categorical(num_categories=4),
        L.DiscretizedLogistic(levels=16), L.Poisson(), L.NegativeBinomial(concentration=0.7),
        L.ZeroInflatedNegativeBinomial(concentration="predicted"),
    ]  # fmt: skip
    network = pv.networks.MLP(2, [3], L.Columns.outputs(kinds))
    likelihood = L.Columns(network, kinds)
    z = torch.randn(4, 5, 2)
    p = likelihood(z)
    x = p.sample()[0]
    likelihood.check(x)
    own = [
        part.log_prob(column)
        for part, column in zip(p.base_dist.parts, x.split(1, -1), strict=True)
    ]
    torch.testing.assert_close(p.log_prob(x), torch.cat(own, -1).sum(-1))
    holes = x.clone()
    holes[1, ::2] = torch.nan
    left_out = torch.cat(own, -1)[:, 1, ::2].sum(-1)
    log_p = L.Incomplete(likelihood)(z).log_prob(holes)
    torch.testing.assert_close(log_p[:, 1], p.log_prob(x)[:, 1] - left_out)
    posterior = pv.posteriors.DiagonalNormal(pv.networks.MLP(len(kinds), [3], 4))
    vae = pv.VAE(pv.priors.StandardNormal(2), likelihood, posterior)
    for objective in (pv.ELBO(num_particles=3), pv.IWAE(3, "dreg")):
        objective.differentiable_loss(vae.model, vae.guide, x).backward()
        assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())


def test_columns_refuse_by_the_tables_own_column():
    kinds, x = table()
    likelihood = L.Columns(RAW, kinds)
    likelihood.check(x)
    for column, value, name in [(2, 2.0, "Bernoulli"), (3, 4.0, "Categorical"), (4, -1, "Poisson")]:
        bad = x.clone()
        bad[1, column] = value
        with pytest.raises(SupportError, match=rf"{name} takes .*row 1, column {column}"):
            likelihood.check(bad)
    with pytest.raises(ShapeError, match="there are 6 columns, got 5"):
        likelihood.check(x[:, :5])
    with pytest.raises(ShapeError, match="need 10 network outputs, got 9"):
        likelihood(torch.zeros(9))


def test_columns_start_at_the_means():
    kinds, _ = table()
    network = pv.networks.MLP(2, [], L.Columns.outputs(kinds))
    likelihood = L.Columns(network, kinds)
    mean = torch.tensor([0.3, -1.0, 0.25, 1.5, 2.0, 4.0])  # 1.5: a uniform category
    likelihood.initialize(mean)
    torch.testing.assert_close(likelihood(torch.zeros(2)).mean, mean)


def test_one_object_in_adjacent_columns_makes_a_block():
    """The network's outputs come block by block: all locations, then all raw scales."""
    shared = L.Normal(scale="predicted")
    raw = torch.randn(6)
    p = L.Columns(RAW, [shared, shared, L.Normal(scale="predicted")])(raw).base_dist
    x = torch.tensor([0.5, -1.0, 2.0])
    scales = FLOOR + softplus(start() + raw.numpy()[[2, 3, 5]])
    np.testing.assert_allclose(p.log_prob(x), st.norm(raw[[0, 1, 4]], scales).logpdf(x))
    with pytest.raises(ValueError, match="within the support"):
        L.Columns(RAW, [L.Normal(), L.Bernoulli()])(torch.zeros(2)).log_prob(
            torch.tensor([0.5, 0.5])
        )


def test_a_repeated_column_shares_its_scale_and_a_copy_does_not():
    shared = L.Normal()
    assert sum(p.numel() for p in L.Columns(RAW, [shared, shared]).parameters()) == 1
    assert sum(p.numel() for p in L.Columns(RAW, [L.Normal(), L.Normal()]).parameters()) == 2
