"""Fills the tables of both READMEs from benchmarks/results, so that no figure is typed by hand.

    python -m benchmarks.tables           # rewrite README.md and benchmarks/README.md
    python -m benchmarks.tables --check   # exit 1 if one would change

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

READMES = (Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md")
PARTS = ("train", "test")
STAGES, OTHERS = ("start", "middle", "end"), ("monte_carlo", "stl")
SOURCES = {  # of tables that share their results with others
    "kl_noise": "kl_estimators_digits",
    "train_step_by_machine": "train_step",
    "start_up_by_machine": "start_up",
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def mnist(report: dict[str, Any]) -> str:
    """`benchmarks.mnist`: fit beside the loop by hand."""
    found = report["results"]
    rows = [
        [
            name,
            f"{row['elbo']:.2f}",
            f"{row['elbo_first']:.2f}",
            f"{row['log_px']:.2f} ± {row['se_total']:.2f}",
            f"{row['seconds']:.0f} s",
        ]
        for name, row in (
            ("`pv.fit`", found["mean"]["fit"]),
            ("by hand", found["mean"]["by_hand"]),
        )
    ]
    few = f"first {found['num_test']}"
    return table(
        [
            f"{found['epochs']} epochs, {len(found['runs'])} seeds",
            "test ELBO",
            few,
            f"L_{found['num_samples']}, {few}",
            "time",
        ],
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
            f"{sum(row['steps_to_target']) / row['seeds']:,.0f}",
            f"{row['seconds_to_target']:.1f} s",
            f"{step[row['prior']][row['estimator']]:.2f} ms",
        ]
        for row in report["results"]["summary"]
    ]
    head = [
        "prior",
        "KL",
        "log p(x), sd over seeds",
        "gain over Monte Carlo",
        "steps to target",
        "time to target",
        "a compiled step",
    ]
    return table(head, rows)


def kl_noise(report: dict[str, Any]) -> str:
    """`benchmarks.kl_estimators`: the variance of the encoder's gradient, one draw of 64 data."""

    def variance(decoder: str, latent: int, stage: str, estimator: str) -> float:
        at = {
            "decoder": decoder, "latent": latent, "batch": 64, "stage": stage,
            "estimator": estimator, "particles": 1,
        }  # fmt: skip
        return sum(
            row["variance"]
            for row in report["results"]["noise"]
            if at.items() <= row.items() and row["group"].startswith("encoder")
        )

    def over_analytic(*where: Any) -> list[str]:
        others = (variance(*where, name) / variance(*where, "analytic") for name in OTHERS)
        return [f"{ratio:.3g}" for ratio in others]

    rows = [
        [decoder, str(latent), *(r for s in STAGES for r in over_analytic(decoder, latent, s))]
        for decoder in ("mlp", "linear")
        for latent in (2, 10, 32)
    ]
    head = [f"{short}, {stage}" for stage in STAGES for short in ("Monte Carlo", "STL")]
    return table(["decoder", "latents", *head], rows)


def mnist_parts(report: dict[str, Any]) -> str:
    """`benchmarks.mnist_parts`: what a better prior and a tighter bound are worth."""
    found = report["results"]
    rows = [
        [
            row["name"],
            f"{row['log_px']:.2f} ± {row['se_total']:.2f}",
            f"{row['gain']:+.2f} ± {row['gain_se']:.2f}",
            str(row["active_units"]),
        ]
        for row in found["rows"]
    ]
    head = [
        f"{found['epochs']} epochs", f"L_{found['num_samples']}, {found['num_test']} images",
        "gain, paired SE", "active units",
    ]  # fmt: skip
    return table(head, rows)


def counts(report: dict[str, Any]) -> str:
    """`benchmarks.counts`: likelihoods of counts on CEL-seq2."""
    rows = [
        [
            str(row["seed"]),
            row["likelihood"],
            f"{row['log_px']:.0f}",
            f"{row['gain']:+.0f} ± {row['gain_se']:.0f}",
            f"{row['rand_index']:.3f}",
        ]
        for row in report["results"]["rows"]
    ]
    head = ["seed", "likelihood", "held-out log p(x)", "gain over Poisson, paired SE", "Rand index"]
    return table(head, rows)


