"""Imputations are draws from p(x_mis|x_obs): exact in a linear model, whatever the guide."""

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Linear
from test_cli import FAST, run
from test_incomplete import mixed_table, mixed_vae, with_holes
from torch import Tensor
from toys import z_scores

import pyro_vae as pv
from pyro_vae.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    ShapeError,
    SiteError,
    SupportError,
    UnknownNameError,
)
from pyro_vae.evidence.ground import undisturbed
from pyro_vae.imputation.chains import SplitMeans
from pyro_vae.imputation.holes import Holes, State

NAN = float("nan")


def conditional(p: Linear, row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the missing values of a row given the rest (Bishop, eq. 2.81)."""
    covariance = p.W @ p.W.T + p.sigma**2 * torch.eye(len(p.b))
    hole = row.isnan()
    across = covariance[hole][:, ~hole]
    gain = torch.linalg.solve(covariance[~hole][:, ~hole], across.T).T
    mean = p.b[hole] + gain @ (row[~hole] - p.b[~hole])
    return mean, covariance[hole][:, hole] - gain @ across.T


def holed_row(p: Linear) -> Tensor:
    row = p.draw(1)[0]
    row[[1, 3]] = NAN
    return row


def missing_draws(p: Linear, row: Tensor, copies: int, **options) -> Tensor:
    """The missing values of one row, imputed in many copies of it: independent draws."""
    x = row.repeat(copies, 1)
    found = pv.impute(p.model, p.guide, x, num_imputations=1, **options)
    return found.values[0][:, row.isnan()]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("metropolis", {"num_samples": 1, "num_sweeps": 40}),
        ("importance", {"num_samples": 1000}),
        ("metropolis", {"num_samples": 200, "num_sweeps": 5}),
    ],
)
def test_draws_are_from_the_exact_conditional_though_the_guide_is_wrong(method, options):
    p = Linear.random(4, 2, shift=0.7, shrink=1.5)
    row = holed_row(p)
    mean, covariance = conditional(p, row)
    draws = missing_draws(p, row, 2000, method=method, **options)
    # 5 z-scores beyond 3.5 a method: odds of 1 in 400
    assert z_scores(draws, mean).abs().max() < 3.5
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None]
    assert (
        z_scores(products.flatten(1)[:, [0, 1, 3]], covariance.flatten()[[0, 1, 3]]).abs().max()
        < 3.5
    )


def test_without_the_correction_a_wrong_guide_shows():
    p = Linear.random(4, 2, shift=0.7, shrink=1.5)
    row = holed_row(p)
    mean, covariance = conditional(p, row)
    draws = missing_draws(p, row, 2000, method="gibbs", num_sweeps=30)
    assert z_scores(draws, mean).abs().max() > 10
    assert z_scores((draws - mean) ** 2, covariance.diagonal()).abs().max() > 10


def test_with_the_exact_posterior_as_guide_pseudo_gibbs_is_exact():
    p = Linear.random(4, 2)
    row = holed_row(p)
    mean, covariance = conditional(p, row)
    x = row.repeat(2000, 1)
    found = pv.impute(p.model, p.guide, x, num_imputations=1, method="metropolis", num_sweeps=30)
    torch.testing.assert_close(found.acceptance, torch.ones(2000))  # it has nothing to correct
    draws = missing_draws(p, row, 2000, method="gibbs", num_sweeps=30)
    assert z_scores(draws, mean).abs().max() < 3.5
    assert z_scores((draws - mean) ** 2, covariance.diagonal()).abs().max() < 3.5


@pytest.mark.parametrize("kernel", ["sweep", "move"])
def test_each_kernel_leaves_the_conditional_as_it_is(kernel):
    """From exact draws, after a few steps of one kernel alone, still exact draws."""
    p = Linear.random(4, 2, shift=0.7, shrink=1.5)
    row, copies = holed_row(p), 4000
    mean, covariance = conditional(p, row)
    x = row.repeat(copies, 1)
    whole = x.clone()
    whole[:, row.isnan()] = torch.distributions.MultivariateNormal(mean, covariance).sample(
        (copies,)
    )
    spread = torch.linalg.cholesky(torch.linalg.inv(p.precision))
    z = p.posterior_mean(whole) + torch.randn(copies, 2) @ spread.T
    with undisturbed(p.model, p.guide):
        holes = Holes.of(p.model, p.guide, x, (), None)
        state = State({"z": z}, whole, whole)
        for _ in range(4):
            if kernel == "sweep":
                state, moved = holes.sweep(state, correct=True)
            else:  # a step so coarse that the dynamics without the correction would show
                state, moved = holes.move(state, torch.tensor(0.4), 3)
    assert 0.3 < moved.double().mean() < 0.9
    drawn = state.x[:, row.isnan()]
    assert z_scores(drawn, mean).abs().max() < 3.5
    assert z_scores((drawn - mean) ** 2, covariance.diagonal()).abs().max() < 3.5
    seen = ~row.isnan()  # z itself: p(z|x_obs) is that of the model of the observed features
    part = Linear(p.W[seen], p.b[seen], p.sigma)
    error = state.z["z"] - part.posterior_mean(row[seen][None])
    assert z_scores(error, 0.0).abs().max() < 3.5
    truth = torch.linalg.inv(part.precision)
    assert z_scores(error**2, truth.diagonal()).abs().max() < 3.5
    assert z_scores(error.prod(1), truth[0, 1]).abs() < 3.5


@pytest.mark.parametrize(
    ("method", "shift", "shrink", "options"),
    [
        ("metropolis", 0.3, 1.3, {"num_samples": 100, "num_sweeps": 20}),
        # far off and too narrow: the guide's proposals are hardly ever accepted
        ("metropolis", 2.5, 0.7, {"num_sweeps": 20}),
        ("importance", 0.3, 4.0, {"num_samples": 2000}),
        # of weights without the draws from the prior those that pass for even cover 84%
        ("importance", 1.5, 1.0, {"num_samples": 2000}),
    ],
)
def test_intervals_of_ninety_percent_hold_ninety_percent(method, shift, shrink, options):
    p = Linear.random(5, 2, shift=shift, shrink=shrink)
    whole = p.draw(1500)
    x = with_holes(whole, 0.4)
    found = pv.impute(p.model, p.guide, x, num_imputations=39, method=method, **options)
    assert found.flagged.double().mean() < (0.05 if method == "metropolis" else 0.3)
    low, high = found.interval(0.9)
    hole = ~found.observed & ~found.flagged[:, None]
    inside = ((whole > low) & (whole < high))[hole].double()
    assert hole.sum() > 2000  # standard error 0.67% at most: 2% is 3 of them
    assert 0.88 < inside.mean() < 0.92
    np.testing.assert_array_equal(low[found.observed], whole[found.observed])


@pytest.mark.parametrize("num_sweeps", [10, 11])
def test_rhat_is_that_of_arviz(num_sweeps):
    import arviz

    drift = torch.arange(num_sweeps)[:, None, None] * torch.tensor([0.0, 2.0])  # (S, 1, 2)
    runs = 1e4 + drift + torch.randn(num_sweeps, 3 * 4, 2)  # 3 chains of 4 rows
    means = SplitMeans(runs[0], num_sweeps)
    for sweep, value in enumerate(runs):
        means.add(sweep, value)
    ours = means.rhat(torch.Size([3, 4])).numpy()
    assert (ours[:, 1] > ours[:, 0]).all()
    for row in range(4):
        for column in range(2):
            chains = runs.unflatten(1, (3, 4))[:, :, row, column].T.numpy()
            theirs = arviz.rhat(chains, method="split")
            np.testing.assert_allclose(ours[row, column], theirs, rtol=1e-8)


def test_intervals_from_twenty_draws_are_as_honest_as_from_many():
    draws = torch.randn(19, 40_000, 1)
    full = torch.ones(40_000, 1, dtype=torch.bool)
    nothing = torch.zeros(40_000)
    found = pv.Imputations(draws, full, draws.mean(0), "gibbs", *[nothing] * 4)
    low, high = found.interval(0.9)
    fresh = torch.randn(40_000, 1)
    share = ((fresh > low) & (fresh < high)).double()
    assert z_scores(share, 0.9).abs() < 3.5
    with pytest.raises(ConfigError, match="95% takes at least 39 imputations, there are 19"):
        found.interval(0.95)


def test_the_mean_is_that_of_the_conditional_and_less_noisy_than_the_draws():
    p = Linear.random(4, 2, shift=0.3)
    row = holed_row(p)
    mean, _ = conditional(p, row)
    found = pv.impute(p.model, p.guide, row.repeat(1000, 1), num_imputations=5)
    hole = row.isnan()
    means, averages = found.mean[:, hole], found.values.mean(0)[:, hole]
    assert z_scores(means, mean).abs().max() < 3.5
    assert (means.var(0) < averages.var(0)).all()
    torch.testing.assert_close(found.mean[:, ~hole], row[~hole].expand(1000, -1))


def test_observed_values_stay_and_a_mask_is_the_same_as_nan():
    p = Linear.random(4, 2)
    whole = p.draw(20)
    x = with_holes(whole)
    by_nan = pv.impute(p.model, p.guide, x, num_imputations=3, num_sweeps=5)
    by_mask = pv.impute(p.model, p.guide, whole, num_imputations=3, num_sweeps=5, mask=~x.isnan())
    torch.testing.assert_close(by_nan.values, by_mask.values, rtol=0, atol=0)
    assert (by_nan.values == whole)[:, by_nan.observed].all()
    assert by_nan.values.isfinite().all()
    as_array = pv.impute(p.model, p.guide, whole.numpy(), num_imputations=3, num_sweeps=5,
                         mask=(~x.isnan()).numpy())  # fmt: skip
    torch.testing.assert_close(by_nan.values, as_array.values, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["metropolis", "importance", "gibbs"])
def test_mixed_columns_are_filled_within_their_supports(method):
    vae = mixed_vae()
    x = with_holes(mixed_table(), 0.5)
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    found = pv.impute(vae.model, vae.guide, x, num_imputations=6, method=method, num_sweeps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())
    for completed in found.values:
        vae.likelihood.likelihood.check(completed)
    assert set(found.mode()[:, 2].tolist()) <= {0.0, 1.0, 2.0, 3.0}
    again = pv.impute(vae.model, vae.guide, x, num_imputations=6, method=method, num_sweeps=3)
    assert torch.equal(found.values, again.values)
    other = pv.impute(
        vae.model, vae.guide, x, num_imputations=6, method=method, num_sweeps=3, seed=1
    )
    assert not torch.equal(found.values, other.values)


def test_categories_are_drawn_with_their_conditional_probabilities():
    """Two binary values that z ties together: p(b|a) by a sum over a fine grid of z."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            logits = 3 * z + torch.tensor([0.5, -0.5])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1] - 0.5, 1.2).to_event(1))

    z = torch.linspace(-8, 8, 4001)
    weight = torch.exp(-0.5 * z**2) * torch.sigmoid(3 * z + 0.5)
    truth = (weight * torch.sigmoid(3 * z - 0.5)).sum() / weight.sum()
    x = torch.tensor([[1.0, NAN]]).repeat(2000, 1)
    for method in ("metropolis", "importance"):
        found = pv.impute(model, guide, x, num_imputations=1, method=method, num_sweeps=30)
        assert z_scores(found.values[0, :, 1], truth).abs() < 3.5
        assert z_scores(found.mean[:, 1], truth).abs() < 3.5


def test_values_in_a_plate_and_further_arguments_are_taken_by_row():
    """Features in a plate of their own, shifted by a covariate of each row."""
    p = Linear.random(3, 2)

    def model(x, shift):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1, 2), 1.0).to_event(1))
            loc = z.squeeze(-2) @ p.W.T + shift[:, None]
            with pyro.plate("features", 3, dim=-1):
                pyro.sample("x", dist.Normal(loc, p.sigma), obs=x)

    def guide(x, shift):
        with pyro.plate("data", len(x), dim=-2):
            loc = torch.zeros(len(x), 1, 2)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    shift = torch.tensor([-50.0, 50.0]).repeat_interleave(1000)
    row = holed_row(Linear.random(4, 2))[:3]
    x = row + shift[:, None]
    found = pv.impute(model, guide, x, shift, num_imputations=1, num_sweeps=40)
    drawn = (found.values[0] - shift[:, None])[:, row.isnan()]
    centred = Linear(p.W, torch.zeros(3), p.sigma)
    mean, covariance = conditional(centred, row)
    assert z_scores(drawn, mean).abs().max() < 3.5
    assert z_scores((drawn - mean) ** 2, covariance.diagonal()).abs().max() < 3.5


