"""The words of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from pyro_vae.errors import ConfigError

SIZES = ("hidden", "upper", "image_shape")  # the entries of a recipe that are lists


@dataclass(frozen=True)
class Recipe:
    """Which data, which parts, which objective; every field is plain JSON.

    Attributes:
        data, split, binarize: see `datasets.load`.
        key, label_key, divide_by, image_shape: of a file of data; see `datasets.load_file`, whose
            `scale` is `divide_by` here. An empty `image_shape` is the file's own, if it has one.
        model: a name in `recipes.models.MODELS`; what follows are its parts.
        prior, likelihood, posterior, network, objective: names in `recipes.parts`.
        components: of a mixture prior; pseudo-inputs of a VampPrior.
        latent: dimension of z.
        hidden: sizes of the hidden layers (or channels), encoder order; the decoder's are reversed.
        scale: of a likelihood that has one: a number, "learned", "per_feature" or "predicted".
        kl, gradient, kl_weight, free_bits: see `ELBO` and `IWAE`.
        num_particles: draws per datum and step.
        labels: training labels that an m2 or m1m2 model is told; 0 for all that are known.
        label_weight: of each of them, in units of N / labels (alpha / N of Kingma et al. 2014).
        clusters: of a gmvae.
        pretrain: epochs of the plain VAE that a gmvae starts from, and that is M1 of an m1m2.
        upper: dimensions of the latent layers above z_1 of a hierarchical model, from the data up;
            the one of the z of an m1m2.
        seed: of the weights, the data's fixed draws, and training.
    """

    data: str = "digits"
    split: str | None = None
    binarize: str | None = "dynamic"
    key: str | None = None
    label_key: str | None = None
    divide_by: float | None = None
    image_shape: tuple[int, ...] = ()
    model: str = "vae"
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
    labels: int = 100
    label_weight: float = 0.1
    clusters: int = 10
    pretrain: int = 50
    upper: tuple[int, ...] = (8,)
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
        sizes = {name: tuple(entries.get(name, getattr(cls, name))) for name in SIZES}
        for name, value in sizes.items():
            if any(size < 1 for size in value):
                raise ConfigError(f"{name}={list(value)} in a recipe: sizes are at least 1")
        return cls(**{**entries, **sizes})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON entries."""
        return {**asdict(self), **{name: list(getattr(self, name)) for name in SIZES}}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; a whole number is a float, True is no number."""
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(v, int) for v in value)
    accepted = hint | int if float in (hint, *get_args(hint)) else hint
    return isinstance(value, accepted) and not isinstance(value, bool)


def refuse(recipe: Recipe, choice: str, *names: str) -> None:
    """Refuse what was set and the choice would ignore."""
    for name in names:
        if getattr(recipe, name) != getattr(Recipe, name):
            option = name.replace("_", "-")
            raise ConfigError(f"{choice} has no use for {name} (--{option}): leave it out")
