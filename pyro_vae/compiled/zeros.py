"""Zero times what is not finite: NaN, as in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)


class ZerosAsFloats(CustomGraphPass):
    """Writes the Python 0 in a product of floats as 0.0: the product with an integer 0, and 0 / x,
    TorchInductor takes for 0 whatever the other factor is, which would hide a NaN."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target in _PRODUCTS and not _is_integer(node.meta["val"]):
                node.args = tuple(_as_float(factor) for factor in node.args)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _is_integer(value: torch.Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _as_float(factor: Any) -> Any:
    return 0.0 if isinstance(factor, int) and factor == 0 else factor
