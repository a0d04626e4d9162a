"""log_marginal against closed forms, enumeration and its own invariances."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Binary, Linear, all_images
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    NonFiniteError,
    ShapeError,
    SiteError,
    SupportError,
    UnknownNameError,
)
from pyro_vae.evidence import Annealing, draws
from pyro_vae.evidence.importance import Proposal


@pytest.fixture
def pair() -> Linear:
    return Linear.random(features=5, latent=2, shift=0.3, shrink=1.2)


def z_scores(evidence: pv.Evidence, exact: Tensor) -> np.ndarray:
    return (evidence.log_px - exact.numpy()) / evidence.se


@pytest.mark.parametrize("defensive", [0.0, 0.1])
def test_agrees_with_the_closed_form_within_its_error(pair: Linear, defensive: float) -> None:
    x = pair.draw(200)
    evidence = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=1000, defensive=defensive, progress=False
    )
    z = z_scores(evidence, pair.log_px(x))
    # 200 z-scores: |mean| beyond 4/sqrt(200) and an sd off by 4 of its own errors are 1 in 16,000
    assert abs(z.mean()) < 4 / math.sqrt(200)
    assert abs(z.std() - 1) < 4 / math.sqrt(400)
    assert evidence.num_flagged == 0
    assert (evidence.elbo < evidence.log_px).all()


@pytest.mark.parametrize("defensive", [0.0, 0.3])
def test_the_elbo_is_that_of_the_guide(defensive: float) -> None:
    """Closed form: log p(x) - KL(q || p(z|x)); the inflated draws have no part in it."""
    pair = Linear.random(features=5, latent=2, shift=0.5, shrink=0.8)
    x = pair.draw(200)
    found = pv.log_marginal(pair.model, pair.guide, x, num_samples=300, defensive=defensive)
    covariance = torch.linalg.inv(pair.precision)
    shift = 0.5 * covariance.diagonal().sqrt()
    kl = 0.5 * (2 * 0.64 + shift @ pair.precision @ shift - 2 - 2 * math.log(0.64))
    error = found.elbo - (pair.log_px(x) - kl).numpy()
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(200)


def test_inflated_draws_are_as_many_as_asked_for_and_spread_evenly() -> None:
    for share in ("0", "0.1", "0.3", "0.5", "0.7", "0.9"):
        wide = Proposal(float(share)).wide(1000)
        counts = wide.cumsum(0).tolist()
        assert counts == [math.floor(k * Fraction(share)) for k in range(1, 1001)]


@pytest.mark.parametrize("num_samples", [1, 7])
def test_any_draws_are_exact_when_the_guide_is_the_posterior(num_samples: int) -> None:
    pair = Linear.random(features=5, latent=2)
    x = pair.draw(10)
    evidence = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=num_samples, defensive=0, progress=False
    )
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-10)
    np.testing.assert_allclose(evidence.elbo, pair.log_px(x), atol=1e-10)
    assert evidence.flagged.all(), "so few draws can tell nothing of their own reliability"


@pytest.mark.parametrize(("defensive", "shrink"), [(0.0, 1.15), (0.1, 0.85)])
def test_error_bias_and_coverage_are_as_reported(defensive: float, shrink: float) -> None:
    """A thousand estimates of one datum: their spread, bias and 95% intervals."""
    pair = Linear.random(features=5, latent=2, shift=0.3, shrink=shrink)
    x = pair.draw(1)
    found = pv.log_marginal(
        pair.model, pair.guide, x.expand(1000, -1), num_samples=400, defensive=defensive
    )
    error = found.log_px - pair.log_px(x).item()
    coverage = (abs(error) < 1.96 * found.se).mean()
    assert 0.93 < coverage < 0.97
    covariance = torch.linalg.inv(pair.precision)
    cv2 = pv.exact.weight_variance(
        torch.zeros(2), covariance, 0.3 * covariance.diagonal().sqrt(), shrink**2 * covariance
    ).item()
    spread = error.std()
    if defensive:
        assert spread < math.sqrt(cv2 / 400), "the mixture must do better than the narrow guide"
    else:
        # an sd of 1000 values has 2.2% of error
        assert spread == pytest.approx(math.sqrt(cv2 / 400), rel=0.1)
        assert found.bias_est.mean() == pytest.approx(-cv2 / 800, rel=0.2)
    assert abs(error.mean() - found.bias_est.mean()) < 4 * spread / math.sqrt(1000)
    jackknife = found.log_px_jackknife - pair.log_px(x).item()
    assert abs(jackknife.mean()) < 4 * spread / math.sqrt(1000)


def test_probabilities_of_all_images_sum_to_one() -> None:
    pair, x = Binary.random(pixels=8, latent=2), all_images(8)
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=2000, progress=False)
    p = np.exp(evidence.log_px)
    error = math.sqrt(((p * evidence.se) ** 2).sum())
    assert abs(p.sum() - 1) < 4 * error
    assert error < 0.01


def test_a_guide_too_narrow_for_a_finite_variance_is_flagged() -> None:
    # the variance is finite only while 2 Σp⁻¹ - Σq⁻¹ is positive definite: shrink² > 1/2
    x = (pair := Linear.random(5, 4, shrink=0.4)).draw(50)
    narrow = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=2000, defensive=0, progress=False
    )
    assert narrow.flagged.mean() > 0.9
    assert narrow.num_flagged == narrow.flagged.sum()
    assert "lower bound" in str(narrow)
    assert f"{narrow.num_flagged} of 50" in str(narrow)
    assert "±" not in str(narrow)
    wide = Linear.random(5, 4, shrink=1.1)
    sound = pv.log_marginal(wide.model, wide.guide, x, num_samples=2000, progress=False)
    assert sound.num_flagged == 0
    assert "±" in str(sound)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 200_000])
def test_how_the_work_is_divided_changes_nothing(pair: Linear, chunk_bytes: int) -> None:
    x = pair.draw(30)
    whole = pv.log_marginal(pair.model, pair.guide, x, num_samples=40, progress=False)
    parts = pv.log_marginal(
        pair.model, pair.guide, x, num_samples=40, chunk_bytes=chunk_bytes, progress=False
    )
    few = pv.log_marginal(pair.model, pair.guide, x[:4], num_samples=40, progress=False)
    for name in ("log_px", "se", "elbo", "ess", "log_px_jackknife"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)
        np.testing.assert_allclose(getattr(few, name), getattr(whole, name)[:4], rtol=1e-9)


def test_blocks_of_draws_change_nothing(pair: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """More draws than the guide makes at once: every block has noise and weights of its own."""
    from pyro_vae.evidence import importance

    monkeypatch.setattr(importance, "DRAWS_AT_ONCE", 16)
    x = pair.draw(100)
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=500, progress=False)
    assert abs(z_scores(evidence, pair.log_px(x)).mean()) < 4 / math.sqrt(100)


def test_memory_that_runs_out_halves_the_work(pair: Linear) -> None:
    x, largest = pair.draw(6), []

    def model(x: Tensor) -> None:
        pair.model(x)

    def hungry(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if z[..., 0].numel() > 100:
                raise torch.OutOfMemoryError("no more")
            largest.append(z[..., 0].numel())
            pyro.sample("x", dist.Normal(z @ pair.W.T + pair.b, 0.5).to_event(1), obs=x)

    plenty = pv.log_marginal(model, pair.guide, x, num_samples=999, progress=False)
    scarce = pv.log_marginal(hungry, pair.guide, x, num_samples=999, progress=False)
    np.testing.assert_allclose(scarce.log_px, plenty.log_px, rtol=1e-12)
    assert max(largest) <= 100


def test_an_evaluation_leaves_no_trace() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                flat = self.net(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)
                pyro.sample("x", dist.Normal(flat, 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            loc = pyro.param("loc", torch.zeros(2))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    vae = Module()
    vae.net[2].eval()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    modes = [m.training for m in vae.modules()]
    x = torch.randn(5, 3)
    torch_state = torch.get_rng_state()
    evidence = pv.log_marginal(vae.model, vae.guide, x, num_samples=50, progress=False)
    assert np.isfinite(evidence.log_px).all()
    assert (torch.get_rng_state() == torch_state).all()
    assert [m.training for m in vae.modules()] == modes
    assert all((value == before[name]).all() for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert not dict(pyro.get_param_store())


def test_training_mode_of_the_modules_a_function_uses_is_seen() -> None:
    dropout = nn.Dropout(0.5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dropout(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    x = torch.randn(4, 2)
    evidence = pv.log_marginal(model, guide, x, num_samples=1, progress=False)
    exact = torch.distributions.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    np.testing.assert_allclose(evidence.log_px, exact, atol=1e-12)
    assert dropout.training


def test_exactly_k_draws_a_datum(pair: Linear) -> None:
    seen = 0

    def model(x: Tensor) -> None:
        nonlocal seen
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            seen += z[..., 0].numel() if z.dim() == 3 else 0
            pyro.sample("x", dist.Normal(z @ pair.W.T + pair.b, 0.5).to_event(1), obs=x)

    x = pair.draw(7)
    evidence = pv.log_marginal(model, pair.guide, x, num_samples=123, chunk_bytes=9999)
    # two draws for three rows, to see that the programs take several at once, and two and three
    # for one, to see how memory grows
    probes = 2 * 3 + 2 + 3
    assert seen - probes == 7 * 123 == evidence.provenance["model_evaluations"]
    assert (evidence.num_samples == 123).all()


class Chain:
    """x = z2 + noise, z2 = z1 + noise, all standard normal, in various guises."""

    def __init__(self, scale: float = 1.0, guide_scale: float = 1.0) -> None:
        self.scale, self.guide_scale = scale, guide_scale

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample=x), pyro.poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample=x), pyro.poutine.scale(scale=self.guide_scale):
            z2 = pyro.sample("z2", dist.Normal(2 * x / 3, 0.9))
            pyro.sample("z1", dist.Normal(z2 / 2, 0.8))

    @staticmethod
    def log_px(x: Tensor) -> Tensor:
        return torch.distributions.Normal(0.0, 3**0.5).log_prob(x)


@pytest.mark.parametrize(("scale", "guide_scale"), [(1.0, 1.0), (1.0, 4.0), (7.0, 0.1)])
def test_several_sites_under_subsampling_and_scales(scale: float, guide_scale: float) -> None:
    chain, x = Chain(scale, guide_scale), 2 * torch.randn(60)
    evidence = pv.log_marginal(chain.model, chain.guide, x, num_samples=500, progress=False)
    z = z_scores(evidence, Chain.log_px(x))
    assert abs(z.mean()) < 4 / math.sqrt(60)


def laplace_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Laplace(2 * x / 3, 0.9))
        pyro.sample("z1", dist.StudentT(8.0, z2 / 2, 0.8))


def flow_guide(x: Tensor) -> None:
    skew = dist.transforms.ELUTransform()
    with pyro.plate("data", len(x)):
        base = dist.Normal((2 * x / 3).asinh(), 0.5)
        z2 = pyro.sample("z2", dist.TransformedDistribution(base, [skew, skew.inv]))
        pyro.sample("z1", dist.Normal(z2 / 2, 0.8))


@pytest.mark.parametrize("guide", [laplace_guide, flow_guide])
def test_guides_of_other_families(guide: object) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    x = torch.randn(40)
    whole = pv.log_marginal(model, guide, x, num_samples=400, progress=False)
    parts = pv.log_marginal(model, guide, x, num_samples=400, chunk_bytes=3000, progress=False)
    np.testing.assert_allclose(parts.log_px, whole.log_px, rtol=1e-12)
    assert abs(z_scores(whole, Chain.log_px(x)).mean()) < 4 / math.sqrt(40)
    assert whole.provenance["proposal"]["share"] == (0.1 if guide is flow_guide else 0)


def test_discrete_latents_drawn_by_the_guide() -> None:
    centres, weights = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.2, 0.5, 0.3])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(centres[c], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=-((x[:, None] - centres) ** 2) / 4))

    x = torch.randn(30) * 2
    evidence = pv.log_marginal(model, guide, x, num_samples=300, progress=False)
    mixture = dist.Normal(centres, 1.0).log_prob(x[:, None]) + weights.log()
    assert abs(z_scores(evidence, mixture.logsumexp(1)).mean()) < 4 / math.sqrt(30)


def test_masked_values_and_inner_plates() -> None:
    """Features in a plate of their own, some of them missing: the marginal of those seen."""
    W, sigma = torch.tensor([1.0, -2.0, 0.5]), 0.7

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 3, dim=-1), pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z * W, sigma), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        precision = 1 + (seen * W**2).sum(1, keepdim=True) / sigma**2
        loc = (seen * W * x).sum(1, keepdim=True) / sigma**2 / precision
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(loc, 1.1 * precision.rsqrt()))

    seen = torch.rand(20, 3) < 0.6
    x = torch.where(seen, torch.randn(20, 3), math.nan)
    clean = torch.where(seen, x, 0.0)
    covariance = W[:, None] * W + sigma**2 * torch.eye(3)
    exact = torch.stack(
        [
            torch.distributions.MultivariateNormal(
                torch.zeros(int(s.sum())), covariance[s][:, s]
            ).log_prob(v[s])
            if s.any()
            else torch.tensor(0.0)
            for v, s in zip(clean, seen, strict=True)
        ]
    )
    evidence = pv.log_marginal(
        model, guide, clean, seen, num_samples=500, chunk_bytes=20_000, progress=False
    )
    assert (abs(evidence.log_px - exact.numpy()) < 4 * evidence.se + 1e-12).all()


def test_errors_name_the_site(pair: Linear) -> None:
    x = pair.draw(4)

    def fails(error: type, match: str, model: object, guide: object = pair.guide) -> None:
        with pytest.raises(error, match=match):
            pv.log_marginal(model, guide, x, num_samples=10, progress=False)

    def global_latent(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.W.T + w, 1.0).to_event(1), obs=x)

    def with_w(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pair.guide(x)

    fails(SiteError, '"w" is missing from the guide', global_latent)
    fails(SiteError, 'latent site "w" lies in no plate', global_latent, with_w)

    def wrong_plate(x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=x[:2])

    def wrong_guide(x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fails(ShapeError, "none of which is the 3 rows", wrong_plate, wrong_guide)

    def inner_subsample(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pixels", 5, subsample_size=2, dim=-1) as i:
                pyro.sample("x", dist.Normal((z @ pair.W.T)[..., 0, i], 1.0), obs=x[:, i])

    def outer_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fails(SiteError, 'plate "pixels" at site "x" is subsampled', inner_subsample, outer_guide)

    def unobserved(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fails(SiteError, "observes nothing", unobserved)

    def changing(x: Tensor) -> None:
        pair.model(x)
        if len(x) == 1:
            with pyro.plate("more", len(x)):
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])

    with pytest.raises(SiteError, match=r"\['y'\] come and go"):
        pv.log_marginal(changing, pair.guide, x, num_samples=10, chunk_bytes=1, progress=False)


def test_data_outside_the_support() -> None:
    pair, x = Binary.random(pixels=4, latent=2), all_images(4)
    x[5, 2] = 0.5
    with pytest.raises(
        SupportError, match=r'"x" takes values in Boolean\(\), but row 5, position \[2\] = 0\.5'
    ):
        pv.log_marginal(pair.model, pair.guide, x, num_samples=10, progress=False)


def test_data_and_options_that_mean_nothing(pair: Linear) -> None:
    x = pair.draw(3)
    with pytest.raises(DataError, match="no datum"):
        pv.log_marginal(pair.model, pair.guide, x[:0])
    with pytest.raises(ConfigError, match="num_samples"):
        pv.log_marginal(pair.model, pair.guide, x, num_samples=0)
    with pytest.raises(UnknownNameError, match="method"):
        pv.log_marginal(pair.model, pair.guide, x, method="magic")
    with pytest.raises(ConfigError, match="defensive"):
        pv.log_marginal(pair.model, pair.guide, x, defensive=1.0)
    broken = Linear(pair.W * math.nan, pair.b, pair.sigma)
    with pytest.raises(NonFiniteError, match="row 0"):
        pv.log_marginal(broken.model, pair.guide, x, num_samples=5, progress=False)


BAD_OPTIONS = [
    {"num_samples": 1.5}, {"num_samples": "5"}, {"seed": -1}, {"seed": 2**64}, {"seed": 0.5},
    {"defensive": "a"}, {"defensive": math.nan}, {"chunk_bytes": 0}, {"start": "middle"},
    {"annealing": 5},
]  # fmt: skip


@pytest.mark.parametrize("option", BAD_OPTIONS, ids=str)
def test_options_that_mean_nothing_are_named(pair: Linear, option: dict[str, object]) -> None:
    ((name, _),) = option.items()
    with pytest.raises(ConfigError, match=name):
        pv.log_marginal(pair.model, pair.guide, pair.draw(3), **option)


def test_data_that_are_no_data_are_named(pair: Linear) -> None:
    x = pair.draw(4)
    split = pv.Split(x)
    with pytest.raises(DataError, match=r"x is a Data of several splits"):
        pv.log_marginal(pair.model, pair.guide, pv.Data(split, None, split))
    for nothing in (None, ["a", "b"], [[1.0, 2.0], [3.0]], torch.utils.data.DataLoader(x)):
        with pytest.raises(DataError, match="is no array of numbers"):
            pv.log_marginal(pair.model, pair.guide, nothing)
    with pytest.raises(ConfigError, match="the guide must be a Pyro program"):
        pv.log_marginal(pair.model, None, x)


def test_programs_that_do_not_run_say_on_what() -> None:
    """The program, its arguments and the reason, without Pyro's table of shapes."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(2, [8], 6)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(6, [8], 4)),
    )
    x = torch.ones(5, 6)
    for wrong, error, match in (
        (x[:, :4], ShapeError, r"guide .* \(3, 4\) float64: MLP takes vectors of 6 values"),
        (x.long(), DataError, r"guide .* \(3, 6\) int64: .*dtype"),
        (x[None], DataError, r"guide .* \(1, 5, 6\) float64: Shape mismatch inside plate"),
    ):
        with pytest.raises(error, match=match) as raised:
            pv.log_marginal(vae.model, vae.guide, wrong)
        assert len(str(raised.value).splitlines()) == 1

    def one_draw_only(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.reshape(len(x), 2), 1.0).to_event(1), obs=x[:, :2])

    with pytest.raises(DataError, match=r"the model does not run .* for 2 draws at once"):
        pv.log_marginal(one_draw_only, vae.guide, x)