def test_an_empty_datum_is_an_error_or_a_draw_from_the_model():
    p = Linear.random(4, 2, shift=0.7)
    x = torch.cat([p.draw(1), torch.full((3000, 4), NAN)])
    with pytest.raises(DataError, match=r"row 1 \(and 2999 more\) has no observed value"):
        pv.impute(p.model, p.guide, x)
    found = pv.impute(p.model, p.guide, x, num_imputations=1, num_sweeps=1, allow_empty=True)
    draws = found.values[0, 1:]
    assert z_scores(draws, p.b).abs().max() < 3.5
    variance = (p.W @ p.W.T + p.sigma**2 * torch.eye(4)).diagonal()
    assert z_scores((draws - p.b) ** 2, variance).abs().max() < 3.5
    assert not found.flagged[1:].any()
    assert (found.acceptance[1:] == 1).all()
    assert (found.rhat[1:] == 1).all()
    x[0, 0] = NAN
    few = pv.impute(
        p.model, p.guide, x, num_imputations=1, method="importance", num_samples=3, allow_empty=True
    )
    assert few.flagged.tolist() == [True] + [False] * 3000


def test_draws_that_are_not_to_be_trusted_are_flagged():
    bad = Linear.random(4, 2, shift=6.0, shrink=0.3)
    good = Linear.random(4, 2, shrink=5.0)
    x = with_holes(good.draw(10))
    holed = x.isnan().any(1)
    assert 0 < holed.sum() < 10
    for p, method, options, flagged in [
        (bad, "importance", {"num_samples": 150}, True),
        (good, "importance", {"num_samples": 4000}, False),
        (bad, "gibbs", {"num_sweeps": 3}, True),  # too few to know
        (bad, "metropolis", {"num_sweeps": 3}, True),
        (good, "metropolis", {"num_sweeps": 30}, False),
        (bad, "metropolis", {"num_sweeps": 60}, False),
    ]:
        found = pv.impute(p.model, p.guide, x, method=method, **options)
        assert (found.flagged[holed] == flagged).all(), (p, method)
        assert not found.flagged[~holed].any()  # nothing is drawn there


