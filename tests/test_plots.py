"""Figures hold the numbers they claim to: image data, curves, contours, labels, errors."""

import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from scipy import stats

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.errors import ConfigError, DataError, ShapeError
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP
from pyro_vae.plots import latent
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import StandardNormal

SHAPE = (3, 4)


def make_vae(latent=2, features=12, likelihood=Bernoulli, prior=None, posterior=None):
    torch.manual_seed(7)
    decoder = torch.nn.Sequential(MLP(latent, [8], features), torch.nn.Dropout(0.5))
    encoder = MLP(features, [8], 2 * latent)
    return pv.VAE(
        prior or StandardNormal(latent), likelihood(decoder), posterior or DiagonalNormal(encoder)
    )


def binary(rows, features=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, features, generator=generator).round()


def decoded(vae, z):
    """E[x|z] in evaluation mode, by a way of its own."""
    modes = [(m, m.training) for m in vae.modules()]
    vae.eval()
    with torch.no_grad():
        mean = vae.decode(z).mean.numpy()
    for module, mode in modes:
        module.training = mode
    return mean


def cells(axes, columns, shape=SHAPE, edge=1):
    """The images of a mosaic, row by row, cut out by hand."""
    (image,) = axes.images
    mosaic = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)
    height, width = shape[-2] + 2 * edge, shape[-1] + 2 * edge
    found = []
    for top in range(0, mosaic.shape[0], height):
        for left in range(0, columns * width, width):
            cell = mosaic[top : top + height, left : left + width]
            found.append(cell[edge : height - edge, edge : width - edge].reshape(-1))
    return np.array(found)


def lines_of(axes):
    """Paths of the collections of data lines (frames have five corners), an array each."""
    paths = [[p.vertices for p in c.get_paths()] for c in axes.collections
             if isinstance(c, LineCollection)]  # fmt: skip
    return [np.array(p) for p in paths if len(p[0]) != 5]


def metrics(epochs=40):
    rows = []
    for epoch in range(1, epochs + 1):
        loss = 20 + 100 / epoch
        valid = 25 + (epoch - 30) ** 2 / 100
        row = {"epoch": epoch, "step": 10 * epoch, "seconds": 0.1 * epoch, "kl_weight": 1.0,
               "train_loss": loss, "train_elbo": -loss, "train_reconstruction": 3 - loss,
               "train_kl": 3.0 + 1 / epoch, "valid_loss": valid, "valid_elbo": -valid,
               "valid_reconstruction": 4 - valid, "valid_kl": 4.0}  # fmt: skip
        rows.append(row)
    return rows


def curves(axes):
    return {str(line.get_label()): line for line in axes.get_lines()}


# training curves


def test_training_curves_hold_the_columns_in_their_panels():
    rows = metrics()
    figure = plots.training_curves(rows)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4
    for axes, term in zip(figure.axes, ("loss", "elbo", "reconstruction", "kl"), strict=True):
        drawn = curves(axes)
        for label, part in (("train", "train"), ("validation", "valid")):
            np.testing.assert_array_equal(drawn[label].get_xdata(), np.arange(1, 41))
            expected = [row[f"{part}_{term}"] for row in rows]
            np.testing.assert_array_equal(drawn[label].get_ydata(), expected)
        assert axes.get_ylabel() == "nats per datum"
        assert drawn["best epoch (30)"].get_xdata()[0] == 30


