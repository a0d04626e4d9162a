"""A VAE described in words: what the command line builds, and a run folder builds again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import nn

from pyro_vae import datasets, likelihoods, networks, posteriors, priors
from pyro_vae.data import Data
from pyro_vae.errors import CheckpointError, ConfigError, UnknownNameError
from pyro_vae.objectives import ELBO, IWAE, Objective
from pyro_vae.seeding import derive, seeded
from pyro_vae.training import load_weights
from pyro_vae.training.folder import CHECKPOINT, CONFIG, MODEL, read_config
from pyro_vae.vae import VAE

MakeNetwork = Callable[[int], nn.Module]  # from the number of outputs (a feature, for a decoder)


class NetworkPair(NamedTuple):
    """How a kind of network makes encoders and decoders for one data set."""

    encoder: MakeNetwork
    decoder: MakeNetwork


@dataclass(frozen=True)
class Recipe:
    """Which data, which parts, which objective; every field is plain JSON.

    Attributes:
        data, split, binarize: see `datasets.load`.
        prior, likelihood, posterior, network, objective: names in the registries of this module.
        components: of a mixture prior; pseudo-inputs of a VampPrior.
        latent: dimension of z.
        hidden: sizes of the hidden layers (or channels), encoder order; the decoder's are reversed.
        scale: of a likelihood that has one: a number, "learned", "per_feature" or "predicted".
        kl, gradient, kl_weight, free_bits: see `ELBO` and `IWAE`.
        num_particles: draws per datum and step.
        seed: of the weights, the data's fixed draws, and training.
    """

    data: str = "digits"
    split: str | None = None
    binarize: str | None = "dynamic"
    prior: str = "normal"
    likelihood: str = "bernoulli"
    posterior: str = "diagonal"
    network: str = "mlp"
    components: int = 100
    latent: int = 2
    hidden: tuple[int, ...] = (200, 200)
    scale: float | str = "learned"
    objective: str = "elbo"
    kl: str = "auto"
    gradient: str = "standard"
    kl_weight: float = 1.0
    free_bits: float = 0.0
    num_particles: int = 1
    seed: int = 0

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Recipe:
        """A recipe from JSON entries.

        Raises:
            ConfigError: an entry is not a field of a recipe, or not of its type.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(entries.keys() - known):
            raise ConfigError(f"unknown entries {unknown}; a recipe has {sorted(known)}")
        hints = get_type_hints(cls)
        for name, value in entries.items():
            if not _is_a(value, hints[name]):
                kind = cls.__annotations__[name]
                raise ConfigError(f"{name}={value!r} in a recipe should be of type {kind}")
        hidden = tuple(entries.get("hidden", cls.hidden))
        if any(size < 1 for size in hidden):
            raise ConfigError(f"hidden={list(hidden)} in a recipe: sizes are at least 1")
        return cls(**{**entries, "hidden": hidden})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON entries."""
        return {**asdict(self), "hidden": list(self.hidden)}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; a whole number is a float, True is no number."""
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(v, int) for v in value)
    accepted = hint | int if float in (hint, *get_args(hint)) else hint
    return isinstance(value, accepted) and not isinstance(value, bool)


def load_data(recipe: Recipe) -> Data:
    """The data of a recipe, in its splits."""
    return datasets.load(
        recipe.data, split=recipe.split, binarize=recipe.binarize, seed=recipe.seed
    )


def build_vae(recipe: Recipe, data: Data) -> VAE:
    """A fresh VAE: weights drawn from the recipe's seed, output bias from the training mean.

    Raises:
        UnknownNameError: a name is in no registry; the message lists the known ones.
    """
    with seeded(derive(recipe.seed, 0)):
        pair = _look_up(NETWORKS, recipe.network, "network")(recipe, data)
        posterior = _look_up(POSTERIORS, recipe.posterior, "posterior")(recipe, pair.encoder)
        likelihood = _look_up(LIKELIHOODS, recipe.likelihood, "likelihood")(recipe, pair.decoder)
        prior = _look_up(PRIORS, recipe.prior, "prior")(recipe, data, posterior)
    likelihood.initialize(data.train_mean())
    return VAE(prior, likelihood, posterior).float()  # whatever torch's default is


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    return _look_up(OBJECTIVES, recipe.objective, "objective")(recipe)


def load_run(folder: str | Path) -> tuple[VAE, Data, Recipe]:
    """The trained VAE of a run folder that the command line made, its data and its recipe.

    Raises:
        CheckpointError: the folder is no such run, or not a finished one, or its weights do not
            fit its recipe.
        ConfigError: an entry of its recipe means nothing.
    """
    folder = Path(folder)
    entries = read_config(folder, "recipe")
    if missing := sorted({f.name for f in fields(Recipe)} - entries.keys()):
        raise CheckpointError(f"{folder / CONFIG} has a recipe without {missing}")
    recipe = Recipe.from_json(entries)
    if (folder / CHECKPOINT).is_file() and not (folder / MODEL).is_file():
        command = f"pyro-vae train --out {shlex.quote(str(folder))} --resume"
        raise CheckpointError(f"{folder} is not finished: {command}")
    data = load_data(recipe)
    vae = build_vae(recipe, data)
    load_weights(vae, folder / MODEL)
    return vae, data, recipe


