"""Figures of experiments hold the numbers that they claim to."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.errors import DataError, ShapeError


def found(rows=3, features=12):
    values = torch.rand(5, rows, features)
    observed = torch.ones(rows, features, dtype=torch.bool)
    observed[:, 6:] = False
    nothing = torch.zeros(rows)
    return pv.Imputations(values, observed, values.mean(0), "gibbs", *[nothing] * 4)


def test_imputations_stand_under_what_was_observed():
    imputed = found()
    truth = torch.rand(3, 12)
    (axes,) = plots.imputations(imputed, (3, 4), truth.numpy(), draws=2).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["observed", "draw 1", "draw 2", "mean", "truth"]
    (image,) = axes.images
    mosaic = np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan)
    first = mosaic[1:4, 1:5].reshape(-1)  # cells have an empty edge of one pixel
    np.testing.assert_allclose(first[:6], imputed.values[0, 0, :6])
    assert np.isnan(first[6:]).all()
    last = mosaic[4 * 5 + 1 : 4 * 5 + 4, 1:5].reshape(-1)
    np.testing.assert_allclose(last, truth[0])
    with pytest.raises(ShapeError, match=r"\(3, 11\)"):
        plots.imputations(imputed, (3, 4), truth[:, 1:].numpy())


def test_lines_of_images_stand_under_their_names():
    seen = torch.rand(4, 12) * 3 - 1
    seen[:, :6] = torch.nan
    (axes,) = plots.image_rows({"seen": seen, "zero": np.zeros((4, 12))}, (3, 4)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seen", "zero"]
    mosaic = np.ma.filled(np.ma.asarray(axes.images[0].get_array(), float), np.nan)
    low, high = min(0, seen.nan_to_num(0).min().item()), seen.nan_to_num(0).max().item()
    last = mosaic[1:4, 3 * 6 + 1 : 3 * 6 + 5].reshape(-1)
    np.testing.assert_allclose(low + last * (high - low), seen[3])
    for lines, error in (({}, DataError), ({"a": seen, "b": seen[:2]}, ShapeError)):
        with pytest.raises(error):
            plots.image_rows(lines, (3, 4))


def test_posteriors_have_a_panel_a_datum():
    exact, approximate = torch.randn(50, 3, 2), torch.randn(40, 3, 2)
    figure = plots.posteriors(exact, approximate, columns=2)
    drawn = [axes.collections for axes in figure.axes if axes.collections]
    assert len(drawn) == 3
    np.testing.assert_allclose(drawn[2][0].get_offsets(), exact[:, 2])
    np.testing.assert_allclose(drawn[2][1].get_offsets(), approximate[:, 2])
    with pytest.raises(ShapeError, match="3, 5"):
        plots.posteriors(torch.randn(9, 3, 5), torch.randn(9, 3, 5))


def test_densities_are_upright_and_points_are_points():
    def log_density(z):
        return -((z[:, 0] - 1) ** 2) - (z[:, 1] + 2) ** 2

    points = torch.randn(30, 2)
    figure = plots.densities({"p": log_density, "data": points}, extent=4)
    height = figure.axes[0].images[0].get_array()
    row, column = np.unravel_index(height.argmax(), height.shape)
    side = np.linspace(-4, 4, len(height))
    assert abs(side[column] - 1) < 0.1
    assert abs(side[row] + 2) < 0.1
    np.testing.assert_allclose(figure.axes[1].collections[0].get_offsets(), points)
    with pytest.raises(DataError):
        plots.densities({}, 1)


def test_series_show_values_and_errors():
    figure = plots.series({"a": ([1, 2], [3, 4], [0.5, 0.25]), "b": ([1, 2], [5, 6])}, "x", "y")
    axes = figure.axes[0]
    a, b = (container.lines[0] for container in axes.containers)
    np.testing.assert_allclose(a.get_ydata(), [3, 4])
    np.testing.assert_allclose(b.get_ydata(), [5, 6])
    segments = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[2.5, 3.5], [3.75, 4.25]])
    assert axes.get_xscale() == "linear"
    with pytest.raises(DataError):
        plots.series({}, "x", "y")
