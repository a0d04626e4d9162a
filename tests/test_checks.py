"""Options that mean nothing are a `ConfigError` that names them, whatever their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.checks import at_least, look_up, nonnegative, positive, whole
from pyro_vae.datasets.splits import permutation
from pyro_vae.errors import ConfigError, UnknownNameError
from pyro_vae.networks import MLP, ConvEncoder, GatedMLP
from pyro_vae.priors import GaussianMixture, StandardNormal, VampPrior
from pyro_vae.schedules import Cyclical, Warmup
from pyro_vae.seeding import derive

NO_NUMBERS = [True, "1", None, [1], 1j, torch.ones(1), float("nan"), np.bool_(True)]
INFINITE = float("inf")


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), torch.tensor(3)], ids=repr)
def test_whole_numbers_are_ints(value: Any) -> None:
    for number in (whole("n", value), at_least("n", value, 3)):
        assert number == 3
        assert type(number) is int
    with pytest.raises(ConfigError, match=r"n must be a whole number of at least 4, got "):
        at_least("n", value, 4)


@pytest.mark.parametrize("value", [*NO_NUMBERS[:5], 3.0, np.float64(3), INFINITE], ids=repr)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="n must be a whole number, got "):
        whole("n", value)
    with pytest.raises(ConfigError, match="n must be a whole number of at least 0, got "):
        at_least("n", value, 0)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), torch.tensor(0.5)])
def test_real_numbers_are_floats(value: Any) -> None:
    for number in (positive("s", value), nonnegative("s", value)):
        assert number == 0.5
        assert type(number) is float
    assert nonnegative("s", 0 * value) == 0
    for check in (positive, nonnegative):
        with pytest.raises(ConfigError, match=r"s must be .*, got "):
            check("s", -value)
    with pytest.raises(ConfigError, match="s must be positive and finite, got "):
        positive("s", 0 * value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, INFINITE, -INFINITE], ids=repr)
def test_what_is_no_real_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="s must be positive and finite, got "):
        positive("s", value)
    with pytest.raises(ConfigError, match="s must be finite and not negative, got "):
        nonnegative("s", value)


def test_names_are_looked_up_and_the_nearest_is_proposed() -> None:
    table = {"mnist": 1, "digits": 2}
    assert look_up("set", "digits", table) == 2
    with pytest.raises(UnknownNameError) as caught:
        look_up("set", "MINST", table, ", or None")
    said = "no set named 'MINST'; did you mean 'mnist'? known: 'mnist', 'digits', or None"
    assert str(caught.value) == said
    for name in (None, 3, ["mnist"], {}):
        with pytest.raises(UnknownNameError, match=r"no set named .* known: 'mnist', 'digits'"):
            look_up("set", name, table)


def vamp(**options: Any) -> VampPrior:
    return VampPrior(
        torch.nn.Identity(), **{"num_pseudo_inputs": 2, "start": [0.0, 1.0], **options}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(10, 200, 64), r"hidden must be a list of sizes, .* got 200"),
        (lambda: MLP(10, "200", 64), r"hidden must be a list of sizes, .* got '200'"),
        (lambda: GatedMLP(10, None, 64), r"hidden must be a list of sizes, .* got None"),
        (lambda: MLP(10, [True], 64), r"every size of .* got True"),
        (lambda: ConvEncoder(28, [4], 2), r"image_shape must be a list of sizes, .* got 28"),
        (lambda: ConvEncoder((8, 8), 4, 2), r"channels must be a list of sizes, .* got 4"),
        (lambda: pv.ELBO(kl_weight="x"), "kl_weight must be finite and not negative, got 'x'"),
        (lambda: pv.ELBO(free_bits="x"), "free_bits must be finite and not negative, got 'x'"),
        (lambda: pv.ELBO(free_bits=True), "free_bits must be finite and not negative, got True"),
        (lambda: pv.IWAE(True), "num_particles must be a whole number of at least 1, got True"),
        (lambda: Warmup("a"), "steps must be positive and finite, got 'a'"),
        (lambda: Warmup(0.5), r"steps must be at least 1, got 0\.5"),
        (lambda: Warmup(3, end=None), "end must be finite and not negative, got None"),
        (lambda: Cyclical(3, ramp="a"), "ramp must be positive and finite, got 'a'"),
        (lambda: Cyclical(3, cycles=1.5), r"cycles must be a whole number .*, got 1\.5"),
        (lambda: GaussianMixture("a"), "loc must be an array of numbers, got 'a'"),
        (lambda: GaussianMixture([[0.0], [1.0, 2.0]]), "loc must be an array of numbers"),
        (lambda: GaussianMixture([[0.0]], "a"), "scale must be an array of numbers, got 'a'"),
        (lambda: GaussianMixture([[0.0]], 1, "a"), "weights must be an array of numbers, got 'a'"),
        (lambda: vamp(start=None), "start must be an array of numbers, got None"),
        (lambda: vamp(noise="a"), "noise must be finite and not negative, got 'a'"),
        (lambda: StandardNormal(True), "latent must be a whole number of at least 1, got True"),
        (lambda: pv.likelihoods.Normal(scale=True), "a scale is a positive number.* got True"),
        (lambda: pv.likelihoods.StudentT(df="4"), "df must be positive and finite, got '4'"),
        (lambda: derive(True, 1), "a seed must be a whole number of at least 0, got True"),
        (lambda: derive(2**64, 1), r"a seed must be below 2\^64, got 18446744073709551616"),
        (lambda: permutation(3, 2**32), r"seed must be below 2\^32, got 4294967296"),
        (lambda: pv.datasets.load("digits", seed=True), "seed must be a whole number .* got True"),
    ],
)  # fmt: skip
def test_options_are_named_with_their_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_numbers_and_arrays_of_numpys_and_pythons_will_do() -> None:
    z = torch.randn(4, 2)
    lists = GaussianMixture([[0, 1], [2, 3]], [1, 2], np.array([1, 3]))
    tensors = GaussianMixture(
        torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    )
    assert torch.equal(lists().log_prob(z), tensors().log_prob(z))
    assert vamp().pseudo_inputs.shape == (2, 2)
    scale = pv.likelihoods.Normal(MLP(2, [], 3), scale=np.float32(0.5))(z).base_dist.scale
    assert torch.equal(scale, torch.full((4, 3), 0.5))
    objective = pv.ELBO(kl_weight=np.float32(0.5), free_bits=torch.tensor(0.25))
    objective.kl_weight = pv.ELBO(kl_weight=0.75).kl_weight
    assert (objective.kl_weight.item(), objective.free_bits) == (0.75, 0.25)
    assert Warmup(np.int64(4), end=np.float32(1))(2) == 0.5
