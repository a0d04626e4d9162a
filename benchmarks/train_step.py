"""One training step: compiled, beside Pyro, PyTorch by hand, NumPyro, and pythae.

    python -m benchmarks.train_step        # with NumPyro and pythae installed

Every contender has a process of its own that sleeps until its turn, so that none has from another
how threads or memory are set. In its turn, round after round, it takes a few steps that are not
timed and then some that are; reported are medians over the rounds, the fastest rounds, and the
medians of the ratios within a round. "Memory kept" is a process whose malloc is told by environment
variables what `pyro_vae.compiled.memory` tells it. "Denormals flushed" is one that takes numbers
below 1e-38 for zero, as XLA does: most of many importance weights are soon such, with which
processors multiply several times as slowly, and which `pv.IWAE` leaves out. All full fp32 (JAX
would multiply in TF32 on a GPU unless told), all reading the loss at every step, except NumPyro's
`fori_loop` and `steps` of ours, which take all of a turn's steps at once. On a GPU where torch sees
one. NumPyro and pythae take part where they are installed. Also reported: what the first compiled
step takes, with an empty compilation cache and with one on disk, the peak memory, and the import
time of `pyro_vae` against `import pyro`.

The threads of PyTorch spin while they wait, which on a machine with other work costs milliseconds:
there, set GOMP_SPINCOUNT=0. The load average stands in the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks import report, step_models
from pyro_vae.compiled import memory

COMMAND = "python -m benchmarks.train_step"
OURS, ALL_AT_ONCE, BY_HAND = step_models.OURS, step_models.ALL_AT_ONCE, step_models.BY_HAND
PAUSE = 0.1  # seconds, until the threads of the process before have stopped spinning
Timer = Callable[[int], float]  # steps to seconds
COLORS = {"Pyro": "C3", "PyTorch": "C1", "NumPyro": "C2", "pythae": "C4", "compiled": "C0"}


FULL_FP32 = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
KEEPS_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(memory.KEPT),
    "MALLOC_MMAP_THRESHOLD_": str(memory.FROM_HEAP),
}


class Process:
    """A contender's process: `module` is run with `arguments`, and takes steps on demand."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def seconds(self, request: str) -> float:
        """What the steps asked for take."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        """End it."""
        self.process.communicate()

    def answer(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended")
        return answer


def measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds a step of every contender, and its ratio to ours."""
    ways = list(step_models.ways(step_models.cases()[name]))
    processes = {way: Process("step_torch", name, way) for way in ways}
    processes[f"{BY_HAND}, memory kept"] = Process("step_torch", name, BY_HAND, **KEEPS_MEMORY)
    timers = {way: _timer(process, "") for way, process in processes.items()}
    if importlib.util.find_spec("numpyro") and step_models.cases()[name].in_numpyro:
        processes["NumPyro"] = Process("step_numpyro", name, **FULL_FP32)
        timers["NumPyro jitted update"] = _timer(processes["NumPyro"], "update ")
        timers["NumPyro fori_loop"] = _timer(processes["NumPyro"], "fori_loop ")
    try:
        for process in processes.values():
            process.answer()
        rows = _rounds(timers, rounds, seconds)
    finally:
        for process in processes.values():
            process.close()
    return {
        "milliseconds": {n: 1e3 * statistics.median(row[n] for row in rows) for n in timers},
        "fastest_milliseconds": {n: 1e3 * min(row[n] for row in rows) for n in timers},
        "ours_over": {n: _over(OURS, n, rows) for n in timers if n not in (OURS, ALL_AT_ONCE)},
        "all_at_once_over": {n: _over(ALL_AT_ONCE, n, rows) for n in timers if n != ALL_AT_ONCE},
    }


