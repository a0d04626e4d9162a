"""`pyro-vae`: train, evaluate, compare, sample, impute and plot from the command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import click
from click.core import ParameterSource

from pyro_vae.data import Data, Split
from pyro_vae.errors import CheckpointError, ConfigError, PyroVAEError, ShapeError

RUN = click.Path(path_type=Path, exists=True, file_okay=False)
FAILURE, INTERRUPTED = 1, 130
PRECISIONS = ("32-true", "64-true", "bf16-mixed")  # again: whose module imports torch and Fabric

# what may be given with --resume; the rest would make it another run
RESUMABLE = {"out", "resume", "overwrite", "epochs", "device", "tensorboard"}
SIZES = ("hidden", "upper", "image_shape")  # of several numbers
STARTING = ("batch_size", "learning_rate", "device", "precision")  # of what is trained beforehand


class Sizes(click.ParamType):
    """Layer sizes separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = value if isinstance(value, tuple | list) else str(value).split(",")
        words = [str(part).strip() for part in parts]
        sizes = tuple(int(word) if word.isdecimal() else 0 for word in words)
        if not all(sizes):
            self.fail(f"{value!r} is no list of positive whole numbers like 200,200", param, ctx)
        return sizes


class DataSet(click.ParamType):
    """The name of a data set; or a file's path, made one that is found from other folders too."""

    name = "data"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        path = Path(str(value))
        return str(path.absolute()) if path.suffix and path.is_file() else str(value)


class Scale(click.ParamType):
    """A positive number, or one of the words of `likelihoods.Normal`."""

    name = "scale"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return float(value)
        except (TypeError, ValueError):
            return str(value)


class Sections(click.Command):
    """A command whose options are listed under headings; one named here begins the next."""

    headings: ClassVar = {
        "out": "Run", "data": "Data", "model": "Model", "objective": "Objective",
        "epochs": "Training",
    }  # fmt: skip

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for param in self.get_params(ctx):
            heading = self.headings.get(param.name or "", heading)
            if record := param.get_help_record(ctx):
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="pyro-vae")
def cli() -> None:
    """Train variational autoencoders and evaluate their log p(x).

    A run lives in a folder: configuration, metrics, checkpoint, evaluation, figures.

    \b
        pyro-vae train --data digits --out runs/a
        pyro-vae evaluate runs/a --num-samples 1000
        pyro-vae plot runs/a
        pyro-vae compare runs/a runs/b

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """


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


@cli.command(cls=Sections)
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
    trackers = [track_log_px(vae, _part(data, "valid")[:500], every)] if every else []
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


@cli.command()
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
@click.option("--overwrite", is_flag=True, help="Replace an evaluation that is there.")
def evaluate(
    run: Path,
    num_samples: int,
    method: str,
    part: str,
    limit: int | None,
    seed: int,
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
        split = _part(data, part)[:limit]
        if not is_conditional(recipe):
            split = split.given(None)  # log p(x) of every row, not log p(x, y) of those with labels
        evidence = pv.log_marginal(
            vae.model, vae.guide, split, num_samples=num_samples, method=method, seed=seed
        )
        origin = {"data_set": data.name, "part": part, "preparation": data.preparation}
        evidence = replace(evidence, provenance={**evidence.provenance, **origin})
        evidence.save(file)
        evidence.plot(data.image_shape).savefig(figure, dpi=150, bbox_inches="tight")
    click.echo(f"{part}: {evidence}")
    click.echo(f"Written to {run / EVIDENCE}, drawn in {run / EVIDENCE_FIGURE}")
    click.echo(f"Next: pyro-vae plot {run}; pyro-vae sample {run}")


@cli.command()
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


@cli.command()
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


@cli.command()
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


@cli.command()
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


def _part(data: Data, name: str) -> Split:
    split = getattr(data, name)
    if split is None:
        raise ConfigError(f'these data have no "{name}" part; choose another split')
    return split.fixed()


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


def main() -> None:
    """Entry point. Exit codes: 1 for an error of ours, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (PyroVAEError, OSError) as error:  # a full disk is no bug of ours
        click.echo(f"Error: {error}", err=True)
        sys.exit(FAILURE)
