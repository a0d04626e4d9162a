"""Recipes: every registered part builds and trains as the command line does it."""

import json
import re
from dataclasses import fields, replace

import pytest
import torch

import pyro_vae as pv
from pyro_vae import recipes
from pyro_vae.cli import train
from pyro_vae.cli.train import PRECISIONS
from pyro_vae.data import Data, Split
from pyro_vae.errors import ConfigError, DataError, UnknownNameError
from pyro_vae.recipes import Recipe, build_objective, build_vae
from pyro_vae.training import devices

KINDS = ["model", "prior", "likelihood", "posterior", "network", "objective"]
EACH = [
    *({"prior": name} for name in ("normal", "flow")),
    *({"prior": name, "components": 4} for name in ("mixture", "vamp")),
    *({"posterior": name} for name in recipes.POSTERIORS),
    *({"network": name, "hidden": (8, 8)} for name in recipes.NETWORKS),
    *({"likelihood": name} for name in recipes.LIKELIHOODS),
    *({"likelihood": "normal", "scale": form} for form in (0.5, "per_feature", "predicted")),
    {"objective": "iwae", "num_particles": 3, "gradient": "dreg"},
    {"kl": "monte_carlo", "gradient": "stl"},
    *({"model": name} for name in recipes.MODELS),
    {"model": "m2", "labels": 5, "label_weight": 0.2, "network": "gated"},
    {
        "model": "gmvae",
        "clusters": 3,
        "posterior": "full_rank",
        "network": "conv",
        "hidden": (4, 8),
    },
    {"model": "hierarchical", "upper": (4, 2)},
    {"model": "m1m2", "labels": 4, "upper": (2,), "network": "conv", "hidden": (4, 8)},
]