def test_chains_that_never_move_are_flagged():
    """Of a discrete latent variable, whose proposals are all refused: R-hat has nothing to see."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            loc = torch.stack([k, k], -1) * 100.0
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.tensor([1.0, 0.0])))

    x = torch.tensor([[100.0, NAN], [0.0, NAN]])
    found = pv.impute(model, guide, x, num_samples=20, num_sweeps=20)
    assert found.flagged.tolist() == [True, False]
    assert found.rhat.tolist() == [np.inf, 1.0]
    assert z_scores(found.values[:, 0, 1], 100.0).abs() < 4  # of the prior's draws, which know it


def test_errors_name_what_is_wrong():
    p = Linear.random(4, 2)
    x = with_holes(p.draw(6))
    for error, match, data, options in [
        (UnknownNameError, "'metropolis', 'importance', 'gibbs'", x, {"method": "mice"}),
        (ConfigError, "num_imputations .* at least 1, got 0", x, {"num_imputations": 0}),
        (ConfigError, "num_imputations .* at least 1, got 2.5", x, {"num_imputations": 2.5}),
        (ConfigError, "num_samples .* at least 1, got '3'", x, {"num_samples": "3"}),
        (ConfigError, "num_sweeps .* at least 1, got 0", x, {"num_sweeps": 0}),
        (DataError, "mask is boolean", x, {"mask": torch.ones(6, 4)}),
        (DataError, "mask is boolean", x, {"mask": np.array(["yes"])}),
        (ShapeError, r"shape is \(4,\)", x[0], {}),
        (ShapeError, r"mask of shape \(6, 3\)", x, {"mask": torch.ones(6, 3, dtype=torch.bool)}),
        (DataError, "floating point", torch.ones(3, 4, dtype=torch.long), {}),
        (DataError, r"x\[0, 1\] = inf", torch.tensor([[0, torch.inf, NAN, 0]]), {}),
        (SiteError, '"y" is no observed site', x, {"site": "y"}),
    ]:
        with pytest.raises(error, match=match):
            pv.impute(p.model, p.guide, data, **options)


def test_programs_that_cannot_be_imputed_are_refused():
    p = Linear.random(4, 2)
    x = with_holes(p.draw(6))

    def model(x, features=4, dependent=False, twice=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z @ p.W.T[:, :features]
            fn = dist.Normal(loc, 1.0).to_event(1)
            if dependent:
                fn = dist.MultivariateNormal(loc, torch.eye(features))
            pyro.sample("x", fn, obs=x[:, :features])
            if twice:
                pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=x[:, 0].nan_to_num())

    with pytest.raises(ShapeError, match=r'"x" has values of shape \(2, 3\)'):
        pv.impute(lambda x: model(x, 3), p.guide, x)
    with pytest.raises(SiteError, match="not independent given z"):
        pv.impute(lambda x: model(x, dependent=True), p.guide, x)
    with pytest.raises(SiteError, match=r"\['x', 'y'\]: say which"):
        pv.impute(lambda x: model(x, twice=True), p.guide, x)
    pv.impute(lambda x: model(x, twice=True), p.guide, x, site="x", num_sweeps=2)


def test_a_mask_may_be_that_of_one_datum_and_what_it_hides_does_not_matter():
    p = Linear.random(4, 2)
    whole = p.draw(5)
    one = torch.tensor([True, False, True, False])
    x = torch.where(one, whole, torch.nan)
    expected = pv.impute(p.model, p.guide, x, num_sweeps=2).values
    for hidden in (-999.0, torch.inf, 1e300):
        for mask in (one, one[None].numpy(), one.tolist()):
            given = torch.where(one, whole, hidden)
            found = pv.impute(p.model, p.guide, given, mask=mask, num_sweeps=2)
            assert torch.equal(found.values, expected)
    masked = np.ma.masked_array(whole.numpy(), np.broadcast_to(~one.numpy(), (5, 4)))
    assert torch.equal(pv.impute(p.model, p.guide, masked, num_sweeps=2).values, expected)


def test_observed_values_outside_the_support_are_refused_by_row():
    vae = mixed_vae()
    x = mixed_table(3)
    x[2, 1], x[2, 0] = 0.5, NAN
    with pytest.raises(SupportError, match="row 2"):
        pv.impute(vae.model, vae.guide, x)


def test_weights_that_are_all_zero_are_an_error_by_row():
    vae = mixed_vae()
    with torch.no_grad():
        vae.likelihood.likelihood.network.layers[-1].bias[0] = 1e200
    x = mixed_table(3)
    x[:, 1] = NAN
    with pytest.raises(NonFiniteError, match="datum 0"):
        pv.impute(vae.model, vae.guide, x)


# the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    run("train", "--out", folder, "--binarize", "threshold", *FAST)
    return folder


def holed_digits(tmp_path: Path, **arrays) -> tuple[Path, np.ndarray]:
    digits = pv.datasets.load("digits", binarize="threshold").test.x[:5].numpy()
    x = digits.copy()
    x[:, 32:] = np.nan
    np.savez(tmp_path / "holes.npz", **({"x": x} | arrays))
    return tmp_path / "holes.npz", digits


def test_the_command_fills_in_the_lower_half(trained, tmp_path):
    file, digits = holed_digits(tmp_path)
    said = run("impute", trained, "--data", file, "--num-sweeps", "3").stdout
    assert "160 values of 5 data filled in 20 times" in said
    with np.load(trained / "imputations.npz") as found:
        assert found["values"].shape == (20, 5, 64)
        assert (found["values"][:, :, :32] == digits[:, :32]).all()
        assert np.isin(found["values"], [0, 1]).all()
        assert (found["low"] <= found["high"]).all()
        assert not found["observed"][:, 32:].any()
    said = run("impute", trained, "--data", file, code=1)
    assert "is there already: --overwrite" in said.stderr


def test_the_command_takes_a_mask_and_images(trained, tmp_path):
    mask = np.ones((5, 8, 8), bool)
    mask[:, 4:] = False
    whole = pv.datasets.load("digits", binarize="threshold").test.x[:5].reshape(5, 8, 8).numpy()
    file, _ = holed_digits(tmp_path, x=whole, mask=mask)
    by_nan, _ = holed_digits(tmp_path)
    outs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    options = ["--method", "importance", "--num-imputations", "3"]
    for data, out in zip((file, by_nan), outs, strict=True):
        run("impute", trained, "--data", data, "--out", out, *options)
    first, second = (np.load(out)["values"] for out in outs)
    np.testing.assert_array_equal(first, second)
    assert "low" not in np.load(outs[0])


def test_the_command_reads_tables_with_empty_cells(trained, tmp_path):
    file, digits = holed_digits(tmp_path)
    table = tmp_path / "holes.csv"
    lines = [",".join(str(int(v)) for v in row[:32]) + "," * 32 for row in digits]
    table.write_text("\n".join([",".join(f"pixel {i}" for i in range(64)), *lines]))
    outs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for data, out in zip((file, table), outs, strict=True):
        said = run("impute", trained, "--data", data, "--out", out, "--num-sweeps", "3").stdout
        assert "5 data flagged: raise --num-sweeps" in said
    np.testing.assert_array_equal(*(np.load(out)["values"] for out in outs))
    for cell, message in (("one", "'one' is not a number"), ("inf", "inf at row 5")):
        table.write_text("\n".join([*lines, cell + lines[0][1:]]))
        said = run("impute", trained, "--data", table, "--out", tmp_path / "c.npz", code=1).stderr
        assert message in said


def test_the_command_takes_the_mask_of_one_image(trained, tmp_path):
    mask = np.ones((8, 8), bool)
    mask[4:] = False
    whole = pv.datasets.load("digits", binarize="threshold").test.x[:5].reshape(5, 8, 8).numpy()
    file, _ = holed_digits(tmp_path, x=whole, mask=mask)
    by_nan, _ = holed_digits(tmp_path)
    run("impute", trained, "--data", file, "--out", tmp_path / "a.npz", "--num-sweeps", "2")
    run("impute", trained, "--data", by_nan, "--out", tmp_path / "b.npz", "--num-sweeps", "2")
    first, second = (np.load(tmp_path / out)["observed"] for out in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(first, second)


def test_the_command_refuses_a_model_with_a_context(tmp_path):
    run("train", "--out", tmp_path / "c", "--model", "cvae", "--binarize", "threshold", *FAST)
    file, _ = holed_digits(tmp_path)
    said = run("impute", tmp_path / "c", "--data", file, code=1)
    assert "is given a context" in said.stderr


def test_the_command_says_what_it_cannot_fill(trained, tmp_path):
    empty = np.full((2, 64), np.nan)
    for x, message in [
        (empty, "row 0 (and 1 more) has no observed value"),
        (np.full((2, 63), 1.0), "63 values a row"),
        (np.full((2, 64), 0.5), "0.5"),
        (np.array(["a"]), "a datum a row"),
        (empty[:0], "a datum a row"),
    ]:
        file, _ = holed_digits(tmp_path, x=x)
        out = tmp_path / "none.npz"
        assert message in run("impute", trained, "--data", file, "--out", out, code=1).stderr
        assert not out.exists()
    file, _ = holed_digits(tmp_path, x=empty)
    run("impute", trained, "--data", file, "--out", tmp_path / "drawn.npz", "--allow-empty")
    file, _ = holed_digits(tmp_path, a=empty, x=empty)
    np.savez(tmp_path / "two.npz", a=empty, b=empty)
    said = run(
        "impute", trained, "--data", tmp_path / "two.npz", "--out", tmp_path / "c.npz", code=1
    )
    assert 'save the data as "x"' in said.stderr
    said = run("impute", trained, "--data", file, "--out", tmp_path / "c.csv", code=1)
    assert "saved as .npz" in said.stderr
