"""The command line, as a user drives it: what it writes, says, refuses and returns."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.recipes import load_run
from pyro_vae.training import read_metrics

FAST = ["--hidden", "16", "--epochs", "2", "--batch-size", "256", "--device", "cpu"]


class Done(NamedTuple):
    """What a command said."""

    stdout: str
    stderr: str


def run(*args: str | Path, code: int = 0) -> Done:
    """Run the command line within this process; its exit code must be `code`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["pyro-vae", *map(str, args)]),
    ):
        try:
            main()
            found: Any = 0
        except SystemExit as stop:
            found = stop.code or 0
    assert found == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    said = run("train", "--out", folder, *FAST).stdout
    assert str(folder) in said
    assert "pyro-vae evaluate" in said
    return folder


MODEL_OPTIONS = {
    "cvae": [],
    "class_means": [],
    "m2": ["--labels", "50"],
    "m1m2": ["--labels", "50", "--pretrain", "1", "--upper", "3"],
    "gmvae": ["--clusters", "4", "--pretrain", "2"],
    "hierarchical": ["--upper", "3,2"],
}


@pytest.mark.parametrize("model", MODEL_OPTIONS)
def test_every_model_goes_through_every_command(model: str, tmp_path: Path) -> None:
    folder = tmp_path / model
    run("train", "--out", folder, "--model", model, *MODEL_OPTIONS[model], *FAST)
    said = run("evaluate", folder, "--num-samples", "5", "--limit", "6", "--method", "is").stdout
    assert "log p(x)" in said
    assert len(np.load(folder / "evidence.npz", allow_pickle=False)["log_px"]) == 6
    run("sample", folder, "--num", "12")
    with np.load(folder / "samples.npz") as samples:
        assert samples["mean"].shape == samples["x"].shape == (12, 64)
    run("plot", folder)
    names = {path.stem for path in (folder / "figures").iterdir()}
    expected = {"training_curves", "reconstructions", "samples", "evidence"}
    if model == "m1m2":
        assert names == expected | {"class_grid"}
    elif model == "hierarchical":
        assert names == expected
    else:
        assert names == expected | {"latent_map", "class_grid"}
    assert "no use for" in run("train", "--out", tmp_path / "b", "--upper", "3", code=1).stderr


def test_labels_are_of_training_alone(tmp_path: Path) -> None:
    """An m2 model is judged by log p(x) of every row, and fills holes without being told."""
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).round()
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40) % 4 - 1)
    folder = tmp_path / "m2"
    holes = x[:3].masked_fill(torch.eye(3, 6) > 0, float("nan"))
    np.savez(tmp_path / "holes.npz", x=holes)
    m2 = ["--model", "m2", "--labels", "0", "--binarize", "none"]
    run("train", "--out", folder, "--data", tmp_path / "data.npz", *m2, *FAST, "--batch-size", "8")
    run("evaluate", folder, "--part", "train", "--num-samples", "5", "--method", "is")
    run("impute", folder, "--data", tmp_path / "holes.npz", "--num-sweeps", "2")
    vae, data, _ = load_run(folder)
    assert set(data.train.context.tolist()) == {-1, 0, 1, 2}
    assert vae.model.label_weight == pytest.approx(0.1 * 32 / int((data.train.context >= 0).sum()))
    with np.load(folder / "evidence.npz", allow_pickle=False) as evidence:
        expected = pv.log_marginal(
            vae.model, vae.guide, data.train.given(None), num_samples=5, method="is"
        )
        np.testing.assert_allclose(evidence["log_px"], expected.log_px, rtol=1e-6)