def test_training_curves_take_rows_columns_and_files_alike(tmp_path):
    from pyro_vae.training.metrics import MetricsLog

    rows = metrics(5)
    log = MetricsLog(tmp_path)
    for row in rows:
        log.append(row)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    sources = [rows, columns, tmp_path / "metrics.csv", str(tmp_path / "metrics.csv")]
    drawn = [
        [line.get_xydata() for axes in plots.training_curves(s).axes for line in axes.get_lines()]
        for s in sources
    ]
    for other in drawn[1:]:
        for a, b in zip(drawn[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_training_curves_take_a_pandas_table():
    pandas = pytest.importorskip("pandas")
    figure = plots.training_curves(pandas.DataFrame(metrics(5)))
    assert curves(figure.axes[0])["train"].get_ydata()[0] == 120


def test_training_curves_need_no_validation():
    rows = [{k: v for k, v in row.items() if not k.startswith("valid")} for row in metrics(3)]
    figure = plots.training_curves(rows)
    assert [list(curves(axes)) for axes in figure.axes] == [["train"]] * 4


def test_best_epoch_is_that_of_the_validation_loss_before_the_elbo():
    rows = metrics()
    for row in rows:
        row["valid_elbo"] = row["epoch"]
    assert "best epoch (30)" in curves(plots.training_curves(rows).axes[1])
    for row in rows:
        del row["valid_loss"]
    assert "best epoch (40)" in curves(plots.training_curves(rows).axes[1])


def test_log_px_taken_now_and_then_is_drawn_where_it_was_taken():
    rows = metrics(10)
    rows[3]["valid_log_px"], rows[8]["valid_log_px"] = -22.0, -21.0
    line = curves(plots.training_curves(rows).axes[1])[r"validation $\log \hat p(x)$"]
    np.testing.assert_array_equal(line.get_xydata(), [[4, -22], [9, -21]])


def test_kl_weight_is_shown_only_where_it_is_not_one():
    assert len(plots.training_curves(metrics()).axes) == 4
    rows = metrics()
    for row in rows:
        row["kl_weight"] = min(1.0, row["epoch"] / 10)
    figure = plots.training_curves(rows)
    np.testing.assert_array_equal(
        curves(figure.axes[4])["KL weight"].get_ydata(), [row["kl_weight"] for row in rows]
    )


def test_the_fall_at_the_start_leaves_the_frame_but_nothing_later_does():
    rows = metrics()
    rows[0]["train_loss"] = 1e6
    low, high = plots.training_curves(rows).axes[0].get_ylim()
    later = [row[name] for row in rows[2:] for name in ("train_loss", "valid_loss")]
    assert low < min(later) < max(later) < high < 1e3


def test_training_curves_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        plots.training_curves(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="train_loss"):
        plots.training_curves([{"epoch": 1.0}])
    with pytest.raises(DataError, match="no epoch"):
        plots.training_curves({name: [] for name in metrics(1)[0]})


def test_kl_per_dimension_is_sorted_counted_and_named():
    figure = plots.kl_per_dimension([0.5, 0.001, 2.0, 0.02])
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 0.5, 0.02, 0.001]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "0", "3", "1"]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert axes.get_title("left") == "3 of 4 dimensions above 0.01 nats"
    assert "nats" in axes.get_ylabel()
    assert (
        plots.kl_per_dimension([0.5, 2.0], threshold=1).axes[0].get_title("left").startswith("1 of")
    )


@pytest.mark.parametrize("kl", [[], [[1.0]], [1.0, math.nan]])
def test_kl_per_dimension_refuses_other_than_a_finite_vector(kl):
    with pytest.raises(DataError, match="KL per dimension"):
        plots.kl_per_dimension(kl)


# tiles


def test_tile_places_images_row_by_row_and_leaves_the_rest_white():
    rows = np.random.default_rng(0).random((5, 12))
    axes = Figure().subplots()
    plots.tile(axes, rows, SHAPE, 3)
    found = cells(axes, 3)
    np.testing.assert_allclose(found[:5], rows)
    assert np.isnan(found[5]).all()
    assert axes.images[0].get_extent() == [0, 3, 2, 0]


def test_tile_scales_grey_values_to_the_limits():
    axes = Figure().subplots()
    plots.tile(axes, [[-2.0, 0.0, 2.0, 6.0]], (2, 2), 1)
    np.testing.assert_allclose(cells(axes, 1, (2, 2))[0], [0, 0.25, 0.5, 1])
    axes = Figure().subplots()
    plots.tile(axes, [[3.0] * 4], (1, 2, 2), 1)  # a constant has no range to divide by
    np.testing.assert_allclose(cells(axes, 1, (2, 2))[0], 0.5)


def test_tile_reads_colour_images_channels_first():
    row = np.random.default_rng(0).random(3 * 2 * 4)
    axes = Figure().subplots()
    plots.tile(axes, [row], (3, 2, 4), 1, gap=False)
    shown = np.asarray(axes.images[0].get_array())
    for channel in range(3):
        np.testing.assert_allclose(shown[..., channel], row.reshape(3, 2, 4)[channel])


