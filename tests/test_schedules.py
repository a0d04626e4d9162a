"""KL weights over training."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import ConfigError
from pyro_vae.schedules import Cyclical, Warmup


def test_warmup_is_a_line_and_then_stays():
    w = Warmup(4, start=0.2, end=1.0)
    assert [w(i) for i in (0, 1, 2, 4, 5, 100)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0, 1.0])
    assert Warmup(10)(0) == 0


def test_cycles_rise_stay_and_start_anew():
    w = Cyclical(10, ramp=0.5)
    assert [w(i) for i in (0, 2, 5, 9, 10, 12)] == pytest.approx([0, 0.4, 1, 1, 0, 0.4])
    assert [Cyclical(10, cycles=2)(i) for i in (10, 19, 20, 25)] == [0, 1, 1, 1]
    assert Cyclical(10, ramp=1.0)(5) == pytest.approx(0.5)
    w = Cyclical(10, cycles=2, start=0.2, end=0.6)
    assert [w(i) for i in (0, 2, 5, 15, 20, 99)] == pytest.approx([0.2, 0.36, 0.6, 0.6, 0.6, 0.6])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Warmup(0),
        lambda: Warmup(float("nan")),
        lambda: Cyclical(float("nan")),
        lambda: Warmup(1, start=-1),
        lambda: Warmup(1, end=float("inf")),
        lambda: Cyclical(0),
        lambda: Cyclical(5, ramp=0),
        lambda: Cyclical(5, cycles=0),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_a_schedule_moves_the_loss_through_the_objectives_weight():
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Normal(pv.networks.MLP(2, [], 3), 1.0),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(3, [], 4)),
    )
    x, schedule, objective = torch.randn(5, 3), Warmup(4), pv.ELBO()
    for step in (0, 1, 3, 9):
        objective.kl_weight = schedule(step)
        terms = objective.terms(vae.model, vae.guide, x)
        torch.testing.assert_close(terms.loss, schedule(step) * terms.kl - terms.reconstruction)