def clustering(report: dict[str, Any]) -> str:
    """`benchmarks.clustering`: the Gaussian-mixture VAE."""
    rows = [
        [
            row["data"],
            str(row["seed"]),
            f"{row['placed']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['smallest']:.2f} to {row['largest']:.2f}",
        ]
        for row in report["results"]["rows"]
    ]
    return table(["data", "seed", "placed", "trained", "shares of the clusters"], rows)


def semi_supervised(report: dict[str, Any]) -> str:
    """`benchmarks.semi_supervised`: errors beside the published ones."""

    def percent(mean: float, sd: float) -> str:
        return f"{mean:.2f} ± {sd:.2f} %"

    rows = [
        [
            str(row["labels"]),
            row["method"],
            percent(row["error"], row["sd"]),
            percent(*row["published"]) if row["published"] else "–",
            f"{row['processor_seconds']:.0f} s",
        ]
        for row in report["results"]["rows"]
    ]
    return table(["labels", "method", "test error", "Kingma et al. 2014", "CPU"], rows)


def fit_overhead(report: dict[str, Any]) -> str:
    """`benchmarks.fit_overhead`: the time of `fit` over that of a bare loop."""
    rows = [
        [name, f"{row['processor']['median']:.3f}", f"{row['wall']['median']:.3f}"]
        for name, row in report["results"]["ratios"].items()
    ]
    return table(["against the bare loop", "processor time", "wall time"], rows)


def evidence(report: dict[str, Any]) -> str:
    """`benchmarks.evidence`: microseconds a (datum, draw) pair, and the error they are worth."""
    found = report["results"]
    rows = [
        [
            name,
            f"{row['microseconds']:.1f}",
            f"{row['times_the_limit']:.2f}",
            f"{row['nats2_seconds']:.4f}" if "nats2_seconds" in row else "–",
        ]
        for name, row in found["speed"].items()
    ]
    auto = found["auto"]
    rows.append(['the same, `method="auto"`', "–", "–", f"{auto['nats2_seconds']:.4f}"])
    head = ["log p(x)", "µs a (datum, draw)", "over the decoder's products", "nats² × s a datum"]
    return table(head, rows)


def evidence_auto(report: dict[str, Any]) -> str:
    """`benchmarks.evidence_auto`: escalation beside plain importance sampling at equal time."""
    rows = [
        [
            row["model"],
            row["condition"],
            f"{row['auto']:.2f}",
            f"{row['plain']:.2f}",
            f"{row['gain']:.1f}x ({row['least_gain']:.1f}x)",
        ]
        for row in report["results"]["summary"]
    ]
    head = [
        "model",
        "evaluated",
        "auto, rms nats",
        "plain, rms nats",
        "gain, median (least) of seeds",
    ]
    return table(head, rows)


def evidence_whole(report: dict[str, Any]) -> str:
    """`benchmarks.evidence_whole`: whole evaluations, time and memory."""
    rows = [
        [
            f"{row['num_data']:,} x {row['num_samples']:,}",
            f"{row['processor_seconds']:.0f} s",
            f"{row['peak_megabytes']:.0f} MB",
        ]
        for row in report["results"]["rows"]
    ]
    return table(["data x draws", "processor time, all", "most memory, all"], rows)


def evidence_compiled(report: dict[str, Any]) -> str:
    """`benchmarks.evidence_compiled`: what compiling gains an evaluation."""
    return _by_machine(report, _compiled_evaluations)


def _compiled_evaluations(machine: str, found: dict[str, Any]) -> str:
    names = {"is": "importance sampling, 5,000 draws", "ais": "annealing"}
    rows = [
        [
            f"{names[method]}: {row['data']:,} data",
            f"{row['eager_seconds']:.0f} s",
            f"{row['compiled_seconds']:.0f} s",
            f"{row['ratio']:.2f}",
            f"{row['largest_difference']:.0e}",
        ]
        for method, row in found.items()
    ]
    head = [machine, "eager", "compiled", "ratio", "nats apart at most"]
    return table(head, rows)


