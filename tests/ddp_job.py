"""A training script as a user has it, run by two processes: `ddp_job.py FOLDER MODE`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from training_helpers import binary_data, small_vae

import pyro_vae as pv


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    vae = small_vae(seed=int(os.environ.get("LOCAL_RANK", "0")))  # ranks begin with other weights
    rank = os.environ.get("LOCAL_RANK", "0")

    def hook(step: int) -> float:
        # the first process alone is interrupted, within the second epoch; both must leave
        if mode == "interrupt" and rank == "0" and step == 50:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    run = pv.fit(
        vae, binary_data(320, dynamic=True), epochs=3, batch_size=4, device="cpu", devices=2,
        out=folder / "run", resume=mode == "resume", kl_schedule=hook, patience=2,
        compile=mode == "compile",
    )  # fmt: skip
    rank = os.environ.get("LOCAL_RANK", "0")
    pv.save_weights(vae, folder / f"rank{rank}.safetensors")
    if mode == "exists":
        raise AssertionError("the folder exists")
    assert len(run.metrics) == 3


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
