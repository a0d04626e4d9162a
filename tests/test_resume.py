"""A run that was killed or interrupted, and resumed, is the run that was not: bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from resume_jobs import EPOCHS, JOBS, STEPS_PER_EPOCH, process, run
from training_helpers import (
    binary,
    contents,
    identical,
    in_training,
    saved_state,
    small_vae,
    without_time,
)

import pyro_vae as pv
from pyro_vae.errors import CheckpointError, ConfigError
from pyro_vae.training.checkpoint import load_tree


def nothing(_: int) -> None: ...


def interrupt_at(moment: int) -> Any:
    def hook(step: int) -> None:
        if step == moment and in_training():
            signal.raise_signal(signal.SIGINT)

    return hook


def same_runs(a: Path, b: Path) -> None:
    """Weights, optimizer, scheduler, best weights and metrics agree exactly; metrics once each."""
    trees = [load_tree(folder / "checkpoint.safetensors") for folder in (a, b)]
    for tree in trees:
        tree["state"].pop("seconds")
        tree["state"]["rows"] = without_time(tree["state"]["rows"])
    assert flat(trees[0]) == flat(trees[1])
    models = [load_tree(folder / "model.safetensors")["weights"] for folder in (a, b)]
    assert identical(*models)
    rows = [without_time(pv.read_metrics(folder / "metrics.csv")) for folder in (a, b)]
    assert rows[0] == rows[1]
    table = pandas.read_csv(b / "metrics.csv")
    assert table["epoch"].tolist() == list(range(1, len(table) + 1))
    assert not table.isna().any(axis=None)


def flat(tree: Any, place: str = "") -> dict[str, Any]:
    """Every leaf by its place, tensors as their bytes."""
    if isinstance(tree, torch.Tensor):
        return {place: (tree.dtype, tree.shape, tree.contiguous().numpy().tobytes())}
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f"{place}/{key}").items()}
    return {place: tree}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each job uninterrupted, run once, in this process and in one of its own."""
    done: dict[tuple[str, bool], Path] = {}

    def get(name: str, *, in_process: bool) -> Path:
        if (name, in_process) not in done:
            folder = tmp_path_factory.mktemp("whole") / name
            if in_process:
                run(name, folder, nothing)
            else:
                with process(name, folder) as (child, _):
                    child.join(60)
                    assert child.exitcode == 0, folder.with_suffix(".log").read_text()
            done[name, in_process] = folder
        return done[name, in_process]

    return get


