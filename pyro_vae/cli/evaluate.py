"""`pyro-vae evaluate` and `compare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from pyro_vae.cli.parameters import RUN, part_of
from pyro_vae.errors import ConfigError


@click.command()
@click.argument("run", type=RUN)
@click.option("--num-samples", type=click.IntRange(1), default=1000, help="Draws per datum.")
@click.option(
    "--method",
    type=click.Choice(["auto", "is", "ais", "grid", "enumerate"]),
    default="auto",
    help="auto takes importance sampling, and what is exact or annealed where that fails.",
)
@click.option("--part", type=click.Choice(["train", "valid", "test"]), default="test")
@click.option("--limit", type=click.IntRange(1), default=None, help="Only the first so many data.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the draws.")
@click.option("--compile", is_flag=True, help="Fuse the densities: pays for long evaluations.")
@click.option("--overwrite", is_flag=True, help="Replace an evaluation that is there.")
def evaluate(
    run: Path,
    num_samples: int,
    method: str,
    part: str,
    limit: int | None,
    seed: int,
    compile: bool,
    overwrite: bool,
) -> None:
    """Estimate log p(x) under RUN, with its error.

    It is written to RUN/evidence.npz and drawn in RUN/figures/evidence.png.
    """
    import pyro_vae as pv
    from pyro_vae.recipes import is_conditional, load_run
    from pyro_vae.training.folder import EVIDENCE, EVIDENCE_FIGURE, new_output

    with (
        new_output(run / EVIDENCE, overwrite) as file,
        new_output(run / EVIDENCE_FIGURE, overwrite) as figure,
    ):
        vae, data, recipe = load_run(run)
        split = part_of(data, part)[:limit]
        if not is_conditional(recipe):
            split = split.given(None)  # log p(x) of every row, not log p(x, y) of those with labels
        evidence = pv.log_marginal(
            vae.model, vae.guide, split, num_samples=num_samples, method=method, seed=seed,
            compile=compile,
        )  # fmt: skip
        origin = {"data_set": data.name, "part": part, "preparation": data.preparation}
        evidence = replace(evidence, provenance={**evidence.provenance, **origin})
        evidence.save(file)
        evidence.plot(data.image_shape).savefig(figure, dpi=150, bbox_inches="tight")
    click.echo(f"{part}: {evidence}")
    click.echo(f"Written to {run / EVIDENCE}, drawn in {run / EVIDENCE_FIGURE}")
    click.echo(f"Next: pyro-vae plot {run}; pyro-vae sample {run}")


@click.command()
@click.argument("runs", type=RUN, nargs=-1, required=True)
@click.option("--mixed", is_flag=True, help="Also where numbers of draws or methods differ.")
def compare(runs: tuple[Path, ...], mixed: bool) -> None:
    """Rank RUNS by log p(x), paired datum by datum.

    Each has to be evaluated first.
    """
    from pyro_vae.evidence import Evidence, compare
    from pyro_vae.training.folder import EVIDENCE

    found = {}
    for run in runs:
        if not (run / EVIDENCE).is_file():
            raise ConfigError(f"{run} is not evaluated: pyro-vae evaluate {run}")
        found[str(run)] = Evidence.load(run / EVIDENCE)
    click.echo(str(compare(found, mixed)))
