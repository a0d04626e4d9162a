"""NaN is never trained through, and the error says where it came from."""

from __future__ import annotations

import re
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_helpers import (
    binary,
    binary_data,
    contents,
    identical,
    in_training,
    intensities,
    normal_vae,
    saved_state,
    small_vae,
)

import pyro_vae as pv
from pyro_vae.errors import DataError, NonFiniteError
from pyro_vae.training.checkpoint import copy_weights
from pyro_vae.training.guard import Interruption


class Switch(nn.Module):
    """Wraps a network; from one training call on, does something to its output."""

    def __init__(self, network: nn.Module, effect: Any, call: int) -> None:
        super().__init__()
        self.network, self.effect, self.call, self.calls = network, effect, call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        out = self.network(x)
        return self.effect(out) if self.calls >= self.call else out


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0] * ctx.factor, None


def fails(vae: Any, data: Any, out: Path, **settings: Any) -> tuple[str, dict[str, Tensor]]:
    """Train until it fails; returns the message, and the weights of the last good checkpoint,
    having seen that it is intact and finite."""
    with pytest.raises(NonFiniteError) as caught:
        pv.fit(vae, data, **{"epochs": 50, "batch_size": 16, "out": out, **settings})
    again = type(vae)(vae.prior, vae.likelihood, vae.posterior)
    pv.load_weights(again, out / "checkpoint.safetensors")
    weights = copy_weights(again)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    state = saved_state(out)
    assert torch.isfinite(state["sums"]).all()
    assert not (out / "model.safetensors").exists()
    message = str(caught.value)
    assert "try a lower learning rate" in message
    assert "step" in message
    return message, weights


def step_of(message: str) -> int:
    found = re.search(r"step (\d+)", message)
    assert found
    return int(found[1])


