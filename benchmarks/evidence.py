"""How fast log p(x) is, beside the obvious ways to it and the limit that the decoder sets.

    PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.evidence

A 784-200-200-50 tanh VAE of binarised MNIST, a few epochs old, in float32, on the CPU or (--device
cuda) the GPU. The ways to log p(x) take turns within one process. Reported are microseconds a
(datum, draw) pair, medians over rounds, each also as a multiple of the decoder's bare matrix
products (by PyTorch's own product) in the same round; and, since fast is worth nothing without
right, the mean squared error against a long annealing run times the seconds a datum took. On one
thread of a CPU the clock is that of the process, which others do not disturb much. pythae takes
part where it is installed. Memory: see `benchmarks.evidence_whole`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks import pythae_peer, report
from benchmarks.mnist import BATCH, LATENT, make_vae
from pyro_vae.evidence import Annealing

COMMAND = "PYRO_VAE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.evidence"
LONG = Annealing(chains=32, temperatures=400, leapfrogs=5)

# what a way returns: log p(x), `(N,)`, or None where it does not tell a datum's
Found = Tensor | None


def make_trained(device: str, epochs: int, num_data: int) -> tuple[pv.VAE, Tensor]:
    """The VAE and some test data."""
    data = pv.datasets.load("mnist", split="burda", binarize="dynamic", seed=0)
    torch.manual_seed(0)
    vae = make_vae(data)
    pv.fit(vae, data, epochs=epochs, batch_size=BATCH, progress=False)
    return vae.to(device).requires_grad_(False), data.test.fixed().x[:num_data].to(device)


def bare_products(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """The decoder's matrix products and nothing else: the limit."""
    layers = [m for m in vae.likelihood.modules() if isinstance(m, nn.Linear)]
    z = torch.randn(num_samples, LATENT, device=x.device)
    for _ in x:
        h = z
        for layer in layers:
            h = nn.functional.linear(h, layer.weight, layer.bias)
    return None