def data() -> Data:
    """Zeros and ones, which every likelihood here takes."""
    x = (torch.rand(40, 36, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    y = torch.arange(40) % 2
    splits = (Split(x[rows], y[rows]) for rows in (slice(20), slice(20, 30), slice(30, 40)))
    return Data(*splits, image_shape=(6, 6))


def given(recipe: Recipe) -> Data:
    """The data as `load_data` hands them to a model."""
    return recipes.MODELS[recipe.model].given(replace(recipe, labels=6), data())


@pytest.mark.parametrize("entries", EACH, ids=str)
def test_each_part_builds_and_trains(entries: dict) -> None:
    recipe = Recipe(latent=3, **entries)
    vae = build_vae(recipe, given(recipe))
    before = {n: p.detach().clone() for n, p in vae.named_parameters() if p.requires_grad}
    objective = build_objective(recipe)
    run = pv.fit(vae, given(recipe), objective=objective, epochs=2, batch_size=10)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in run.metrics)
    moved = [n for n, p in vae.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert moved == list(before)


def test_m1_is_trained_before_m2_and_not_with_it() -> None:
    recipe = Recipe(model="m1m2", latent=3, hidden=(8,), upper=(2,), pretrain=2)
    vae = build_vae(recipe, given(recipe))
    m1 = [*vae.model.likelihood.parameters(), *vae.guide.features.parameters()]
    m2 = list(vae.m2.parameters())
    before = [p.detach().clone() for p in m1 + m2]
    recipes.start(recipe, given(recipe), vae, batch_size=10)
    started = [p.detach().clone() for p in m1 + m2]
    assert not any(map(torch.equal, before[: len(m1)], started))
    assert all(map(torch.equal, before[len(m1) :], started[len(m1) :]))
    pv.fit(vae, given(recipe), objective=build_objective(recipe), epochs=2, batch_size=10)
    assert all(map(torch.equal, started[: len(m1)], m1))
    assert not any(map(torch.equal, started[len(m1) :], m2))
    with pytest.raises(ConfigError, match="one layer above"):
        build_vae(replace(recipe, upper=(3, 2)), given(recipe))


def test_a_recipe_survives_json_and_its_seed_fixes_the_weights() -> None:
    for recipe in (Recipe(model="hierarchical", upper=(3, 2)), Recipe(hidden=(5, 4), seed=3)):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    recipe = Recipe(latent=3, hidden=(5, 4), prior="vamp", components=4, seed=3)
    first, second = (build_vae(recipe, data()).state_dict() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_different_seeds_give_different_weights() -> None:
    seeds = [build_vae(Recipe(seed=seed), data()).state_dict() for seed in (0, 1)]
    a, b = (next(v for v in s.values() if v.dim() == 2) for s in seeds)
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "kind", ["model", "prior", "likelihood", "posterior", "network", "objective"]
)
def test_unknown_names_list_the_known(kind: str) -> None:
    registry = getattr(recipes, f"{kind}s".upper())
    recipe = Recipe(**{kind: "nothing"})
    with pytest.raises(UnknownNameError, match=f"no {kind} named 'nothing'") as caught:  # noqa: PT012
        build_vae(recipe, data())
        build_objective(recipe)
    assert all(name in str(caught.value) for name in registry)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"labels": 7}, r'model="vae" has no use for labels \(--labels\)'),
        ({"model": "cvae", "prior": "vamp"}, "no use for prior"),
        ({"model": "m2", "clusters": 3}, "no use for clusters"),
        ({"model": "hierarchical", "label_weight": 0.3}, "--label-weight"),
        ({"model": "m2", "network": "conv"}, 'conv" takes no class'),
    ],
)
def test_options_that_a_model_has_no_use_for(entries: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_vae(Recipe(**entries), data())


@pytest.mark.parametrize("model", ["cvae", "class_means", "m2"])
def test_models_of_classes_need_labels(model: str) -> None:
    unlabelled = Data(*(Split(torch.zeros(4, 36)) for _ in range(3)))
    with pytest.raises(DataError, match="labels"):
        recipes.MODELS[model].given(Recipe(model=model), unlabelled)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"gradient": "dreg"}, "iwae"),
        ({"objective": "iwae", "kl": "analytic"}, r"--kl\)"),
        ({"objective": "iwae", "kl_weight": 0.5}, "--kl-weight"),
        ({"objective": "iwae", "free_bits": 0.5}, "--free-bits"),
        ({"gradient": "stl", "kl": "analytic"}, "Monte Carlo"),
    ],
)
def test_options_that_mean_nothing_together(entries: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_objective(Recipe(**entries))


@pytest.mark.parametrize(
    ("entries", "option"),
    [
        *(({"likelihood": n, "scale": 0.5}, "--scale") for n in ("bernoulli", "poisson")),
        *(({"prior": n, "components": 5}, "--components") for n in ("normal", "flow")),
    ],
)
def test_options_that_a_part_would_ignore(entries: dict, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        build_vae(Recipe(**entries), data())


def test_every_registered_part_is_tried() -> None:
    for kind in ("prior", "posterior", "network", "likelihood"):
        tried = {entries[kind] for entries in EACH if kind in entries}
        assert tried == set(getattr(recipes, f"{kind}s".upper()))


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"latnet": 2}, "latnet"),
        ({"latent": "2"}, "latent"),
        ({"latent": 2.0}, "latent"),
        ({"seed": True}, "seed"),
        ({"data": None}, "data"),
        ({"kl_weight": "1"}, "kl_weight"),
        ({"scale": None}, "scale"),
        ({"hidden": 200}, "hidden"),
        ({"hidden": [200, 1.5]}, "hidden"),
        ({"hidden": [200, 0]}, "hidden"),
    ],
)
def test_entries_that_are_no_recipe_are_refused_by_name(entries: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Recipe.from_json(entries)


def test_whole_numbers_will_do_for_real_ones_in_json() -> None:
    recipe = Recipe.from_json({"kl_weight": 1, "scale": 2, "split": None, "hidden": []})
    assert (recipe.kl_weight, recipe.scale, recipe.hidden) == (1, 2, ())


def test_every_recipe_field_is_an_option_of_train() -> None:
    options = {p.name for p in train.params}
    assert {f.name for f in fields(Recipe)} <= options


@pytest.mark.parametrize(
    "kind", ["model", "prior", "likelihood", "posterior", "network", "objective"]
)
def test_the_help_names_every_registered_part(kind: str) -> None:
    (option,) = (p for p in train.params if p.name == kind)
    words = set(re.findall(r"\w+", option.to_info_dict()["help"]))
    assert set(getattr(recipes, f"{kind}s".upper())) <= words


def test_the_command_line_offers_every_precision() -> None:
    assert PRECISIONS == devices.PRECISIONS
