"""The parts that a recipe can name: networks, priors, likelihoods, posteriors, objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.checks import look_up
from pyro_vae.data import Data
from pyro_vae.errors import ConfigError
from pyro_vae.objectives import ELBO, IWAE, Objective
from pyro_vae.recipes.recipe import Recipe, refuse

MakeNetwork = Callable[[int], nn.Module]  # from the number of outputs (a feature, for a decoder)


class NetworkPair(NamedTuple):
    """How a kind of network makes encoders and decoders for one data set."""

    encoder: MakeNetwork
    decoder: MakeNetwork


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


def _standard_normal(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    refuse(recipe, 'prior="normal"', "components")
    return priors.StandardNormal(recipe.latent)


def _flow_prior(recipe: Recipe, data: Data, posterior: nn.Module) -> nn.Module:
    refuse(recipe, 'prior="flow"', "components")
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
        refuse(recipe, f'likelihood="{recipe.likelihood}"', "scale")
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
    refuse(recipe, 'objective="iwae"', "kl", "kl_weight", "free_bits")
    return IWAE(recipe.num_particles, recipe.gradient)  # type: ignore[arg-type]


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


def parts(recipe: Recipe, data: Data, q: int = 0, p: int = 0) -> tuple[nn.Module, nn.Module]:
    """Posterior and likelihood, whose networks take contexts of sizes `q` and `p`."""
    make = look_up("network", recipe.network, NETWORKS)
    encoder, decoder = make(recipe, data, q).encoder, make(recipe, data, p).decoder
    posterior = look_up("posterior", recipe.posterior, POSTERIORS)(recipe, encoder)
    likelihood = look_up("likelihood", recipe.likelihood, LIKELIHOODS)(recipe, decoder)
    return posterior, likelihood


def classifier(recipe: Recipe, data: Data, num_classes: int) -> nn.Module:
    """q(y|x), by a network of the kind that encodes."""
    make = look_up("network", recipe.network, NETWORKS)
    return posteriors.Classifier(make(recipe, data, 0).encoder(num_classes))
