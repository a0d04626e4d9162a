"""A VAE described in words: what the command line builds, and a run folder builds again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from pyro_vae import datasets, likelihoods, networks, posteriors, priors, variants
from pyro_vae.data import UNKNOWN, Data, one_hot
from pyro_vae.datasets.files import READERS
from pyro_vae.errors import CheckpointError, ConfigError, UnknownNameError
from pyro_vae.objectives import ELBO, IWAE, Objective
from pyro_vae.seeding import derive, seeded
from pyro_vae.training import fit, load_weights
from pyro_vae.training.folder import CHECKPOINT, CONFIG, MODEL, read_config
from pyro_vae.vae import VAE, Generative

MakeNetwork = Callable[[int], nn.Module]  # from the number of outputs (a feature, for a decoder)
SIZES = ("hidden", "upper", "image_shape")  # the entries of a recipe that are lists
OF_FILES = ("key", "label_key", "divide_by", "image_shape")  # those that only a file of data takes


class NetworkPair(NamedTuple):
    """How a kind of network makes encoders and decoders for one data set."""

    encoder: MakeNetwork
    decoder: MakeNetwork


@dataclass(frozen=True)
class Recipe:
    """Which data, which parts, which objective; every field is plain JSON.

    Attributes:
        data, split, binarize: see `datasets.load`.
        key, label_key, divide_by, image_shape: of a file of data; see `datasets.load_file`, whose
            `scale` is `divide_by` here. An empty `image_shape` is the file's own, if it has one.
        model: a name in MODELS; what follows are its parts.
        prior, likelihood, posterior, network, objective: names in the registries of this module.
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


def load_data(recipe: Recipe) -> Data:
    """The data of a recipe, in its splits, with the context that its model takes."""
    model = _look_up(MODELS, recipe.model, "model")
    common: dict[str, Any] = {"binarize": recipe.binarize, "seed": recipe.seed}
    if Path(recipe.data).suffix.lower() in READERS:
        _refuse(recipe, "a file of data", "split")
        data = datasets.load_file(
            recipe.data, key=recipe.key, label_key=recipe.label_key, scale=recipe.divide_by,
            image_shape=recipe.image_shape or None, **common,
        )  # fmt: skip
    else:
        _refuse(recipe, f'data="{recipe.data}"', *OF_FILES)
        data = datasets.load(recipe.data, split=recipe.split, **common)
    return model.given(recipe, data)


def build_vae(recipe: Recipe, data: Data) -> Generative:
    """A fresh model and guide: weights drawn from the recipe's seed, output bias from the training
    mean.

    Raises:
        UnknownNameError: a name is in no registry; the message lists the known ones.
        ConfigError: an option is given that the model has no use for.
        DataError: the model is of classes, and the data have none.
    """
    model = _look_up(MODELS, recipe.model, "model")
    _refuse(recipe, f'model="{recipe.model}"', *sorted(OPTIONS_OF_MODELS - model.options))
    with seeded(derive(recipe.seed, 0)):
        vae = model.build(recipe, data)
    vae.likelihood.initialize(data.train_mean())
    return vae.float()  # whatever torch's default is


def start(recipe: Recipe, data: Data, vae: Generative, **fitting: Any) -> None:
    """What a model needs before it is trained: a gmvae, components at the clusters of a plain VAE;
    an m1m2, its M1.

    Args:
        fitting: of `fit`, for what is trained here: batch_size, learning_rate, device, precision.
    """
    _look_up(MODELS, recipe.model, "model").start(recipe, data, vae, **fitting)


def is_conditional(recipe: Recipe) -> bool:
    """Whether the model of a recipe must be given a context with each datum."""
    return _look_up(MODELS, recipe.model, "model").conditional


def sample_context(recipe: Recipe, data: Data, num: int) -> Tensor | None:
    """A context for `num` samples of a conditional model: the classes in turn."""
    if not is_conditional(recipe):
        return None
    return one_hot(torch.arange(num) % data.num_classes, data.num_classes).float()


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    return _look_up(OBJECTIVES, recipe.objective, "objective")(recipe)


def load_run(folder: str | Path) -> tuple[Generative, Data, Recipe]:
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
    if read_config(folder, "fit").get("precision") == "64-true":
        vae.double()
    load_weights(vae, folder / MODEL)
    return vae, data, recipe


def _dense(
    kind: type[networks.MLP | networks.GatedMLP],
) -> Callable[[Recipe, Data, int], NetworkPair]:
    def build(recipe: Recipe, data: Data, context: int) -> NetworkPair:
        there, back = list(recipe.hidden), list(reversed(recipe.hidden))
        return NetworkPair(
            lambda outputs: kind(data.features + context, there, outputs),
            lambda outputs: kind(recipe.latent + context, back, outputs * data.features),
        )

    return build


