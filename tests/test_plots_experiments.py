"""Figures of experiments hold the numbers that they claim to."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.errors import DataError, ShapeError
from pyro_vae.plots import style
from pyro_vae.plots.tiles import MISSING


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
    assert (first[6:] == MISSING).all()  # drawn in a colour of its own
    assert image.cmap(-1.0)[:3] == pytest.approx(to_rgb(style.SKY))
    last = mosaic[4 * 5 + 1 : 4 * 5 + 4, 1:5].reshape(-1)
    np.testing.assert_allclose(last, truth[0])
    with pytest.raises(ShapeError, match=r"\(3, 11\)"):
        plots.imputations(imputed, (3, 4), truth[:, 1:].numpy())


def test_lines_of_images_have_names_and_missing_pixels_a_colour():
    seen = torch.rand(4, 12) * 3 - 1
    seen[:, :6] = torch.nan
    (axes,) = plots.image_rows({"seen": seen, "zero": np.zeros((4, 12))}, (3, 4)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seen", "zero"]
    mosaic = np.ma.filled(np.ma.asarray(axes.images[0].get_array(), float), np.nan)
    low, high = min(0, seen.nan_to_num(0).min().item()), seen.nan_to_num(0).max().item()
    last = mosaic[1:4, 3 * 6 + 1 : 3 * 6 + 5].reshape(-1)
    assert (last[:6] == MISSING).all()
    np.testing.assert_allclose(low + last[6:] * (high - low), seen[3, 6:])
    (axes,) = plots.image_rows({"seen": seen.repeat(1, 3)}, (3, 3, 4)).axes
    colours = np.asarray(axes.images[0].get_array())
    assert (colours == to_rgb(style.SKY)).all(-1).sum() == 4 * 6
    (axes,) = plots.image_rows({"nothing": np.full((2, 12), np.nan)}, (3, 4)).axes
    assert np.nanmax(np.asarray(axes.images[0].get_array().filled(np.nan))) == MISSING


def test_lines_of_images_that_cannot_be_drawn():
    seen = torch.rand(4, 12)
    with pytest.raises(DataError):
        plots.image_rows({}, (3, 4))
    with pytest.raises(ShapeError, match=r"b has shape \(2, 12\), a has \(4, 12\)"):
        plots.image_rows({"a": seen, "b": seen[:2]}, (3, 4))


def test_long_titles_of_panels_do_not_run_into_each_other():
    titles = ["argmin KL(Q||P), from the left", "argmin KL(Q||P), from the right"] * 2
    panels = {f"{title} {i}": np.zeros((1, 2)) for i, title in enumerate(titles)}
    figure = plots.densities(panels, extent=1)
    figure.canvas.draw()
    boxes = [axes._left_title.get_window_extent() for axes in figure.axes]
    for left, right in pairwise(boxes):
        assert left.x1 < right.x0


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