def test_the_jobs_use_what_they_claim(whole: Any) -> None:
    state = saved_state(whole("array", in_process=True))
    assert state["best_weights"] is not None
    assert state["epoch"] > 3
    rates = {row["learning_rate"] for row in saved_state(whole("loader", in_process=True))["rows"]}
    assert len(rates) > 1  # the plateau was met


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("moment", [0, 2, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 20])
def test_interrupted_at_any_step_and_resumed(
    name: str, moment: int, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    rng = torch.manual_seed(11).get_state()
    with pytest.raises(KeyboardInterrupt):
        run(name, folder, interrupt_at(moment))
    assert torch.equal(torch.get_rng_state(), rng)
    state = saved_state(folder)
    assert state["step"] == moment + 1  # the step in which the signal came was finished
    assert state["step"] == state["epoch"] * STEPS_PER_EPOCH + state["position"]
    message = capsys.readouterr().out
    assert f"holds the state after step {moment + 1}" in message
    assert f"Resume with fit(..., out='{folder}', resume=True)" in message
    assert not (folder / "model.safetensors").exists()
    torch.manual_seed(12)
    run(name, folder, nothing)
    same_runs(whole(name, in_process=True), folder)


def test_killed_before_the_first_checkpoint_it_starts_over(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise SystemExit

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae.training.checkpoint.save_tree", die)
        with pytest.raises(SystemExit):
            run("array", folder, nothing)
    assert set(contents(folder)) == {"config.json"}
    run("array", folder, nothing)
    same_runs(whole("array", in_process=True), folder)
    (folder / "checkpoint.safetensors").unlink()  # a lost checkpoint is another matter
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run("array", folder, nothing)
    assert (folder / "metrics.csv").exists()


def test_interrupted_many_times(whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    total = saved_state(whole("array", in_process=True))["step"]
    for moment in range(3, total - 1, 7):
        with pytest.raises(KeyboardInterrupt):
            run("array", folder, interrupt_at(moment))
    run("array", folder, nothing)
    same_runs(whole("array", in_process=True), folder)


def test_interrupted_in_the_last_step_nothing_is_lost_or_swallowed(tmp_path: Path) -> None:
    last = EPOCHS * STEPS_PER_EPOCH - 1
    with pytest.raises(KeyboardInterrupt):
        run("shuffled", tmp_path / "run", interrupt_at(last))
    vae, finished = run("shuffled", tmp_path / "run", nothing)
    other, expected = run("shuffled", tmp_path / "whole", nothing)
    assert identical(vae, other)
    assert without_time(finished.metrics) == without_time(expected.metrics)


def test_interrupted_in_validation_the_epoch_is_kept(tmp_path: Path) -> None:
    def signal_after(epoch: int) -> dict[str, float]:
        if epoch == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    settings: dict[str, Any] = {"epochs": 4, "batch_size": 16, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        pv.fit(small_vae(), binary(48), **settings, trackers=[signal_after])
    state = saved_state(tmp_path / "run")
    assert (state["epoch"], state["position"]) == (2, 0)


def test_interrupted_without_a_folder_says_that_nothing_was_saved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pv.fit(small_vae(), binary(48), epochs=2, batch_size=16, kl_schedule=interrupt_at_one)
    assert "after step 2; nothing was saved, for fit had no out= folder" in capsys.readouterr().out


def interrupt_at_one(step: int) -> float:
    interrupt_at(1)(step)
    return 1.0


def test_a_second_signal_acts_at_once_and_the_message_stays_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(step: int) -> float:
        if step == 4 and in_training():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        pv.fit(
            small_vae(),
            binary(48),
            epochs=2,
            batch_size=16,
            kl_schedule=twice,
            out=tmp_path / "run",
        )
    assert "holds the state after step 3" in capsys.readouterr().out
    assert saved_state(tmp_path / "run")["step"] == 3


def test_a_finished_run_resumed_does_nothing_more(whole: Any, tmp_path: Path) -> None:
    run("array", tmp_path / "run", nothing)
    run("array", tmp_path / "run", nothing)
    same_runs(whole("array", in_process=True), tmp_path / "run")


def test_a_finished_run_resumed_gives_its_result_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vae, run_before = run("loader", tmp_path / "run", nothing)
    again, run_after = run("loader", tmp_path / "run", nothing)
    assert run_after == run_before
    assert identical(again, vae)
    assert capfd.readouterr() == ("", "")


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run("array", folder, interrupt_at(2 * STEPS_PER_EPOCH + 1))
    before = contents(folder)
    for epochs in (1, 2):
        with pytest.raises(
            ConfigError, match=f"epochs={epochs} is fewer than .* 2 epochs and 2 steps .* least 3"
        ):
            run("array", folder, nothing, epochs)
        assert contents(folder) == before
    assert len(run("array", folder, nothing, 3)[1].metrics) == 3


def test_metrics_that_a_killed_run_logged_but_did_not_save_are_not_there_twice(
    whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run("array", folder, interrupt_at(8))
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,12,0.1,0.02,0.4,7,-7,-6,1,7,-7,-6,1,4\r\n3,1")  # and half a line
    run("array", folder, nothing)
    same_runs(whole("array", in_process=True), folder)


@pytest.mark.parametrize("name", JOBS)
def test_kill_9_at_five_random_moments(name: str, whole: Any, tmp_path: Path) -> None:
    """A real process, killed by the kernel: in a step, in a save, in validation, wherever it is.

    The moments are drawn by step and a fraction of a millisecond; each job starts from whatever
    the one before it left.
    """
    moments = random.Random(f"{name} 1")
    folder = tmp_path / "run"
    for _ in range(5):
        with process(name, folder) as (child, counter):
            # within about two epochs, so that progress is made between kills and lost by them
            begun = moments.randint(1, 2 * STEPS_PER_EPOCH)
            while counter.value < begun and child.is_alive():
                time.sleep(0.0001)
            time.sleep(moments.uniform(0.0, 0.01))
            child.kill()
            child.join()
            assert child.exitcode in (-signal.SIGKILL, 0)
    with process(name, folder) as (child, _):
        child.join(60)
        assert child.exitcode == 0, folder.with_suffix(".log").read_text()
    same_runs(whole(name, in_process=False), folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_process(number: signal.Signals, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with process("array", folder) as (child, counter):
        while counter.value < 9 and child.is_alive():
            time.sleep(0.0001)
        assert child.pid is not None
        os.kill(child.pid, number)
        child.join(30)
        assert child.exitcode == 1
    log = folder.with_suffix(".log").read_text()
    assert "KeyboardInterrupt" in log
    found = re.search(
        r"Interrupted in epoch \d+, after step (\d+); .* holds .* after step (\d+)", log
    )
    assert found
    assert found[1] == found[2] == str(saved_state(folder)["step"])
    with process("array", folder) as (child, _):
        child.join(60)
    same_runs(whole("array", in_process=False), folder)


def test_ctrl_c_in_a_terminal_does_not_kill_the_workers_of_a_loader(tmp_path: Path) -> None:
    """It goes to all processes there are, and the step at hand may still wait for a batch."""
    folder = tmp_path / "run"
    with process("workers", folder) as (child, counter):
        while counter.value < 4 and child.is_alive():
            time.sleep(0.001)
        time.sleep(0.02)  # while the next batch is waited for
        os.killpg(child.pid, signal.SIGINT)
        child.join(60)
        assert child.exitcode == 1
    log = folder.with_suffix(".log").read_text()
    state = saved_state(folder)
    assert f"holds the state after step {state['step']}" in log
    assert state["step"] > 2
    _, resumed = run("workers", folder, nothing, 4)
    _, whole = run("workers", tmp_path / "whole", nothing, 4)
    assert without_time(resumed.metrics) == without_time(whole.metrics)
