"""The models of `benchmarks.train_step` in NumPyro, in a process of its own.

    python benchmarks/step_numpyro.py NAME

Answers each line `update N` or `fori_loop N` on standard input with the seconds that N steps took.
It imports nothing of this project, so that no PyTorch is in its process.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

PIXELS = 784


def network(name: str, x: Any, sizes: list[int]) -> Any:
    """Affine maps with tanh between them, initialised as torch.nn.Linear is."""
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        bound = 1 / np.sqrt(a)
        w = numpyro.param(f"{name}.w{i}", lambda key, a=a, b=b, s=bound: jax.random.uniform(
            key, (a, b), minval=-s, maxval=s))  # fmt: skip
        bias = numpyro.param(f"{name}.b{i}", jnp.zeros(b))
        x = x @ w + bias
        if i < len(sizes) - 2:
            x = jnp.tanh(x)
    return x


def vae(hidden: list[int], latent: int, batch: int, loss: Any) -> tuple[Any, ...]:
    """Model, guide, loss and data."""
    x = (np.random.default_rng(0).random((batch, PIXELS)) < 0.3).astype(np.float32)

    def model(x: Any) -> None:
        with numpyro.plate("data", batch):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = network("decoder", z, [latent, *reversed(hidden), PIXELS])
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_variance = jnp.split(
            network("encoder", x, [PIXELS, *hidden, 2 * latent]), 2, axis=-1
        )
        with numpyro.plate("data", batch):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    return model, guide, loss, (jnp.asarray(x),)


def regression() -> tuple[Any, ...]:
    """Bayesian regression with an AutoNormal guide."""
    random = np.random.default_rng(0)
    x = random.standard_normal((500, 10)).astype(np.float32)
    y = (x.sum(-1) + random.standard_normal(500)).astype(np.float32)

    def model(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Normal(jnp.zeros(10), 1.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 10.0))
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ weight + bias, noise), obs=y)

    return model, AutoNormal(model), Trace_ELBO(), (jnp.asarray(x), jnp.asarray(y))


MODELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "MLP 784-400-20, batch 128": lambda: vae([400], 20, 128, TraceMeanField_ELBO()),
    "IWAE 784-200-200-50, batch 20, k = 1": lambda: vae([200, 200], 50, 20, Trace_ELBO()),
    "IWAE 784-200-200-50, batch 20, k = 50": lambda: vae(
        [200, 200], 50, 20, RenyiELBO(alpha=0.0, num_particles=50)
    ),
    "Bayesian regression, AutoNormal": regression,
}


def main() -> None:
    """Compile both ways of stepping, then time on demand."""
    model, guide, loss, args = MODELS[sys.argv[1]]()
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    state = svi.init(jax.random.key(0), *args)
    update = jax.jit(svi.update)
    loop = jax.jit(
        lambda state, n: lax.fori_loop(0, n, lambda _, s: svi.update(s, *args)[0], state)
    )
    state, value = update(state, *args)
    jax.block_until_ready((loop(state, 2), value))
    print("ready", flush=True)
    for line in sys.stdin:
        way, n = line.split()
        start = time.perf_counter()
        if way == "update":
            for _ in range(int(n)):
                state, value = update(state, *args)
                float(value)
        else:
            state = jax.block_until_ready(loop(state, int(n)))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