def test_tile_draws_features_as_lines_within_their_cells():
    rows = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    axes = Figure().subplots()
    plots.tile(axes, rows, None, 2)
    (lines,) = lines_of(axes)
    for index, line in enumerate(lines):
        x, y = line[:, 0] - index % 2, line[:, 1] - index // 2
        np.testing.assert_allclose(x, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(y, 0.9 - 0.8 * rows[index])  # y is downwards


@pytest.mark.parametrize(
    ("rows", "shape", "columns", "error", "match"),
    [
        (np.zeros((2, 12)), (3, 5), 1, ShapeError, "12 values.*15"),
        (np.zeros((2, 12)), (2, 2, 3), 1, ConfigError, "image_shape"),
        (np.zeros((2, 12)), (12,), 1, ConfigError, "image_shape"),
        (np.zeros((2, 12)), SHAPE, 0, ConfigError, "columns"),
        (np.zeros((0, 12)), SHAPE, 1, DataError, r"\(0, 12\)"),
        (np.zeros(12), SHAPE, 1, DataError, r"\(12,\)"),
    ],
)
def test_tile_refuses_other_shapes(rows, shape, columns, error, match):
    with pytest.raises(error, match=match):
        plots.tile(Figure().subplots(), rows, shape, columns)


# reconstructions, samples, manifold


def test_reconstructions_are_data_above_the_decoded_posterior_means():
    vae, x = make_vae(), binary(6)
    figure = plots.reconstructions(vae, x, SHAPE, num=4)
    (axes,) = figure.axes
    found = cells(axes, 4)
    np.testing.assert_allclose(found[:4], x[:4].numpy())
    with torch.no_grad():
        z = vae.encode(x[:4]).base_dist.loc
    np.testing.assert_allclose(found[4:], decoded(vae, z), rtol=1e-12)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["$x$", r"$\mathbb{E}[x\,|\,z]$"]
    assert cells(plots.reconstructions(vae, x.numpy(), SHAPE).axes[0], 6).shape == (12, 12)


def test_reconstructions_of_features_are_lines_over_the_data():
    vae, x = make_vae(likelihood=lambda net: Normal(net)), 5 * binary(3) - 1
    figure = plots.reconstructions(vae, x, None)
    data, mean = lines_of(figure.axes[0])
    assert len(data) == len(mean) == 3
    with torch.no_grad():
        expected = decoded(vae, vae.encode(x).mean)
    low, high = min(-1.0, expected.min()), max(4.0, expected.max())
    for drawn, rows in ((data, x.numpy()), (mean, expected)):
        values = low + (high - low) * (0.9 - drawn[..., 1] % 1) / 0.8
        np.testing.assert_allclose(values, rows, atol=1e-9)
    assert f"{low:.3g} to {high:.3g}" in figure.axes[0].get_xlabel()


def test_samples_show_means_beside_draws_at_the_same_z():
    vae = make_vae()
    figure = plots.samples(vae, SHAPE, num=400, seed=5)
    mean, drawn = (cells(axes, 20) for axes in figure.axes)
    torch.manual_seed(5)
    z = torch.randn(400, 2)
    np.testing.assert_allclose(mean, decoded(vae, z), rtol=1e-12)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    # sum of standardised residuals over 4800 independent Bernoullis: |z| < 4.9 but 1 in 1e6
    residual = (drawn - mean).sum() / np.sqrt((mean * (1 - mean)).sum())
    assert abs(residual) < 4.9
    # and draws belong to their own means: those of another z would fit worse
    fit = (drawn * np.log(mean) + (1 - drawn) * np.log1p(-mean)).sum()
    other = np.roll(mean, 1, 0)
    assert fit > (drawn * np.log(other) + (1 - drawn) * np.log1p(-other)).sum()
    assert ["E" in axes.get_title() for axes in figure.axes] == [True, False]


def test_samples_follow_their_seed_and_leave_the_global_generator_alone():
    vae = make_vae()
    state = torch.get_rng_state()
    first, again, other = (
        np.stack([cells(axes, 3) for axes in plots.samples(vae, SHAPE, num=9, seed=s).axes])
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())


def test_both_pictures_of_samples_share_one_scale():
    vae = make_vae(likelihood=lambda net: Normal(net, 2.0))
    figure = plots.samples(vae, SHAPE, num=9, seed=0)
    torch.manual_seed(0)
    mean = decoded(vae, torch.randn(9, 2))
    shown, drawn = (cells(axes, 3) for axes in figure.axes)
    assert drawn.min() == pytest.approx(0) and drawn.max() == pytest.approx(1)  # noqa: PT018
    slope, intercept = np.polyfit(mean.ravel(), shown.ravel(), 1)
    text = f"black {-intercept / slope:.3g}, white {(1 - intercept) / slope:.3g}"
    assert figure.get_supxlabel() == text


def test_manifold_decodes_the_quantiles_of_the_prior():
    vae, num = make_vae(), 5
    figure = plots.manifold(vae, SHAPE, num=num)
    (axes,) = figure.axes
    found = cells(axes, num)
    quantile = stats.norm.ppf((np.arange(num) + 0.5) / num)
    z = [[quantile[c], quantile[num - 1 - r]] for r in range(num) for c in range(num)]
    np.testing.assert_allclose(found, decoded(vae, torch.tensor(z)), rtol=1e-9)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")
    marked = dict(zip(axes.get_xticks(), [t.get_text() for t in axes.get_xticklabels()],
                      strict=True))  # fmt: skip
    assert marked[2.5] == "$0.00$"
    for place, text in marked.items():
        assert float(text.strip("$")) == pytest.approx(stats.norm.ppf(place / num), abs=6e-3)
    top = [float(t.get_text().strip("$")) for t in axes.get_yticklabels()]
    assert all(a < b for a, b in pairwise(top))
    assert all(a > b for a, b in pairwise(axes.get_yticks()))  # y is downwards, z2 upwards


def mixture(context=None):
    """Two far-apart Gaussians of equal weight: a prior with no inverse distribution function."""
    centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    parts = dist.Normal(centres, torch.ones(2, 2)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


def test_quantiles_of_a_prior_without_an_inverse_come_from_draws():
    from pyro_vae.plots.pictures import quantiles

    torch.manual_seed(0)
    found = quantiles(mixture(), torch.tensor([0.25, 0.75]))
    # the quartiles are the centres but for e-15; standard error sqrt(3/16/1e5)/(0.4/2) = 0.007
    np.testing.assert_allclose(found[:, 0], [-4, 4], atol=5 * 0.007)
    np.testing.assert_allclose(found[:, 1], stats.norm.ppf([0.25, 0.75]), atol=5 * 0.0043)
    assert plots.manifold(make_vae(prior=mixture), SHAPE, num=3).axes[0].images


def test_manifold_needs_two_dimensions():
    with pytest.raises(ConfigError, match=r"two dimensions.*\(3,\)"):
        plots.manifold(make_vae(latent=3), SHAPE)


@pytest.mark.parametrize("draw", [
    lambda vae: plots.samples(vae, SHAPE, num=0),
    lambda vae: plots.manifold(vae, SHAPE, num=0),
    lambda vae: plots.reconstructions(vae, binary(3), SHAPE, num=0),
])  # fmt: skip
def test_numbers_of_pictures_are_positive(draw):
    with pytest.raises(ConfigError, match="num must be a whole number of at least 1, got 0"):
        draw(make_vae())


@pytest.mark.parametrize("draw", [
    lambda vae: plots.samples(vae, (5, 5)),
    lambda vae: plots.manifold(vae, (5, 5)),
    lambda vae: plots.reconstructions(vae, binary(3), (5, 5)),
    lambda vae: plots.reconstructions(vae, binary(3, features=11), None),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(draw):
    with pytest.raises(ShapeError):
        draw(make_vae())


# latent map


def scattered(axes):
    return {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections
            if not isinstance(c, ContourSet)}  # fmt: skip


def contour(axes):
    (found,) = [c for c in axes.collections if isinstance(c, ContourSet)]
    return found


def test_latent_map_scatters_posterior_means_by_class():
    vae, x = make_vae(), binary(30)
    labels = torch.arange(30) % 3
    figure = plots.latent_map(vae, x, labels)
    (axes,) = figure.axes
    with torch.no_grad():
        means = vae.encode(x).mean.numpy()
    found = scattered(axes)
    assert set(found) == {"0", "1", "2"}
    for label in range(3):
        np.testing.assert_allclose(found[str(label)], means[labels == label])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["0", "1", "2"]
    at = {t.get_text(): t.xy for t in axes.texts if hasattr(t, "xy")}
    np.testing.assert_allclose(at["1"], np.median(means[labels == 1], 0))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")


def test_contours_of_a_standard_normal_are_circles_of_the_right_radius():
    (axes,) = plots.latent_map(make_vae(), binary(4)).axes
    paths = contour(axes).get_paths()
    assert len(paths) == 3
    for path, mass in zip(paths, (0.99, 0.9, 0.5), strict=True):
        radius = np.hypot(*path.vertices.T)
        exact = math.sqrt(-2 * math.log(1 - mass))
        # the level is a quantile over 20,000 draws: standard error of r, from that of the mass
        error = math.sqrt(mass * (1 - mass) / 20_000) / (exact * (1 - mass))
        assert abs(radius.mean() - exact) < 5 * error
        assert np.ptp(radius) < 0.01


def test_contours_of_a_mixture_are_two_of_each():
    (axes,) = plots.latent_map(make_vae(prior=mixture), binary(4)).axes
    inner = contour(axes).get_paths()[2].vertices
    # far apart, each half holds 50% of its own component: the circle of N(0, I) around a centre
    distance = np.hypot(np.abs(inner[:, 0]) - 4, inner[:, 1])
    np.testing.assert_allclose(distance, math.sqrt(2 * math.log(2)), atol=0.06)
    assert (inner[:, 0] > 0).any() and (inner[:, 0] < 0).any()  # noqa: PT018


def test_more_dimensions_are_shown_in_principal_components_and_said_so():
    from sklearn.decomposition import PCA

    vae, x = make_vae(latent=4), binary(50)
    (axes,) = plots.latent_map(vae, x).axes
    with torch.no_grad():
        means = vae.encode(x).mean.numpy()
    pca = PCA(2).fit(means)
    expected = means @ pca.components_.T
    (points,) = scattered(axes).values()
    signs = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points, signs * expected, atol=1e-9)
    for label, share in zip((axes.get_xlabel(), axes.get_ylabel()),
                            pca.explained_variance_ratio_, strict=True):  # fmt: skip
        assert "of 4 latent dimensions" in label
        assert f"{share:.0%}" in label
    radius = np.hypot(*contour(axes).get_paths()[1].vertices.T)
    np.testing.assert_allclose(radius, math.sqrt(-2 * math.log(0.1)), atol=0.08)


def test_the_projection_of_a_normal_prior_with_unequal_scales_is_exact():
    from pyro_vae.plots.latent import _density

    loc, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])
    prior = dist.Normal(loc, scale).to_event(1)
    directions, _ = torch.linalg.qr(torch.randn(3, 2))
    density, _ = _density(prior, directions, prior.sample((10,)))
    z = torch.randn(6, 2)
    covariance = directions.T @ torch.diag(scale**2) @ directions
    oracle = stats.multivariate_normal((loc @ directions).numpy(), covariance.numpy())
    np.testing.assert_allclose(density(z), oracle.logpdf(z.numpy()), rtol=1e-9)


def test_numbers_beyond_ten_get_a_colour_bar_and_names_a_legend():
    vae, x = make_vae(), binary(24)
    numbers = np.linspace(0, 1, 24)
    axes, bar = plots.latent_map(vae, x, numbers).axes
    (points,) = [c for c in axes.collections if c.get_array() is not None
                 and not isinstance(c, ContourSet)]  # fmt: skip
    np.testing.assert_array_equal(points.get_array(), numbers)
    assert bar.get_ylabel() == "label"
    names = np.array([f"kind {i % 12}" for i in range(24)])
    (axes,) = plots.latent_map(vae, x, names).axes
    assert len(axes.get_legend().get_texts()) == 12


def test_one_latent_dimension_is_shown_as_histograms_beside_the_prior():
    vae, x = make_vae(latent=1), binary(40)
    (axes,) = plots.latent_map(vae, x, torch.arange(40) % 2).axes
    (line,) = axes.get_lines()
    np.testing.assert_allclose(line.get_ydata(), stats.norm.pdf(line.get_xdata()), rtol=1e-9)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["0", "1", "prior"]
    assert len(axes.patches) == 2


class ShiftedFlow(torch.nn.Module):
    """q(z|x) with no mean in closed form: N(0, 1) pushed through z -> x[:2] + z."""

    def forward(self, x, context=None):
        base = dist.Normal(torch.zeros(len(x), 2), torch.ones(len(x), 2)).to_event(1)
        return dist.TransformedDistribution(
            base, [torch.distributions.AffineTransform(x[:, :2], 1.0, event_dim=1)]
        )


def test_means_of_a_flow_come_from_draws_of_the_seed():
    vae, x = make_vae(posterior=ShiftedFlow()), binary(500)
    (found,) = scattered(plots.latent_map(vae, x, seed=1).axes[0]).values()
    (again,) = scattered(plots.latent_map(vae, x, seed=1).axes[0]).values()
    np.testing.assert_array_equal(found, again)
    z = (found - x[:, :2].numpy()) * math.sqrt(256)
    assert abs(z.mean()) * math.sqrt(z.size) < 5  # 1 in 1.7e6
    assert abs(z.var() - 1) * math.sqrt(z.size / 2) < 5


def test_latent_map_refuses_labels_of_another_length_and_no_data():
    vae = make_vae()
    with pytest.raises(ShapeError, match=r"4 data.*\(3,\)"):
        plots.latent_map(vae, binary(4), [0, 1, 2])
    with pytest.raises(DataError, match=r"\(0, 12\)"):
        plots.latent_map(vae, torch.empty(0, 12))


# all of them


def test_figures_leave_vae_generator_and_pyplot_as_they_were():
    vae, x = make_vae(), binary(8)
    vae.train()
    vae.likelihood.network[1].eval()
    modes = [m.training for m in vae.modules()]
    state = torch.get_rng_state()
    for figure in (
        plots.reconstructions(vae, x, SHAPE),
        plots.samples(vae, SHAPE),
        plots.latent_map(vae, x),
        plots.manifold(vae, SHAPE, num=3),
    ):
        figure.canvas.draw()
    assert [m.training for m in vae.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in vae.parameters())
    command = "import sys, pyro_vae.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_inputs_take_the_precision_of_the_vae():
    vae = make_vae().float()
    assert plots.reconstructions(vae, binary(3).numpy(), SHAPE).axes[0].images
    assert plots.latent_map(vae, pv.Split(binary(3))).axes


# --- contexts and classes -----------------------------------------------------------------------


def class_vae():
    """Three classes in prior, likelihood and posterior."""
    torch.manual_seed(8)
    return pv.VAE(
        pv.priors.ClassMeans(3, 2),
        Bernoulli(MLP(2 + 3, [8], 12)),
        DiagonalNormal(MLP(12 + 3, [8], 4)),
    )


def semi_supervised():
    torch.manual_seed(9)
    return pv.variants.SemiSupervisedVAE(
        StandardNormal(2),
        Bernoulli(MLP(2 + 3, [8], 12)),
        DiagonalNormal(MLP(12 + 3, [8], 4)),
        pv.posteriors.Classifier(MLP(12, [8], 3)),
        3,
    )


@pytest.mark.parametrize("make", [class_vae, semi_supervised])
def test_class_grid_has_a_row_a_class_and_a_column_a_noise(make):
    vae = make()
    figure = plots.class_grid(vae, 3, SHAPE, num=4, seed=5)
    shown = cells(figure.axes[0], 4)
    assert len(shown) == 12
    for y in range(3):
        labels = torch.full((4,), y)
        context = torch.eye(3)[labels] if make is class_vae else labels
        expected = vae.generate(4, context, seed=5).mean.numpy()
        np.testing.assert_allclose(shown[4 * y : 4 * y + 4].reshape(4, -1), expected, rtol=1e-6)
    assert figure.axes[0].get_ylabel() == "Class"
    assert plots.class_grid(vae, 3, SHAPE, name="cluster").axes[0].get_ylabel() == "Cluster"
    with pytest.raises(ConfigError, match="num must be a whole number"):
        plots.class_grid(vae, 3, SHAPE, num=0)
    with pytest.raises((DataError, ShapeError), match="3 classes"):
        plots.class_grid(vae, 4, SHAPE)


def test_grids_state_the_values_of_black_and_white():
    vae = class_vae()
    vae.model.likelihood = Normal(MLP(2 + 3, [8], 12))
    figure = plots.class_grid(vae, 3, SHAPE)
    means = cells(figure.axes[0], 10)  # scaled to 0 and 1
    low, high = re.findall(r"-?[\d.]+(?:e-?\d+)?", figure.get_supxlabel())
    x = vae.generate(10, torch.eye(3)[torch.zeros(10).long()], seed=0).mean
    expected = float(low) + (float(high) - float(low)) * means[:10].reshape(10, -1)
    np.testing.assert_allclose(expected, x, atol=5e-3)


@pytest.mark.parametrize("make", [class_vae, semi_supervised])
def test_analogies_decode_the_style_of_a_datum_in_every_class(make):
    vae, x, y = make(), binary(5), torch.tensor([2, 0, 1, 1, 2])
    shown = cells(plots.analogies(vae, x, y, 3, SHAPE, num=4).axes[0], 4).reshape(4, 4, -1)
    np.testing.assert_array_equal(shown[:, 0], x[:4])
    one = torch.eye(3)
    with torch.no_grad():
        q = vae.encode(x[:4], one[y[:4]] if make is class_vae else y[:4]).mean
        for c in range(3):
            labels = torch.full((4,), c)
            p = vae.decode(q, one[labels] if make is class_vae else labels)
            np.testing.assert_allclose(shown[:, 1 + c], p.mean, rtol=1e-6)
    with pytest.raises(ConfigError, match="num must be a whole number"):
        plots.analogies(vae, x, y, 3, SHAPE, num=0)
    with pytest.raises(ShapeError, match="4 data need as many contexts"):
        plots.analogies(vae, x, y[:2], 3, SHAPE, num=4)


def test_contexts_reach_encoder_decoder_and_prior():
    vae, x = class_vae(), binary(6)
    context = torch.eye(3)[[0, 1, 2, 0, 0, 1]]
    figure = plots.reconstructions(vae, x, SHAPE, num=6, context=context)
    with torch.no_grad():
        expected = vae.decode(vae.encode(x, context).mean, context).mean.numpy()
    np.testing.assert_allclose(cells(figure.axes[0], 6)[6:].reshape(6, -1), expected, rtol=1e-6)
    prior = latent._prior(vae, context)
    z = torch.randn(4, 2)
    means, weights = vae.prior.means.detach(), np.array([3, 2, 1]) / 6
    density = sum(
        w * stats.multivariate_normal(m.numpy(), np.eye(2)).pdf(z)
        for w, m in zip(weights, means, strict=True)
    )
    np.testing.assert_allclose(prior.log_prob(z).exp().detach(), density, rtol=1e-9)
    plots.latent_map(vae, x, torch.arange(6) % 3, context=context).draw_without_rendering()
    with pytest.raises(ShapeError, match="6 data need as many contexts"):
        plots.latent_map(vae, x, context=context[:2])
    assert np.isfinite(cells(plots.samples(vae, SHAPE, 6, context=context).axes[0], 3)).all()


def test_a_map_of_a_model_without_a_prior_of_its_own():
    """p(z_1) of a hierarchy is an integral over the layers above."""
    layers = DiagonalNormal(MLP(2, [], 4)), DiagonalNormal(MLP(12, [], 4))
    vae = pv.variants.HierarchicalVAE(
        StandardNormal(2), layers[:1], Bernoulli(MLP(2, [], 12)), [layers[1], layers[0]]
    )
    with pytest.raises(ConfigError, match="HierarchicalVAE states none"):
        plots.latent_map(vae, binary(3))


def test_maps_side_by_side_are_those_of_each():
    vaes = {"one": make_vae(), "two": make_vae(latent=3)}
    x, labels = binary(8), torch.arange(8) % 2
    figure = plots.latent_maps(vaes, x, labels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    for axes, vae in zip(figure.axes, vaes.values(), strict=True):
        alone = plots.latent_map(vae, x, labels).axes[0]
        for a, b in zip(axes.collections[:2], alone.collections[:2], strict=True):
            np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())
    assert [axes.get_legend() is None for axes in figure.axes] == [True, False]
    with pytest.raises(ConfigError, match="no VAE"):
        plots.latent_maps({}, x)
    with pytest.raises(ConfigError, match="one dimension"):
        plots.latent_maps({"flat": make_vae(latent=1)}, x)
