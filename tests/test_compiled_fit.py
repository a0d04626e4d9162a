"""`fit(compile=...)`: the same draws and the same weights as without, or a word on why not."""

import shutil

import pytest
import torch
from training_helpers import binary_data, small_vae

import pyro_vae as pv
from pyro_vae.errors import CompileError
from pyro_vae.schedules import Warmup


class Peeking(pv.likelihoods.Bernoulli):
    """What it does depends on a value, which no graph can hold."""

    def forward(self, z, context=None):
        return super().forward(z if z.sum() > 0 else -z, context)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
def test_compiled_training_ends_at_the_eager_weights() -> None:
    runs = []
    for compile in (False, True):
        vae = small_vae()
        run = pv.fit(
            vae, binary_data(dynamic=True), epochs=4, batch_size=20, kl_schedule=Warmup(6),
            objective=pv.ELBO(kl="analytic"), compile=compile, device="cpu",
        )  # fmt: skip
        runs.append((vae.state_dict(), run.metrics))
    (eager, eager_rows), (fused, fused_rows) = runs
    for name, value in eager.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-9, atol=1e-11)
    for row, other in zip(eager_rows, fused_rows, strict=True):
        assert other["valid_elbo"] == pytest.approx(row["valid_elbo"], rel=1e-9)


def test_what_cannot_be_compiled_is_an_error_or_a_warning() -> None:
    vae = small_vae()
    vae.model.likelihood = Peeking(vae.likelihood.network)
    options = {"epochs": 1, "batch_size": 20, "device": "cpu"}
    with pytest.raises(CompileError):
        pv.fit(vae, binary_data(), compile=True, **options)
    with pytest.warns(UserWarning, match="without compiling"):
        pv.fit(vae, binary_data(), compile="auto", **options)
