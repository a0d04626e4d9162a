"""One PyTorch contender of `benchmarks.train_step` in a process of its own: steps on demand."""

from __future__ import annotations

import sys
import time

import torch

from benchmarks import step_models


def main() -> None:
    """Take a first step, then as many as each line says."""
    name, way = sys.argv[1:]
    torch.manual_seed(0)
    take = step_models.ways(step_models.cases()[name])[way]()
    take(1)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        take(int(line))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
