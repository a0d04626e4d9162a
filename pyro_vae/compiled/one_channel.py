"""Convolutions of images of one channel as products of matrices, and their gradients.

An encoder of grey images begins with one, and a decoder ends with a transposed one. PyTorch's
kernels on a CPU pad the one channel to a vector register, sixteen of them, or lay out all maps anew
around it. Here `images` have one channel, `(batch, 1, height, width)`, `maps` have several, and a
kernel, `(channels, 1, kernel height, kernel width)`, is between the two in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from pyro_vae.compiled.biases import bias_gradient, rows_of
from pyro_vae.compiled.in_memory import in_memory


def convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    """`torch.nn.functional.conv2d` of images: maps."""
    maps = _windows(images, weight, stride, padding).flatten(3) @ weight.flatten(1).T
    return (maps if bias is None else maps + bias).permute(0, 3, 1, 2)


def transposed_convolution(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` of maps: images."""
    sizes = zip(maps.shape[2:], weight.shape[2:], stride, padding, strict=True)
    size = [(places - 1) * apart - 2 * cut + kernel for places, kernel, apart, cut in sizes]
    images = _spread(maps, weight, size, stride, padding)
    return images if bias is None else images + bias


def convolution_backward(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of `convolution` for what is `wanted` of images, weight and bias.

    Args:
        gradient: for the maps.
    """
    of_images = of_weight = None
    if wanted[0]:
        of_images = _spread(gradient, weight, images.shape[2:], stride, padding)
    if wanted[1]:
        seen = _windows(images, weight, stride, padding).flatten(3)
        of_weight = _gathered(seen, gradient, weight)
    return of_images, of_weight, bias_gradient(gradient) if wanted[2] else None


def transposed_convolution_backward(
    gradient: Tensor, maps: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of `transposed_convolution` for what is `wanted` of maps, weight and bias.

    Args:
        gradient: for the images.
    """
    seen = _windows(gradient, weight, stride, padding).flatten(3)
    of_maps = (seen @ weight.flatten(1).T).permute(0, 3, 1, 2) if wanted[0] else None
    of_weight = _gathered(seen, maps, weight) if wanted[1] else None
    return of_maps, of_weight, bias_gradient(gradient) if wanted[2] else None


def _gathered(seen: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
    """What is seen from each place, times what is there, added up: shaped as the kernel."""
    # of the two orders the one in which the BLAS takes half the time: few rows, more columns
    return (seen.flatten(0, 2).T @ rows_of(maps)).T.reshape(weight.shape)


def _windows(images: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """What the kernel sees from each place: `(batch, height, width, *kernel)`, places of maps."""
    height, width = weight.shape[2:]
    framed = in_memory(pad(images[:, 0], (padding[1], padding[1], padding[0], padding[0])))
    return framed.unfold(1, height, stride[0]).unfold(2, width, stride[1])


def _spread(
    maps: Tensor, weight: Tensor, size: Sequence[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Images of a size: from each place the kernel, times what is there, added up."""
    batch, _, height, width = maps.shape
    spread = (rows_of(maps) @ weight.flatten(1)).view(batch, height, width, *weight.shape[2:])
    spread = spread.transpose(2, 3)  # batch, height, kernel height, width, kernel width
    rows = in_memory(_overlapped(spread, stride[1], padding[1], size[1], 3))
    return in_memory(_overlapped(rows, stride[0], padding[0], size[0], 1)[:, None])


def _overlapped(spread: Tensor, stride: int, padding: int, size: int, dim: int) -> Tensor:
    """Add up along `dim`, places `stride` apart, what each spreads over the kernel, `dim + 1`; of
    this, `size` from `padding` on."""
    kernel = spread.shape[dim + 1]
    overlaps = -(-kernel // stride)
    behind = spread.dim() - dim - 1  # dimensions
    spread = pad(spread, (0, 0) * (behind - 1) + (0, overlaps * stride - kernel))
    parts = spread.unflatten(dim + 1, (overlaps, stride)).unbind(dim + 1)
    shifted = [pad(part, (0, 0) * behind + (i, overlaps - 1 - i)) for i, part in enumerate(parts)]
    whole = sum(shifted[1:], shifted[0]).flatten(dim, dim + 1)
    beyond = max(0, padding + size - whole.shape[dim])  # what no place reaches
    return pad(whole, (0, 0) * (behind - 1) + (0, beyond)).narrow(dim, padding, size)
