"""Analytic KL against Monte Carlo KL: gradient noise, time, and what training ends with.

    python -m benchmarks.kl_estimators                  # digits, minutes
    PYRO_VAE_DATA=... python -m benchmarks.kl_estimators --data mnist

Same model, data, seeds and batches for every estimator. Three studies:

1. noise: variance and bias of the gradient by group of parameters and by latent dimension, at
   the start, in the middle and at the end of training, with 1, 5 and 50 particles, by size of the
   latent space and of the batch; against the exact gradient (linear decoder) or that of 10,000
   particles. With `--data digits` only.
2. time: a compiled step of each estimator, all taken in turn.
3. training: ELBO and importance-sampled log p(x) of validation data through training, over seeds,
   with N(0, I) and with a VampPrior (which has no analytic KL), and the time to a given ELBO.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv
from benchmarks import report
from benchmarks.gradient_noise import (
    Reference,
    dimensions_of_head,
    draw_gradients,
    exact,
    linear_elbo,
    long_run,
    noise,
    parameter_groups,
    squared_norm,
)
from pyro_vae.objectives import Objective
from pyro_vae.seeding import derive, seeded

ESTIMATORS: dict[str, Callable[[int], Objective]] = {
    "analytic": lambda k: pv.ELBO(kl="analytic", num_particles=k),
    "monte_carlo": lambda k: pv.ELBO(kl="monte_carlo", num_particles=k),
    "stl": lambda k: pv.ELBO(kl="monte_carlo", gradient="stl", num_particles=k),
}
STAGES = {"start": 0, "middle": 5, "end": 200}
# no analytic KL exists for a VampPrior
CONFIGURATIONS = [
    (prior, name)
    for prior in ("normal", "vamp")
    for name in ESTIMATORS
    if (prior, name) != ("vamp", "analytic")
]
COLORS = {"analytic": "C0", "monte_carlo": "C1", "stl": "C2"}


def make_vae(data: pv.Data, latent: int, hidden: Sequence[int], seed: int, prior: str = "normal",
             linear: bool = False) -> pv.VAE:  # fmt: skip
    """A VAE on this data: Bernoulli MLP, or a linear decoder with a Normal likelihood."""
    with seeded(derive(seed, 0)):
        posterior = pv.posteriors.DiagonalNormal(pv.networks.MLP(data.features, hidden, 2 * latent))
        if linear:
            likelihood: Any = pv.likelihoods.Normal(pv.networks.MLP(latent, [], data.features), 0.5)
        else:
            likelihood = pv.likelihoods.Bernoulli(
                pv.networks.MLP(latent, list(reversed(hidden)), data.features)
            )
        vamp = prior == "vamp"
        p = (
            pv.priors.VampPrior(posterior, 100, data.train.fixed().x)
            if vamp
            else pv.priors.StandardNormal(latent)
        )
    likelihood.initialize(data.train_mean())
    return pv.VAE(p, likelihood, posterior)


def stages(data: pv.Data, latent: int, linear: bool) -> Iterator[tuple[str, pv.VAE]]:
    """A VAE at the start, in the middle and at the end of its training."""
    vae = make_vae(data, latent, [64], seed=1, linear=linear)
    done = 0
    for stage, epochs in STAGES.items():
        if epochs > done:
            pv.fit(vae, data, objective=pv.ELBO(), epochs=epochs - done, seed=epochs)
            done = epochs
        yield stage, vae


def noise_study(data: pv.Data, draws: int, repeats: int) -> list[dict[str, Any]]:
    """Study 1: a row for every setting, estimator and group."""
    rows: list[dict[str, Any]] = []
    settings = [(linear, latent, 64) for linear in (True, False) for latent in (2, 10, 32)]
    settings += [(False, 10, batch) for batch in (8, 512)]
    for linear, latent, batch in settings:
        x = data.train.fixed().x[:batch]
        for stage, vae in stages(data, latent, linear):
            where = {"decoder": "linear" if linear else "mlp", "latent": latent, "batch": batch,
                     "stage": stage}  # fmt: skip
            references, found = draws_at(vae, x, linear, draws, repeats)
            scale = squared_norm(references)
            for how, samples in found:
                for group, reference in references.items():
                    measured = noise(samples[group], reference, scale)
                    rows.append(where | how | {"group": group} | vars(measured))
            print(f"noise: {where}")
    return rows


def dimension_study(data: pv.Data, draws: int, repeats: int) -> list[dict[str, Any]]:
    """Study 1 by latent dimension, beside its KL: noise of the encoder's last layer."""
    rows: list[dict[str, Any]] = []
    x = data.train.fixed().x[:64]
    for linear in (True, False):
        for stage, vae in stages(data, 10, linear):
            where = {"decoder": "linear" if linear else "mlp", "stage": stage}
            with torch.no_grad():
                kl = pv.ELBO().terms(vae.model, vae.guide, x).kl_per_dimension["z"] / len(x)
            references, found = draws_at(vae, x, linear, draws, repeats)
            head, scale = references["encoder head"], squared_norm(references)
            for how, samples in found:
                for j, own in enumerate(dimensions_of_head(vae)):
                    measured = noise(samples["encoder head"][:, own], head[own], scale)
                    rows.append(where | how | {"dimension": j, "kl": kl[j].item()} | vars(measured))
            print(f"by dimension: {where}")
    return rows


