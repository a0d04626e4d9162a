"""Figures of an evaluation hold its numbers: bars, curves, points, images in order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.errors import ConfigError, DataError, ShapeError


@pytest.fixture
def x() -> torch.Tensor:
    return (torch.rand(30, 12) < 0.5).double()


@pytest.fixture
def evidence(x: torch.Tensor) -> pv.Evidence:
    """Half of the data are flagged."""
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(2, [8], 12)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(12, [8], 4)),
    )
    found = pv.log_marginal(vae.model, vae.guide, x, num_samples=300)
    return replace(found, flagged=np.arange(30) % 2 == 0)


def test_histogram_counts_all_data_and_marks_the_mean(evidence: pv.Evidence) -> None:
    axes = plots.log_px_histogram(evidence).axes[0]
    sound, flagged = (sum(bar.get_height() for bar in bars) for bars in axes.containers)
    assert (sound, flagged) == (15, 15)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(evidence.mean)
    assert r"\geq" in axes.get_title(loc="left"), "with flagged data the mean is a bound"
    log_px = np.where(np.arange(30) < 3, -math.inf, evidence.log_px)
    axes = plots.log_px_histogram(replace(evidence, log_px=log_px)).axes[0]
    assert "3 of 30" in axes.get_title(loc="left")
    assert not axes.lines


def test_convergence_is_the_mean_over_growing_draws(evidence: pv.Evidence) -> None:
    curve, elbo = plots.convergence(evidence).axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 4, 8, 16, 32, 64, 128, 256, 300])
    assert curve.get_ydata()[-1] == pytest.approx(evidence.mean)
    assert elbo.get_ydata()[0] == pytest.approx(evidence.elbo.mean())
    with pytest.raises(ConfigError, match="this one has is"):
        plots.convergence(replace(evidence, convergence={}))


def test_khat_is_drawn_over_the_effective_sample_size(evidence: pv.Evidence) -> None:
    sound, flagged, threshold, least = plots.khat(evidence).axes[0].lines
    np.testing.assert_array_equal(sound.get_ydata(), evidence.khat[1::2])
    np.testing.assert_array_equal(flagged.get_xdata(), evidence.ess[::2])
    assert threshold.get_ydata()[0] == pytest.approx(1 - 1 / math.log10(300))
    assert least.get_xdata()[0] == 100
    with pytest.raises(ConfigError, match="no datum"):
        plots.khat(replace(evidence, khat=np.full(30, math.nan)))


def test_the_worst_come_first_as_images(evidence: pv.Evidence, x: torch.Tensor) -> None:
    axes = plots.worst_explained(evidence, image_shape=(3, 4), num=5).axes[0]
    order = np.argsort(evidence.log_px)[:5]
    mosaic = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert mosaic.shape == (3 + 2, 5 * (4 + 2))
    np.testing.assert_array_equal(mosaic[1:4, 1:5], x[order[0]].reshape(3, 4))
    np.testing.assert_array_equal(mosaic[1:4, 25:29], x[order[4]].reshape(3, 4))
    assert [text.get_text() for text in axes.texts] == [
        f"{v:.1f}" for v in np.sort(evidence.log_px)[:5]
    ]
    with pytest.raises(ShapeError, match=r"\(5, 5\)"):
        plots.worst_explained(evidence, image_shape=(5, 5))
    with pytest.raises(ConfigError, match="num"):
        plots.worst_explained(evidence, num=0)


def test_an_evaluation_plots_what_it_knows(evidence: pv.Evidence, tmp_path: object) -> None:
    assert isinstance(evidence.plot((3, 4)), Figure)
    assert len(evidence.plot().axes) == 4
    loaded = pv.Evidence.load(evidence.save(tmp_path / "e.npz"))
    assert len(loaded.plot().axes) == 3, "a file holds no data"
    with pytest.raises(DataError, match="holds no data"):
        plots.worst_explained(loaded)
    with pytest.raises(DataError, match="29 rows of x"):
        plots.evaluation(loaded, np.zeros((29, 12)))
    bare = replace(loaded, convergence={}, khat=np.full(30, math.nan))
    (axes,) = bare.plot().axes
    assert "of 30 data" in axes.get_ylabel()
    evidence.plot((3, 4)).savefig(tmp_path / "figure.png")
