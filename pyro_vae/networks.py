"""Networks from vectors to vectors: what a likelihood or posterior is parametrised by.

Every network maps `(..., in_features)` to `(..., out_features)` for any number of leading batch
dimensions (data, particles, plates). Images travel as flat rows; the convolutional pair knows
their shape. Any other `nn.Module` with the same habit serves in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError, ShapeError


class Network(nn.Module):
    """Base of the networks here: layers over rows, for inputs with any leading dimensions.

    Args:
        in_features, out_features: sizes of the vectors.
        layers: from rows `(n, in_features)` to rows of `out_features` values.

    Raises:
        ConfigError: a size is not a whole number of at least 1.
        ShapeError: at call, when the last dimension of the input is not `in_features`.
    """

    def __init__(self, in_features: int, out_features: int, layers: nn.Sequential) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"{type(self).__name__} takes vectors of {self.in_features} values, "
                f"got an input of shape {tuple(x.shape)}"
            )
        rows = x.reshape(-1, self.in_features)
        return self.layers(rows).reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def set_output_bias(self, bias: Tensor) -> None:
        """Make the output start around `bias`, `(out_features,)` or fewer leading ones."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.bias[: len(bias)].copy_(bias)


class MLP(Network):
    """Fully connected network with one activation after every hidden layer.

    Args:
        in_features, out_features: sizes of the vectors.
        hidden: sizes of the hidden layers; none makes an affine map.
        activation: the module class between layers. The default, tanh, is that of Kingma & Welling
            2013 and Burda et al. 2015.

    Raises:
        ConfigError: `hidden` is no list, or a size is not a whole number of at least 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        sizes = check_sizes(in_features, *listed("hidden", hidden), out_features)[:-1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        last = nn.Linear(sizes[-1], out_features)
        super().__init__(in_features, out_features, nn.Sequential(*layers, last))


class GatedDense(nn.Module):
    """An affine map times the sigmoid of another (Dauphin et al. 2017, eq. 1)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.value_and_gate = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(self.value_and_gate(x), dim=-1)


class GatedMLP(Network):
    """Fully connected network of gated layers, as in Tomczak & Welling 2017.

    Args:
        in_features, out_features: sizes of the vectors.
        hidden: sizes of the hidden layers; none makes an affine map.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int) -> None:
        sizes = check_sizes(in_features, *listed("hidden", hidden), out_features)[:-1]
        gated = [GatedDense(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)]
        last = nn.Linear(sizes[-1], out_features)
        super().__init__(in_features, out_features, nn.Sequential(*gated, last))


class ConvEncoder(Network):
    """Images, as flat rows, to vectors: strided convolutions that halve the image, then affine.

    Args:
        image_shape: `(channels, height, width)`, or `(height, width)` for one channel.
        channels: of the convolutions; each halves height and width (rounding up).
        out_features: size of the output.
    """

    def __init__(
        self, image_shape: Sequence[int], channels: Sequence[int], out_features: int
    ) -> None:
        shape, channels = _with_channels(image_shape), listed("channels", channels)
        check_sizes(*shape, *channels, out_features)
        maps = [shape[0], *channels]
        layers: list[nn.Module] = [nn.Unflatten(-1, shape)]
        for fine, coarse in pairwise(maps):
            layers += [nn.Conv2d(fine, coarse, kernel_size=3, stride=2, padding=1), nn.SiLU()]
        height, width = _halvings(shape[1:], len(channels))[-1]
        layers += [nn.Flatten(-3), nn.Linear(maps[-1] * height * width, out_features)]
        super().__init__(math.prod(shape), out_features, nn.Sequential(*layers))


class ConvDecoder(Network):
    """Vectors to images, as flat rows: affine, then transposed convolutions that double the image.

    Args:
        in_features: size of the input.
        channels: of the feature maps, coarse to fine; each step doubles height and width.
        image_shape: `(channels, height, width)`, or `(height, width)` for one channel. A likelihood
            that needs several outputs per value takes a multiple of the image's channels.
    """

    def __init__(
        self, in_features: int, channels: Sequence[int], image_shape: Sequence[int]
    ) -> None:
        shape, channels = _with_channels(image_shape), listed("channels", channels)
        if not channels:
            raise ConfigError("ConvDecoder needs at least one number of channels, got none")
        check_sizes(in_features, *channels, *shape)
        sizes = _halvings(shape[1:], len(channels))[::-1]
        maps = [*channels, shape[0]]
        layers: list[nn.Module] = [
            nn.Linear(in_features, maps[0] * math.prod(sizes[0])),
            nn.Unflatten(-1, (maps[0], *sizes[0])),
        ]
        for i, (size, doubled) in enumerate(pairwise(sizes)):
            # where the size aimed at is odd, doubling would be one too large: the kernel shrinks
            kernel = (4 - 2 * size[0] + doubled[0], 4 - 2 * size[1] + doubled[1])
            layers += [
                nn.SiLU(),
                nn.ConvTranspose2d(maps[i], maps[i + 1], kernel, stride=2, padding=1),
            ]
        super().__init__(in_features, math.prod(shape), nn.Sequential(*layers))
        self.image_shape = shape

    @torch.no_grad()
    def set_output_bias(self, bias: Tensor) -> None:
        """Make the output start around `bias`, whole channels of it: one value a channel, the mean
        over its pixels.
        """
        last = self.layers[-1]
        assert isinstance(last, nn.ConvTranspose2d)
        assert last.bias is not None
        per_channel = bias.reshape(-1, math.prod(self.image_shape[1:])).mean(-1)
        last.bias[: len(per_channel)].copy_(per_channel)


def listed(name: str, sizes: Any) -> list[Any]:
    """Several sizes as a list.

    Raises:
        ConfigError: they are not several.
    """
    if not isinstance(sizes, Iterable) or isinstance(sizes, str):
        raise ConfigError(f"{name} must be a list of sizes, such as [200, 200], got {sizes!r}")
    return list(sizes)


def check_sizes(*sizes: int) -> list[int]:
    """The sizes as a list.

    Raises:
        ConfigError: one of them is not a whole number of at least 1.
    """
    for size in sizes:
        at_least(f"every size of {sizes}", size, 1)
    return list(sizes)


def concatenate(x: Tensor, context: Tensor | None) -> Tensor:
    """`x` and its context side by side, the leading dimensions of both broadcast."""
    if context is None:
        return x
    batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (x, context)], dim=-1)


def _with_channels(image_shape: Sequence[int]) -> tuple[int, int, int]:
    image_shape = listed("image_shape", image_shape)
    if len(image_shape) == 2:
        return (1, image_shape[0], image_shape[1])
    if len(image_shape) == 3:
        return (image_shape[0], image_shape[1], image_shape[2])
    raise ConfigError(
        f"an image shape is (height, width) or (channels, height, width), got {image_shape}"
    )


def _halvings(size: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Height and width before each of `times` halvings, and after the last."""
    sizes = [(size[0], size[1])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes
