"""The run folder: its files, its configuration, and when it may be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
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


def check_resumable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume with settings that are not those of the run.

    Raises:
        CheckpointError: there is no run, its configuration is damaged, or it has other settings.
    """
    if not (folder / CHECKPOINT).is_file():
        raise CheckpointError(f"there is nothing to resume in {folder}: no {CHECKPOINT}")
    try:
        before = json.loads((folder / CONFIG).read_text())["fit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is missing or damaged: {error!r}") from error
    now = json.loads(json.dumps(settings, default=str))
    for name in [name for name in now if name not in FREE]:
        if before.get(name) != now[name]:
            raise CheckpointError(
                f"the run in {folder} has {name}={before.get(name)!r}, not {now[name]!r}: resume "
                "with its own settings, or start another run"
            )


def write_config(folder: Path, config: Mapping[str, Any], data: Any, *, fresh: bool) -> None:
    """Make the run folder and write its configuration; a fresh run first removes the old one.

    Raises:
        RunPermissionError: the folder cannot be made or written.
    """
    entries = {**config, "data": _describe_data(data), "versions": versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (CHECKPOINT, MODEL, METRICS):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        part = folder / f".{CONFIG}.part"
        part.write_text(json.dumps(entries, indent=2, default=str) + "\n")
        os.replace(part, folder / CONFIG)
    except OSError as error:
        raise RunPermissionError(f"cannot write the run folder {folder}: {error}") from error


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
