"""`pyro-vae plot`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from pyro_vae.cli.parameters import RUN
from pyro_vae.data import Data


@click.command()
@click.argument("run", type=RUN)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the draws that are shown.")
@click.option("--overwrite", is_flag=True, help="Replace figures that are there.")
def plot(run: Path, seed: int, overwrite: bool) -> None:
    """Draw RUN's figures into RUN/figures."""
    from pyro_vae import plots
    from pyro_vae.recipes import load_run, sample_context
    from pyro_vae.training.folder import FIGURES, METRICS, PLOTS, new_output

    paths = {name: run / FIGURES / f"{name}.png" for name in PLOTS}
    with ExitStack() as outputs:
        files = {n: outputs.enter_context(new_output(p, overwrite)) for n, p in paths.items()}
        vae, data, recipe = load_run(run)
        test, shape = data.test.fixed(), data.image_shape
        context, classes = sample_context(recipe, data, 64), _num_classes(recipe, data)
        row = "cluster" if recipe.model == "gmvae" else "class"
        figures: dict[str, Callable[[], Any]] = {
            "training_curves": lambda: plots.training_curves(run / METRICS),
            "reconstructions": lambda: plots.reconstructions(
                vae, test.x, shape, context=test.context
            ),
            "samples": lambda: plots.samples(vae, shape, seed=seed, context=context),
            "latent_map": lambda: plots.latent_map(vae, test.x, test.y, context=test.context),
            "manifold": lambda: plots.manifold(vae, shape),
            "class_grid": lambda: plots.class_grid(vae, classes, shape, seed=seed, name=row),
        }
        if recipe.model != "vae" or recipe.latent != 2:
            del figures["manifold"]
        if not hasattr(vae, "prior"):
            del figures["latent_map"]
        if not classes:
            del figures["class_grid"]
        for name, draw in figures.items():
            draw().savefig(files[name], dpi=150, bbox_inches="tight")
    for name in figures:
        click.echo(str(paths[name]))


def _num_classes(recipe: Any, data: Data) -> int:
    """How many classes the model of a recipe can be asked for."""
    if recipe.model == "gmvae":
        return recipe.clusters
    return data.num_classes if recipe.model in ("cvae", "class_means", "m2", "m1m2") else 0
