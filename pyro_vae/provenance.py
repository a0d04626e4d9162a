"""What a number depends on besides its inputs: versions, and the data's own values."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

ROWS = 4096  # at a time, so that no whole array is copied into float64


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("pyro-vae", "pyro-ppl", "torch", "numpy", "lightning-fabric")
    found = {name: version_of(name) for name in packages}
    # which build it is as well, of which the package on PyPI says nothing
    return {"python": platform.python_version(), **found, "torch": str(torch.__version__)}


@functools.cache  # it reads files
def version_of(name: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def fingerprint(*arrays: Any) -> str:
    """A hash of the data's values, to tell whether two evaluations saw the same."""
    digest = hashlib.sha256()
    for array in arrays:
        if isinstance(array, Tensor):
            digest.update(str(tuple(array.shape)).encode())
            for rows in torch.atleast_1d(array.detach()).split(ROWS):
                digest.update(rows.cpu().double().contiguous().numpy())
    return digest.hexdigest()[:16]
