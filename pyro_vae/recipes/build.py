"""What a recipe makes: data, a model with its guide, an objective; and a run folder, again."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae import datasets
from pyro_vae.checks import look_up
from pyro_vae.data import Data, one_hot
from pyro_vae.datasets.files import READERS
from pyro_vae.errors import CheckpointError
from pyro_vae.objectives import Objective
from pyro_vae.recipes.models import MODELS, OPTIONS_OF_MODELS
from pyro_vae.recipes.parts import OBJECTIVES
from pyro_vae.recipes.recipe import Recipe, refuse
from pyro_vae.seeding import derive, seeded
from pyro_vae.training import load_weights
from pyro_vae.training.folder import CHECKPOINT, CONFIG, MODEL, read_config
from pyro_vae.vae import Generative

OF_FILES = ("key", "label_key", "divide_by", "image_shape")  # those that only a file of data takes


def load_data(recipe: Recipe) -> Data:
    """The data of a recipe, in its splits, with the context that its model takes."""
    model = look_up("model", recipe.model, MODELS)
    common: dict[str, Any] = {"binarize": recipe.binarize, "seed": recipe.seed}
    if Path(recipe.data).suffix.lower() in READERS:
        refuse(recipe, "a file of data", "split")
        data = datasets.load_file(
            recipe.data, key=recipe.key, label_key=recipe.label_key, scale=recipe.divide_by,
            image_shape=recipe.image_shape or None, **common,
        )  # fmt: skip
    else:
        refuse(recipe, f'data="{recipe.data}"', *OF_FILES)
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
    model = look_up("model", recipe.model, MODELS)
    refuse(recipe, f'model="{recipe.model}"', *sorted(OPTIONS_OF_MODELS - model.options))
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
    look_up("model", recipe.model, MODELS).start(recipe, data, vae, **fitting)


def is_conditional(recipe: Recipe) -> bool:
    """Whether the model of a recipe must be given a context with each datum."""
    return look_up("model", recipe.model, MODELS).conditional


def sample_context(recipe: Recipe, data: Data, num: int) -> Tensor | None:
    """A context for `num` samples of a conditional model: the classes in turn."""
    if not is_conditional(recipe):
        return None
    return one_hot(torch.arange(num) % data.num_classes, data.num_classes).float()


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    return look_up("objective", recipe.objective, OBJECTIVES)(recipe)


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
