"""M1+M2: a semi-supervised VAE of the features that another VAE has found."""

from __future__ import annotations

from dataclasses import replace

import pyro
import torch
from torch import Tensor

from pyro_vae import programs
from pyro_vae.data import Data, Split
from pyro_vae.errors import ConfigError
from pyro_vae.typing import Conditional, Distribution
from pyro_vae.vae import VAE, Generative, ProgramModule
from pyro_vae.variants.semi_supervised import ClassGuide, ClassModel, SemiSupervisedVAE

CHUNK = 4096


class StackedVAE(Generative):
    """p(y) p(z|y) p(z1|z, y) p(x|z1) with q(z1|x) q(y|z1) q(z|z1, y) (M1+M2: Kingma et al. 2014,
    section 2.3).

    The authors train the two one after the other: `m1` on the data, `m2` on `encoded(m1, data)`.
    The whole is a model and guide of its own, to be evaluated, or trained on.

    Args:
        m1: its likelihood and posterior are taken; its prior gives way to `m2`.
        m2: over vectors as long as `m1`'s latent ones.
        name: see `VAE`.
    """

    def __init__(self, m1: VAE, m2: SemiSupervisedVAE, name: str | None = None) -> None:
        super().__init__()
        self.m2 = m2
        self.model = StackedModel(m1.likelihood, m2.model, name and f"{name}.model")
        self.guide = StackedGuide(m1.posterior, m2.guide, name and f"{name}.guide")

    def classify(self, x: Tensor, labels: Tensor | None = None) -> Distribution:
        """q(y|z1) at the mean of q(z1|x); a known label has all the probability."""
        return self.m2.classify(self.encode(x).mean, labels)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Distribution:
        """q(z1|x)."""
        return self.guide.features(x)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x|z1)."""
        return self.model.likelihood(z)

    def check_context(self, context: Tensor) -> None:
        """See `SemiSupervisedVAE.check_context`."""
        self.guide.check_context(context)

    def _run_model(self, x: Tensor, context: Tensor | None) -> None:
        with self.m2.told(context):
            self.model(x)


class StackedModel(ProgramModule):
    """y and z as in M2, z1 ~ p(z1|z, y), x ~ p(x|z1)."""

    def __init__(self, likelihood: Conditional, top: ClassModel, name: str | None) -> None:
        super().__init__(name)
        self.likelihood, self.top = likelihood, top

    def forward(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Run the model with data `x`, `(N, features)`, and the known labels observed."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", self.top.draw())
            pyro.sample("x", self.likelihood(z1), obs=x)
            self.top.observe(z1, labels)


class StackedGuide(ProgramModule):
    """z1 ~ q(z1|x), then y and z as in M2."""

    def __init__(self, features: Conditional, top: ClassGuide, name: str | None) -> None:
        super().__init__(name)
        self.features, self.top = features, top

    def check_context(self, context: Tensor) -> None:
        """See `SemiSupervisedVAE.check_context`."""
        self.top.check_context(context)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Run the guide on data `x`, `(N, features)`."""
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            self.top.draw(pyro.sample("z1", self.features(x)), labels)


def encoded(vae: VAE, data: Data) -> Data:
    """The same data seen through a VAE: each datum a draw from its q(z|x), anew at every visit.

    Any classifier of these features is M1; a `SemiSupervisedVAE` of them is the upper half of
    M1+M2. Labels and contexts stay. Data that are binarised anew are binarised once.

    Args:
        vae: its posterior is a `DiagonalNormal`.

    Raises:
        ConfigError: the posterior is another.
    """

    @torch.no_grad()
    def look(split: Split) -> Split:
        like = next(vae.parameters())
        with programs.evaluating(vae):
            parts = [vae.encode(x.to(like)) for x in split.fixed().x.split(CHUNK)]
        if not all(
            isinstance(getattr(q, "base_dist", None), torch.distributions.Normal) for q in parts
        ):
            raise ConfigError("encoded needs a posterior of independent Normals, DiagonalNormal")
        loc, scale = (torch.cat([getattr(q, name) for q in parts]) for name in ("mean", "stddev"))
        return replace(split, x=torch.cat([loc, scale], -1), draw=normal_draw)

    valid = None if data.valid is None else look(data.valid)
    return replace(
        data, train=look(data.train), valid=valid, test=look(data.test), image_shape=None
    )


def normal_draw(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from Normals whose means are the first half of a row, and scales the second."""
    loc, scale = x.chunk(2, -1)
    noise = torch.randn(loc.shape, generator=generator, dtype=x.dtype, device=x.device)
    return loc + scale * noise
