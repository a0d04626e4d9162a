"""Bounds from both sides, against the closed form of the very data they were simulated on."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_pairs import Binary, Linear, all_images
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import ConfigError, SiteError, UnknownNameError
from pyro_vae.evidence.ais import Annealing
from pyro_vae.evidence.bounds import simulate
from pyro_vae.evidence.ground import undisturbed
from pyro_vae.seeding import derive


@pytest.mark.parametrize(("method", "start"), [("is", "guide"), ("ais", "guide"), ("ais", "prior")])
def test_bounds_hold_the_closed_form(method: str, start: str) -> None:
    pair = Linear.random(features=5, latent=3, shift=0.5, shrink=0.7)
    x = torch.zeros(300, 5)
    found = pv.sandwich(
        pair.model, pair.guide, x, method=method, start=start, num_samples=30,
        annealing=Annealing(chains=4, temperatures=10, leapfrogs=3), seed=4,
    )  # fmt: skip
    with undisturbed(pair.model):
        simulated, _ = simulate(pair.model, pair.guide, x, (), derive(4, 0))
    exact = pair.log_px(simulated).numpy()
    for bound, sign in ((found.lower - exact, -1), (found.upper - exact, 1)):
        error = bound.std() / math.sqrt(300)
        assert sign * bound.mean() > -3 * error
        # and it is a bound with something to show, not a copy of the answer
        assert abs(bound).max() > 1e-3
    assert found.gap > 0


def test_verdicts() -> None:
    good = Linear.random(features=5, latent=2)
    x = torch.zeros(50, 5)
    tight = pv.sandwich(good.model, good.guide, x, num_samples=100)
    assert tight.tight
    assert "can be trusted" in str(tight)
    bad = Linear.random(features=5, latent=2, shift=4.0, shrink=0.3)
    loose = pv.sandwich(bad.model, bad.guide, x, num_samples=100)
    assert not loose.tight
    assert "bounds" in str(loose)
    one = pv.sandwich(good.model, good.guide, x[:1], num_samples=100)
    assert not one.tight
    assert "So few data cannot tell" in str(one)


def test_a_missed_mode_shows_in_the_gap() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def one_sided(x: Tensor) -> None:
        root = x.abs().sqrt().clamp_min(0.3)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(root, 0.18 / root))

    found = pv.sandwich(model, one_sided, torch.zeros(200), num_samples=300)
    assert found.gap > 0.5, "half of the planted draws lie in the mode that the guide misses"


def test_any_guide_and_pixels_can_be_simulated() -> None:
    pair = Binary.random(pixels=5, latent=2)
    found = pv.sandwich(pair.model, pair.guide, all_images(5), num_samples=300)
    assert abs(found.gap) < 0.3
    with pytest.raises(UnknownNameError, match="method"):
        pv.sandwich(pair.model, pair.guide, all_images(5), method="cubo")
    with pytest.raises(ConfigError, match="at least 2"):
        pv.sandwich(pair.model, pair.guide, all_images(5), num_samples=1)

    def two(x: Tensor) -> None:
        pair.model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])

    with pytest.raises(SiteError, match=r"\['x', 'y'\]"):
        pv.sandwich(two, pair.guide, all_images(5))
