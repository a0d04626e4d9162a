"""Training by two processes on the CPU (Fabric's "ddp" over gloo)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_helpers import identical, saved_state, without_time

import pyro_vae as pv
from pyro_vae.training.checkpoint import load_tree


def obstacle() -> str:
    """Why two processes cannot talk here, or nothing."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "torch was built without gloo"
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
    except OSError as error:
        return f"no local port can be opened: {error}"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]


def launch(folder: Path, mode: str, expect: int | None = 0) -> str:
    job = Path(__file__).with_name("ddp_job.py")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(job), str(folder), mode],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert expect is None or done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def rank_weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_tree(folder / f"rank{rank}.safetensors")["weights"] for rank in range(2)]


def test_two_processes_end_with_the_same_weights_also_when_interrupted(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(whole, "train")
    first, second = rank_weights(whole)
    assert identical(first, second)
    assert identical(first, load_tree(whole / "run" / "model.safetensors")["weights"])
    rows = pv.read_metrics(whole / "run" / "metrics.csv")
    assert rows[-1]["step"] == 3 * 40  # 320 rows, 2 processes, 4 a batch
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]

    message = launch(parts, "interrupt", expect=-signal.SIGINT)
    assert message.count("Interrupted in epoch 2, after step 60") == 1
    assert saved_state(parts / "run")["random"]["cpu"].shape[0] == 2
    launch(parts, "resume")
    assert all(identical(first, weights) for weights in rank_weights(parts))
    resumed = pv.read_metrics(parts / "run" / "metrics.csv")
    for a, b in zip(without_time(rows), without_time(resumed), strict=True):
        assert a == pytest.approx(b, rel=1e-12)  # sums over processes are taken in another order


def test_a_refusal_ends_both_processes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    started = time.monotonic()
    message = launch(tmp_path, "exists", expect=None)
    assert "RunExistsError" in message
    assert time.monotonic() - started < 60
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
def test_compiled_they_end_where_they_end_without(tmp_path: Path) -> None:
    for mode in ("train", "compile"):
        (tmp_path / mode).mkdir()
        launch(tmp_path / mode, mode)
    eager, compiled = (rank_weights(tmp_path / mode) for mode in ("train", "compile"))
    assert identical(*compiled)
    for name, value in eager[0].items():
        torch.testing.assert_close(compiled[0][name], value, rtol=1e-5, atol=1e-6)