def test_train_leaves_a_run_folder(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["recipe"]["data"] == "digits"
    assert config["recipe"]["hidden"] == [16]
    assert config["fit"]["epochs"] == 2
    assert config["versions"]["torch"]
    rows = read_metrics(trained / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["train_elbo"] == pytest.approx(row["train_reconstruction"] - row["train_kl"])
    with safe_open(trained / "model.safetensors", "numpy") as file:
        assert any(name.endswith("weight") for name in file.keys())  # noqa: SIM118


def test_config_in_and_out(trained: Path, tmp_path: Path) -> None:
    run("train", "--config", trained / "config.json", "--out", tmp_path / "b", "--epochs", "1")
    first = json.loads((trained / "config.json").read_text())
    second = json.loads((tmp_path / "b" / "config.json").read_text())
    assert second["recipe"] == first["recipe"]
    assert second["fit"]["epochs"] == 1  # given on the command line, so it wins
    assert second["fit"]["batch_size"] == 256


def test_unknown_config_entry_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"latnet": 3}')
    done = run("train", "--config", config, "--out", tmp_path / "run", code=2)
    assert "latnet" in done.stderr
    assert not (tmp_path / "run").exists()


def test_evaluate_samples_and_plots(trained: Path) -> None:
    said = run("evaluate", trained, "--num-samples", "20", "--limit", "30").stdout
    assert "log p(x)" in said
    assert "nats" in said
    run("evaluate", trained, "--num-samples", "20", "--limit", "30", "--compile", "--overwrite")
    assert pv.evidence.Evidence.load(trained / "evidence.npz").provenance["compile"] is True
    run("sample", trained, "--num", "7")
    samples = np.load(trained / "samples.npz", allow_pickle=False)
    assert samples["x"].shape == samples["mean"].shape == (7, 64)
    assert set(np.unique(samples["x"])) <= {0.0, 1.0}
    assert ((samples["mean"] > 0) & (samples["mean"] < 1)).all()
    run("plot", trained)
    names = {path.stem for path in (trained / "figures").glob("*.png")}
    drawn = {"training_curves", "reconstructions", "samples", "latent_map", "manifold"}
    assert names == {*drawn, "evidence"}


def test_a_run_in_float64_is_looked_at_in_float64(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", "--out", folder, "--epochs", "1", "--hidden", "8", "--precision", "64-true")
    run("evaluate", folder, "--num-samples", "10", "--method", "is")
    assert pv.Evidence.load(folder / "evidence.npz").provenance["precision"] == "float64"
    run("plot", folder)
    run("sample", folder)


def test_compare_ranks_evaluated_runs(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "longer"
    run("train", "--out", other, *FAST, "--epochs", "30")
    assert "not evaluated" in run("compare", other, trained, code=1).stderr
    for folder, rows in ((trained, "20"), (other, "20")):
        run(
            "evaluate",
            folder,
            "--num-samples",
            "50",
            "--limit",
            rows,
            "--method",
            "is",
            "--overwrite",
        )
    lines = run("compare", trained, other).stdout.splitlines()
    assert str(other) in lines[1]  # thirty epochs beat two
    assert str(trained) in lines[2]
    run("evaluate", other, "--num-samples", "50", "--limit", "10", "--method", "is", "--overwrite")
    assert "different data" in run("compare", trained, other, code=1).stderr


def test_nothing_is_overwritten_unasked(trained: Path) -> None:
    before = {p: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    for args in (["train", "--out", trained, *FAST], ["sample", trained], ["evaluate", trained]):
        for name in ("samples.npz", "evidence.npz"):
            (trained / name).touch()
        done = run(*args, code=1)
        assert "overwrite" in done.stderr
    assert {p: p.read_bytes() for p in before} == before


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A run that may be changed, with nothing derived from it."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("config.json", "metrics.csv", "checkpoint.safetensors", "model.safetensors"):
        shutil.copy(trained / name, folder)
    return folder


def derive(folder: Path) -> list[Path]:
    """Stand-ins for what is made from a run's weights."""
    (folder / "figures").mkdir()
    paths = [folder / n for n in ("evidence.npz", "samples.npz", "figures/manifold.png")]
    for path in paths:
        path.write_bytes(b"old")
    return paths


@pytest.mark.parametrize("args", [["--overwrite", *FAST], ["--resume", "--epochs", "3"]])
def test_training_removes_what_was_made_from_other_weights(copied: Path, args: list[str]) -> None:
    old = derive(copied)
    (copied / "figures" / "notes.txt").write_text("not ours")
    run("train", "--out", copied, *args)
    assert not any(path.exists() for path in old)
    assert (copied / "figures" / "notes.txt").exists()
    assert "not evaluated" in run("compare", copied, code=1).stderr


def test_plot_removes_the_figures_that_it_does_not_draw(tmp_path: Path) -> None:
    run("train", "--out", tmp_path / "run", *FAST, "--latent", "3", "--epochs", "1")
    derive(tmp_path / "run")
    assert "overwrite" in run("plot", tmp_path / "run", code=1).stderr
    run("plot", tmp_path / "run", "--overwrite")
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert names == {"training_curves.png", "reconstructions.png", "samples.png", "latent_map.png"}


OUTPUTS = [("evaluate", "evidence.npz"), ("sample", "samples.npz"), ("plot", "figures")]


@pytest.mark.parametrize(("command", "name"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_computing(
    command: str, name: str, copied: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    with patch("pyro_vae.recipes.load_run") as load_run:
        with patch.object(Path, "write_bytes", refuse):
            assert "cannot write" in run(command, copied, code=1).stderr
        if command == "plot":
            assert not (copied / name).exists()
            (copied / name).touch()
        else:
            (copied / name).mkdir()
        done = run(command, copied, "--overwrite", code=1)
        assert str(copied / name) in done.stderr
        assert len(done.stderr.splitlines()) == 1
        load_run.assert_not_called()


@pytest.mark.parametrize(("command", "name"), OUTPUTS)
def test_a_failure_leaves_the_old_output_whole(command: str, name: str, copied: Path) -> None:
    old = derive(copied)
    (copied / "model.safetensors").write_bytes(b"damaged")
    run(command, copied, "--overwrite", code=1)
    assert [path.read_bytes() for path in old] == [b"old"] * 3
    assert not list(copied.rglob(".part*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "digit"], ["digit", "digits", "mnist"]),
        (["--binarize", "none"], ["Bernoulli", "row", "binarize"]),
        (["--prior", "nomral"], ["nomral", "normal"]),
        (["--device", "cuda:99"], ["cuda"]),
        (["--batch-size", "5000"], ["5000", "1297"]),
        (["--network", "conv", "--data", "FILE"], ["image"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    args: list[str], words: list[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.eye(20))
    args = [str(tmp_path / "x.npy") if a == "FILE" else a for a in args]
    done = run("train", "--out", tmp_path / "run", *args, code=1)
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [["--binarize", "threshold"], ["--hidden", "16"], ["--seed", "0"], ["--batch-size", "64"]],
)
def test_resuming_takes_no_options_that_make_another_run(args: list[str], copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.iterdir()}
    done = run("train", "--out", copied, "--resume", *args, code=1)
    assert done.stderr.startswith(f"Error: {args[0]} ")
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def test_resuming_goes_on_to_no_fewer_epochs_than_are_done(copied: Path) -> None:
    old = derive(copied)
    done = run("train", "--out", copied, "--resume", "--epochs", "1", code=1)
    assert done.stderr.startswith("Error: ")
    assert "epochs" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert all(path.exists() for path in [*old, copied / "model.safetensors"])


def test_resuming_takes_no_configuration(copied: Path) -> None:
    args = ["--out", copied, "--resume", "--config", copied / "config.json"]
    assert "--config" in run("train", *args, code=2).stderr


DAMAGES = [
    '{"options": {',
    "[]",
    "{}",
    '{"options": [], "recipe": 1}',
    '{"options": {}, "recipe": {}}',
]


@pytest.mark.parametrize("text", DAMAGES)
@pytest.mark.parametrize("args", [["train", "--resume", "--out"], ["evaluate"]])
def test_a_damaged_configuration_is_one_line(text: str, args: list[str], copied: Path) -> None:
    (copied / "config.json").write_text(text)
    done = run(*args, copied, code=1)
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert str(copied) in done.stderr


def test_resuming_checks_the_stored_options(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    for name, value in (("batch_size", "many"), ("data", None)):
        damaged = {**config, "options": {**config["options"], name: value}}
        (copied / "config.json").write_text(json.dumps(damaged))
        assert str(value) in run("train", "--resume", "--out", copied, code=1).stderr


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"options": 1}', "object"),
        ('{"epochs": [1]}', "epochs"),
        ('{"hidden": {"a": 1}}', "hidden"),
        ('{"hidden": true}', "hidden"),
        ('{"hidden": [8, 1.5]}', "hidden"),
        ('{"hidden": 0}', "hidden"),
        ('{"seed": -1}', "seed"),
    ],
)
def test_a_file_that_is_no_configuration_is_wrong_usage(
    text: str, word: str, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_text(text)
    done = run("train", "--config", tmp_path / "c.json", "--out", tmp_path / "run", code=2)
    assert word in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_configuration_may_give_one_size(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"hidden": 8, "epochs": 1}')
    run("train", "--config", tmp_path / "c.json", "--out", tmp_path / "run", "--device", "cpu")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["hidden"] == [8]


@pytest.mark.parametrize(
    "args",
    [
        *(["--hidden", sizes] for sizes in ("0", "-1", "8,,8", "", "8,", "1.5", "a")),
        ["--precision", "16-mixed"],
        ["--seed", "-1"],
    ],
    ids=str,
)
def test_values_out_of_range_are_wrong_usage(args: list[str], tmp_path: Path) -> None:
    assert args[0] in run("train", "--out", tmp_path / "run", *args, code=2).stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample", "plot"])
def test_negative_seeds_are_wrong_usage(command: str, trained: Path) -> None:
    assert "--seed" in run(command, trained, "--seed", "-1", code=2).stderr


def test_a_file_of_data_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).random((60, 9)) < 0.5
    np.save(tmp_path / "x.npy", x.astype("float32"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    args = ["--data", "x.npy", "--binarize", "none", *FAST, "--batch-size", "8"]
    run("train", "--out", tmp_path / "run", *args)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("sample", tmp_path / "run")
    run("train", "--out", tmp_path / "run", "--resume", "--epochs", "3")


def test_files_of_data_as_they_come(tmp_path: Path) -> None:
    """Bytes that are to be binarised, a named array and labels, and a table's column of labels."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (60, 6)), np.arange(60) % 3
    np.savez(tmp_path / "x.npz", grey=x, other=x, kind=y)
    table = "a,b,kind,c\n" + "".join(f"{i % 2},{i // 2 % 2},{i % 3},0\n" for i in range(60))
    (tmp_path / "x.csv").write_text(table)
    named = ["--key", "grey", "--label-key", "kind"]
    files = {
        "npz": [*named, "--divide-by", "255", "--image-shape", "3,2"],
        "csv": ["--label-key", "kind", "--binarize", "none", "--image-shape", "1,3"],
    }
    npz = ["--out", tmp_path / "run", "--data", tmp_path / "x.npz", *named]
    assert "--divide-by" in run("train", *npz, code=1).stderr
    fast = ["--model", "cvae", "--epochs", "1", "--batch-size", "20"]
    for ending, options in files.items():
        folder = tmp_path / ending
        run("train", "--out", folder, "--data", tmp_path / f"x.{ending}", *options, *fast)
        run("train", "--out", folder, "--resume", "--epochs", "2")
        _, found, recipe = load_run(folder)
        assert found.features == {"npz": 6, "csv": 3}[ending]
        assert found.image_shape == recipe.image_shape
        assert found.num_classes == 3
        run("plot", folder)
    again = ["--config", tmp_path / "npz" / "config.json", "--epochs", "1"]
    run("train", "--out", tmp_path / "again", *again)
    said = run("train", "--out", tmp_path / "run", "--divide-by", "16", code=1).stderr
    assert 'data="digits" has no use for divide_by (--divide-by): leave it out' in said
    assert not (tmp_path / "run").exists()


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    assert "Usage" in run("train", code=2).stderr
    assert "no-such" in run("evaluate", tmp_path / "no-such", code=2).stderr
    run("frobnicate", code=2)


def test_help_names_every_command() -> None:
    said = run("--help").stdout
    assert "130 interrupted" in said
    for command in ("train", "evaluate", "compare", "sample", "impute", "plot"):
        assert command in said
        assert "..." not in next(line for line in said.splitlines() if f"  {command} " in line)
        assert "Usage" in run(command, "--help").stdout
    said = run("train", "--help").stdout
    headings = [said.index(f"\n{name}:\n") for name in ("Run", "Data", "Model", "Training")]
    assert headings == sorted(headings)
    assert headings[1] < said.index("--split") < headings[2]
    for name in pv.datasets.names():
        assert name in said


@pytest.mark.slow
def test_interrupted_run_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    # processes of their own throughout: signals, threads and precision as users have them
    args = ["--hidden", "16", "--epochs", "40", "--batch-size", "64", "--device", "cpu"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"

    def start(*args: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pyro_vae", "train", *map(str, args)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread)

    uninterrupted = start("--out", whole, *args)
    process = start("--out", halved, *args)
    while not (halved / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    assert f"pyro-vae train --out {halved} --resume" in said
    assert not (halved / "model.safetensors").exists()
    unfinished = run("evaluate", halved, code=1).stderr
    assert f"not finished: pyro-vae train --out {halved} --resume" in unfinished
    for finishing in (uninterrupted, start("--out", halved, "--resume")):
        finishing.communicate()
        assert finishing.returncode == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, halved))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