def _over(way: str, peer: str, rows: list[dict[str, float]]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(row[way] / row[peer] for row in rows)


def _timer(process: Process, way: str) -> Timer:
    return lambda n: process.seconds(f"{way}{n}")


def _rounds(timers: dict[str, Timer], rounds: int, seconds: float) -> list[dict[str, float]]:
    """Seconds a step, by contender and round; a turn takes about `seconds`."""

    def turn(name: str, steps: int) -> float:
        time.sleep(PAUSE)
        timers[name](max(3, steps // 3))
        return timers[name](steps) / steps

    steps = {name: max(3, int(seconds / turn(name, 5))) for name in timers}
    return [{name: turn(name, steps[name]) for name in timers} for _ in range(rounds)]


def start_up(name: str) -> dict[str, dict[str, float]]:
    """A first compiled step in a fresh process, by the state of the cache on disk: seconds in all,
    of tracing, and of compiling and checking; and the peak memory, MB, beside that by hand."""
    ours = (
        "svi = step_models.compiled_svi(case); svi.step(*case.args)\n"
        "took = svi.compile_seconds[0]\n"
    )
    by_hand = "step = step_models.by_hand(case, compile=False); step(); took = {}\n"
    with tempfile.TemporaryDirectory() as cache:
        empty, on_disk = (_fresh(name, ours, TORCHINDUCTOR_CACHE_DIR=cache) for _ in range(2))
    return {"empty_cache": empty, "cache_on_disk": on_disk, "by_hand": _fresh(name, by_hand)}


def _fresh(name: str, step: str, **environment: str) -> dict[str, float]:
    script = (
        "import json, time, torch; from benchmarks import step_models\n"
        f"case = step_models.cases()[{name!r}]\n"
        f"start = time.perf_counter()\n{step}"
        "took['first_step'] = time.perf_counter() - start\n"
        # not getrusage's, which a process takes over from the one that started it
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "took['peak_mb'] = int(status['VmHWM'].split()[0]) / 1024\n"
        "print(json.dumps(took))"
    )
    return json.loads(_run(script, **environment))


def import_time(repeats: int = 7) -> dict[str, float]:
    """Median seconds of the two imports, in fresh processes in turn, and of their ratio."""
    script = (
        "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    )
    pairs = [[float(_run(script.format(m))) for m in ("pyro_vae", "pyro")] for _ in range(repeats)]
    return {
        "pyro_vae": statistics.median(ours for ours, _ in pairs),
        "pyro": statistics.median(pyro for _, pyro in pairs),
        "ratio": statistics.median(ours / pyro for ours, pyro in pairs),
    }


def _run(script: str, **environment: str) -> str:
    """The last line that a script prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    return result.stdout.splitlines()[-1]


def plot(models: dict[str, Any]) -> Figure:
    """Milliseconds a step, a panel a model."""
    figure = Figure(figsize=(9, 1.9 * len(models)), layout="constrained")
    rows = figure.subplots(len(models), squeeze=False)[:, 0]
    for axes, (name, result) in zip(rows, models.items(), strict=True):
        items = sorted(result["milliseconds"].items(), key=lambda item: -item[1])
        labels, values = zip(*items, strict=True)
        bars = axes.barh(
            labels, values, color=[COLORS[label.split()[0].rstrip(",")] for label in labels]
        )
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlim(0, 1.1 * max(values))
        axes.tick_params(labelsize=8)
    axes.set_xlabel("milliseconds a step (median)")
    return figure


def main() -> None:
    """Measure, print, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a contender's turn")
    parser.add_argument("--models", type=int, help="how many, from the first on")
    options = parser.parse_args()
    models = {}
    for name in [*step_models.cases()][: options.models]:
        models[name] = measure(name, options.rounds, options.seconds)
        print(
            name, *(f"{v:9.2f} ms  {n}" for n, v in models[name]["milliseconds"].items()), sep="\n"
        )
    results = {"models": models, "load_average": os.getloadavg()[0]}
    report.add("train_step", COMMAND, results, plot(models))
    first = next(iter(models))
    results = {"model": first, "first_step": start_up(first), "import_seconds": import_time()}
    report.add("start_up", COMMAND, results)


if __name__ == "__main__":
    main()
