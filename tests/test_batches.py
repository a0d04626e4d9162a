"""Sources of batches: every datum once an epoch, in an order that its seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from training_helpers import binary, intensities, small_vae

import pyro_vae as pv
from pyro_vae.data import bernoulli_draw
from pyro_vae.errors import ConfigError, DataError, SupportError
from pyro_vae.likelihoods import check_finite
from pyro_vae.training.batches import Resident, Streamed, as_split

CPU = torch.device("cpu")


def numbered(n: int) -> Tensor:
    return torch.arange(float(n)).unsqueeze(1)


def resident(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Resident:
    return Resident(pv.Split(numbered(n)), batch_size, CPU, torch.float64, rank, world_size)


def streamed(loader: DataLoader[Any], check: Any = check_finite) -> Streamed:
    return Streamed(loader, CPU, torch.float64, check)


def flat(parts: list[list[float]]) -> list[float]:
    return [x for part in parts for x in part]


def rows(batches: Iterator[tuple[Tensor, ...]]) -> list[list[float]]:
    return [batch[0].flatten().tolist() for batch in batches]


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_an_epoch_holds_every_datum_once(n: int, batch_size: int) -> None:
    source = resident(n, batch_size)
    epoch = rows(source.epoch(seed=3))
    assert len(epoch) == len(source) == -(-n // batch_size)
    assert sorted(flat(epoch)) == list(range(n))
    assert {len(batch) for batch in epoch[:-1]} <= {batch_size}


def test_the_order_follows_from_the_seed_alone() -> None:
    source = resident(50, 7)
    torch.manual_seed(0)
    first = rows(source.epoch(seed=3))
    torch.manual_seed(1)
    assert rows(source.epoch(seed=3)) == first
    assert rows(source.epoch(seed=4)) != first


def test_orders_are_uniform() -> None:
    """Which datum comes first: chi-squared over 2000 seeds and 10 data."""
    source = resident(10, 10)
    firsts = torch.tensor([rows(source.epoch(seed))[0][0] for seed in range(2000)])
    counts = torch.bincount(firsts.long(), minlength=10)
    chi_squared = ((counts - 200.0) ** 2 / 200).sum()
    assert chi_squared < 29.7  # nine degrees of freedom: odds 1 in 2000


def test_an_epoch_can_be_taken_up_anywhere() -> None:
    source = resident(20, 3)
    whole = rows(source.epoch(seed=5))
    for start in range(len(source) + 1):
        assert rows(source.epoch(seed=5, start=start)) == whole[start:]


def test_processes_share_an_epoch_without_overlap() -> None:
    for n in (16, 17):
        shares = [resident(n, 3, rank, world_size=2) for rank in range(2)]
        parts = [flat(rows(source.epoch(seed=1))) for source in shares]
        assert len(parts[0]) == len(parts[1]) == 8
        assert len(set(parts[0]) | set(parts[1])) == 16
        assert len(shares[0]) == len(shares[1])


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=11 is larger than the data \(10 rows\)"):
        resident(10, 11)
    with pytest.raises(ConfigError, match=r"10 rows, 5 for each of 2 processes"):
        resident(10, 6, world_size=2)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        resident(10, 0)


def test_draws_are_made_anew_but_the_first_look_costs_nothing() -> None:
    split = pv.Split(intensities(20), draw=bernoulli_draw)
    source = Resident(split, 20, CPU, torch.float64)
    (a,), (b,) = next(source.epoch(1)), next(source.epoch(1))
    assert a.shape == b.shape
    assert not torch.equal(a, b)
    assert set(a.unique().tolist()) == {0.0, 1.0}
    assert source.first()[0].shape == (2, split.x.shape[1])


def test_contexts_come_with_their_rows() -> None:
    for context, dtype in ((numbered(9).float(), torch.float64), (torch.arange(9), torch.int64)):
        split = pv.Split(numbered(9), draw=lambda x, _: x + 0.5, context=context)
        batches = list(Resident(split, 4, CPU, torch.float64).epoch(seed=2))
        assert [len(batch) for batch in batches] == [2, 2, 2]
        for x, c in batches:
            assert c.dtype == dtype
            assert torch.equal(x.flatten(), c.flatten() + 0.5)


def test_integers_become_the_models_floats() -> None:
    split = pv.Split((numbered(6) % 2).to(torch.uint8))
    (batch,) = next(Resident(split, 3, CPU, torch.float32).epoch(0))
    assert batch.dtype == torch.float32
    (batch,) = next(streamed(DataLoader(split.x, 3)).epoch(0))
    assert batch.dtype == torch.float64


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_is_seeded_by_the_epoch_and_taken_up_anywhere(own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(99) if own_generator else None

    def noisy(items: list[Any]) -> Tensor:  # augmentation from the global generator
        return torch.stack([x for (x,) in items]) + torch.rand(1)

    def epoch(start: int) -> Any:
        loader = DataLoader(
            TensorDataset(numbered(20)), 3, shuffle=True, generator=generator, collate_fn=noisy
        )
        torch.manual_seed(8)
        return streamed(loader).epoch(seed=8, start=start)

    whole = rows(epoch(0))
    assert sorted(int(x) for x in flat(whole)) == list(range(20))
    for start in range(len(whole) + 1):
        assert rows(epoch(start)) == whole[start:]


def test_a_loader_has_skipped_before_it_returns() -> None:
    """The state that a resumed run restores must not be spent on skipping."""
    loader = DataLoader(TensorDataset(numbered(20)), 3, shuffle=True)
    source = streamed(loader)
    torch.manual_seed(4)
    iterator = source.epoch(seed=0, start=2)
    torch.manual_seed(5)
    after = rows(iterator)
    torch.manual_seed(4)
    assert rows(source.epoch(seed=0))[2:] == after


def test_a_distributed_sampler_shuffles_anew_at_every_epoch() -> None:
    dataset = TensorDataset(numbered(20))
    sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=0, shuffle=True)
    source = streamed(DataLoader(dataset, 5, sampler=sampler))
    assert rows(source.epoch(seed=1)) == rows(source.epoch(seed=1))
    assert rows(source.epoch(seed=1)) != rows(source.epoch(seed=2))


def test_a_loaders_parts_are_the_arguments() -> None:
    dataset = TensorDataset(numbered(6).float(), torch.arange(6))
    batch = next(streamed(DataLoader(dataset, 3)).epoch(0))
    assert [part.dtype for part in batch] == [torch.float64, torch.int64]
    assert [part.shape for part in streamed(DataLoader(dataset, 3)).first()] == [(2, 1), (2,)]
    plain = next(streamed(DataLoader(numbered(6), 3)).epoch(0))
    assert len(plain) == 1


def test_a_poisoned_batch_is_named_by_batch_row_and_column() -> None:
    x = binary(20)
    x[13, 4] = float("nan")
    epoch = streamed(DataLoader(TensorDataset(x), 5)).epoch(0)
    next(epoch), next(epoch)
    with pytest.raises(DataError, match=r"batch 2 of the DataLoader.*x\[3, 4\] = nan"):
        next(epoch)


def test_poison_in_a_further_part_is_found_too() -> None:
    dataset = TensorDataset(numbered(4), torch.tensor([[0.0], [1.0], [float("inf")], [0.0]]))
    with pytest.raises(DataError, match=r"batch 1 of the DataLoader.*inf \(row 0, column 0\)"):
        list(streamed(DataLoader(dataset, 2)).epoch(0))


def test_support_is_checked_batch_by_batch() -> None:
    x = binary(20)
    x[7, 0] = 0.5
    check = pv.likelihoods.Bernoulli(pv.networks.MLP(2, [], x.shape[1])).check
    with pytest.raises(SupportError, match=r"batch 1 of the DataLoader: Bernoulli.*Binarize"):
        list(streamed(DataLoader(TensorDataset(x), 5), check).epoch(0))


def test_loaders_that_cannot_serve() -> None:
    class Endless(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(1)

    with pytest.raises(ConfigError, match="needs a length"):
        streamed(DataLoader(Endless()))
    with pytest.raises(DataError, match="is empty"):
        streamed(DataLoader(TensorDataset(numbered(3)), 5, drop_last=True))
    pictures: Any = [{"image": torch.zeros(2)}]
    with pytest.raises(DataError, match="this one yields dict"):
        streamed(DataLoader(pictures)).first()


def test_a_loader_that_runs_dry_after_an_epoch() -> None:
    class Once(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.rows = iter(binary(20))

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[Tensor]:
            return islice(self.rows, 10)

    with pytest.raises(DataError, match=r"no batch in epoch \d"):
        pv.fit(small_vae(), DataLoader(Once(), 5), epochs=3)


def test_what_can_be_data() -> None:
    for data in (numbered(3), numbered(3).numpy(), [[0.0], [1.0], [2.0]]):
        assert torch.equal(as_split(data).x.double(), numbered(3))
    split = pv.Split(numbered(3))
    assert as_split(split) is split
    fixed = numbered(3).numpy()
    fixed.flags.writeable = False
    assert torch.equal(as_split(fixed).x, numbered(3))
    assert torch.equal(as_split(numbered(3).numpy()[::-1]).x, numbered(3).flip(0))
    with pytest.raises(DataError, match="data of type ndarray is no array"):
        as_split(np.array([["a", "b"]]))
    with pytest.raises(DataError, match="at least one datum"):
        as_split(torch.zeros(0, 3))
    with pytest.raises(DataError, match="one row a datum"):
        as_split(torch.zeros(3))