def _conv(recipe: Recipe, data: Data, context: int) -> NetworkPair:
    if data.image_shape is None:
        raise ConfigError(f'network="conv" needs images, and "{data.name}" has no image shape')
    if context:
        raise ConfigError(
            f'network="conv" takes no class beside the image, as model="{recipe.model}" needs: '
            "choose mlp or gated"
        )
    *channels, height, width = data.image_shape
    there, back = list(recipe.hidden), list(reversed(recipe.hidden))
    in_channels = channels[0] if channels else 1
    return NetworkPair(
        lambda outputs: networks.ConvEncoder((in_channels, height, width), there, outputs),
        lambda outputs: networks.ConvDecoder(
            recipe.latent, back, (outputs * in_channels, height, width)
        ),
    )


def _parts(recipe: Recipe, data: Data, q: int = 0, p: int = 0) -> tuple[nn.Module, nn.Module]:
    """Posterior and likelihood, whose networks take contexts of sizes `q` and `p`."""
    make = _look_up(NETWORKS, recipe.network, "network")
    encoder, decoder = make(recipe, data, q).encoder, make(recipe, data, p).decoder
    posterior = _look_up(POSTERIORS, recipe.posterior, "posterior")(recipe, encoder)
    likelihood = _look_up(LIKELIHOODS, recipe.likelihood, "likelihood")(recipe, decoder)
    return posterior, likelihood


def _classifier(recipe: Recipe, data: Data, num_classes: int) -> nn.Module:
    make = _look_up(NETWORKS, recipe.network, "network")
    return posteriors.Classifier(make(recipe, data, 0).encoder(num_classes))


def _vae(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = _parts(recipe, data)
    prior = _look_up(PRIORS, recipe.prior, "prior")(recipe, data, posterior)
    return VAE(prior, likelihood, posterior)


def _cvae(recipe: Recipe, data: Data) -> Generative:
    classes = data.num_classes
    posterior, likelihood = _parts(recipe, data, classes, classes)
    prior = posteriors.DiagonalNormal(networks.MLP(classes, [], 2 * recipe.latent))
    return VAE(prior, likelihood, posterior)


def _class_means(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = _parts(recipe, data)
    prior = priors.ClassMeans(data.num_classes, recipe.latent)
    return VAE(prior, variants.Unconditional(likelihood), variants.Unconditional(posterior))


def _m2(recipe: Recipe, data: Data) -> Generative:
    classes = data.num_classes
    posterior, likelihood = _parts(recipe, data, classes, classes)
    return variants.SemiSupervisedVAE(
        priors.StandardNormal(recipe.latent), likelihood, posterior,
        _classifier(recipe, data, classes), classes, _label_weight(recipe, data),
    )  # fmt: skip


def _m1m2(recipe: Recipe, data: Data) -> Generative:
    """M1 stays as it is while M2 is trained on what it sees (Kingma et al. 2014, section 2.3)."""
    if len(recipe.upper) != 1:
        raise ConfigError(f'model="m1m2" has one layer above z_1 (--upper), got {recipe.upper}')
    posterior, likelihood = (part.requires_grad_(False) for part in _parts(recipe, data))
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
    posterior, likelihood = _parts(recipe, data)
    return variants.GaussianMixtureVAE(likelihood, posterior, recipe.clusters, recipe.latent)


def _hierarchical(recipe: Recipe, data: Data) -> Generative:
    posterior, likelihood = _parts(recipe, data)
    sizes = [recipe.latent, *recipe.upper]

    def between(inputs: int, outputs: int) -> nn.Module:
        return posteriors.DiagonalNormal(networks.MLP(inputs, recipe.hidden, 2 * outputs))

    up = [between(below, above) for below, above in pairwise(sizes)]
    down = [between(above, below) for below, above in pairwise(sizes)][::-1]
    top = priors.StandardNormal(sizes[-1])
    return variants.HierarchicalVAE(top, down, likelihood, [posterior, *up])


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
    parts = vae.model.likelihood, vae.guide.features
    if recipe.pretrain:
        m1 = VAE(priors.StandardNormal(recipe.latent), *(p.requires_grad_() for p in parts))
        without = replace(data, train=data.train.given(None))
        fit(m1, without, epochs=recipe.pretrain, seed=recipe.seed, **fitting)
        m1.to("cpu")
    for part in parts:
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
NETWORKS: dict[str, Callable[[Recipe, Data, int], NetworkPair]] = {
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