def test_data_that_the_model_cannot_make_have_minus_infinity() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(torch.zeros_like(z)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, 1.0))

    x = torch.tensor([0.0, 1.0])
    found = pv.log_marginal(model, guide, x, num_samples=200, defensive=0)
    np.testing.assert_allclose(found.log_px, [0.0, -math.inf], atol=1e-12)
    assert found.flagged.tolist() == [False, True]
    assert "log p(x)" in str(found)


def test_saves_and_loads_without_pickle(pair: Linear, tmp_path: object) -> None:
    evidence = pv.log_marginal(pair.model, pair.guide, pair.draw(5), num_samples=20, progress=False)
    for name in ("evidence.npz", "evidence.json"):
        found = pv.Evidence.load(evidence.save(tmp_path / name))
        assert str(found) == str(evidence)
        assert found.convergence == evidence.convergence
        assert found.provenance == evidence.provenance
        for column in ("log_px", "khat", "method", "flagged", "num_samples"):
            np.testing.assert_array_equal(getattr(found, column), getattr(evidence, column))
    with pytest.raises(ConfigError, match="npz"):
        evidence.save(tmp_path / "evidence.pkl")
    (tmp_path / "broken.npz").write_bytes(b"PK but no more")
    with pytest.raises(CorruptFileError):
        pv.Evidence.load(tmp_path / "broken.npz")
    with pytest.raises(FileNotFoundError):
        pv.Evidence.load(tmp_path / "absent.npz")


