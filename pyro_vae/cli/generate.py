"""`pyro-vae sample` and `impute`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vae.cli.parameters import RUN
from pyro_vae.errors import ConfigError, ShapeError


@click.command()
@click.argument("run", type=RUN)
@click.option("--num", type=click.IntRange(1), default=64, help="How many.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the draws.")
@click.option("--overwrite", is_flag=True, help="Replace samples that are there.")
def sample(run: Path, num: int, seed: int, overwrite: bool) -> None:
    """Draw from RUN's model: E[x|z] and x, into RUN/samples.npz."""
    import numpy as np

    from pyro_vae.recipes import load_run, sample_context
    from pyro_vae.seeding import seeded
    from pyro_vae.training.folder import SAMPLES, new_output

    with new_output(run / SAMPLES, overwrite) as file:
        vae, data, recipe = load_run(run)
        vae.eval()
        with seeded(seed):
            likelihood = vae.generate(num, sample_context(recipe, data, num))
            x = likelihood.sample()
        np.savez(file, mean=likelihood.mean.numpy(), x=x.numpy())
    click.echo(f"{num} samples: E[x|z] as mean, draws of x as x, in {run / SAMPLES}")


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help=".npz of x, NaN where missing, and perhaps a boolean mask, True where observed; .npy; or "
    ".csv, its empty cells missing.",
)
@click.option("--num-imputations", type=click.IntRange(1), default=20, help="Of every datum.")
@click.option(
    "--method",
    type=click.Choice(["metropolis", "importance", "gibbs"]),
    default="metropolis",
    help="Metropolis within Gibbs, importance resampling, or pseudo-Gibbs.",
)
@click.option("--num-samples", type=click.IntRange(1), default=500, help="Importance draws.")
@click.option("--num-sweeps", type=click.IntRange(1), default=50, help="Of every chain.")
@click.option("--allow-empty", is_flag=True, help="Draw data of which nothing is observed.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the draws.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Default: RUN/imputations.npz."
)
@click.option("--overwrite", is_flag=True, help="Replace imputations that are there.")
def impute(run: Path, data: Path, out: Path | None, overwrite: bool, **options: Any) -> None:
    """Fill in missing values, several times, under RUN's model.

    The --data are as the model saw them: scaled and binarised in the same way.
    """
    import pyro_vae as pv
    from pyro_vae.imputation.files import read_holes, write_imputations
    from pyro_vae.recipes import is_conditional, load_run
    from pyro_vae.training.folder import IMPUTATIONS, new_output

    out = run / IMPUTATIONS if out is None else out
    if out.suffix != ".npz":
        raise ConfigError(f"imputations are saved as .npz, not {out.name!r}")
    with new_output(out, overwrite) as file:
        x, mask = read_holes(data)
        vae, trained_on, recipe = load_run(run)
        if is_conditional(recipe):
            raise ConfigError(
                f"the model of {run} is given a context with each datum, and a file of holes has "
                "none: use pyro_vae.impute(model, guide, x, context)"
            )
        if x[0].numel() != trained_on.features:
            raise ShapeError(
                f"{data} has {x[0].numel()} values a row, the model of {run} {trained_on.features}"
            )
        if mask is not None and mask.shape in (x.shape, x.shape[1:]):  # of all data or of one
            mask = mask.flatten(mask.dim() - x.dim() + 1)
        x = x.flatten(1)
        found = pv.impute(vae.model, vae.guide, x, mask=mask, **options)
        write_imputations(file, found)
    holes, flagged = int((~found.observed).sum()), int(found.flagged.sum())
    more = "--num-samples" if found.method == "importance" else "--num-sweeps"
    click.echo(
        f"{holes:,} values of {len(x):,} data filled in {len(found.values)} times, "
        f"{flagged:,} data flagged" + f": raise {more}" * (flagged > 0)
    )
    click.echo(f"Written to {out}: values, mean, low and high of 90%, observed, and diagnostics")
