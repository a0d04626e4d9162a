"""The READMEs say what is so: code runs, tables are the results, links lead on."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from benchmarks import report, tables
from pyro_vae.compiled import backend

ROOT = Path(__file__).parents[1]
TEXTS = {path: path.read_text() for path in tables.READMES}
README, BENCHMARKS = TEXTS.values()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_made_from_the_results(path: Path) -> None:
    assert tables.MARKED.search(TEXTS[path])
    assert tables.render(TEXTS[path]) == TEXTS[path]


def test_every_table_stands_in_one_place() -> None:
    placed = [name for text in TEXTS.values() for _, name, _ in tables.MARKED.findall(text)]
    made = {n for n, f in vars(tables).items() if (f.__doc__ or "").startswith("`benchmarks.")}
    assert sorted(placed) == sorted(made)


def test_every_command_of_a_benchmark_stands_in_the_list() -> None:
    listed = README[README.index("| benchmark |") :]
    scripts = (ROOT / "benchmarks").glob("*.py")
    parts = ("step_numpyro", "step_torch", "tables")  # processes of `train_step`, and no benchmark
    for script in scripts:
        if "__main__" in script.read_text() and script.stem not in parts:
            assert re.search(rf"python -m benchmarks\.{script.stem}\b", listed), script.stem


def test_what_is_said_of_the_kl_estimators_is_what_the_results_say() -> None:
    prose = " ".join(BENCHMARKS.split())
    found = {name: report.read(f"kl_estimators_{name}")["results"] for name in ("digits", "mnist")}
    noise, dimensions = found["digits"]["noise"], found["digits"]["by_dimension"]
    worst, worst_dimension = (max(r["bias_z"] for r in rows) for rows in (noise, dimensions))
    ratio, rows = {}, {}
    for name, results in found.items():
        row = rows[name] = {(r["prior"], r["estimator"]): r for r in results["summary"]}
        step = results["milliseconds_a_step"]["normal"]
        ratio[name] = step["stl"] / step["analytic"]
        for prior in ("normal", "vamp"):
            steps = {e: sum(r["steps_to_target"]) for (p, e), r in row.items() if p == prior}
            assert min(steps, key=steps.get) == "stl"
            assert row[prior, "stl"]["log_px"] == max(
                r["log_px"] for (p, _), r in row.items() if p == prior
            )
        seconds = {e: r["seconds_to_target"] for (p, e), r in row.items() if p == "normal"}
        assert seconds["stl"] == pytest.approx(seconds["analytic"], rel=0.03)
        assert max(seconds, key=seconds.get) == "monte_carlo"
        assert row["normal", "analytic"]["gain_over_monte_carlo"] > 0
    gain = rows["mnist"]["normal", "stl"]["log_px"] - rows["mnist"]["normal", "analytic"]["log_px"]
    for said in (
        f"on MNIST by {gain:.2f} nats over the analytic KL",
        f"takes {ratio['mnist']:.2f} (MNIST) and {ratio['digits']:.2f} times (digits) as long",
        f"of {len(noise)} comparisons",
        f"the largest z-score is {worst:.1f}; of {len(dimensions)} by latent dimension",
        f"degrees of freedom, {worst_dimension:.1f}.",
    ):
        assert said in prose, said


def test_a_table_typed_by_hand_is_noticed() -> None:
    edited = README.replace("<!-- end -->", "| 0.1 |\n<!-- end -->", 1)
    assert tables.render(edited) != edited


LINKS = [
    (path, target or source)
    for path, text in TEXTS.items()
    for target, source in re.findall(r"\]\(([^):]+)\)|src=\"([^\"]+)\"", text)
]


@pytest.mark.parametrize(("path", "target"), LINKS)
def test_links_lead_somewhere(path: Path, target: str) -> None:
    """To a file, and in it to a heading by the name that GitHub gives it."""
    name, _, heading = target.partition("#")
    found = path.parent / name if name else path
    assert found.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in anchors


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:pyro_vae|tests|benchmarks)/[\w/.]+)`", text)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_pictures_of_the_models_are_those_of_the_notebooks() -> None:
    spec = importlib.util.spec_from_file_location("models", ROOT / "docs" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    rows = re.findall(r"docs/models/(\w+)\.png.*notebooks/(\w+)\.ipynb", README)
    assert dict(rows) == {name: notebook for name, (notebook, _) in models.PICTURES.items()}
    for name, place in models.PICTURES.items():
        stored = (ROOT / "docs" / "models" / f"{name}.png").read_bytes()
        assert stored == models.picture(*place), f"{name}: python docs/models.py"


SHORTER = {
    "data = pv.datasets.load": "data = few",
    "range(100)": "range(20)",
    "num_samples=1000": "num_samples=20",
    'method="auto"': 'method="auto", annealing=short',
    "holes[:100]": "holes[:4]",
}


def few(name: str, **options: Any) -> pv.Data:
    """`pv.datasets.load`, of which little is kept."""
    data = pv.datasets.load(name, **options)
    parts = {"train": data.train[:256], "valid": data.valid[:20], "test": data.test[:4]}
    return dataclasses.replace(data, **parts)


def test_the_code_runs_in_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every block, in one namespace: of few data and draws, its defaults short, its graphs run
    operation by operation (`test_compiled_svi` compiles them)."""
    texts_and_blocks = re.split(r"```python\n(.*?)```", README, flags=re.DOTALL)
    defaults = {
        "fit": {"epochs": 20},
        "nuts": {"num_samples": 10, "warmup_steps": 10, "num_chains": 2},
        "inference_gaps": {"num_steps": 50},
    }
    for name, options in defaults.items():
        monkeypatch.setattr(pv, name, functools.partial(getattr(pv, name), **options))
    monkeypatch.setattr(backend, "inductor", lambda graph, _: graph)
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as users have it; the fixture puts it back
    script = "".join(  # the text as empty lines, so that an error names the README's line
        part if i % 2 else "\n" * (part.count("\n") + 1) for i, part in enumerate(texts_and_blocks)
    )
    assert script.count("import pyro_vae as pv") == 1
    for long, shorter in SHORTER.items():
        assert long in script, long
        script = script.replace(long, shorter)
    names: dict[str, Any] = {"few": few, "short": pv.evidence.Annealing(4, 5, 2)}
    exec(compile(script, str(ROOT / "README.md"), "exec"), names)
    said = capsys.readouterr().out
    assert "log p(x)" in said
    assert "mixture" in said
    assert (tmp_path / "runs" / "digits" / "metrics.csv").exists()
    assert names["found"].values.shape == (20, 4, 64)


def test_the_example_of_contributing_passes_its_own_test() -> None:
    likelihood, test = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    names: dict = {}
    exec(likelihood + test, names)
    names["test_geometric_counts"]()
    broken = likelihood.replace("-mean.clamp(min=1e-3).log()", "mean")
    exec(broken + test, names)
    with pytest.raises(AssertionError):
        names["test_geometric_counts"]()
