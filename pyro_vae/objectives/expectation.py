"""E_q of what a run computed: particles are averaged, enumerated sites summed over exactly."""

from __future__ import annotations

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae import programs
from pyro_vae.errors import SiteError
from pyro_vae.programs import Run, Site


class Expectation:
    """E_{q(y|x)} E_{q(z|x,y)}: the sum over y is exact, z is drawn once for each y.

    y are the guide's enumerated sites (Kingma et al. 2014, eq. 7). Where q(y|x) gives a value no
    probability, that value counts nothing, whatever its log-densities are: a label that is known
    is a q(y|x) with all its probability there (their eq. 6).

    Args:
        run: with the guide's own densities, whose gradient the probabilities carry.
        num_particles: that the run took.
    """

    def __init__(self, run: Run, num_particles: int) -> None:
        self.num_particles = num_particles
        # the last first: its probabilities may depend on those that were drawn before
        self.sums = [
            (dim, programs.log_prob(run.guide[name]).softmax(dim), run.guide[name])
            for name, dim in reversed(list(run.enumerated.items()))
        ]

    def __call__(self, site: Site, value: Tensor) -> Tensor:
        """Sum over the data, with the site's scale, of the expectation: `(leading,)`.

        Args:
            site: that the value belongs to.
            value: `(leading, *batch)`.

        Raises:
            SiteError: the site lies outside a plate of the enumerated site that it depends on, so
                that the values of all its data would have to be enumerated jointly.
        """
        for dim, probability, y in self.sums:
            if value.dim() > -dim and value.shape[dim] > 1:
                _check_within(site, y)
                counted = torch.where(probability > 0, value, 0.0)
                value = (probability * counted).sum(dim, keepdim=True)
        scaled = scale_and_mask(value, site["scale"], None)
        return scaled.reshape(len(scaled), -1).sum(1) / self.num_particles


def _check_within(site: Site, y: Site) -> None:
    outside = set(y["cond_indep_stack"]) - set(site["cond_indep_stack"])
    if outside:
        names = sorted(frame.name for frame in outside)
        raise SiteError(
            f'site "{site["name"]}" depends on the enumerated site "{y["name"]}" but lies outside '
            f"its plates {names}: draw it within them"
        )