def _dense(
    kind: type[networks.MLP | networks.GatedMLP],
) -> Callable[[Recipe, Data], NetworkPair]:
    def build(recipe: Recipe, data: Data) -> NetworkPair:
        there, back = list(recipe.hidden), list(reversed(recipe.hidden))
        return NetworkPair(
            lambda outputs: kind(data.features, there, outputs),
            lambda outputs: kind(recipe.latent, back, outputs * data.features),
        )

    return build


def _conv(recipe: Recipe, data: Data) -> NetworkPair:
    if data.image_shape is None:
        raise ConfigError(f'network="conv" needs images, and "{data.name}" has no image shape')
    *channels, height, width = data.image_shape
    there, back = list(recipe.hidden), list(reversed(recipe.hidden))
    in_channels = channels[0] if channels else 1
    return NetworkPair(
        lambda outputs: networks.ConvEncoder((in_channels, height, width), there, outputs),
        lambda outputs: networks.ConvDecoder(
            recipe.latent, back, (outputs * in_channels, height, width)
        ),
    )


def _standard_normal(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    _refuse(recipe, 'prior="normal"', "components")
    return priors.StandardNormal(recipe.latent)


def _flow_prior(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    _refuse(recipe, 'prior="flow"', "components")
    return priors.Flow.spline(recipe.latent)


def _mixture(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    return priors.GaussianMixture(torch.randn(recipe.components, recipe.latent))


def _vamp(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    x = data.train.fixed().x
    bounds = (0.0, 1.0) if bool(((x >= 0) & (x <= 1)).all()) else None
    return priors.VampPrior(posterior, recipe.components, x, bounds=bounds, seed=recipe.seed)


def _located(kind: Any) -> Callable[[Recipe, MakeNetwork], nn.Module]:
    """A likelihood with a location and a scale in the form that the recipe asks for."""
    return lambda recipe, decoder: kind(
        decoder(2 if recipe.scale == "predicted" else 1), recipe.scale
    )


def _plain(kind: type[likelihoods.Likelihood]) -> Callable[[Recipe, MakeNetwork], nn.Module]:
    def build(recipe: Recipe, decoder: MakeNetwork) -> nn.Module:
        _refuse(recipe, f'likelihood="{recipe.likelihood}"', "scale")
        return kind(decoder(kind.outputs_per_feature))

    return build


def _full_rank(recipe: Recipe, encoder: MakeNetwork) -> nn.Module:
    outputs = posteriors.FullRankNormal.outputs(recipe.latent)
    return posteriors.FullRankNormal(encoder(outputs), recipe.latent)


def _flow_posterior(recipe: Recipe, encoder: MakeNetwork) -> nn.Module:
    context = 2 * recipe.latent
    return posteriors.InverseAutoregressiveFlow(
        encoder(2 * recipe.latent + context), recipe.latent, context,
        hidden=(max(64, 2 * recipe.latent),),
    )  # fmt: skip


def _elbo(recipe: Recipe) -> Objective:
    if recipe.gradient == "dreg":
        raise ConfigError('gradient="dreg" is of the iwae objective')
    return ELBO(
        kl=recipe.kl,  # type: ignore[arg-type]
        gradient=recipe.gradient,  # type: ignore[arg-type]
        kl_weight=recipe.kl_weight,
        free_bits=recipe.free_bits,
        num_particles=recipe.num_particles,
    )


def _iwae(recipe: Recipe) -> Objective:
    _refuse(recipe, 'objective="iwae"', "kl", "kl_weight", "free_bits")
    return IWAE(recipe.num_particles, recipe.gradient)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[Recipe, Data], NetworkPair]] = {
    "mlp": _dense(networks.MLP),
    "gated": _dense(networks.GatedMLP),
    "conv": _conv,
}
PRIORS: dict[str, Callable[[Recipe, Data, nn.Module], nn.Module]] = {
    "normal": _standard_normal,
    "mixture": _mixture,
    "vamp": _vamp,
    "flow": _flow_prior,
}
LIKELIHOODS: dict[str, Callable[[Recipe, MakeNetwork], nn.Module]] = {
    "bernoulli": _plain(likelihoods.Bernoulli),
    "continuous_bernoulli": _plain(likelihoods.ContinuousBernoulli),
    "normal": _located(likelihoods.Normal),
    "laplace": _located(likelihoods.Laplace),
    "student_t": _located(likelihoods.StudentT),
    "discretized_logistic": _located(likelihoods.DiscretizedLogistic),
    "poisson": _plain(likelihoods.Poisson),
    "negative_binomial": _plain(likelihoods.NegativeBinomial),
}
POSTERIORS: dict[str, Callable[[Recipe, MakeNetwork], nn.Module]] = {
    "diagonal": lambda recipe, encoder: posteriors.DiagonalNormal(encoder(2 * recipe.latent)),
    "full_rank": _full_rank,
    "flow": _flow_posterior,
}
OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {"elbo": _elbo, "iwae": _iwae}


def _refuse(recipe: Recipe, choice: str, *names: str) -> None:
    """Refuse what was set and the choice would ignore."""
    for name in names:
        if getattr(recipe, name) != getattr(Recipe, name):
            option = name.replace("_", "-")
            raise ConfigError(f"{choice} has no use for {name} (--{option}): leave it out")


def _look_up(registry: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in registry:
        raise UnknownNameError(f'unknown {kind} "{name}"; known are {", ".join(sorted(registry))}')
    return registry[name]
