"""The fingerprint of data is a hash of the values, whatever their layout in memory."""

import hashlib

import pytest
import torch
from torch import Tensor

from pyro_vae.provenance import ROWS, fingerprint

ARRAYS = [
    torch.arange(2 * ROWS + 5).reshape(-1, 1) / 7,
    torch.arange(12.0).reshape(3, 4).t(),
    torch.zeros(0, 3),
    torch.tensor(2),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: str(tuple(a.shape)))
def test_rows_are_hashed_as_the_whole_would_be(array: Tensor) -> None:
    whole = array.double().contiguous().numpy().tobytes()
    expected = hashlib.sha256(str(tuple(array.shape)).encode() + whole).hexdigest()
    assert fingerprint(array) == expected[:16]
