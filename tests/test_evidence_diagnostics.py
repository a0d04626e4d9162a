"""The figures of importance weights, against ArviZ, naive formulas and lognormal weights."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.evidence import arithmetic, kernels
from pyro_vae.evidence.diagnostics import (
    checkpoints,
    is_flagged,
    khat_threshold,
    pareto_khat,
    running_log_mean,
    summarize,
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def arvizs_khat(log_w: np.ndarray) -> np.ndarray:
    """ArviZ's own Pareto k-hat of log weights `(N, K)`, whichever version is installed."""
    import arviz

    if int(arviz.__version__.split(".")[0]) < 1:
        _, khat = arviz.psislw(log_w, reff=1.0)
        return np.atleast_1d(khat)
    from arviz_stats.base import array_stats

    # from 1.0 on, ArviZ takes log importance ratios with the other sign
    _, khat = array_stats.psislw(-log_w, r_eff=1.0, axis=-1)
    return np.atleast_1d(khat)


# the sizes of the tails are whole here: ArviZ rounds others up until 0.23, down from 1.0 on
@pytest.mark.parametrize("num_samples", [200, 10_000])
def test_khat_is_that_of_arviz(num_samples: int) -> None:
    log_w = torch.randn(6, num_samples) * torch.arange(0.5, 3.5, 0.5)[:, None]
    np.testing.assert_allclose(pareto_khat(log_w), arvizs_khat(log_w.numpy()), rtol=1e-6)


def test_khat_of_exact_pareto_tails() -> None:
    for k in (0.2, 0.5, 1.0):
        w = torch.rand(40, 20_000) ** -k
        assert pareto_khat(w.log()).mean() == pytest.approx(k, abs=0.06)


def test_weights_alike_have_no_tail() -> None:
    assert (pareto_khat(torch.zeros(2, 1000)) == -math.inf).all()
    assert pareto_khat(torch.zeros(2, 20)).isnan().all()


def test_few_weights_have_the_figures_of_their_definitions() -> None:
    """By numpy, for so few weights that one more or less would show."""
    log_w, wide = torch.randn(4, 7), torch.arange(7) % 3 == 2
    w = log_w.exp().numpy()
    found = {name: value.numpy() for name, value in vars(summarize(log_w)).items()}
    np.testing.assert_allclose(found["log_mean"], np.log(w.mean(1)))
    relative = w.var(1, ddof=1) / w.mean(1) ** 2
    np.testing.assert_allclose(found["se"], np.sqrt(relative / 7))
    np.testing.assert_allclose(found["bias"], -relative / 14)
    np.testing.assert_allclose(found["ess"], w.sum(1) ** 2 / (w**2).sum(1))
    np.testing.assert_allclose(found["max_weight"], w.max(1) / w.sum(1))
    # two strata of fixed sizes: the variance of the sum is the sum of theirs
    parts = w[:, ~wide], w[:, wide]
    variance = sum(part.shape[1] * part.var(1, ddof=1) for part in parts) / w.sum(1) ** 2
    np.testing.assert_allclose(summarize(log_w, wide).se, np.sqrt(variance))


def test_jackknife_is_the_definition() -> None:
    log_w = torch.randn(3, 12)
    Z = log_w.exp()
    without = torch.stack([(Z.sum(1) - Z[:, k]) / 11 for k in range(12)], 1)
    naive = 12 * Z.mean(1).log() - 11 / 12 * without.log().sum(1)
    torch.testing.assert_close(summarize(log_w).jackknife, naive)


def test_jackknife_removes_the_bias() -> None:
    # lognormal weights of mean 1: the bias of log-mean-exp at K = 20 is about -cv²/(2K) = -0.043
    log_w = torch.randn(20_000, 20) - 0.5
    found = summarize(log_w)
    error = found.log_mean.std() / math.sqrt(20_000)
    assert found.log_mean.mean() < -10 * error
    assert abs(found.jackknife.mean()) < 0.25 * abs(found.log_mean.mean())
    assert found.bias.mean() == pytest.approx(found.log_mean.mean().item(), rel=0.35)