def train_step(report: dict[str, Any]) -> str:
    """`benchmarks.train_step`: the compiled step over each peer's, medians of ratios, where it was
    measured last."""
    return _latest(report, _steps)


def train_step_by_machine(report: dict[str, Any]) -> str:
    """`benchmarks.train_step`: the same, on every machine."""
    return _by_machine(report, _steps)


def _by_machine(report: dict[str, Any], draw: Callable[[str, dict[str, Any]], str]) -> str:
    """A table for each machine (`report.add`)."""
    return "\n\n".join(draw(machine, found) for machine, found in report["results"].items())


def _latest(report: dict[str, Any], draw: Callable[[str, dict[str, Any]], str]) -> str:
    """A table for the machine of the latest results."""
    return draw(*list(report["results"].items())[-1])


def _steps(machine: str, found: dict[str, Any]) -> str:
    models = found["models"]

    def row(name: str, values: list[float | None], end: str = "") -> list[str]:
        shown = ["–" if v is None else f"{v:.3f}" if v < 0.1 else f"{v:.2f}" for v in values]
        return [name, *(s if s == "–" else s + end for s in shown)]

    each = models.values()
    rows = [row("compiled", [m["milliseconds"]["compiled"] for m in each], " ms")]
    for peer in dict.fromkeys(peer for m in each for peer in m["ours_over"]):
        rows.append(row(f"over {peer}", [m["ours_over"].get(peer) for m in each]))
    at_once = [m.get("all_at_once_over", {}) for m in each]
    if any(at_once):  # of a benchmark before `steps`, there is none
        times = [m["milliseconds"]["compiled, steps"] for m in each]
        rows.append(row("compiled, `steps`", times, " ms"))
        loop = "NumPyro fori_loop"
        rows.append(row(f"`steps` over {loop}", [ratios.get(loop) for ratios in at_once]))
    return table([machine, *models], rows)


def start_up(report: dict[str, Any]) -> str:
    """`benchmarks.train_step`: what comes before the first compiled step, and the memory, where it
    was measured last."""
    return _latest(report, _start_up)


def start_up_by_machine(report: dict[str, Any]) -> str:
    """`benchmarks.train_step`: the same, on every machine."""
    return _by_machine(report, _start_up)


def _start_up(machine: str, found: dict[str, Any]) -> str:
    imports = found["import_seconds"]
    rows = [
        [
            state.replace("_", " "),
            f"{row['trace']:.1f} s" if "trace" in row else "–",
            f"{row['compile']:.1f} s" if "compile" in row else "–",
            f"{row['first_step']:.1f} s",
            f"{row['peak_mb']:.0f} MB",
        ]
        for state, row in found["first_step"].items()
    ]
    rows.append(
        [f"`import pyro_vae`, {imports['ratio']:.2f} of `import pyro`", "–", "–",
         f"{imports['pyro_vae']:.1f} s", "–"]
    )  # fmt: skip
    head = [f"{machine}: {found['model']}", "tracing", "compiling", "first step in all",
            "peak memory"]  # fmt: skip
    return table(head, rows)


def fit_throughput(report: dict[str, Any]) -> str:
    """`benchmarks.fit_throughput`: training samples a second."""
    return _by_machine(report, _throughput)


def _throughput(machine: str, found: dict[str, Any]) -> str:
    rows = [
        [name, f"{value:,.0f}", f"{found['times_pythae'].get(name, 1.0):.2f}"]
        for name, value in found["rows_per_second"].items()
    ]
    return table([machine, "samples a second", "times pythae's trainer"], rows)


def mnist_compiled(report: dict[str, Any]) -> str:
    """`benchmarks.mnist_compiled`: what compiling changes, and what it does not."""
    return _by_machine(report, _compiled)


def _compiled(machine: str, found: dict[str, Any]) -> str:
    rows = [
        [row["way"], f"{row['log_px']:.2f} ± {row['sd']:.2f}", f"{row['seconds']:.0f} s"]
        for row in found["rows"]
    ]
    kind = f"{machine}: {found['epochs']} epochs, {found['seeds']} seeds"
    return table([kind, "log p(x), sd over seeds", "time"], rows)


