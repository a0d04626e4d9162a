"""How fast log p(x) is, beside the obvious ways to it and the limit that the decoder sets.

    python -m benchmarks.evidence

A 784-200-200-50 tanh VAE with binary data, float32, on the CPU or, with --device cuda, the GPU. The
ways to the same importance-sampled log p(x) take turns within one process: microseconds a (datum,
draw) pair, medians over rounds, each also as a multiple of the decoder's bare matrix products (by
PyTorch's own product) in the same round. The last rows are the peak memory of whole evaluations,
each in a process of its own. pythae takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import report

COMMAND = "python -m benchmarks.evidence"
LATENT, HIDDEN, PIXELS = 50, [200, 200], 784


def make_vae(device: str) -> pv.VAE:
    """The VAE, at its initial weights: speed does not depend on them."""
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENT),
        likelihood=pv.likelihoods.Bernoulli(pv.networks.MLP(LATENT, HIDDEN, PIXELS)),
        posterior=pv.posteriors.DiagonalNormal(pv.networks.MLP(PIXELS, HIDDEN, 2 * LATENT)),
    ).to(device)


@torch.no_grad()
def bare_products(vae: pv.VAE, x: Tensor, num_samples: int) -> None:
    """The decoder's matrix products and nothing else: the limit."""
    layers = [m for m in vae.likelihood.modules() if isinstance(m, nn.Linear)]
    z = torch.randn(num_samples, LATENT, device=x.device)
    for _ in x:
        h = z
        for layer in layers:
            h = nn.functional.linear(h, layer.weight, layer.bias)


def ours(vae: pv.VAE, x: Tensor, num_samples: int) -> None:
    """`log_marginal` with its defaults."""
    pv.log_marginal(vae.model, vae.guide, x, num_samples=num_samples, progress=False)


@torch.no_grad()
def plain_pytorch(vae: pv.VAE, x: Tensor, num_samples: int) -> None:
    """What one writes by hand: encode once, a datum's draws at a time, cross entropy."""
    encoder, decoder = vae.posterior.network, vae.likelihood.network
    loc, log_variance = encoder(x).chunk(2, -1)
    for x_n, loc_n, log_variance_n in zip(x, loc, log_variance, strict=True):
        q = torch.distributions.Normal(loc_n, (0.5 * log_variance_n).exp())
        z = q.sample((num_samples,))
        reconstruction = -nn.functional.binary_cross_entropy_with_logits(
            decoder(z), x_n.expand(num_samples, -1), reduction="none"
        ).sum(-1)
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        (reconstruction + log_prior - q.log_prob(z).sum(-1)).logsumexp(0)


@torch.no_grad()
def pyro_weights(vae: pv.VAE, x: Tensor, num_samples: int) -> None:
    """Pyro's `vectorized_importance_weights`, a datum at a time since it adds up over data."""
    with pyro.get_param_store().scope():
        for n in range(len(x)):
            log_w, _, _ = vectorized_importance_weights(
                vae.model, vae.guide, x[n : n + 1], num_samples=num_samples, max_plate_nesting=1
            )
            log_w.logsumexp(0)


def pythae_nll(vae: pv.VAE, x: Tensor, num_samples: int) -> None:
    """pythae's `VAE.get_nll` with networks of the same sizes."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.posterior.network

        def forward(self, x: Tensor) -> Any:
            loc, log_variance = self.net(x.reshape(len(x), -1)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.likelihood.network

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid().reshape(-1, 1, 28, 28))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder()).to(x.device)
    with torch.no_grad():
        model.get_nll(x.reshape(-1, 1, 28, 28), n_samples=num_samples, batch_size=num_samples)


WAYS: dict[str, Callable[[pv.VAE, Tensor, int], None]] = {
    "bare decoder products": bare_products,
    "pyro_vae.log_marginal": ours,
    "plain PyTorch": plain_pytorch,
    "Pyro's importance weights": pyro_weights,
    "pythae's get_nll": pythae_nll,
}


def race(device: str, num_data: int, num_samples: int, rounds: int) -> dict[str, Any]:
    """Microseconds a pair and the ratio to the bare products, medians over rounds."""
    vae = make_vae(device)
    x = (torch.rand(num_data, PIXELS, device=device) < 0.3).float()
    ways = dict(WAYS)
    if importlib.util.find_spec("pythae") is None:
        del ways["pythae's get_nll"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way(vae, x, num_samples)
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - started) / x.shape[0] / num_samples)
    limit = times["bare decoder products"]
    return {
        name: {
            "microseconds": 1e6 * statistics.median(seconds),
            "times_the_limit": statistics.median(
                s / bare for s, bare in zip(seconds, limit, strict=True)
            ),
        }
        for name, seconds in times.items()
    }


def memory(num_data: int, num_samples: int) -> float:
    """Peak memory in MB of a process that evaluates so many data with so many draws."""
    code = (
        f"from benchmarks.evidence import evaluate_alone; evaluate_alone({num_data}, {num_samples})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def evaluate_alone(num_data: int, num_samples: int) -> None:
    """Evaluate in this process and print its peak memory, MB."""
    x = (torch.rand(num_data, PIXELS) < 0.3).float()
    ours(make_vae("cpu"), x, num_samples)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(device: str, num_data: int, num_samples: int, rounds: int) -> None:
    """Race, weigh, print, write."""
    results: dict[str, Any] = {
        "protocol": f"784-200-200-50 tanh, {num_data} data x {num_samples} draws, {rounds} rounds",
        "speed": race(device, num_data, num_samples, rounds),
    }
    print(results["protocol"])
    for name, row in results["speed"].items():
        print(f"{name:<28}{row['microseconds']:>9.2f} µs a pair{row['times_the_limit']:>8.2f}x")
    sizes = [(20, 500), (20, 5000), (200, 500), (1000, 100)] if device == "cpu" else []
    results["peak_memory_mb"] = [
        {"num_data": n, "num_samples": k, "megabytes": memory(n, k)} for n, k in sizes
    ]
    for row in results["peak_memory_mb"]:
        print(f"{row['num_data']:>6} x {row['num_samples']:<6}{row['megabytes']:>8.0f} MB at most")
    name = "evidence" if device == "cpu" else "evidence_cuda"
    report.write(name, COMMAND, results, draw(results["speed"]))


def draw(speed: dict[str, Any]) -> Figure:
    """A bar for every way."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(speed), [row["microseconds"] for row in speed.values()])
    axes.bar_label(bars, [f"{row['times_the_limit']:.2f}x" for row in speed.values()], padding=3)
    axes.set(xlabel="µs a (datum, draw) pair; multiple of the limit")
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-data", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.device, options.num_data, options.num_samples, options.rounds)