def draws_at(
    vae: pv.VAE, x: Tensor, linear: bool, draws: int, repeats: int
) -> tuple[dict[str, Reference], Iterator[tuple[dict[str, Any], dict[str, Tensor]]]]:
    """The gradient to compare with, and the gradients that each estimator draws."""
    groups = parameter_groups(vae)
    if linear:
        references = exact(linear_elbo(vae, x), groups)
    else:
        references = long_run(ESTIMATORS["analytic"](100), vae, x, groups, repeats, seed=7)

    def found() -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        for name, make in ESTIMATORS.items():
            for particles in (1, 5, 50):
                objective = make(particles)
                few = max(20, draws // particles)

                def loss(objective: Objective = objective) -> Tensor:
                    return objective.differentiable_loss(vae.model, vae.guide, x) / len(x)

                how = {"estimator": name, "particles": particles, "draws": few}
                yield how, draw_gradients(loss, groups, few, seed=11)

    return references, found()


def time_study(
    data: pv.Data, latent: int, hidden: Sequence[int], steps: int
) -> dict[str, dict[str, float]]:
    """Study 2: milliseconds a compiled step, as training takes them, by prior and estimator, all
    in turn, medians."""
    x = data.train.fixed().x[:128]
    runs = {}
    for prior, name in CONFIGURATIONS:
        vae = make_vae(data, latent, hidden, 0, prior)
        optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
        runs[prior, name] = pv.CompiledSVI(vae.model, vae.guide, optimizer, ESTIMATORS[name](1))
        runs[prior, name].step(x)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(steps):
        for key, svi in runs.items():
            started = time.perf_counter()
            svi.step(x)
            seconds[key].append(time.perf_counter() - started)
    table: dict[str, dict[str, float]] = {}
    for (prior, name), times in seconds.items():
        table.setdefault(prior, {})[name] = 1e3 * statistics.median(times)
    return table


def training_study(
    data: pv.Data, latent: int, hidden: Sequence[int], epochs: int, every: int, seeds: int
) -> list[dict[str, Any]]:
    """Study 3: a row for every prior, estimator and seed, with its curves."""
    assert data.valid is not None
    held_out = data.valid.fixed()[:500]
    # over the first fifth of training: without a warm-up a VampPrior of few data collapses
    warmup = epochs * -(-len(data.train) // 128) // 5
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for prior, name in CONFIGURATIONS:
            vae = make_vae(data, latent, hidden, seed, prior)
            run = pv.fit(
                vae, data, objective=ESTIMATORS[name](1), epochs=epochs, seed=seed,
                kl_schedule=pv.schedules.Warmup(warmup),
                trackers=[pv.track_log_px(vae, held_out, every)], compile=True,
            )  # fmt: skip
            runs.append({
                "prior": prior, "estimator": name, "seed": seed,
                "steps": [r["step"] for r in run.metrics],
                "valid_elbo": [r["valid_elbo"] for r in run.metrics],
                "valid_log_px": {
                    int(r["epoch"]): r["valid_log_px"] for r in run.metrics if "valid_log_px" in r
                },
            })  # fmt: skip
            print(f"training: {prior}, {name}, seed {seed}: log p(x) {_final(runs[-1]):.3f}")
    return runs


def summarise(
    runs: list[dict[str, Any]], milliseconds: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Final log p(x) of each estimator over seeds, its paired difference from Monte Carlo, and
    the time to an ELBO that all reach: steps, times the time of a step."""
    rows = []
    for prior, name in CONFIGURATIONS:
        mine = [r for r in runs if r["prior"] == prior]
        target = min(max(r["valid_elbo"]) for r in mine) - 0.25
        chosen = [r for r in mine if r["estimator"] == name]
        final = torch.tensor([_final(r) for r in chosen])
        base = torch.tensor([_final(r) for r in mine if r["estimator"] == "monte_carlo"])
        gain = final - base
        steps = [_steps_to(r, target) for r in chosen]
        n = len(final)
        rows.append({
            "prior": prior, "estimator": name, "seeds": n,
            "log_px": final.mean().item(), "sd": final.std().item(),
            "gain_over_monte_carlo": gain.mean().item(),
            "gain_se": (gain.std() / n**0.5).item(),
            "target_elbo": target, "steps_to_target": steps,
            "seconds_to_target": statistics.mean(steps) * milliseconds[prior][name] / 1e3,
        })  # fmt: skip
    return rows


def _final(run: dict[str, Any]) -> float:
    return run["valid_log_px"][max(run["valid_log_px"])]


def _steps_to(run: dict[str, Any], target: float) -> float:
    """The step at which the validation ELBO reaches a target, between epochs by the straight line.

    The target lies below the best ELBO of every run, so that each reaches it.
    """
    before = (0.0, -float("inf"))
    for step, elbo in zip(run["steps"], run["valid_elbo"], strict=True):
        if elbo >= target:
            share = (target - before[1]) / (elbo - before[1]) if before[0] else 1.0
            return before[0] + share * (step - before[0])
        before = (step, elbo)
    raise ValueError(f"the ELBO never reached {target}")


def draw(results: dict[str, Any], title: str) -> Figure:
    """Gradient variance by stage and by dimension, where it was studied, and log p(x) through
    training."""
    panels = [(_draw_curves, "normal"), (_draw_curves, "vamp")]
    if "noise" in results:
        panels = [(_draw_stages, ""), (_draw_dimensions, ""), *panels]
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    for axes, (panel, prior) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, results, prior, title)
        axes.legend(fontsize=6)
    return figure


def _draw_stages(axes: Axes, results: dict[str, Any], *_: str) -> None:
    chosen = [
        r for r in results["noise"]
        if r["decoder"] == "mlp" and r["batch"] == 64 and r["particles"] == 1
    ]  # fmt: skip
    for latent, marker in ((2, "o"), (10, "s"), (32, "^")):
        for name, color in COLORS.items():
            y = [
                sum(r["variance"] for r in chosen
                    if (r["latent"], r["estimator"], r["stage"]) == (latent, name, stage))
                for stage in STAGES
            ]  # fmt: skip
            axes.plot(list(STAGES), y, marker + "-", color=color, label=f"{name}, {latent} latents")
    axes.set(yscale="log", ylabel="gradient variance / |exact gradient|²", title="noise of a draw")


def _draw_dimensions(axes: Axes, results: dict[str, Any], *_: str) -> None:
    for stage, marker in (("start", "o"), ("end", "s")):
        for name, color in COLORS.items():
            chosen = [
                r for r in results["by_dimension"]
                if (r["decoder"], r["stage"], r["estimator"], r["particles"])
                == ("mlp", stage, name, 1)
            ]  # fmt: skip
            axes.plot(
                [r["kl"] for r in chosen], [r["variance"] for r in chosen],
                marker, color=color, label=f"{name}, {stage}",
            )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="KL of the latent dimension, nats",
        ylabel="variance of its mean's and log-variance's gradient", title="by latent dimension",
    )  # fmt: skip


def _draw_curves(axes: Axes, results: dict[str, Any], prior: str, title: str) -> None:
    for name, color in COLORS.items():
        mine = [r for r in results["training"] if (r["prior"], r["estimator"]) == (prior, name)]
        if not mine:
            continue
        epochs = list(mine[0]["valid_log_px"])
        curves = torch.tensor([list(r["valid_log_px"].values()) for r in mine])
        mean, sd = curves.mean(0), curves.std(0)
        axes.plot(epochs, mean, color=color, label=name)
        axes.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2)
    axes.set(xlabel="epoch", ylabel="validation log p(x), nats", title=f"{title}, {prior} prior")


def main() -> None:
    """Run the studies and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=["training", "noise", "dimensions", "time"],
        help="repeat these studies and keep the others, with where they come from",
    )  # fmt: skip
    options = parser.parse_args()
    if options.data == "digits":
        data = pv.datasets.load("digits", binarize="dynamic")
        latent, hidden, epochs, every = 10, [128], 200, 10
    else:
        data = pv.datasets.load("mnist", binarize="dynamic")
        latent, hidden, epochs, every = 50, [200, 200], 20, 2
    studies: dict[str, tuple[str, Callable[[], Any]]] = {
        "training": (
            "training", lambda: training_study(data, latent, hidden, epochs, every, options.seeds)
        ),
        "time": ("milliseconds_a_step", lambda: time_study(data, latent, hidden, steps=300)),
    }  # fmt: skip
    if options.data == "digits":
        studies["noise"] = "noise", lambda: noise_study(data, draws=200, repeats=100)
        studies["dimensions"] = "by_dimension", lambda: dimension_study(data, 200, repeats=100)

    name = f"kl_estimators_{options.data}"
    made_by = report.provenance(f"python -m benchmarks.kl_estimators --data {options.data}")
    held = report.read(name) if options.only else {"studies": {}, "results": {}}
    sources, results = held["studies"], held["results"]
    for study, (key, measure) in studies.items():
        if options.only is None or study in options.only:
            sources[key], results[key] = made_by, measure()
    for run in results["training"]:  # JSON makes text of the epochs
        run["valid_log_px"] = {int(e): value for e, value in run["valid_log_px"].items()}
    results["summary"] = summarise(results["training"], results["milliseconds_a_step"])
    for row in results["summary"]:
        print(row)
    print(results["milliseconds_a_step"])
    report.write_studies(name, sources, results, draw(results, options.data))


if __name__ == "__main__":
    main()
