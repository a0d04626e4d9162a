"""`benchmarks.kl_estimators` repeats one study and leaves the others as they were measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kl_estimators, report


@pytest.mark.parametrize("name", ["kl_estimators_digits", "kl_estimators_mnist"])
def test_every_stored_study_says_where_it_comes_from(name: str) -> None:
    stored = report.read(name)
    assert set(stored["studies"]) == set(stored["results"]) - {"summary"}
    for source in stored["studies"].values():
        assert source["command"]
        assert source["machine"]["versions"]["torch"]


def test_a_partial_run_keeps_the_provenance_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "kl_estimators_digits"
    before = report.read(name)
    (tmp_path / f"{name}.json").write_text(json.dumps(before))
    again = {
        prior: dict.fromkeys(row, 1.0)
        for prior, row in before["results"]["milliseconds_a_step"].items()
    }

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a study that was not asked for ran")

    for study in ("training_study", "noise_study", "dimension_study"):
        monkeypatch.setattr(kl_estimators, study, refuse)
    monkeypatch.setattr(kl_estimators, "time_study", lambda *_, **__: again)
    monkeypatch.setattr(kl_estimators, "draw", lambda *_: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "machine", lambda: {"processor": "another"})
    monkeypatch.setattr("sys.argv", ["kl_estimators", "--only", "time"])
    kl_estimators.main()

    after = report.read(name)
    timed = after["studies"].pop("milliseconds_a_step")
    before["studies"].pop("milliseconds_a_step")
    assert timed["machine"] == {"processor": "another"}
    assert timed["command"].endswith("--data digits --only time")
    assert after["studies"] == before["studies"]
    assert after["results"]["milliseconds_a_step"] == again
    for key in ("training", "noise", "by_dimension"):
        assert after["results"][key] == before["results"][key]
    assert after["results"]["summary"] != before["results"]["summary"]