@pytest.fixture
def small(pair: Linear) -> pv.Evidence:
    return pv.log_marginal(pair.model, pair.guide, pair.draw(5), num_samples=20)


@pytest.mark.parametrize("damage", ["cut", "flipped", "short column", "no header", "a list"])
def test_a_damaged_npz_is_said_to_be_one(small: pv.Evidence, tmp_path: Path, damage: str) -> None:
    path = small.save(tmp_path / "evidence.npz")
    whole = bytearray(path.read_bytes())
    columns = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        whole[len(whole) // 3] ^= 255
        path.write_bytes(whole)
    elif damage == "short column":
        np.savez(path, **{**columns, "se": columns["se"][:3]})
    elif damage == "no header":
        np.savez(path, **{n: c for n, c in columns.items() if n != "header"})
    else:
        np.savez(path, **{**columns, "header": np.array("[1, 2]")})
    with pytest.raises(CorruptFileError, match="holds no evidence"):
        pv.Evidence.load(path)


DAMAGED = [
    {"log_px": [1.0]}, {"log_px": 3.0}, {"log_px": [[0.0] * 5]}, {"flagged": ["yes"] * 5},
    {"method": [1, 2, 3, 4, 5]}, {"num_samples": [1.5] * 5}, {"convergence": [1, 2]},
    {"convergence": {"a": 1.0}}, {"provenance": 3}, {"data_size": 0}, {"data_size": "a"},
    {"more": 1}, {"se": ["hello"] * 5},
]  # fmt: skip


@pytest.mark.parametrize("entry", DAMAGED, ids=str)
def test_json_that_is_no_evaluation_is_said_to_be_none(
    small: pv.Evidence, tmp_path: Path, entry: dict[str, object]
) -> None:
    path = small.save(tmp_path / "evidence.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(CorruptFileError, match="holds no evidence"):
        pv.Evidence.load(path)
    for nothing in ("", "null", '"a"', "[]", "{}"):
        path.write_text(nothing)
        with pytest.raises(CorruptFileError, match="holds no evidence"):
            pv.Evidence.load(path)


def test_json_has_no_words_of_python(small: pv.Evidence, tmp_path: Path) -> None:
    """Infinity and NaN are no JSON; they come back all the same."""
    odd = replace(
        small, convergence={1: -math.inf, 20: math.nan}, log_px=np.full(5, -math.inf),
        provenance={"tf32_audit": {"data": 1, "largest_difference": math.inf}},
    )  # fmt: skip
    path = odd.save(tmp_path / "evidence.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    found = pv.Evidence.load(path)
    assert (found.log_px == -math.inf).all()
    assert found.convergence[1] == -math.inf
    assert math.isnan(found.convergence[20])


def test_figures_of_the_data_set(pair: Linear) -> None:
    evidence = pv.log_marginal(pair.model, pair.guide, pair.draw(50), num_samples=300)
    assert evidence.mean == pytest.approx(evidence.log_px.mean())
    assert evidence.se_mc == pytest.approx(math.sqrt((evidence.se**2).sum()) / 50)
    assert evidence.se_total == pytest.approx(evidence.log_px.std(ddof=1) / math.sqrt(50))
    assert evidence.bits_per_dim == pytest.approx(-evidence.mean / 5 / math.log(2))
    np.testing.assert_allclose(evidence.bias_est, -(evidence.se**2) / 2)
    assert list(evidence.convergence)[-1] == 300
    assert evidence.convergence[300] == pytest.approx(evidence.mean)
    assert evidence.provenance["seed"] == 0


def test_takes_arrays_and_splits(pair: Linear) -> None:
    x = pair.draw(4)
    options = {"num_samples": 10, "progress": False}
    expected = pv.log_marginal(pair.model, pair.guide, x, **options).log_px
    for same in (x.numpy(), x.tolist(), pv.Split(x)):
        found = pv.log_marginal(pair.model, pair.guide, same, **options).log_px
        np.testing.assert_array_equal(found, expected)


def test_full_precision_whatever_training_chose(pair: Linear) -> None:
    seen = set()

    def model(x: Tensor) -> None:
        autocast = torch.is_autocast_enabled("cpu")
        seen.add((torch.get_float32_matmul_precision(), autocast, torch.backends.cudnn.allow_tf32))
        pair.model(x)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pv.log_marginal(model, pair.guide, pair.draw(3), num_samples=5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {("highest", False, False)}


@pytest.mark.parametrize("method", ["is", "auto", "ais", "enumerate"])
def test_tf32_is_audited(pair: Linear, method: str) -> None:
    """A model that errs by 0.01 nats wherever products may be rounded."""

    def model(x: Tensor) -> None:
        error = 0.01 if torch.get_float32_matmul_precision() == "high" else 0.0
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4))
            if method == "enumerate":
                loc = c[..., None] * pair.b
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = c[..., None] + z @ pair.W.T
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
            pyro.factor("error", torch.full(x.shape[:1], error))

    x = pair.draw(40)
    options = {"num_samples": 500, "method": method, "annealing": Annealing(4, 5, 2)}
    full = pv.log_marginal(model, pair.guide, x, **options)
    rounded = pv.log_marginal(model, pair.guide, x, **options, tf32=True)
    audit = rounded.provenance["tf32_audit"]
    assert audit == {"data": 16, "largest_difference": pytest.approx(0.01)}
    assert "differs by up to 0.01 nats" in str(rounded)
    assert "TF32" not in str(full)
    assert "tf32_audit" not in full.provenance


def test_float32_is_right_to_a_thousandth_of_a_nat() -> None:
    """The whole evaluation, same draws: binary data, a confident decoder, a tanh encoder."""
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(10, [100], 200)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(200, [100], 20)),
    )
    for parameter in vae.likelihood.parameters():
        parameter.data.mul_(5)
    x = (torch.rand(20, 200) < 0.5).double()
    z = torch.randn(300, 20, 10).float()  # float32's draws, which float64 is to take as well
    found = {}
    for dtype in (torch.float32, torch.float64):
        vae.to(dtype)
        with same_noise(z.to(dtype)):
            found[dtype] = pv.log_marginal(vae.model, vae.guide, x, num_samples=300)
    for name in ("log_px", "elbo", "log_px_jackknife"):
        one, other = (getattr(e, name) for e in found.values())
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert found[torch.float32].provenance["precision"] == "float32"


@contextmanager
def same_noise(u: Tensor) -> Iterator[None]:
    """Give log_marginal these `(num_draws, rows, latent)` as the noise of every guide site."""
    rows = iter(range(u.shape[1]))

    def noise(shape: object, axis: int, streams: list, dtype: torch.dtype) -> Tensor:
        return u[:, [next(rows) for _ in streams]]

    with mock.patch.object(draws, "noise", noise):
        yield


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu() -> None:
    pair, x = Binary.random(pixels=8, latent=2), all_images(8)
    on_cpu = pv.log_marginal(pair.model, pair.guide, x, method="grid", progress=False)
    for module in (pair.decoder, pair.encoder):
        module.cuda()
    x, zeros = x.cuda(), torch.zeros(2, device="cuda")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=pair.decoder(z)).to_event(1), obs=x)

    on_cuda = pv.log_marginal(model, pair.guide, x, method="grid", progress=False)
    np.testing.assert_allclose(on_cuda.log_px, on_cpu.log_px, atol=1e-3)
    sampled = pv.log_marginal(model, pair.guide, x, num_samples=2000, progress=False)
    z = (sampled.log_px - on_cpu.log_px) / sampled.se
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert sampled.provenance["device"].startswith("cuda")
