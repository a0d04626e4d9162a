"""The run folder: its files, its configuration, and when it may be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae.errors import CheckpointError, RunExistsError, RunPermissionError
from pyro_vae.objectives import Objective
from pyro_vae.provenance import versions

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.csv"
TENSORBOARD = "tensorboard"
EVIDENCE = "evidence.npz"
SAMPLES = "samples.npz"
IMPUTATIONS = "imputations.npz"
FIGURES = "figures"
EVIDENCE_FIGURE = f"{FIGURES}/evidence.png"
PLOTS = ("training_curves", "reconstructions", "samples", "latent_map", "manifold", "class_grid")

# what is made from the trained weights, and is of other weights once training starts
DERIVED = (
    MODEL, EVIDENCE, EVIDENCE_FIGURE, SAMPLES, IMPUTATIONS,
    *(f"{FIGURES}/{name}.png" for name in PLOTS),
)  # fmt: skip

# what may differ when a run is resumed: everything else would make it another run
FREE = ("epochs", "device")


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it may be overwritten.

    Raises:
        RunExistsError: it is not empty.
        RunPermissionError: it cannot be looked into.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise RunExistsError(
                f"{folder} is not empty: resume that run, choose another folder, or overwrite it"
            )
    except PermissionError as error:
        raise RunPermissionError(f"cannot read the run folder {folder}: {error}") from error


def read_config(folder: Path, entry: str) -> dict[str, Any]:
    """One entry of a run's configuration: "fit", and of the command line "options" and "recipe".

    Raises:
        CheckpointError: the configuration is missing or damaged, or has no such entry.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error!r}") from error
    found = config.get(entry) if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(
            f'{path} is missing or damaged, or not of this kind of run: it has no "{entry}"'
        )
    return found


def check_resumable(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Refuse to resume with settings that are not those of the run.

    Returns:
        Whether there is a checkpoint to go on from: a run killed before it wrote its first has
        none, and starts over.

    Raises:
        CheckpointError: there is no run, its configuration is damaged, or it has other settings.
    """
    begun = (folder / CHECKPOINT).is_file()
    if not begun and ((folder / METRICS).exists() or not (folder / CONFIG).exists()):
        raise CheckpointError(f"there is nothing to resume in {folder}: no {CHECKPOINT}")
    before = read_config(folder, "fit")
    now = json.loads(json.dumps(settings, default=str))
    for name in [name for name in now if name not in FREE]:
        if before.get(name) != now[name]:
            raise CheckpointError(
                f"the run in {folder} has {name}={before.get(name)!r}, not {now[name]!r}: resume "
                "with its own settings, or start another run"
            )
    return begun


def write_config(folder: Path, config: Mapping[str, Any], data: Any, *, fresh: bool) -> None:
    """Make the run folder and write its configuration, removing what is of other weights.

    A fresh run removes the old run and all that was derived from it; a resumed run keeps its
    checkpoint and metrics, and removes the rest too, since its weights change.

    Raises:
        RunPermissionError: the folder cannot be made or written.
    """
    entries = {**config, "data": _describe_data(data), "versions": versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*DERIVED, CHECKPOINT, METRICS) if fresh else DERIVED:
            (folder / name).unlink(missing_ok=True)
        if fresh:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        part = folder / f".{CONFIG}.part"
        part.write_text(json.dumps(entries, indent=2, default=str) + "\n")
        os.replace(part, folder / CONFIG)
    except OSError as error:
        raise RunPermissionError(f"cannot write the run folder {folder}: {error}") from error


@contextmanager
def new_output(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` when the block ends well.

    A file left empty only removes `path`. Entering the block makes the temporary file, so that
    what cannot be written is refused before anything is computed.

    Raises:
        RunExistsError: `path` is there and is not to be replaced, or is no file, or what should be
            its folder is none.
        RunPermissionError: it cannot be written.
    """
    part = path.with_name(f".part.{path.name}")  # the ending stays: it chooses the format
    with _folder(path.parent, path):
        try:
            _check_replaceable(path, overwrite)
            part.write_bytes(b"")  # nor is anything left of one that was killed
        except RunExistsError:
            raise
        except OSError as error:
            raise RunPermissionError(f"cannot write {path}: {error}") from error
        try:
            yield part
            if part.stat().st_size:
                os.replace(part, path)
            else:
                path.unlink(missing_ok=True)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _folder(folder: Path, path: Path) -> Iterator[None]:
    """The folder of `path`, made where there is none, and removed again if it stays empty."""
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise RunExistsError(f"{folder} is no folder: move it away") from error
    except OSError as error:
        raise RunPermissionError(f"cannot write {path}: {error}") from error
    try:
        yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise RunExistsError(f"{path} is a folder: move it away")
    if path.exists() and not overwrite:
        raise RunExistsError(f"{path} is there already: --overwrite replaces it")


def _describe_data(data: Any) -> dict[str, Any]:
    return {
        "name": getattr(data, "name", type(data).__name__),
        "preparation": getattr(data, "preparation", {}),
    }


def describe(objective: Objective) -> dict[str, Any]:
    """An objective's name and arguments, for provenance."""
    plain = {
        name.lstrip("_"): value.item() if isinstance(value, Tensor) else value
        for name, value in vars(objective).items()
        if isinstance(value, str | int | Tensor) or name == "free_bits"
    }
    keep = ("kl", "gradient", "kl_weight", "free_bits", "num_particles", "num_estimates")
    return {"name": type(objective).__name__, **{k: plain[k] for k in keep if k in plain}}
