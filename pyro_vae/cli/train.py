"""`pyro-vae train`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pyro_vae.cli.parameters import DataSet, Scale, Sections, Sizes, part_of
from pyro_vae.errors import CheckpointError, ConfigError

PRECISIONS = ("32-true", "64-true", "bf16-mixed")  # again: whose module imports torch and Fabric

# what may be given with --resume; the rest would make it another run
RESUMABLE = {"out", "resume", "overwrite", "epochs", "device", "tensorboard"}
SIZES = ("hidden", "upper", "image_shape")  # of several numbers
STARTING = ("batch_size", "learning_rate", "device", "precision")  # of what is trained beforehand


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Entries of the file become the defaults of the options; options given still win."""
    if value is None:
        return None
    try:
        entries = json.loads(value.read_text())
    except ValueError as error:
        raise click.BadParameter(f"{value} is not JSON: {error}") from error
    if isinstance(entries, dict):
        entries = entries.get("options", entries)
    if not isinstance(entries, dict):
        raise click.BadParameter(f"{value} holds no JSON object of options")
    known = {p.name for p in ctx.command.params}
    if unknown := sorted(entries.keys() - known):
        raise click.BadParameter(
            f"{value} has unknown entries {unknown}; known: {sorted(known - {None})}"
        )
    for name, entry in entries.items():
        if isinstance(entry, dict) or (isinstance(entry, list) and name not in SIZES):
            raise click.BadParameter(f"{value} has {name}={entry!r}, which is no single value")
    ctx.default_map = {**(ctx.default_map or {}), **entries}
    return value


@click.command(cls=Sections)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder to write.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    is_eager=True,
    callback=_read_config,
    expose_value=False,
    help="JSON file of options (a run's config.json will do); options given here win.",
)
@click.option("--overwrite", is_flag=True, help="Replace a run that is there.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with its own options.")
@click.option(
    "--data",
    type=DataSet(),
    default="digits",
    help="digits, mnist, fashion_mnist, static_binarized_mnist, frey_faces, omniglot, "
    "caltech101_silhouettes, or a .npz, .npy, .csv, .mat file.",
)
@click.option(
    "--split", default=None, help="Published protocol of splits; default: the data set's."
)
@click.option(
    "--binarize",
    type=click.Choice(["dynamic", "fixed", "threshold", "none"]),
    default="dynamic",
    help="How grey values become binary.",
)
@click.option("--key", default=None, help="Of a file: the array's name in an .npz or .mat.")
@click.option(
    "--label-key", default=None, help="Of a file: the labels' name, or column of a .csv from 0."
)
@click.option(
    "--divide-by", type=float, default=None, help="Of a file: what takes its values to [0, 1]."
)
@click.option(
    "--image-shape", type=Sizes(), default=None, help="Of a file: height and width of a row, 28,28."
)
@click.option(
    "--model",
    default="vae",
    help="vae, cvae (class in prior, likelihood and posterior), class_means (class moves the mean "
    "of the prior), m2 (some labels known), m1m2 (the same, of features of a VAE trained before), "
    "gmvae (clusters) or hierarchical.",
)
@click.option("--prior", default="normal", help="p(z): normal, mixture, vamp or flow.")
@click.option(
    "--likelihood",
    default="bernoulli",
    help="p(x|z): bernoulli, continuous_bernoulli, normal, laplace, student_t, "
    "discretized_logistic, poisson or negative_binomial.",
)
@click.option("--posterior", default="diagonal", help="q(z|x): diagonal, full_rank or flow.")
@click.option("--network", default="mlp", help="Of encoder and decoder: mlp, gated or conv.")
@click.option(
    "--components",
    type=click.IntRange(1),
    default=100,
    help="Of a mixture prior; pseudo-inputs of a VampPrior.",
)
@click.option("--latent", type=click.IntRange(1), default=2, help="Dimension of z.")
@click.option("--hidden", type=Sizes(), default="200,200", help="Sizes of the hidden layers.")
@click.option(
    "--scale",
    type=Scale(),
    default="learned",
    help="Of a normal, laplace, student_t or discretized_logistic likelihood: a number, learned, "
    "per_feature or predicted.",
)
@click.option("--objective", default="elbo", help="elbo or iwae.")
@click.option(
    "--kl",
    type=click.Choice(["analytic", "monte_carlo", "auto"]),
    default="auto",
    help="KL estimator; auto takes the closed form where there is one.",
)
@click.option(
    "--gradient",
    type=click.Choice(["standard", "stl", "dreg"]),
    default="standard",
    help="Gradient estimator; stl needs --kl monte_carlo or iwae, dreg needs iwae.",
)
@click.option("--kl-weight", type=float, default=1.0, help="Beta, the weight of the KL.")
@click.option("--free-bits", type=float, default=0.0, help="Nats each latent dimension may keep.")
@click.option(
    "--num-particles", type=click.IntRange(1), default=1, help="Draws per datum and step."
)
@click.option(
    "--labels",
    type=click.IntRange(0),
    default=100,
    help="Training labels that m2 and m1m2 are told; 0 for all that are known: those not -1.",
)
@click.option("--label-weight", type=float, default=0.1, help="Of each label, times N / labels.")
@click.option("--clusters", type=click.IntRange(1), default=10, help="Of a gmvae.")
@click.option(
    "--pretrain",
    type=click.IntRange(0),
    default=50,
    help="Epochs of the plain VAE that a gmvae starts from, and that is M1 of an m1m2.",
)
@click.option(
    "--upper",
    type=Sizes(),
    default="8",
    help="Dimensions of a hierarchical model's latent layers above --latent, from the data up; of "
    "an m1m2's one.",
)
@click.option("--epochs", type=click.IntRange(1), default=100, help="In all.")
@click.option("--batch-size", type=click.IntRange(1), default=128, help="Data a step.")
@click.option("--learning-rate", type=float, default=1e-3, help="Of Adam.")
@click.option("--kl-warmup", type=click.IntRange(0), default=0, help="Epochs of linear warm-up.")
@click.option("--gradient-clip", type=float, default=None, help="Largest norm of the gradient.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=None,
    help="Stop after so many epochs without gain in validation, and keep the best weights.",
)
@click.option(
    "--log-px-every",
    type=click.IntRange(0),
    default=0,
    help="Epochs between estimates of log p(x) on 500 validation data; 0 for none.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--compile", is_flag=True, help="Fuse the step: slow to start, fast to train.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="32-true",
    help="Of weights and data; bf16-mixed takes matrix products in bfloat16.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, data and training.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard event files.")
