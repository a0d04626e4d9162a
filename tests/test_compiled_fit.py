"""`fit(compile=...)`: the same draws and the same weights as without, or a word on why not."""

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import binary, binary_data, identical, small_vae, without_time

import pyro_vae as pv
from pyro_vae.compiled import backend, step
from pyro_vae.compiled.replay import Replayed
from pyro_vae.errors import CompileError, NonFiniteError
from pyro_vae.schedules import Warmup
from pyro_vae.training.loop import Loop


class Peeking(pv.likelihoods.Bernoulli):
    """What it does depends on a value, which no graph can hold."""

    def forward(self, z, context=None):
        return super().forward(z if z.sum() > 0 else -z, context)


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
    with pytest.warns(UserWarning, match="without compiling") as told:
        pv.fit(vae, binary_data(), compile="auto", **options)
    assert sum("without compiling" in str(warning.message) for warning in told) == 1


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run operation by operation, which needs no compiler and no time."""
    monkeypatch.setattr(backend, "inductor", lambda graph, _: graph)


@pytest.mark.usefixtures("interpreted")
class TestOneGraphAStep:
    @pytest.mark.parametrize(
        "options",
        [
            {"gradient_clip": 0.5},
            {"gradient_clip": 1e-4, "kl_schedule": Warmup(6)},
            {"optimizer": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.5)},
            {"optimizer": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)},
            {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.3)},
            {"objective": pv.IWAE(3, "dreg"), "precision": "64-true"},
        ],
        ids=["clip", "clip hard", "AdamW", "SGD", "scheduler", "IWAE"],
    )
    def test_it_ends_at_the_eager_weights(self, options: dict[str, Any]) -> None:
        runs = []
        for compile in (False, True):
            vae = small_vae()
            run = pv.fit(
                vae, binary_data(dynamic=True), epochs=3, batch_size=20, compile=compile,
                device="cpu", **options,
            )  # fmt: skip
            runs.append((vae.state_dict(), run.metrics))
        (eager, eager_rows), (fused, fused_rows) = runs
        for name, value in eager.items():
            torch.testing.assert_close(fused[name], value, rtol=1e-9, atol=1e-11)
        assert fused_rows[-1]["train_loss"] == pytest.approx(eager_rows[-1]["train_loss"])

    def test_it_resumes_bit_for_bit(self, tmp_path: Path) -> None:
        options = {"batch_size": 20, "compile": True, "device": "cpu", "patience": 9}
        whole = small_vae()
        straight = pv.fit(whole, binary_data(dynamic=True), epochs=4, **options)
        parts = [small_vae(), small_vae(seed=1)]
        out = tmp_path / "run"
        pv.fit(parts[0], binary_data(dynamic=True), epochs=2, out=out, **options)
        run = pv.fit(
            parts[1], binary_data(dynamic=True), epochs=4, out=out, resume=True, **options
        )  # fmt: skip
        assert identical(parts[1], whole)
        assert without_time(run.metrics) == without_time(straight.metrics)

    @pytest.mark.parametrize(
        ("effect", "message"),
        [
            (lambda h, w, sound: h / sound, r"loss became NaN or infinite at step .*site \"z\""),
            (
                lambda h, w, sound: h + (w.square() * sound).sqrt() - w.abs() * sound,
                r'the gradient of "guide.posterior.network.w" became NaN .* though the loss is fin',
            ),
        ],
        ids=["loss", "gradient"],
    )
    def test_what_is_not_finite_reaches_no_weight(
        self, effect: Any, message: str, tmp_path: Path
    ) -> None:
        vae = small_vae()
        vae.posterior.network = Poisoned(vae.posterior.network, effect)
        x = binary(48)
        x[7] = 1.0
        with pytest.raises(NonFiniteError, match=message):
            pv.fit(vae, x, epochs=2, batch_size=8, compile=True, device="cpu", out=tmp_path / "run")
        assert all(p.isfinite().all() for p in vae.parameters())


class PlainWeight(pv.ELBO):
    """An objective of a user's own, whose KL weight is a number."""

    kl_weight = 1.0  # type: ignore[assignment]

    def terms(self, *args: Any, **kwargs: Any) -> Any:
        terms = super().terms(*args, **kwargs)
        return replace(terms, loss=self.kl_weight * terms.kl - terms.reconstruction)


@pytest.mark.usefixtures("interpreted")
def test_a_schedule_of_a_weight_that_is_a_number() -> None:
    states = []
    for compile in (False, True):
        vae = small_vae()
        pv.fit(
            vae, binary_data(), epochs=2, batch_size=20, kl_schedule=Warmup(6), device="cpu",
            objective=PlainWeight(), compile=compile,
        )  # fmt: skip
        states.append(vae.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("interpreted")
def test_log_px_on_the_way_compiles_nothing_anew(caplog: pytest.LogCaptureFixture) -> None:
    vae, x = small_vae(), binary(40, 0)
    with caplog.at_level(logging.INFO, logger="pyro_vae"):
        pv.fit(
            vae, x, epochs=3, batch_size=20, device="cpu", compile=True,
            trackers=[pv.track_log_px(vae, x[:5], every=1, num_samples=10)],
        )  # fmt: skip
    compiled = [m for m in caplog.messages if re.match(r"compiling for .*\(20, ", m)]
    assert len(compiled) == 1


@pytest.mark.usefixtures("interpreted")
def test_on_a_gpu_most_steps_are_taken_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for captured graphs: batches and learning rate change, and a ragged batch
    ends the epoch."""
    eager = small_vae()
    options = {
        "epochs": 2, "batch_size": 20, "device": "cpu",
        "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.3),
    }  # fmt: skip
    data = binary_data(610, dynamic=True)
    pv.fit(eager, data, **options)
    looks: list[bool] = []
    fused_update = Loop._fused_update

    def as_on_a_gpu(self: Loop, batch: Any, look: bool, first: bool) -> bool:
        self.on_cpu = False
        looks.append(first)
        return fused_update(self, batch, first, first)

    monkeypatch.setattr(Loop, "_fused_update", as_on_a_gpu)
    monkeypatch.setattr(step, "Replayed", lambda: Replayed(lambda f, device: f, "cpu"))
    fused = small_vae()
    pv.fit(fused, data, compile=True, **options)
    assert looks.count(False) == 2 * 31 - 2
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-9, atol=1e-11)


class Poisoned(nn.Module):
    """Wraps an encoder; something happens to what it says of a row of ones."""

    def __init__(self, network: nn.Module, effect: Any) -> None:
        super().__init__()
        self.network, self.effect = network, effect
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        sound = (x.mean(-1, keepdim=True) < 1).to(x.dtype)
        return self.effect(self.network(x), self.w, sound)
