"""Seeds: a stretch of random draws that is reproducible and leaves the rest undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError

LIMIT = 2**64  # of torch's generators


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run the body with torch's generators at `seed`, and put them back afterwards.

    With None the body draws from the generators as they are, and advances them.

    Raises:
        ConfigError: the seed is no whole number from 0 to 2^64 - 1.
    """
    if seed is None:
        yield
        return
    with generators_put_back():
        torch.manual_seed(_check(seed))
        yield


def generators_put_back() -> Any:
    """A context that puts torch's generators back, of the CPU and of every GPU."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def noted_generators() -> Callable[[], None]:
    """Note where torch's generators are; what is returned puts them back there."""
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return put_back


def derive(seed: int, *keys: int) -> int:
    """A seed for one part of a job, from the job's seed and the part's numbers.

    Different keys, each a number from 0 to 2^32 - 1, give statistically independent streams
    (numpy's `SeedSequence`).
    """
    seed = _check(seed)
    # as the spawn key: within the entropy, keys that differ by trailing zeros would be the same
    words = np.random.SeedSequence(seed, spawn_key=keys).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


def _check(seed: int) -> int:
    number = at_least("a seed", seed, 0)
    if number >= LIMIT:
        raise ConfigError(f"a seed must be below 2^64, got {seed!r}")
    return number
