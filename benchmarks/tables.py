"""Fills the tables of README.md from benchmarks/results, so that no figure is typed by hand.

    python -m benchmarks.tables           # rewrite the README
    python -m benchmarks.tables --check   # exit 1 if it would change

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def mnist(report: dict[str, Any]) -> str:
    """`benchmarks.mnist`: fit beside the loop by hand."""
    found = report["results"]
    rows = [
        [
            name,
            f"{row['elbo']:.2f}",
            f"{row['log_px']:.2f} ± {row['se_total']:.2f}",
            f"{row['seconds']:.0f} s",
        ]
        for name, row in (("`pv.fit`", found["fit"]), ("by hand", found["by_hand"]))
    ]
    return table(
        ["20 epochs", "test ELBO", f"L_{found['num_samples']}, {found['num_test']} images", "time"],
        rows,
    )


def kl_estimators_digits(report: dict[str, Any]) -> str:
    """`benchmarks.kl_estimators`: what training ends with."""
    step = report["results"]["milliseconds_a_step"]
    rows = [
        [
            row["prior"],
            row["estimator"],
            f"{row['log_px']:.2f} ± {row['sd']:.2f}",
            f"{row['gain_over_monte_carlo']:+.3f} ± {row['gain_se']:.3f}",
            f"{row['seconds_to_target']:.1f} s",
            f"{step[row['estimator']]:.2f} ms",
        ]
        for row in report["results"]["summary"]
    ]
    head = [
        "prior",
        "KL",
        "log p(x), sd over seeds",
        "gain over Monte Carlo",
        "to target",
        "a step",
    ]
    return table(head, rows)


kl_estimators_mnist = kl_estimators_digits


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(text: str) -> str:
    """The README with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(2)
        make: Callable[[dict[str, Any]], str] = globals()[name]
        report = json.loads((RESULTS / f"{name}.json").read_text())
        return match.group(1) + make(report) + match.group(3)

    return MARKED.sub(fill, text)


def main() -> None:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = README.read_text()
    new = render(old)
    if check:
        sys.exit(old != new)
    README.write_text(new)


if __name__ == "__main__":
    main()
