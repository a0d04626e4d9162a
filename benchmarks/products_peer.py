"""Nothing but the matrix products of a training step: none in full float32 is faster than they."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(networks: Sequence[nn.Module], batch: int) -> Callable[[], None]:
    """A step's products of dense networks in a row: of each layer, and of both its gradients.

    Each is done by the faster of PyTorch's two libraries, where it has two.
    """
    weights = [
        layer.weight.detach().to(DEVICE)
        for network in networks
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    ]
    pairs: list[tuple[Tensor, Tensor]] = []
    for i, weight in enumerate(weights):
        inputs = torch.randn(batch, weight.shape[1], device=DEVICE)
        outputs = torch.randn(batch, weight.shape[0], device=DEVICE)
        pairs += [(inputs, weight.T), (outputs.T, inputs)]
        pairs += [(outputs, weight)] if i else []  # data need no gradient
    products = [min(_ways(*pair), key=_best_time) for pair in pairs]

    def run() -> None:
        for product in products:
            product()

    return run


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, until its device is done."""
    began = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _ways(a: Tensor, b: Tensor) -> list[Callable[[], Any]]:
    into = a @ b
    ways: list[Callable[[], Any]] = [lambda: torch.mm(a, b, out=into)]
    if DEVICE == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
    return ways


def _best_time(function: Callable[[], Any]) -> float:
    return min(timed(function) for _ in range(20))
