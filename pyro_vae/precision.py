"""How exact products of float32 are, which torch is told in two ways: in one word, or by parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import starmap

import torch

_EXACT = ("none", "ieee")
_PARTS = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))


def of_products() -> tuple[str, ...]:
    """What torch may make of float32 in matrix products and convolutions, on a GPU and on a CPU:
    "none" and "ieee" are float32, "tf32" and "bf16" less. Unlike torch's own word for it
    (`get_float32_matmul_precision`), it is there however it was set."""
    # at every compiled step: by way of torch.backends it takes ten times as long
    return tuple(starmap(torch._C._get_fp32_precision_getter, _PARTS))


def is_reduced(device: torch.device, convolutions: bool) -> bool:
    """Whether products of float32 on the device are less exact than float32.

    Args:
        convolutions: rather than matrix products. (On a GPU torch makes them TF32 by default.)
    """
    cuda_product, cuda_convolution, product, convolution = of_products()
    on_gpu = (cuda_product, cuda_convolution)
    return (on_gpu if device.type == "cuda" else (product, convolution))[convolutions] not in _EXACT


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Run the body with products in TF32 or float32, and put back what was chosen before."""
    try:
        in_a_word = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by parts, for which there is no word
        in_a_word = None
    by_parts = of_products()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        for part, precision in zip(_PARTS, of_products(), strict=True):
            if not tf32 and precision not in _EXACT:  # it follows what was said of them all
                torch._C._set_fp32_precision_setter(*part, "ieee")
        yield
    finally:
        if in_a_word is not None:
            torch.set_float32_matmul_precision(in_a_word)
        put_back(by_parts)


def put_back(before: tuple[str, ...]) -> None:
    """Have products as `of_products` told before."""
    for part, now, then in zip(_PARTS, of_products(), before, strict=True):
        if now != then:
            torch._C._set_fp32_precision_setter(*part, then)
