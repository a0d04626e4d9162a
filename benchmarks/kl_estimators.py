"""Analytic KL against Monte Carlo KL: gradient noise, time, and what training ends with.

    python -m benchmarks.kl_estimators                  # digits, minutes
    PYRO_VAE_DATA=... python -m benchmarks.kl_estimators --data mnist

Same model, data, seeds and batches for every estimator. Three studies:

1. noise: variance and bias of the gradient by group of parameters and by latent dimension, at
   the start, in the middle and at the end of training, with 1, 5 and 50 particles, by size of the
   latent space and of the batch; against the exact gradient (linear decoder) or that of 10,000
   particles.
2. time: a step of each estimator, all taken in turn.
3. training: ELBO and importance-sampled log p(x) of validation data through training, over seeds,
   with N(0, I) and with a VampPrior (which has no analytic KL), and the time to a given ELBO.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv
from benchmarks import report
from benchmarks.gradient_noise import (
    exact,
    linear_elbo,
    long_run,
    measure,
    parameter_groups,
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


def noise_study(data: pv.Data, draws: int, repeats: int) -> list[dict[str, Any]]:
    """Study 1: a row for every setting, estimator and group."""
    rows: list[dict[str, Any]] = []
    settings = [(linear, latent, 64) for linear in (True, False) for latent in (2, 10, 32)]
    settings += [(False, 10, batch) for batch in (8, 512)]
    for linear, latent, batch in settings:
        vae = make_vae(data, latent, [64], seed=1, linear=linear)
        x = data.train.fixed().x[:batch]
        done = 0
        for stage, epochs in STAGES.items():
            if epochs > done:
                pv.fit(vae, data, objective=pv.ELBO(), epochs=epochs - done, seed=epochs)
                done = epochs
            where = {"decoder": "linear" if linear else "mlp", "latent": latent, "batch": batch,
                     "stage": stage}  # fmt: skip
            rows += [where | row for row in _noise_at(vae, x, linear, draws, repeats)]
            print(f"noise: {where}")
    return rows


def _noise_at(
    vae: pv.VAE, x: Tensor, linear: bool, draws: int, repeats: int
) -> list[dict[str, Any]]:
    groups = parameter_groups(vae)
    if linear:
        references = exact(linear_elbo(vae, x), groups)
    else:
        references = long_run(ESTIMATORS["analytic"](100), vae, x, groups, repeats, seed=7)
    rows = []
    for name, make in ESTIMATORS.items():
        for particles in (1, 5, 50):
            objective = make(particles)
            few = max(20, draws // particles)

            def loss(objective: Objective = objective) -> Tensor:
                return objective.differentiable_loss(vae.model, vae.guide, x) / len(x)

            for group, noise in measure(loss, groups, references, few, seed=11).items():
                rows.append({
                    "estimator": name, "particles": particles, "group": group, "draws": few,
                    "variance": noise.variance, "bias_z": noise.bias_z,
                })  # fmt: skip
    return rows


def dimension_study(data: pv.Data, draws: int) -> list[dict[str, Any]]:
    """Variance of the gradient of each latent mean and log-variance, beside the dimension's KL."""
    latent = 10
    vae = make_vae(data, latent, [64], seed=1)
    pv.fit(vae, data, objective=pv.ELBO(), epochs=STAGES["end"], seed=1)
    x = data.train.fixed().x[:64]
    with torch.no_grad():
        kl = pv.ELBO().terms(vae.model, vae.guide, x).kl_per_dimension["z"] / len(x)
    bias = parameter_groups(vae)["encoder head"][-1]
    rows: list[dict[str, Any]] = []
    for name, make in ESTIMATORS.items():
        objective = make(1)
        samples = []
        for i in range(draws):
            with seeded(derive(3, i)):
                loss = objective.differentiable_loss(vae.model, vae.guide, x) / len(x)
            samples.append(torch.autograd.grad(loss, bias)[0])
        mean_variance, log_variance_variance = torch.stack(samples).var(0).chunk(2)
        rows += [
            {"estimator": name, "dimension": j, "kl": kl[j].item(),
             "variance_of_mean": mean_variance[j].item(),
             "variance_of_log_variance": log_variance_variance[j].item()}
            for j in range(latent)
        ]  # fmt: skip
    return rows


