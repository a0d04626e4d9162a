"""What every benchmark shares: where its results go, and what it says of the machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pyro_vae.provenance import version_of, versions

PEERS = ("numpyro", "jax", "pythae")
ENVIRONMENT = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, device and versions, those of what is compared with among them."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions() | {name: version_of(name) for name in PEERS},
    }


def provenance(command: str) -> dict[str, Any]:
    """Where results come from: the command in full, and the machine with its versions.

    Args:
        command: that makes these results; the options that it was given are added to it, and what
            was set of `ENVIRONMENT`.
    """
    return {"command": _in_full(command), "machine": machine()}


def write(name: str, command: str, results: Any, figure: Figure | None = None) -> Path:
    """Write `results/NAME.json`, and `results/NAME.png` where there is a figure.

    Args:
        command: as in `provenance`.
        results: plain JSON.
    """
    return _save(name, {**provenance(command), "results": results}, figure)


def write_studies(
    name: str, studies: dict[str, dict[str, Any]], results: Any, figure: Figure | None = None
) -> Path:
    """As `write`, of studies that can be repeated one by one.

    Args:
        studies: the `provenance` of each, by the key of its results. What is computed from several
            has none of its own.
    """
    return _save(name, {"studies": studies, "results": results}, figure)


def add(name: str, command: str, results: Any, figure: Figure | None = None) -> Path:
    """As `write`, after the results of other machines: how much faster one way is than another is
    a property of the machine. The figure of a GPU is `results/NAME_cuda.png`.

    Args:
        command, results: as in `write`.
    """
    made = provenance(command)
    on_gpu = made["machine"]["device"] != "cpu"
    place = made["machine"]["device" if on_gpu else "processor"]
    stored: dict[str, Any] = {"studies": {}, "results": {}}
    if (RESULTS / f"{name}.json").exists():
        stored = read(name)
    for part, new in (("studies", made), ("results", results)):
        stored[part].pop(place, None)  # to stand last
        stored[part][place] = new
    return _save(name, stored, figure, f"{name}_cuda" if on_gpu else name)


def _save(
    name: str, report: dict[str, Any], figure: Figure | None, picture: str | None = None
) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    if figure is not None:
        figure.savefig(RESULTS / f"{picture or name}.png", dpi=150, bbox_inches="tight")
    return path


def _in_full(command: str) -> str:
    variables = [f"{v}={os.environ[v]}" for v in ENVIRONMENT if v in os.environ]
    options = [option for option in sys.argv[1:] if option not in command.split()]
    return " ".join([*(v for v in variables if v not in command), command, *options])


def read(name: str) -> dict[str, Any]:
    """What `write`, `write_studies` or `add` wrote under that name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
