"""The models that a recipe can name, built from its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from pyro_vae import likelihoods, networks, posteriors, priors, variants
from pyro_vae.checks import look_up
from pyro_vae.data import UNKNOWN, Data
from pyro_vae.errors import ConfigError
from pyro_vae.recipes.parts import PRIORS, classifier, parts
from pyro_vae.recipes.recipe import Recipe
from pyro_vae.training import fit
from pyro_vae.vae import VAE, Generative


def _vae(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = parts(recipe, data)
    prior = look_up("prior", recipe.prior, PRIORS)(recipe, data, posterior)
    return VAE(prior, likelihood, posterior)


def _cvae(recipe: Recipe, data: Data) -> Generative:
    classes = data.num_classes
    posterior, likelihood = parts(recipe, data, classes, classes)
    prior = posteriors.DiagonalNormal(networks.MLP(classes, [], 2 * recipe.latent))
    return VAE(prior, likelihood, posterior)


def _class_means(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = parts(recipe, data)
    prior = priors.ClassMeans(data.num_classes, recipe.latent)
    return VAE(prior, variants.Unconditional(likelihood), variants.Unconditional(posterior))


def _m2(recipe: Recipe, data: Data) -> Generative:
    classes = data.num_classes
    posterior, likelihood = parts(recipe, data, classes, classes)
    return variants.SemiSupervisedVAE(
        priors.StandardNormal(recipe.latent), likelihood, posterior,
        classifier(recipe, data, classes), classes, _label_weight(recipe, data),
    )  # fmt: skip


def _m1m2(recipe: Recipe, data: Data) -> Generative:
    """M1 stays as it is while M2 is trained on what it sees (Kingma et al. 2014, section 2.3)."""
    if len(recipe.upper) != 1:
        raise ConfigError(f'model="m1m2" has one layer above z_1 (--upper), got {recipe.upper}')
    posterior, likelihood = (part.requires_grad_(False) for part in parts(recipe, data))
    (upper,), latent, classes = recipe.upper, recipe.latent, data.num_classes

    def network(inputs: int, outputs: int) -> nn.Module:
        return networks.MLP(inputs, recipe.hidden, outputs)

    m2 = variants.SemiSupervisedVAE(
        priors.StandardNormal(upper),
        likelihoods.Normal(network(upper + classes, 2 * latent), "predicted"),
        posteriors.DiagonalNormal(network(latent + classes, 2 * upper)),
        posteriors.Classifier(network(latent, classes)), classes, _label_weight(recipe, data),
    )  # fmt: skip
    return variants.StackedVAE(VAE(priors.StandardNormal(latent), likelihood, posterior), m2)


def _label_weight(recipe: Recipe, data: Data) -> float:
    told = data.train.context
    labels = recipe.labels if told is None else int((told != UNKNOWN).sum())
    return recipe.label_weight * len(data.train) / max(1, labels)


def _gmvae(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = parts(recipe, data)
    return variants.GaussianMixtureVAE(likelihood, posterior, recipe.clusters, recipe.latent)


def _hierarchical(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = parts(recipe, data)
    sizes = [recipe.latent, *recipe.upper]

    def between(inputs: int, outputs: int) -> nn.Module:
        return posteriors.DiagonalNormal(networks.MLP(inputs, recipe.hidden, 2 * outputs))

    up = [between(below, above) for below, above in pairwise(sizes)]
    down = [between(above, below) for below, above in pairwise(sizes)][::-1]
    top = priors.StandardNormal(sizes[-1])
    return variants.HierarchicalVAE(top, down, likelihood, [posterior, *up])


class Model(NamedTuple):
    """A kind of model: how it is built, what its data are given, which options it alone takes,
    whether it must be given a context, and what is done before it is trained."""

    build: Callable[[Recipe, Data], Generative]
    given: Callable[[Recipe, Data], Data] = lambda recipe, data: data
    options: frozenset[str] = frozenset()
    conditional: bool = False
    start: Callable[..., None] = lambda recipe, data, vae, **fitting: None


def _start_gmvae(recipe: Recipe, data: Data, vae: Any, **fitting: Any) -> None:
    if recipe.pretrain:
        fit(vae.plain(), data, epochs=recipe.pretrain, seed=recipe.seed, **fitting)
        vae.to("cpu")
    vae.place(data.train.fixed().x, recipe.seed)


def _start_m1m2(recipe: Recipe, data: Data, vae: Any, **fitting: Any) -> None:
    m1_parts = vae.model.likelihood, vae.guide.features
    if recipe.pretrain:
        m1 = VAE(priors.StandardNormal(recipe.latent), *(p.requires_grad_() for p in m1_parts))
        without = replace(data, train=data.train.given(None))
        fit(m1, without, epochs=recipe.pretrain, seed=recipe.seed, **fitting)
        m1.to("cpu")
    for part in m1_parts:
        part.requires_grad_(False)


def _given_classes(recipe: Recipe, data: Data) -> Data:
    return data.given_classes()


def _given_labels(recipe: Recipe, data: Data) -> Data:
    return data.given_labels(recipe.labels or None, recipe.seed)


MODELS = {
    "vae": Model(_vae, options=frozenset({"prior", "components"})),
    "cvae": Model(_cvae, _given_classes, conditional=True),
    "class_means": Model(_class_means, _given_classes, conditional=True),
    "m2": Model(_m2, _given_labels, frozenset({"labels", "label_weight"})),
    "m1m2": Model(
        _m1m2,
        _given_labels,
        frozenset({"labels", "label_weight", "pretrain", "upper"}),
        start=_start_m1m2,
    ),
    "gmvae": Model(_gmvae, options=frozenset({"clusters", "pretrain"}), start=_start_gmvae),
    "hierarchical": Model(_hierarchical, options=frozenset({"upper"})),
}
OPTIONS_OF_MODELS = frozenset().union(*(model.options for model in MODELS.values()))
