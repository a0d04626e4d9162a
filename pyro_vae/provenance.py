"""What a number depends on besides its inputs: versions, and the data's own values."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("pyro-vae", "pyro-ppl", "torch", "numpy", "lightning-fabric")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@functools.cache  # it reads files
def _version(name: str) -> str:
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
            digest.update(array.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