@click.pass_context
def train(ctx: click.Context, out: Path, overwrite: bool, resume: bool, **options: Any) -> None:
    """Train a VAE into a run folder.

    The folder holds config.json, metrics.csv, checkpoint.safetensors (to --resume from) and, in the
    end, model.safetensors.

    \b
        pyro-vae train --data digits --latent 10 --out runs/a
        pyro-vae train --data mnist --prior vamp --patience 20 --out runs/b
        pyro-vae train --data mine.npy --likelihood normal --binarize none --out runs/c
    """
    from pyro_vae.recipes import Recipe, build_objective, build_vae, load_data, start
    from pyro_vae.schedules import Warmup
    from pyro_vae.training import fit, track_log_px
    from pyro_vae.training.folder import check_free

    if resume:
        options |= _options_of(out, ctx, options.keys())
    fitting = dict(options)
    names = {f.name for f in fields(Recipe)}
    entries = {name: fitting.pop(name) for name in names}
    if entries["binarize"] == "none":
        entries["binarize"] = None
    entries["image_shape"] = entries["image_shape"] or ()
    recipe = Recipe.from_json(entries)
    data = load_data(recipe)
    vae = build_vae(recipe, data)
    warmup = fitting.pop("kl_warmup") * -(-len(data.train) // fitting["batch_size"])
    every = fitting.pop("log_px_every")
    trackers = [track_log_px(vae, part_of(data, "valid")[:500], every)] if every else []
    with _telling_how_to_resume(out):
        if not resume:
            check_free(out, overwrite)
            start(recipe, data, vae, **{name: fitting[name] for name in STARTING})
        run = fit(
            vae,
            data,
            objective=build_objective(recipe),
            out=out,
            overwrite=overwrite,
            resume=resume,
            kl_schedule=Warmup(warmup) if warmup else None,
            trackers=trackers,
            seed=recipe.seed,
            config={"recipe": recipe.to_json(), "options": options},
            **fitting,
        )
    last = run.metrics[-1]
    click.echo(
        f"Trained {len(run.metrics)} epochs in {last['seconds']:.1f} s: "
        f"ELBO {last['train_elbo']:.2f} (train)"
        + (f", {last['valid_elbo']:.2f} (validation)" if "valid_elbo" in last else "")
        + " nats a datum"
    )
    click.echo(f"Run folder: {out}")
    click.echo(f"Next: pyro-vae evaluate {out} --num-samples 1000; pyro-vae plot {out}")


@contextmanager
def _telling_how_to_resume(out: Path) -> Iterator[None]:
    from pyro_vae.training.folder import CHECKPOINT

    try:
        yield
    except KeyboardInterrupt:
        if (out / CHECKPOINT).is_file():
            command = f"pyro-vae train --out {shlex.quote(str(out))} --resume"
            click.echo(f"From the command line: {command}")
        raise


def _options_of(run: Path, ctx: click.Context, names: Collection[str]) -> dict[str, Any]:
    """The options a run was made with, but for those that may be given anew.

    Raises:
        ConfigError: an option was given that would make it another run.
        CheckpointError: the folder holds no run, or not these options of one.
    """
    from pyro_vae.training.folder import read_config

    given = _given(ctx)
    if "config" in given:
        raise click.UsageError("--resume goes on with the run's own options: leave out --config")
    stored = read_config(run, "options")
    params = {p.name: p for p in ctx.command.params}
    if others := sorted(params[name].opts[0] for name in given - RESUMABLE):
        raise ConfigError(
            f"{', '.join(others)} cannot be given with --resume, which goes on with the run's own "
            "options"
        )
    if differing := sorted(stored.keys() ^ names):
        raise CheckpointError(f"{run} was made by another version: it differs in {differing}")
    try:
        return {k: params[k].type_cast_value(ctx, v) for k, v in stored.items() if k not in given}
    except click.BadParameter as error:
        raise CheckpointError(f"{run} has a damaged configuration: {error}") from error


def _given(ctx: click.Context) -> set[str]:
    """Names of the options on the command line itself."""
    names = (p.name for p in ctx.command.params if p.name)
    return {n for n in names if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
