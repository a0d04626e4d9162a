"""Models with classes: the same styles in every class, and a datum in all classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.checks import at_least
from pyro_vae.data import one_hot
from pyro_vae.plots import style
from pyro_vae.plots.reading import (
    as_context,
    as_input,
    flat,
    likelihood_means,
    looking,
    posterior_means,
)
from pyro_vae.plots.tiles import Shape, state_limits, tile, value_limits

WIDTH = 5.5  # inches


def class_grid(
    vae: Any,
    num_classes: int,
    image_shape: Shape | None,
    num: int = 10,
    seed: int = 0,
    name: str = "class",
) -> Figure:
    """E[x|z] of every class: a row a class (or cluster), drawn from it; the noise of a column is
    the same in all rows, so that a column is one style where z and class are told apart.

    Args:
        vae: generates by class: a `VAE` whose context is the class, one-hot, or a model with
            classes of its own.
        num_classes: rows.
        image_shape: of a datum, channels first; None draws lines over the features.
        num: columns.
        seed: of the noise.
        name: of what a row is, such as "cluster".

    Raises:
        ConfigError: a number is not positive.
        DataError: the model has fewer classes.
    """
    at_least("num_classes", num_classes, 1)
    at_least("num", num, 1)
    with looking(vae, seed):
        means = [
            flat(vae.generate(num, _classes(vae, torch.full((num,), y), num_classes), seed).mean)
            for y in range(num_classes)
        ]
    title = f"$\\mathbb{{E}}[x\\,|\\,z,y]$, by {name}"
    return _grid(np.concatenate(means), image_shape, num, name.capitalize(), title)


def analogies(
    vae: Any,
    x: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    num_classes: int,
    image_shape: Shape | None,
    num: int = 8,
) -> Figure:
    """The first data, each with its style, in every class (Kingma et al. 2014, figure 1).

    On the left the datum; then E[x|z, y] for every class y, z the mean of q(z|x, its class).

    Args:
        vae: see `class_grid`.
        x, labels: data `(N, features)` and their classes.
        num: how many of the data, a row each.

    Raises:
        ConfigError: a number is not positive.
        DataError, ShapeError: `x` is empty, or has not as many labels; a label is no class.
    """
    at_least("num_classes", num_classes, 1)
    at_least("num", num, 1)
    data = as_input(vae, x)[:num]
    with looking(vae, 0):
        y = torch.as_tensor(labels)[:num].long().to(data.device)
        z = posterior_means(vae, data, as_context(vae, data, _classes(vae, y, num_classes)))
        every = torch.arange(num_classes, device=data.device).repeat(len(data))
        context = _classes(vae, every, num_classes).to(data.device)
        decoded = likelihood_means(vae, z.repeat_interleave(num_classes, 0), context)
    every_class = decoded.reshape(len(data), num_classes, -1)
    rows = np.concatenate([flat(data)[:, None], every_class], 1)
    title = "A datum, and its style in every class"
    return _grid(rows.reshape(-1, rows.shape[-1]), image_shape, num_classes + 1, "", title)


def _classes(vae: Any, labels: Tensor, num_classes: int) -> Tensor:
    """Labels as the model takes them."""
    if hasattr(vae, "classify"):
        return labels
    like = next(vae.parameters())
    return one_hot(labels, num_classes).to(like)


def _grid(rows: Any, image_shape: Shape | None, columns: int, y: str, title: str) -> Figure:
    lines = len(rows) // columns
    ratio = 1.0 if image_shape is None else image_shape[-2] / image_shape[-1]
    figure = style.figure(WIDTH, 0.5 + WIDTH * ratio * lines / columns)
    axes = figure.subplots()
    limits = value_limits(rows)
    tile(axes, rows, image_shape, columns, limits=limits)
    style.dress(axes, title, "", y)
    if y:
        axes.set_yticks(np.arange(lines) + 0.5, [str(i) for i in range(lines)])
        axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if image_shape is not None:
        state_limits(figure, limits)
    return figure
