"""What a trained guide does with its latent dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae import programs
from pyro_vae.checks import at_least
from pyro_vae.data import Split, as_tensor, check_classes
from pyro_vae.distributions import stated_mean
from pyro_vae.errors import ConfigError, ShapeError
from pyro_vae.evidence.ground import prepare
from pyro_vae.seeding import seeded
from pyro_vae.typing import Program


@dataclass(frozen=True)
class ActiveUnits:
    """Which latent dimensions vary with the data.

    Attributes:
        variance: of E_q[u] over the data, for each site, `(dimensions of its event,)`.
        threshold: above which a dimension is active.
    """

    variance: Mapping[str, Tensor]
    threshold: float

    @property
    def active(self) -> dict[str, Tensor]:
        """Booleans, for each site, `(dimensions of its event,)`."""
        return {name: value > self.threshold for name, value in self.variance.items()}

    @property
    def number(self) -> int:
        """Active dimensions of all sites together."""
        return sum(int(active.sum()) for active in self.active.values())


@torch.no_grad()
def active_units(
    guide: Program,
    x: Any,
    threshold: float = 0.01,
    *,
    context: Any = None,
    num_samples: int = 32,
    batch_size: int = 1000,
    seed: int = 0,
) -> ActiveUnits:
    """Count the units u with Cov_x(E_{q(u|x)}[u]) > threshold (Burda et al. 2015, app. C).

    Where a site's distribution has a mean that depends on no other latent, E_q[u] is that mean.
    Elsewhere (a flow; the deeper layers of a hierarchy) it is an average over draws; its own
    variance is kept out by taking the covariance over x of two independent averages, which is
    unbiased and may be slightly negative. A class, whose number is but a name, is left out. The
    guide runs in evaluation mode.

    Args:
        guide: called with rows of `x`; every site has the rows as its leading batch dimension.
        x: data, `(N, features)`, N > 1: a tensor, an array, or a `Split`, at the device and in the
            precision of any parameter.
        threshold: 0.01 in the field.
        context: `(N, ...)`, the guide's second argument where it takes one and `x` brings none.
        num_samples: draws for each average, halved between the two.
        batch_size: rows at once.
        seed: of the draws.

    Raises:
        ConfigError: `num_samples` is no whole number of at least 2, or `batch_size` of at least 1;
            the guide cannot be called or was never run; or there are two contexts.
        DataError: `x` is no array of numbers, or empty.
        ShapeError: fewer than two data, not as many contexts, or a site that has no row for each.
    """
    at_least("num_samples", num_samples, 2)
    at_least("batch_size", batch_size, 1)
    if not callable(guide):
        raise ConfigError(f"the guide must be a Pyro program, a callable; got {guide!r}")
    if context is not None and isinstance(x, Split) and x.context is not None:
        raise ConfigError("x is a Split with a context of its own, so context= has no place")
    x, others = prepare(guide, guide, x, () if context is None else (as_tensor(context),))
    if len(x) < 2:
        raise ShapeError(f"a covariance over the data needs at least two, got {len(x)}")
    args = (x, *others)
    if len(args[-1]) != len(x):
        raise ShapeError(f"{len(x)} data need as many contexts, got {len(args[-1])}")
    parts = zip(*(arg.split(batch_size) for arg in args), strict=True)
    with seeded(seed), programs.evaluating(guide):
        batches = [_two_means(guide, rows, num_samples // 2) for rows in parts]
    variance = {}
    for name in batches[0]:
        a, b = (torch.cat([batch[name][half] for batch in batches]) for half in range(2))
        centred = (a - a.mean(0)) * (b - b.mean(0))
        variance[name] = centred.sum(0) / (len(x) - 1)
    return ActiveUnits(variance, threshold)


def _two_means(
    guide: Program, args: Sequence[Tensor], num_samples: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Two independent estimates of E_q[u] for each site, each `(rows, dimensions)`."""
    halves = [_site_means(guide, args), _site_means(guide, args)]
    if all(torch.equal(halves[0][name], halves[1][name]) for name in halves[0]):
        return {name: (mean, mean) for name, mean in halves[0].items()}  # exact as they are
    for _ in range(num_samples - 1):
        for half in halves:
            for name, mean in _site_means(guide, args).items():
                half[name] = half[name] + mean
    a, b = halves
    return {name: (a[name] / num_samples, b[name] / num_samples) for name in a}


def _site_means(guide: Program, args: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run the guide once: the mean of each site's distribution, or its draw where it has none."""
    nodes = prune_subsample_sites(poutine.trace(guide).get_trace(*args)).nodes
    means, number = {}, len(args[0])
    for name, site in nodes.items():
        if site["type"] != "sample" or site["is_observed"] or _is_class(site["fn"]):
            continue
        draw: Any = site["value"]
        stated = stated_mean(site["fn"])
        mean: Tensor = draw if stated is None else stated
        if mean.dim() == 0 or len(mean) != number:
            shape = tuple(mean.shape)
            raise ShapeError(f'site "{name}" has shape {shape}: no row for each of {number} data')
        means[name] = mean.reshape(number, -1).to(torch.promote_types(mean.dtype, torch.float))
    return means


def _is_class(distribution: Any) -> bool:
    """Whether values are names of classes, in a plate, an event or under a mask."""
    while not isinstance(distribution, Categorical) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, Categorical)


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Share of the data whose cluster is matched to its class, under the best one-to-one matching
    of clusters with classes (Xie et al. 2016, eq. 10).

    Args:
        clusters, labels: whole numbers from 0 on, `(N,)`; leave data of unknown class (-1) out.

    Raises:
        ShapeError: there are not as many clusters as labels, or none.
        DataError: a cluster or label is no such number; the message names it and its row.
    """
    from scipy.optimize import linear_sum_assignment

    if clusters.shape != labels.shape or clusters.dim() != 1 or len(labels) == 0:
        raise ShapeError(
            f"clusters of shape {tuple(clusters.shape)} for labels of shape {tuple(labels.shape)}"
        )
    check_classes(clusters, name="clusters")
    check_classes(labels, name="labels")
    sizes = int(clusters.max()) + 1, int(labels.max()) + 1
    counts = torch.zeros(sizes, dtype=torch.long, device=labels.device)
    counts.index_put_((clusters.long(), labels.long()), torch.ones_like(labels.long()), True)
    matched = linear_sum_assignment(-counts.cpu().numpy())
    return counts.cpu()[matched].sum().item() / len(labels)
