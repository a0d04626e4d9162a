"""What a VAE makes of data and of its prior, as pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_vae.checks import at_least
from pyro_vae.errors import ConfigError
from pyro_vae.plots import style
from pyro_vae.plots.reading import (
    as_context,
    as_input,
    flat,
    likelihood_means,
    looking,
    posterior_means,
)
from pyro_vae.plots.tiles import Limits, Shape, state_limits, tile, value_limits
from pyro_vae.typing import Distribution
from pyro_vae.vae import Generative

MEAN = r"$\mathbb{E}[x\,|\,z]$"
DRAW = r"$x \sim p(x\,|\,z)$"
TICKS = (0.1, 0.25, 0.5, 0.75, 0.9)  # probabilities marked along a manifold
WIDTH = 6.5  # inches, the text width of a page


def reconstructions(
    vae: Generative,
    x: ArrayLike | Tensor,
    image_shape: Shape | None,
    num: int = 10,
    seed: int = 0,
    context: ArrayLike | Tensor | None = None,
) -> Figure:
    """The first data above E[x|z], z the mean of q(z|x).

    Data that are no images are lines over the features, E[x|z] drawn over the datum.

    Args:
        x: `(N, features)`.
        image_shape: of a row, channels first; None where it is no image.
        num: how many of the rows.
        seed: of the draws behind the mean of a q(z|x) that has none in closed form.
        context: `(N, ...)`, where the model takes one; classes that it does not know it guesses.

    Raises:
        DataError, ShapeError: `x` is empty or not of this shape.
        ConfigError: `num` is not positive.
    """
    at_least("num", num, 1)
    data = as_input(vae, x)[:num]
    with looking(vae, seed):
        given = as_context(vae, data, None if context is None else context[:num])  # type: ignore[index]
        mean = likelihood_means(vae, posterior_means(vae, data, given), given)
    rows, count = flat(data), len(data)
    limits = value_limits(rows, mean)
    if image_shape is None:
        figure = _overlaid(rows, mean, limits, ("$x$", MEAN))
    else:
        height, width = image_shape[-2:]
        figure = style.figure(WIDTH, 0.4 + 2 * (WIDTH - 0.6) / count * height / width)
        axes = figure.subplots()
        tile(axes, np.concatenate([rows, mean]), image_shape, count, limits=limits)
        axes.set_yticks([0.5, 1.5], ["$x$", MEAN])
        axes.tick_params(length=0, labelsize=style.LABEL)
        state_limits(figure, limits)
    figure.suptitle(
        r"Data, and their reconstructions at $z = \mathbb{E}_{q(z|x)}[z]$", fontsize=style.TITLE
    )
    return figure


def samples(
    vae: Generative,
    image_shape: Shape | None,
    num: int = 64,
    seed: int = 0,
    context: Tensor | None = None,
) -> Figure:
    """E[x|z] at draws of z from the prior, beside draws of x at the same z.

    The mean is what most pictures in the literature show; the draws are what the model says that
    data look like. Both share one scale of values.

    Args:
        image_shape: of a datum, channels first; None where it is no image.
        num: how many.
        seed: of z and x.
        context: `(num, ...)`, where the model takes one.

    Raises:
        ShapeError: the likelihood is over data of another shape.
        ConfigError: `num` is not positive.
    """
    at_least("num", num, 1)
    with looking(vae, seed):
        p = vae.generate(num, context)
        drawn, mean = flat(p.sample()), flat(p.mean)
    limits = value_limits(mean, drawn)
    if image_shape is None:
        figure = _overlaid(drawn, mean, limits, (DRAW, MEAN))
    else:
        columns = math.ceil(math.sqrt(num))
        height, width = image_shape[-2:]
        ratio = math.ceil(num / columns) / columns * height / width
        figure = style.figure(WIDTH, 0.5 + ratio * WIDTH / 2)
        for axes, rows, title in zip(
            figure.subplots(1, 2), (mean, drawn), (MEAN, DRAW), strict=True
        ):
            tile(axes, rows, image_shape, columns, limits=limits)
            axes.set_title(title, fontsize=style.TITLE)
        state_limits(figure, limits)
    figure.suptitle(r"Samples of the model, $z \sim p(z)$", fontsize=style.TITLE)
    return figure


def manifold(vae: Any, image_shape: Shape | None, num: int = 20, seed: int = 0) -> Figure:
    """E[x|z] over a grid of z at the prior's quantiles (Kingma & Welling 2013, appendix A).

    The grid is evenly spaced in each coordinate's probability, at (i + 1/2) / `num`, so that every
    picture stands for equal mass of a prior whose coordinates are independent. The first
    coordinate grows to the right, the second upwards.

    Args:
        image_shape: of a datum, channels first; None draws lines over the features.
        num: pictures along each side.
        seed: of the draws behind the quantiles of a prior that states none.

    Raises:
        ConfigError: the latent space has not two dimensions, the prior needs a context, or `num`
            is not positive.
        ShapeError: the likelihood is over data of another shape.
    """
    at_least("num", num, 1)
    with looking(vae, seed):
        prior = vae.prior()
        if tuple(prior.event_shape) != (2,) or prior.batch_shape:
            raise ConfigError(
                "a manifold is drawn over a latent space of two dimensions, but the prior has "
                f"event shape {tuple(prior.event_shape)}, batch shape {tuple(prior.batch_shape)}"
            )
        probability = torch.cat([(torch.arange(num) + 0.5) / num, torch.tensor(TICKS)])
        coordinates, ticks = quantiles(prior, probability).split([num, len(TICKS)])
        first, second = coordinates.unbind(-1)
        z = torch.cartesian_prod(second.flip(0), first).flip(-1)
        mean = likelihood_means(vae, z)
    ratio = 1.0 if image_shape is None else image_shape[-2] / image_shape[-1]
    figure = style.figure(5, 0.4 + 4.8 * ratio)
    axes = figure.subplots()
    # small images fill their frame, and would run into their neighbours
    gap = image_shape is not None and min(image_shape[-2:]) < 16
    tile(axes, mean, image_shape, num, limits=value_limits(mean), gap=gap)
    places = num * np.array(TICKS)  # a cell is 1 / num of the probability
    axes.set_xticks(places, [f"${value:.2f}$" for value in ticks[:, 0].tolist()])
    axes.set_yticks(num - places, [f"${value:.2f}$" for value in ticks[:, 1].tolist()])
    style.dress(axes, f"{MEAN} over the prior's quantiles", "$z_1$", "$z_2$")
    state_limits(figure, value_limits(mean))
    return figure


def quantiles(prior: Distribution, probability: Tensor) -> Tensor:
    """Quantiles of each coordinate of a prior, `(number of probabilities, latent)`.

    Exact where the prior's coordinates are independent with an inverse distribution function,
    otherwise those of 100,000 draws.
    """
    base = getattr(prior, "base_dist", None)
    try:
        example = prior.sample()
        p = probability.to(example)[:, None].expand(-1, *prior.event_shape)
        if base is None:
            raise NotImplementedError
        return base.icdf(p)
    except NotImplementedError:
        return torch.quantile(prior.sample(torch.Size([100_000])), probability.to(example), dim=0)


def _overlaid(under: NDArray[Any], over: NDArray[Any], limits: Limits,
              names: tuple[str, str]) -> Figure:  # fmt: skip
    """Lines of two arrays, row by row in the same cells."""
    columns = min(len(under), math.ceil(math.sqrt(len(under) * 1.6)))
    lines = math.ceil(len(under) / columns)
    figure = style.figure(WIDTH, 0.8 + lines / columns * 0.75 * WIDTH)
    axes = figure.subplots()
    colours = (style.GREY, style.BLUE)
    for rows, colour in zip((under, over), colours, strict=True):
        tile(axes, rows, None, columns, limits=limits, colour=colour)
    handles = [Line2D([], [], color=c, label=n) for c, n in zip(colours, names, strict=True)]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=style.LABEL
    )
    axes.set_xlabel(
        f"features of a datum in order; every cell spans {limits[0]:.3g} to {limits[1]:.3g}",
        fontsize=style.LABEL,
    )
    return figure