def onednn_products(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """The same by oneDNN, which is the faster library on some processors."""
    layers = [m for m in vae.likelihood.modules() if isinstance(m, nn.Linear)]
    z = torch.randn(num_samples, LATENT)
    for _ in x:
        h = z
        for layer in layers:
            h = torch.ops.mkldnn._linear_pointwise(h, layer.weight, layer.bias, "none", [], "")
    return None


def ours(vae: pv.VAE, x: Tensor, num_samples: int, **options: Any) -> Found:
    """`log_marginal`."""
    found = pv.log_marginal(
        vae.model, vae.guide, x, num_samples=num_samples, progress=False, **options
    )
    return torch.as_tensor(found.log_px)


def ours_auto(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """`log_marginal(method="auto")`, which anneals where weights fail."""
    return ours(vae, x, num_samples, method="auto")


def plain_pytorch(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """What one writes by hand: encode once, a datum's draws at a time, cross entropy."""
    encoder, decoder = vae.posterior.network, vae.likelihood.network
    loc, log_variance = encoder(x).chunk(2, -1)
    log_px = []
    for x_n, loc_n, log_variance_n in zip(x, loc, log_variance, strict=True):
        q = torch.distributions.Normal(loc_n, (0.5 * log_variance_n).exp())
        z = q.sample((num_samples,))
        reconstruction = -nn.functional.binary_cross_entropy_with_logits(
            decoder(z), x_n.expand(num_samples, -1), reduction="none"
        ).sum(-1)
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_w = reconstruction + log_prior - q.log_prob(z).sum(-1)
        log_px.append(log_w.logsumexp(0) - np.log(num_samples))
    return torch.stack(log_px)


def pyro_weights(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """Pyro's `vectorized_importance_weights`, a datum at a time since it adds up over data."""
    log_px = []
    with pyro.get_param_store().scope():
        for n in range(len(x)):
            log_w, _, _ = vectorized_importance_weights(
                vae.model, vae.guide, x[n : n + 1], num_samples=num_samples, max_plate_nesting=1
            )
            log_px.append(log_w.logsumexp(0) - np.log(num_samples))
    return torch.stack(log_px)


def pythae_nll(vae: pv.VAE, x: Tensor, num_samples: int) -> Found:
    """pythae's `VAE.get_nll` with the same networks; it tells the mean over data only."""
    model = pythae_peer.model(vae.posterior.network, vae.likelihood.network, LATENT).to(x.device)
    model.get_nll(pythae_peer.images(x), n_samples=num_samples, batch_size=num_samples)
    return None


BARE = "bare decoder products"
WAYS: dict[str, Callable[[pv.VAE, Tensor, int], Found]] = {
    BARE: bare_products,
    "the same by oneDNN": onednn_products,
    "pyro_vae.log_marginal": ours,
    "plain PyTorch": plain_pytorch,
    "Pyro's importance weights": pyro_weights,
    "pythae's get_nll": pythae_nll,
}


def clock(device: str) -> Callable[[], float]:
    """Processor time on one thread of a CPU, else wall time."""
    return time.process_time if _alone(device) else time.perf_counter


def _alone(device: str) -> bool:
    return device == "cpu" and torch.get_num_threads() == 1


@torch.no_grad()
def race(
    vae: pv.VAE, x: Tensor, truth: pv.Evidence, num_samples: int, rounds: int
) -> dict[str, Any]:
    """Microseconds a pair, the ratio to the bare products, and the error each is worth."""
    ways, now = dict(WAYS), clock(x.device.type)
    if not pythae_peer.is_installed():
        del ways["pythae's get_nll"]
    if x.device.type != "cpu":
        del ways["the same by oneDNN"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = now()
            log_px = way(vae, x, num_samples)
            if x.device.type != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append(now() - started)
                found[name] += [] if log_px is None else [log_px.double().cpu()]
    return {
        name: {
            "microseconds": 1e6 * statistics.median(seconds) / len(x) / num_samples,
            "times_the_limit": statistics.median(
                s / bare for s, bare in zip(seconds, times[BARE], strict=True)
            ),
            **error(found[name], truth, statistics.median(seconds) / len(x)),
        }
        for name, seconds in times.items()
    }


def error(found: list[Tensor], truth: pv.Evidence, seconds: float) -> dict[str, float]:
    """Mean squared error, nats², and that times the seconds a datum took."""
    if not found:
        return {}
    squares = (torch.stack(found) - torch.as_tensor(truth.log_px)).square().mean().item()
    return {"squared_error": squares, "seconds": seconds, "nats2_seconds": squares * seconds}


@torch.no_grad()
def annealed(vae: pv.VAE, x: Tensor, truth: pv.Evidence, num_samples: int) -> dict[str, float]:
    """The same figures of `method="auto"`, which has no draws to count."""
    now = clock(x.device.type)
    started = now()
    log_px = ours_auto(vae, x, num_samples)
    assert log_px is not None
    return error([log_px], truth, (now() - started) / len(x))


def main(device: str, epochs: int, num_data: int, num_samples: int, rounds: int) -> None:
    """Race, weigh, print, write."""
    vae, x = make_trained(device, epochs, num_data)
    truth = pv.log_marginal(
        vae.model, vae.guide, x, method="ais", annealing=LONG, seed=1, progress=False
    )
    results: dict[str, Any] = {
        "protocol": f"784-200-200-50 tanh, MNIST, {epochs} epochs; {num_data} data x {num_samples} "
        f"draws, {rounds} rounds, {'processor' if _alone(device) else 'wall'} time",
        "truth": {"mean": truth.mean, "se_mc": truth.se_mc, "flagged": truth.num_flagged},
        "speed": race(vae, x, truth, num_samples, rounds),
        "auto": annealed(vae, x, truth, num_samples),
    }
    print(results["protocol"])
    for name, row in results["speed"].items():
        worth = f"{row['nats2_seconds']:>9.4f} nats² s" if "nats2_seconds" in row else ""
        print(
            f"{name:<28}{row['microseconds']:>9.2f} µs a pair{row['times_the_limit']:>8.2f}x{worth}"
        )
    print(f"{'log_marginal, auto':<28}{results['auto']['nats2_seconds']:>41.4f} nats² s")
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
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--num-data", type=int, default=10)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.device, options.epochs, options.num_data, options.num_samples, options.rounds)