def time_study(
    data: pv.Data, latent: int, hidden: Sequence[int], steps: int
) -> dict[str, dict[str, float]]:
    """Study 2: milliseconds a step by prior and estimator, all in turn, medians."""
    x = data.train.fixed().x[:128]
    runs = {}
    for prior, name in CONFIGURATIONS:
        vae = make_vae(data, latent, hidden, 0, prior)
        runs[prior, name] = (vae, torch.optim.Adam(vae.parameters(), 1e-3, fused=True))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(steps):
        for key, (vae, optimizer) in runs.items():
            objective = ESTIMATORS[key[1]](1)
            started = time.perf_counter()
            optimizer.zero_grad()
            objective.differentiable_loss(vae.model, vae.guide, x).backward()
            optimizer.step()
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


def draw(noise: list[dict[str, Any]], runs: list[dict[str, Any]], title: str) -> Figure:
    """Gradient variance by stage, and log p(x) through training."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    chosen = [
        r for r in noise if r["decoder"] == "mlp" and r["batch"] == 64 and r["particles"] == 1
    ]
    for latent, marker in ((2, "o"), (10, "s"), (32, "^")):
        for name, color in COLORS.items():
            y = [
                sum(r["variance"] for r in chosen
                    if (r["latent"], r["estimator"], r["stage"]) == (latent, name, stage))
                for stage in STAGES
            ]  # fmt: skip
            left.plot(list(STAGES), y, marker + "-", color=color, label=f"{name}, {latent} latents")
    left.set(yscale="log", ylabel="gradient variance / |exact gradient|²", title="noise of a draw")
    left.legend(fontsize=6)
    for axes, prior in ((middle, "normal"), (right, "vamp")):
        for name, color in COLORS.items():
            mine = [r for r in runs if r["prior"] == prior and r["estimator"] == name]
            if not mine:
                continue
            epochs = list(mine[0]["valid_log_px"])
            curves = torch.tensor([list(r["valid_log_px"].values()) for r in mine])
            mean, sd = curves.mean(0), curves.std(0)
            axes.plot(epochs, mean, color=color, label=name)
            axes.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2)
        axes.set(
            xlabel="epoch", ylabel="validation log p(x), nats", title=f"{title}, {prior} prior"
        )
        axes.legend()
    return figure


def main() -> None:
    """Run the studies and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--retime", action="store_true", help="repeat study 2 only (on a quiet machine)"
    )
    options = parser.parse_args()
    digits = pv.datasets.load("digits", binarize="dynamic")
    if options.data == "digits":
        data, latent, hidden, epochs, every = digits, 10, [128], 200, 10
    else:
        data = pv.datasets.load("mnist", binarize="dynamic")
        latent, hidden, epochs, every = 50, [200, 200], 20, 2
    name = f"kl_estimators_{options.data}"
    if options.retime:
        found = report.read(name)["results"]
        for run in found["training"]:  # JSON has made text of the epochs
            run["valid_log_px"] = {int(e): value for e, value in run["valid_log_px"].items()}
    else:
        found = {
            "training": training_study(data, latent, hidden, epochs, every, options.seeds),
            "noise": noise_study(digits, draws=200, repeats=100),
            "by_dimension": dimension_study(digits, draws=500),
        }
    milliseconds = time_study(data, latent, hidden, steps=300)
    summary = summarise(found["training"], milliseconds)
    results = {**found, "milliseconds_a_step": milliseconds, "summary": summary}
    for row in summary:
        print(row)
    print(milliseconds)
    command = f"python -m benchmarks.kl_estimators --data {options.data}"
    report.write(name, command, results, draw(found["noise"], found["training"], options.data))


if __name__ == "__main__":
    main()
