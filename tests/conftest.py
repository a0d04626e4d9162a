"""Every test starts from the same ground: float64, an empty parameter store, validation on."""

import os
from collections.abc import Iterator
from pathlib import Path

# tests are small and run in several processes, as do notebooks, commands and loaders that they
# start: threads of one would only stand in the others' way
os.environ["OMP_NUM_THREADS"] = "1"

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_ground() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip that says where it is looked for."""
    folder = os.environ.get("PYRO_VAE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PYRO_VAE_DATA names no folder of real data sets")
    return Path(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        "cuda": "" if torch.cuda.is_available() else "torch sees no CUDA device",
        "slow": "" if config.getoption("--slow") else "takes about a minute: make test-all",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
