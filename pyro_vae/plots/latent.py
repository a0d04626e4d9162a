"""Where data lie in the latent space, and where the prior expects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.plots import style
from pyro_vae.plots.reading import as_context, as_input, looking, posterior_means
from pyro_vae.typing import Distribution

MASSES = (0.5, 0.9, 0.99)  # of the prior, inside the contours
MANY = 10  # classes beyond which numbers become a scale of colours
DRAWS, GRID = 20_000, 200


def latent_map(
    vae: Any,
    x: ArrayLike | Tensor,
    labels: ArrayLike | Tensor | None = None,
    seed: int = 0,
    context: ArrayLike | Tensor | None = None,
) -> Figure:
    """Means of q(z|x) in the plane, coloured by label, over the contours of the prior.

    The contours bound the regions of highest prior density that hold 50, 90 and 99 % of its mass
    (Hyndman 1996); for N(0, I) in the plane they are circles of radius sqrt(-2 log(1 - mass)).
    A latent space of more than two dimensions is shown in the first two principal components of
    the means, as coordinates u·z (not centred, so that the prior's centre keeps its place); the
    contours are then those of the projected prior: exact for a Normal with independent
    dimensions, otherwise a kernel estimate from draws. One of a single dimension is shown as
    histograms beside the prior's density.

    Args:
        x: `(N, features)`.
        labels: `(N,)`, classes or numbers; more than ten distinct numbers get a colour bar.
        seed: of the draws behind contours, and behind means that have no closed form.
        context: `(N, ...)`, where the model takes one; the contours are then those of the mean of
            p(z|context) over the data.

    Raises:
        DataError, ShapeError: `x` is empty; there are not as many labels or contexts as data.
        ConfigError: the prior needs a context, or the model states none (that of z_1 in a
            hierarchy is an integral).
    """
    data = as_input(vae, x)
    classes = None if labels is None else _as_labels(labels, len(data))
    with looking(vae, seed):
        given = as_context(vae, data, context)
        prior = _prior(vae, None if context is None else given)
        means = posterior_means(vae, data, given)
        if means.shape[1] == 1:
            return _histograms(prior, means, classes)
        figure = style.figure(5.4, 5.0)
        names = _map(figure.subplots(), prior, means, classes)
    title = r"Means of $q(z\,|\,x)$, and where the prior has 50, 90 and 99% of its mass"
    style.dress(figure.axes[0], title, *names)
    return figure


def latent_maps(
    vaes: Mapping[str, Any],
    x: ArrayLike | Tensor,
    labels: ArrayLike | Tensor | None = None,
    seed: int = 0,
) -> Figure:
    """The latent maps of several VAEs of the same data, side by side, titled by their names.

    Each has a scale of its own, which the prior's contours show: their radii are the same.

    Args:
        vaes: by name; latent spaces of at least two dimensions.
        x, labels, seed: see `latent_map`.

    Raises:
        ConfigError: there is no VAE, or one has a single latent dimension or needs a context.
        DataError, ShapeError: see `latent_map`.
    """
    if not vaes:
        raise ConfigError("there is no VAE to map")
    figure = style.figure(3.0 * len(vaes) + 0.6, 3.2)
    axes = figure.subplots(1, len(vaes), squeeze=False)[0]
    for i, (panel, (name, vae)) in enumerate(zip(axes, vaes.items(), strict=True)):
        data = as_input(vae, x)
        classes = None if labels is None else _as_labels(labels, len(data))
        with looking(vae, seed):
            means = posterior_means(vae, data, as_context(vae, data, None))
            if means.shape[1] < 2:
                raise ConfigError(f'"{name}" has a latent space of one dimension: see latent_map')
            names = _map(panel, _prior(vae, None), means, classes, legend=i == len(vaes) - 1)
        style.dress(panel, name, *names)
    return figure


def _map(
    axes: Axes, prior: Distribution, means: Tensor, classes: NDArray[Any] | None,
    legend: bool = True,
) -> tuple[str, str]:  # fmt: skip
    """Draw one map; returns the names of its coordinates."""
    directions, explained = _plane(means)
    _scatter(axes, (means @ directions).double().cpu().numpy(), classes, legend)
    _contours(axes, prior, directions)
    axes.set_aspect("equal")
    if explained is None:
        return "$z_1$", "$z_2$"
    first, second = (
        f"Principal component {i + 1} of {means.shape[1]} latent dimensions\n"
        f"({share:.0%} of the means' variance)" for i, share in enumerate(explained)
    )  # fmt: skip
    return first, second


def _prior(vae: Any, context: Tensor | None) -> Distribution:
    """p(z), or the mean of p(z|context) over the contexts."""
    if not hasattr(vae, "prior"):
        raise ConfigError(
            f"a latent map needs the prior of what is encoded, and {type(vae).__name__} states none"
        )
    if context is None:
        prior = vae.prior()
        if prior.batch_shape:
            raise ConfigError(
                f"a latent map needs one prior for all data, got batch {tuple(prior.batch_shape)}"
            )
        return prior
    each, counts = context.unique(dim=0, return_counts=True)
    priors = vae.prior(each)
    if not priors.batch_shape:
        return priors
    return MixtureSameFamily(Categorical(counts.to(priors.mean)), priors)


def _as_labels(labels: ArrayLike | Tensor, number: int) -> NDArray[Any]:
    array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.shape != (number,):
        raise ShapeError(f"{number} data need labels of shape ({number},), got {array.shape}")
    return array


def _plane(means: Tensor) -> tuple[Tensor, list[float] | None]:
    """Directions `(latent, 2)` and, where they are principal, their shares of the variance."""
    latent = means.shape[1]
    if latent == 2:
        return torch.eye(2).to(means), None
    _, singular, right = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    if len(right) < 2:  # a single datum has no spread to speak of
        return torch.eye(latent, 2).to(means), [0.0, 0.0]
    variance = singular.square()
    shares = variance[:2] / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    # the sign of a component is arbitrary: make its largest weight positive
    top = right[:2]
    signs = top.gather(1, top.abs().argmax(1, keepdim=True)).sign()
    return (signs * top).T, shares.tolist()


def _scatter(axes: Axes, points: NDArray[Any], classes: NDArray[Any] | None, legend: bool) -> None:
    look: dict[str, Any] = {
        "s": float(np.clip(12_000 / len(points), 2, 16)), "linewidths": 0, "alpha": 0.75,
        "rasterized": True, "zorder": 2,
    }  # fmt: skip
    if classes is None:
        axes.scatter(points[:, 0], points[:, 1], color=style.BLUE, **look)
        return
    known = np.unique(classes)
    if len(known) > MANY and np.issubdtype(known.dtype, np.number):
        drawn = axes.scatter(points[:, 0], points[:, 1], c=classes, cmap="viridis", **look)
        bar = axes.figure.colorbar(drawn, ax=axes, label="label", shrink=0.7)
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
        return
    for label, colour in zip(known, style.class_colours(len(known)), strict=True):
        cloud = points[classes == label]
        axes.scatter(cloud[:, 0], cloud[:, 1], color=colour, label=_name(label), **look)
        # colours alone do not tell ten classes apart for every reader
        axes.annotate(
            _name(label), np.median(cloud, 0), ha="center", va="center", fontsize=style.TITLE,
            fontweight="bold", color=style.INK, zorder=4,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    if not legend:
        return
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        fontsize=style.LABEL, title="class",
        title_fontsize=style.LABEL, markerscale=2, ncols=1 + (len(known) - 1) // 25,
    )  # fmt: skip


def _name(label: Any) -> str:
    return f"{label:g}" if np.issubdtype(type(label), np.floating) else str(label)


def _contours(axes: Axes, prior: Distribution, directions: Tensor) -> None:
    """Regions of highest density: the level of mass m is the (1 - m) quantile of p(Z), Z ~ p."""
    draws = prior.sample(torch.Size([DRAWS]))
    density, seen = _density(prior, directions, draws)
    levels = torch.quantile(density(seen), 1 - torch.tensor(MASSES).to(seen)).cpu().numpy()
    # wide enough for the prior's own contours, whatever part of it the data occupy
    low, high = torch.quantile(seen, torch.tensor([5e-4, 1 - 5e-4]).to(seen), dim=0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    x, y = (torch.linspace(float(a), float(b), GRID).to(seen)
            for a, b in zip(low, high, strict=True))  # fmt: skip
    grid = torch.cartesian_prod(y, x).flip(-1)
    height = density(grid).reshape(GRID, GRID).cpu().numpy()
    names = {level: f"{mass:.0%}" for level, mass in zip(levels.tolist(), MASSES, strict=True)}
    lines = axes.contour(
        x.cpu(), y.cpu(), height, levels=sorted(names), colors=style.INK, linewidths=0.8,
        linestyles="solid", zorder=3,
    )  # fmt: skip
    axes.clabel(lines, fmt=names, fontsize=style.TICK)


def _density(prior: Distribution, directions: Tensor, draws: Tensor) -> tuple[Any, Tensor]:
    """log-density of the prior in the plane, and its draws there."""
    if len(directions) == 2:
        return prior.log_prob, draws
    seen = draws @ directions
    if isinstance(prior, Independent) and isinstance(prior.base_dist, Normal):
        scaled = directions * prior.stddev[:, None]
        return MultivariateNormal(prior.mean @ directions, scaled.T @ scaled).log_prob, seen
    from scipy.stats import gaussian_kde

    kernel = gaussian_kde(seen[:2000].double().cpu().numpy().T)
    return lambda z: torch.as_tensor(kernel.logpdf(z.double().cpu().numpy().T)).to(z), seen


def _histograms(prior: Distribution, means: Tensor, classes: NDArray[Any] | None) -> Figure:
    """A latent space of one dimension."""
    values = means[:, 0].double().cpu().numpy()
    figure = style.figure(6, 3.4)
    axes = figure.subplots()
    bins = np.histogram_bin_edges(values, bins=40)
    known = [None] if classes is None else list(np.unique(classes))
    for label, colour in zip(known, style.class_colours(len(known)), strict=True):
        part = values if label is None else values[classes == label]
        axes.hist(
            part, bins=bins.tolist(), density=True, histtype="step", linewidth=1.3, color=colour,
            label=r"means of $q(z\,|\,x)$" if label is None else _name(label),
        )  # fmt: skip
    z = torch.linspace(min(-4.0, float(bins[0])), max(4.0, float(bins[-1])), 400).to(means)
    density = prior.log_prob(z[:, None]).exp().cpu()
    axes.plot(z.cpu(), density, color=style.INK, linestyle="--", linewidth=1.2, label="prior")
    style.dress(axes, "Means of $q(z\\,|\\,x)$", "$z$", "Density")
    axes.legend(frameon=False, fontsize=style.TICK, ncols=1 + len(known) // 8)
    return figure
