"""Seeds: reproducible stretches, and streams that do not coincide."""

import itertools

import pyro
import pytest
import torch

from pyro_vae.seeding import derive, seeded


def test_seeded_repeats_itself_and_disturbs_nothing():
    pyro.set_rng_seed(5)
    undisturbed = torch.rand(4)
    pyro.set_rng_seed(5)
    first = torch.rand(2)
    with seeded(1):
        inside = torch.rand(3)
    rest = torch.rand(2)
    assert torch.equal(torch.cat([first, rest]), undisturbed)
    with seeded(1):
        assert torch.equal(torch.rand(3), inside)
    with seeded(2):
        assert not torch.equal(torch.rand(3), inside)


def test_seeded_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(3).fill_(1 // 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_generators_advance():
    pyro.set_rng_seed(5)
    expected = torch.rand(4)
    pyro.set_rng_seed(5)
    with seeded(None):
        first = torch.rand(2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


def test_derived_seeds_differ_by_every_key():
    keys = [keys for n in range(4) for keys in itertools.product(range(5), repeat=n)]
    seeds = {derive(seed, *key) for seed in range(20) for key in keys}
    assert len(seeds) == 20 * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(3, 1, 4) == derive(3, 1, 4)
    torch.Generator().manual_seed(max(seeds))