def test_error_and_effective_size_of_lognormal_weights() -> None:
    sd, K = 0.5, 4000
    found = summarize(sd * torch.randn(500, K))
    cv2 = math.exp(sd**2) - 1
    assert found.se.mean() == pytest.approx(math.sqrt(cv2 / K), rel=0.01)
    assert found.log_mean.std() == pytest.approx(math.sqrt(cv2 / K), rel=0.15)
    assert found.ess.mean() == pytest.approx(K / (1 + cv2), rel=0.01)
    assert (found.max_weight < 0.01).all()


def test_strata_count_the_variance_within_them_only() -> None:
    wide = torch.arange(1000) % 10 == 9
    log_w = torch.where(wide, -2.0, 0.0).expand(3, -1)
    assert (summarize(log_w, wide).se < 1e-9).all()
    assert (summarize(log_w).se > 1e-3).all()


def test_data_without_a_finite_weight() -> None:
    found = summarize(torch.full((2, 100), -math.inf))
    assert (found.log_mean == -math.inf).all()


def test_products_through_the_other_library_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_onednn_is_faster", torch.backends.mkldnn.is_available)
    layer = torch.nn.Linear(30, 40).float()
    for x in (torch.randn(500, 30), torch.randn(20, 30, 30), torch.randn(2, 30)):
        x = x.float()
        with torch.no_grad(), arithmetic.FastArithmetic():
            found = layer(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
        assert found.shape == (*x.shape[:-1], 40)
    with arithmetic.FastArithmetic():
        assert layer(torch.randn(500, 30).float()).requires_grad
    double = layer.double()(torch.randn(500, 30))
    assert double.dtype == torch.float64


def test_the_fast_tanh_is_right_to_rounding_everywhere() -> None:
    size = torch.cat([torch.logspace(-37, 2, 200_000), torch.tensor([0.0, math.inf])])
    x = torch.cat([-size, size]).float()
    exact = torch.tanh(x.double())
    with torch.no_grad(), arithmetic.FastArithmetic():
        found = {"function": torch.tanh(x.reshape(-1, 2)), "method": x.reshape(-1, 2).tanh()}
        assert torch.tanh(torch.full((300, 1), math.nan).float()).isnan().all()
    for way in found.values():
        torch.testing.assert_close(way.flatten().double(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(900, 2, 1), (5, 17), (400, 3, 100), (2000, 1, 784)])
def test_binary_data_have_their_log_density_at_any_logits(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (torch.rand(shape[-2:]) < 0.4).to(dtype)
    for scale in (0.1, 3.0, 100.0):
        logits = (scale * torch.randn(shape)).to(dtype)
        found = kernels._bernoulli(logits, x)
        naive = dist.Bernoulli(logits=logits.double()).log_prob(x.double().expand(shape)).sum(-1)
        torch.testing.assert_close(
            found.double(), naive, rtol=5 * torch.finfo(dtype).eps, atol=1e-6
        )
    certain = torch.full(shape, math.inf, dtype=dtype)
    assert (kernels._bernoulli(certain, torch.ones_like(x)) == 0).all()
    assert (kernels._bernoulli(certain, torch.zeros_like(x)) == -math.inf).all()
    assert kernels._bernoulli(certain * math.nan, x).isnan().all()


def test_a_grid_of_logits_for_all_rows() -> None:
    x, logits = (torch.rand(6, 50) < 0.5).double(), 40 * torch.randn(30, 1, 50)
    found = kernels._bernoulli(logits.expand(30, 6, 50), x)
    naive = dist.Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(found, naive)


def confident_bernoulli(dtype: torch.dtype) -> tuple[dist.Distribution, torch.Tensor]:
    """Logits up to 50, half of them against the data."""
    logits = 100 * torch.rand(20, 3, 3072) - 50
    x = (torch.rand(3, 3072) < 0.5).to(dtype)
    return dist.Bernoulli(logits=logits.float().to(dtype)).to_event(1), x


def narrow_normal(dtype: torch.dtype) -> tuple[dist.Distribution, torch.Tensor]:
    loc, x = 0.01 * torch.randn(20, 3, 3072), 0.01 * torch.randn(3, 3072)
    scale = torch.tensor(0.01).float().to(dtype)
    return dist.Normal(loc.float().to(dtype), scale).to_event(1), x.float().to(dtype)


def narrow_normal_by_feature(dtype: torch.dtype) -> tuple[dist.Distribution, torch.Tensor]:
    fn, x = narrow_normal(dtype)
    return dist.Normal(fn.base_dist.loc, fn.base_dist.scale[0, 0].clone()).to_event(1), x


def counts_of_images(dtype: torch.dtype) -> tuple[dist.Distribution, torch.Tensor]:
    rate = 30 * torch.rand(20, 3, 3, 32, 32) + 1
    x = torch.poisson(15 * torch.ones(3, 3, 32, 32))
    return dist.Poisson(rate.float().to(dtype)).to_event(3), x.to(dtype)


@pytest.mark.parametrize(
    "make", [confident_bernoulli, narrow_normal, narrow_normal_by_feature, counts_of_images]
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_thousands_of_nats_are_summed_to_a_thousandth(
    make: Callable[[torch.dtype], tuple[dist.Distribution, torch.Tensor]], with_gradient: bool
) -> None:
    """float32 has steps of 0.004 nats at 40,000; against torch's own density in float64."""
    seed = torch.get_rng_state()
    fn, x = make(torch.float32)
    base = fn.base_dist
    parameter = next(base.__dict__[n] for n in ("logits", "loc", "rate") if n in base.__dict__)
    parameter.requires_grad_(with_gradient)
    site = {"fn": fn, "value": x, "mask": None, "args": (), "kwargs": {}}
    found = kernels.log_prob(site).detach()
    torch.set_rng_state(seed)
    fn, x = make(torch.float64)
    expected = fn.log_prob(x)
    assert expected.abs().mean() > 5000
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("base", [dist.Normal(0.3, 2.0), dist.Bernoulli(logits=0.4)])
def test_masked_rows_have_no_density(base: dist.Distribution) -> None:
    fn, mask = base.expand((3, 4)).to_event(1), torch.tensor([True, False, True])
    x = torch.ones(3, 4)
    site = {"fn": fn, "value": x, "mask": mask, "args": (), "kwargs": {}}
    torch.testing.assert_close(kernels.log_prob(site), fn.log_prob(x) * mask)


@pytest.mark.parametrize(
    ("khat", "ess", "flagged"),
    [
        (0.69, 101.0, False), (-math.inf, 101.0, False), (0.71, 4000.0, True), (0.1, 99.0, True),
        (0.71, 99.0, True), (math.nan, 4000.0, True), (0.1, math.nan, True),
    ],
)  # fmt: skip
def test_either_diagnostic_flags(khat: float, ess: float, flagged: bool) -> None:
    figures = summarize(torch.randn(1, 5000))
    one = replace(figures, khat=torch.tensor([khat]), ess=torch.tensor([ess]))
    assert is_flagged(one, 5000).item() is flagged


def test_thresholds_and_checkpoints() -> None:
    assert khat_threshold(5000) == 0.7
    assert khat_threshold(100) == 0.5
    assert checkpoints(5) == [1, 2, 4, 5]
    assert checkpoints(4) == [1, 2, 4]
    log_w = torch.randn(2, 5)
    running = running_log_mean(log_w)
    torch.testing.assert_close(running[:, 1], log_w[:, :2].exp().mean(1).log())