def frey_faces(report: dict[str, Any]) -> str:
    """`benchmarks.frey_faces`: the best test ELBO beside the paper's."""
    found = report["results"]["rows"]
    by_scale = {row["scale"]: {} for row in found}
    for row in found:
        by_scale[row["scale"]][row["latent"]] = row
    latents = sorted({row["latent"] for row in found})
    rows = [
        [f"{scale} scale", *(f"{of[latent]['test_elbo']:.0f}" for latent in latents)]
        for scale, of in by_scale.items()
    ]
    paper = {row["latent"]: row["paper"] for row in found}
    rows.append(["Kingma & Welling 2013", *(str(paper[latent]) for latent in latents)])
    return table(["best test ELBO", *(f"{latent} latents" for latent in latents)], rows)


kl_estimators_mnist = kl_estimators_digits


def imputation(report: dict[str, Any]) -> str:
    """`benchmarks.imputation`: a VAE trained on holes beside scikit-learn's imputers."""
    found = report["results"]["rows"]
    methods = list(dict.fromkeys(row["method"] for row in found))
    rows = []
    for name, missing in dict.fromkeys((row["table"], row["missing"]) for row in found):
        by = {r["method"]: r for r in found if (r["table"], r["missing"]) == (name, missing)}
        rows.append([
            f"{name}, {missing}%",
            *(f"{by[m]['rmse']:.3f}, {by[m]['wrong']:.1%}" for m in methods),
            *(f"{by[m]['covered']:.1%}" for m in methods if "covered" in by[m]),
        ])  # fmt: skip
    drawn = [f"{m}, coverage" for m in methods if "covered" in by[m]]
    return table(["missing", *methods, *drawn], rows)


def aevb(report: dict[str, Any]) -> str:
    """`benchmarks.aevb`: three ways to train, figure 3 of Kingma & Welling 2013."""
    found = report["results"]
    rows = [
        [
            f"{row['method']}, {row['updates']:,}",
            *(
                f"{row[part]['log_px']:.1f} ± {row[part]['se']:.1f}, {row[part]['flagged']}"
                for part in PARTS
            ),
            f"{row['visits']:,}",
            f"{row['seconds']:.0f} s",
            " / ".join(f"{value:.1f}" for value in row["paper"]),
        ]
        for row in found["rows"]
        if row["updates"] == max(found["updates"])
    ]
    head = [
        "updates", f"log p(x), flagged of {found['num_test']}: train", "test", "samples seen",
        "CPU", "paper, 60M samples: train / test",
    ]  # fmt: skip
    return table(head, rows)


def aevb_bound(report: dict[str, Any]) -> str:
    """`benchmarks.aevb_bound`: the best test bounds of figure 2 of Kingma & Welling 2013."""
    found = report["results"]["rows"]
    by_method: dict[str, list[str]] = {}
    for row in found:
        by_method.setdefault(row["method"], []).append(f"{max(row['test']):.1f}")
    paper = {row["latent"]: f"{row['paper']:.1f}" for row in found}
    rows = [[method, *bounds] for method, bounds in by_method.items()]
    rows.append(["AEVB of the paper, 10^8 samples", *paper.values()])
    seen = max(max(row["samples"]) for row in found)
    return table([f"{seen:,} samples seen", *(f"{latent} latents" for latent in paper)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(text: str) -> str:
    """The text with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(2)
        make: Callable[[dict[str, Any]], str] = globals()[name]
        report = json.loads((RESULTS / f"{SOURCES.get(name, name)}.json").read_text())
        return match.group(1) + make(report) + match.group(3)

    return MARKED.sub(fill, text)


def main() -> None:
    """Rewrite the READMEs, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    rendered = {path: render(path.read_text()) for path in READMES}
    changed = [path for path, text in rendered.items() if text != path.read_text()]
    if check:
        sys.exit(bool(changed))
    for path in changed:
        path.write_text(rendered[path])


if __name__ == "__main__":
    main()