def test_an_absurd_learning_rate(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    message, _ = fails(
        normal_vae(), intensities(48), tmp_path / "run", learning_rate=1e30, batch_size=16
    )
    assert re.search(r'site "[xz]"|gradient of "|update of step', message)
    assert step_of(message) <= 3


@pytest.mark.parametrize("schedule", [None, pv.schedules.Warmup(20)])
@pytest.mark.parametrize("batches", [100, 102])
def test_a_loss_that_explodes_and_stays_finite_is_warned_of_once(
    batches: int, schedule: Any
) -> None:
    """At the hundredth batch that is worse than the first, and not again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.fit(
            small_vae(), binary(48), epochs=batches, batch_size=48, learning_rate=10.0,
            kl_schedule=schedule,
        )  # fmt: skip
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == (batches > 100)
    for message in messages:
        assert re.match(r"training diverges: 100 batches on end .* Try a lower learn", message)


def test_training_that_gains_and_training_of_the_trained_are_not_warned_of() -> None:
    """Warnings are errors here. The second run begins with a KL weight of 0 where there is nothing
    left to gain, so that its first loss is its least."""
    vae = normal_vae(scale=0.3)
    options = {"batch_size": 48, "epochs": 150}
    pv.fit(vae, intensities(48), learning_rate=0.02, **options)
    schedule = pv.schedules.Warmup(5)
    rows = pv.fit(
        vae, intensities(48), learning_rate=1e-4, kl_schedule=schedule, **options
    ).metrics  # fmt: skip
    assert all(row["train_loss"] > rows[0]["train_loss"] for row in rows[-100:])


def test_a_network_that_divides_by_zero_now_and_then(tmp_path: Path) -> None:
    vae = small_vae()
    vae.likelihood.network = Switch(vae.likelihood.network, lambda h: h / (h - h), call=8)
    message, _ = fails(vae, binary(48), tmp_path / "run")
    assert 'log-density at site "x" of the model is not finite (term: reconstruction)' in message
    assert "at step 8 (epoch 3, batch 2)" in message
    assert saved_state(tmp_path / "run")["step"] == 6


def test_an_encoder_that_divides_by_zero_is_blamed_at_z(tmp_path: Path) -> None:
    vae = small_vae()
    vae.posterior.network = Switch(vae.posterior.network, lambda h: h / 0.0, call=5)
    message, _ = fails(vae, binary(48), tmp_path / "run")
    assert 'the value at site "z" of the guide is not finite (term: KL)' in message
    assert step_of(message) == 5


def test_a_network_that_always_divides_by_zero_is_found_before_writing(tmp_path: Path) -> None:
    vae = small_vae()
    vae.posterior.network = Switch(vae.posterior.network, lambda h: h / 0.0, call=0)
    with pytest.raises(NonFiniteError, match=r'before the first step: .*site "z" of the guide'):
        pv.fit(vae, binary(48), epochs=1, batch_size=16, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_poisoned_batch_is_named_before_it_is_trained_on(tmp_path: Path) -> None:
    x = binary(64)
    x[50, 3] = float("inf")
    vae, out = small_vae(), tmp_path / "run"
    with pytest.raises(DataError, match=r"batch 3 of the DataLoader: .*x\[2, 3\] = inf"):
        pv.fit(vae, DataLoader(TensorDataset(x), 16), epochs=2, out=out)
    assert all(torch.isfinite(parameter).all() for parameter in vae.parameters())
    assert saved_state(out)["step"] == 0


def test_a_batch_that_overflows_is_blamed_on_the_data_site(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    x = intensities(64)
    x[50, 3] = 1e30  # finite, and its square is not
    message, _ = fails(normal_vae(), DataLoader(TensorDataset(x), 16), tmp_path / "run")
    assert 'log-density at site "x" of the model' in message
    assert "at step 4 (epoch 1, batch 4)" in message


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.parametrize("call", [2, 3, 9])
def test_a_bad_gradient_is_blamed_on_its_step_and_parameter(
    clip: float | None, factor: float, call: int, tmp_path: Path
) -> None:
    """Also at the last step of an epoch, or of training, where no loss follows that would show it.

    The decoder's gradient is bad, and so is the encoder's through it, but that of the layer after
    the fault is not: clipping first would spread NaN to it.
    """
    vae = small_vae()
    layers = vae.likelihood.network.layers
    layers[0] = Switch(layers[0], lambda h: BadGradient.apply(h, factor), call=call)
    message, _ = fails(vae, binary(48), tmp_path / "run", gradient_clip=clip, epochs=3)
    assert re.search(r'the gradient of "guide\.posterior\.\S+" became NaN', message)
    assert 'though the loss is finite: term: reconstruction, at site "x". Look' in message
    assert step_of(message) == call
    assert saved_state(tmp_path / "run")["step"] == 3 * ((call - 1) // 3)


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_gradient_of_the_kl_is_blamed_on_the_latent_site(
    clip: float | None, kl: Any, tmp_path: Path
) -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self) -> dist.Distribution:
            return dist.Normal(BadGradient.apply(self.loc, float("nan")), torch.ones(2)).to_event(1)

    vae = small_vae()
    vae.model.prior = Prior()
    message, weights = fails(
        vae, binary(48), tmp_path / "run", gradient_clip=clip, objective=pv.ELBO(kl=kl)
    )
    assert 'the gradient of "model.prior.loc" became NaN or infinite at step 1' in message
    assert 'term: KL, at site "z". Look' in message
    assert "reconstruction" not in message
    assert identical(vae, weights)  # found before the update


def test_a_bad_gradient_is_blamed_on_the_one_site_of_several(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                bad = BadGradient.apply(self.b, float("inf"))
                pyro.sample("left", dist.Normal(z + self.a, 1.0).to_event(1), obs=x[:, :3])
                pyro.sample("right", dist.Normal(z + bad, 1.0).to_event(1), obs=x[:, 3:6])

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    pair = SimpleNamespace(model=Two(), guide=Guide())
    with pytest.raises(NonFiniteError, match=r'"model.b" .*term: reconstruction, at site "right"'):
        pv.fit(pair, intensities(48), epochs=1, batch_size=16)


def test_a_gradient_that_is_bad_only_once_is_said_to_be(tmp_path: Path) -> None:
    class Once(nn.Module):
        calls = 0

        def forward(self, h: Tensor) -> Tensor:
            self.calls += torch.is_grad_enabled()
            return BadGradient.apply(h, float("nan") if self.calls == 2 else 1.0)

    vae = small_vae()
    vae.likelihood.network.layers.append(Once())
    message, _ = fails(vae, binary(48), tmp_path / "run")
    assert "with fresh draws on the same batch every term's is finite" in message
    assert step_of(message) == 2


def test_a_norm_that_overflows_is_no_matter_where_nothing_is_clipped() -> None:
    torch.set_default_dtype(torch.float32)
    vae = small_vae()
    layers = vae.likelihood.network.layers
    layers[2] = Switch(layers[2], lambda h: BadGradient.apply(h, 1e25), call=2)
    pv.fit(vae, binary(48), epochs=1, batch_size=16)


def test_clipping_blames_the_culprit_alone(tmp_path: Path) -> None:
    """One parameter of the model has a NaN gradient; the guide, which comes first, has not."""
    vae = small_vae()

    class Poison(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, h: Tensor) -> Tensor:
            return h + BadGradient.apply(self.shift, float("nan"))

    vae.likelihood.network.layers.append(Poison())
    for clip in (None, 1.0):
        message, _ = fails(vae, binary(48), tmp_path / str(clip), gradient_clip=clip)
        assert 'the gradient of "model.likelihood.network.layers.3.shift"' in message
        assert step_of(message) == 1


def test_a_norm_that_overflows_though_every_gradient_is_finite(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    vae = small_vae()
    layers = vae.likelihood.network.layers
    layers[2] = Switch(layers[2], lambda h: BadGradient.apply(h, 1e25), call=2)
    message, _ = fails(vae, binary(48), tmp_path / "run", gradient_clip=1.0)
    assert "the norm of the gradient overflowed at step 2" in message
    assert re.search(r'in that of "model\.likelihood\.\S+"', message)


def test_an_update_that_overflows_is_blamed_on_it(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    message, _ = fails(
        small_vae(), binary(48), tmp_path / "run",
        optimizer=lambda p: torch.optim.SGD(p, 3e38, momentum=0.99), batch_size=48,
    )  # fmt: skip
    assert re.search(r'update of step \d+ made "|site "', message)


def test_validation_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    far = intensities(20)
    far[5] = 1e25
    data = pv.Data(pv.Split(intensities(48)), pv.Split(far), pv.Split(far))
    message, _ = fails(normal_vae(), data, tmp_path / "run", patience=2)
    assert "in validation after step 3 (epoch 1)" in message
    assert saved_state(tmp_path / "run")["epoch"] == 0


def test_ctrl_c_does_not_save_what_is_not_finite(tmp_path: Path) -> None:
    """The interruption and the bad gradient come in the same step."""
    vae, out = small_vae(), tmp_path / "run"
    layers = vae.likelihood.network.layers
    layers[0] = Switch(layers[0], lambda h: BadGradient.apply(h, float("nan")), call=5)

    def interrupt(step: int) -> float:
        if step == 4 and in_training():
            signal.raise_signal(signal.SIGINT)
        return 1.0

    message, _ = fails(vae, binary(48), out, kl_schedule=interrupt)
    assert step_of(message) == 5
    assert saved_state(out)["step"] == 3


def test_after_the_error_training_can_be_taken_up_with_the_fault_mended(tmp_path: Path) -> None:
    vae, out = small_vae(), tmp_path / "run"
    vae.likelihood.network = Switch(vae.likelihood.network, lambda h: h / 0.0, call=8)
    fails(vae, binary_data(), out, epochs=4)
    vae.likelihood.network.call = 10**9
    pv.fit(vae, binary_data(), epochs=4, batch_size=16, out=out, resume=True)
    healthy = small_vae()
    healthy.likelihood.network = Switch(healthy.likelihood.network, lambda h: h, call=10**9)
    pv.fit(healthy, binary_data(), epochs=4, batch_size=16)
    assert identical(vae, healthy)


def test_the_message_speaks_of_the_largest_parameter(tmp_path: Path) -> None:
    vae = small_vae()
    with torch.no_grad():
        vae.likelihood.network.layers[2].bias[3] = 12345.0
    vae.posterior.network = Switch(vae.posterior.network, lambda h: h / 0.0, call=1)
    message, _ = fails(vae, binary(48), tmp_path / "run")
    assert (
        'The largest parameter is 1.23e+04, in "model.likelihood.network.layers.2.bias"' in message
    )


def test_interruption_waits_and_restores_the_handlers() -> None:
    def mine(*_: Any) -> None:
        raise AssertionError("the handler from before was called")

    before = signal.signal(signal.SIGINT, mine)
    try:
        with Interruption() as stop:
            assert not stop.requested
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)  # the second acts at once
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread() -> None:
    runs: list[pv.Run] = []
    vae = small_vae()
    worker = threading.Thread(
        target=lambda: runs.append(pv.fit(vae, binary(32), epochs=1, batch_size=16))
    )
    worker.start()
    worker.join()
    assert len(runs) == 1


def test_nothing_of_an_older_run_is_touched_by_a_failure_before_training(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pv.fit(small_vae(), binary(48), epochs=1, batch_size=16, out=out)
    before = contents(out)
    vae = small_vae()
    vae.likelihood.network = Switch(vae.likelihood.network, lambda h: h / 0.0, call=0)
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(NonFiniteError):
            pv.fit(vae, binary(48), epochs=1, batch_size=16, out=out, **how)
        assert contents(out) == before
