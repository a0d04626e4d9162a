"""The run folder: its files, its configuration, and when it may be written."""

from __future__ import annotations

import json
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


def prepare_folder(
    folder: Path, resume: bool, overwrite: bool, config: Mapping[str, Any], data: Any
) -> None:
    """Make the run folder and write its configuration, or refuse."""
    if resume:
        _check_resumable(folder, config)
    elif folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise RunExistsError(
            f"{folder} is not empty: resume that run, choose another folder, or overwrite it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in (CHECKPOINT, MODEL, METRICS):
                (folder / name).unlink(missing_ok=True)
        entries = {**config, "data": _describe_data(data), "versions": versions()}
        (folder / CONFIG).write_text(json.dumps(entries, indent=2, default=str) + "\n")
    except OSError as error:
        raise RunPermissionError(f"cannot write the run folder {folder}: {error}") from error


def _check_resumable(folder: Path, config: Mapping[str, Any]) -> None:
    if not (folder / CHECKPOINT).is_file():
        raise CheckpointError(f"there is nothing to resume in {folder}: no {CHECKPOINT}")
    before = json.loads((folder / CONFIG).read_text())["fit"]
    for name in ("seed", "batch_size", "precision", "objective"):
        if before[name] != config["fit"][name]:
            raise CheckpointError(
                f"the run in {folder} has {name}={before[name]!r}, not {config['fit'][name]!r}: "
                "resume with its own settings"
            )


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
