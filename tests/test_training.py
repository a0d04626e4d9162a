"""`fit`: what it computes, held against computations that do not use it."""

from __future__ import annotations

import builtins
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from training_helpers import (
    FEATURES,
    binary,
    binary_data,
    identical,
    in_training,
    intensities,
    normal_vae,
    saved_state,
    small_vae,
    without_time,
)

import pyro_vae as pv
from pyro_vae.errors import ConfigError, SiteError
from pyro_vae.seeding import seeded
from pyro_vae.training.checkpoint import copy_weights


def train(vae: Any = None, data: Any = None, **settings: Any) -> tuple[Any, pv.Run]:
    vae = small_vae() if vae is None else vae
    data = binary_data() if data is None else data
    return vae, pv.fit(vae, data, **{"epochs": 3, "batch_size": 16, **settings})


def test_same_seed_same_weights_and_metrics() -> None:
    (a, run_a), (b, run_b) = (train(data=binary_data(dynamic=True), seed=7) for _ in range(2))
    assert identical(a, b)
    assert without_time(run_a.metrics) == without_time(run_b.metrics)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices_and_numbers_of_other_types(device: Any, tmp_path: Path) -> None:
    expected, _ = train(data=binary(48), seed=7, device="cpu")
    numbers = {"epochs": np.int64(3), "batch_size": np.int32(16), "seed": np.int64(7)}
    for resume in (False, True):
        vae, _ = train(
            data=binary(48), device=device, out=tmp_path / "run", resume=resume, **numbers
        )
        if device is not None:
            assert identical(vae, expected)


def test_a_data_frame_trains_as_its_array_does() -> None:
    frame = pandas.DataFrame(binary(48).numpy())
    assert identical(train(data=frame)[0], train(data=binary(48))[0])


def test_another_seed_other_weights() -> None:
    assert not identical(train(seed=7)[0], train(seed=8)[0])


def test_the_global_generator_does_not_matter_and_is_not_disturbed() -> None:
    loader = torch.utils.data.DataLoader(binary(32), batch_size=8, shuffle=True)
    for data in (binary_data(dynamic=True), loader):
        torch.manual_seed(1)
        a, _ = train(data=data)
        state = torch.manual_seed(2).get_state()
        b, _ = train(data=data)
        assert identical(a, b)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_parameter_store_and_validation_are_not_disturbed() -> None:
    mine = pyro.param("mine", torch.tensor([2.0]), constraint=dist.constraints.positive)
    vae = small_vae()
    pyro.module("vae", vae)
    before = dict(pyro.get_param_store().named_parameters())
    with pyro.validation_enabled(True):
        train(vae)
        assert torch.distributions.Distribution._validate_args
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(pyro.param("mine"), mine)


def test_fit_is_the_loop_one_would_write(tmp_path: Path) -> None:
    """Full-batch SGD on a VAE without noise in q: every number can be computed by hand."""
    x = intensities(24)

    def run_by_hand(vae: pv.VAE) -> list[float]:
        # q has next to no width, so the Monte Carlo term is that at the mean of q
        optimizer = torch.optim.SGD(vae.parameters(), 0.05)
        losses = []
        for _ in range(4):
            q = vae.encode(x).base_dist
            p = vae.decode(q.loc).base_dist
            reconstruction = -0.5 * ((x - p.loc) ** 2 + math.log(2 * math.pi))
            kl = 0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()
            loss = (kl.sum() - reconstruction.sum()) / len(x)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    def noiseless() -> pv.VAE:
        vae = normal_vae()
        vae.guide.posterior.log_variance_range = (-40.0, -39.0)
        return vae

    by_hand, fitted = noiseless(), noiseless()
    losses = run_by_hand(by_hand)
    _, run = train(fitted, x, epochs=4, batch_size=24, optimizer=lambda p: torch.optim.SGD(p, 0.05))
    # rows come in another order, so sums round differently; scales of 2e-9 are what noise is left
    assert [row["train_loss"] for row in run.metrics] == pytest.approx(losses, rel=1e-7)
    for a, b in zip(by_hand.parameters(), fitted.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_validation_loss_is_the_objective_on_the_validation_data() -> None:
    vae, run = train(objective=pv.ELBO(num_particles=3, kl="monte_carlo"))
    x = binary_data().valid.x
    elbo = Trace_ELBO(num_particles=400, vectorize_particles=True)
    with pyro.get_param_store().scope(), torch.no_grad():
        draws = torch.tensor([elbo.loss(vae.model, vae.guide, x) / len(x) for _ in range(20)])
    three = run.metrics[-1]["valid_loss"]
    # one datum's loss has a deviation below 3 nats here (measured 1.2), so the mean of 20 data and
    # 3 particles one below 0.39: 4 of these are odds of 1 in 15,000
    assert abs(three - draws.mean()) < 4 * 3.0 / math.sqrt(60)


def test_rows_hold_the_terms_and_their_identities(tmp_path: Path) -> None:
    _, run = train(out=tmp_path / "run", objective=pv.ELBO(kl_weight=0.5))
    for i, row in enumerate(run.metrics):
        assert (row["epoch"], row["step"]) == (i + 1, 3 * (i + 1))
        for which in ("train", "valid"):
            kl, reconstruction = row[f"{which}_kl"], row[f"{which}_reconstruction"]
            assert row[f"{which}_loss"] == pytest.approx(0.5 * kl - reconstruction, rel=1e-9)
            assert row[f"{which}_elbo"] == pytest.approx(reconstruction - kl, rel=1e-9)
    assert run.estimators == {"z": "analytic"}
    assert pv.read_metrics(tmp_path / "run" / "metrics.csv") == run.metrics
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv").to_dict("records")
    assert [pytest.approx(row, rel=1e-14) for row in run.metrics] == table


def test_the_run_folder(tmp_path: Path) -> None:
    vae, _ = train(out=tmp_path / "a" / "run", config={"recipe": {"latent": 2}})
    folder = tmp_path / "a" / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.safetensors", "config.json", "metrics.csv", "model.safetensors",
    ]  # fmt: skip
    config = pandas.read_json(folder / "config.json", typ="series")
    assert config["recipe"] == {"latent": 2}
    assert config["fit"]["objective"]["name"] == "ELBO"
    assert config["fit"]["optimizer"] == "Adam"
    assert config["versions"]["torch"] == torch.__version__
    for file in ("model.safetensors", "checkpoint.safetensors"):
        other = small_vae(seed=5)
        pv.load_weights(other, folder / file)
        assert identical(vae, other)


def test_early_stopping_restores_the_best_weights(tmp_path: Path) -> None:
    # few data and many epochs at a high rate: the validation loss turns
    data = pv.Data(pv.Split(binary(16)), pv.Split(binary(200, seed=3)), pv.Split(binary(2)))
    snapshots: dict[int, dict[str, Tensor]] = {}
    vae = small_vae(hidden=32)

    def snapshot(epoch: int) -> dict[str, float]:
        snapshots[epoch] = copy_weights(vae)
        return {}

    _, run = train(
        vae, data, epochs=200, patience=4, learning_rate=0.03, out=tmp_path / "run",
        trackers=[snapshot],
    )  # fmt: skip
    losses = [row["valid_loss"] for row in run.metrics]
    assert run.stopped == "patience"
    assert len(losses) < 200
    assert run.best_epoch == 1 + losses.index(min(losses)) == len(losses) - 4
    assert identical(vae, snapshots[run.best_epoch])
    assert not identical(vae, snapshots[len(losses)])
    saved = small_vae(seed=1, hidden=32)
    pv.load_weights(saved, tmp_path / "run" / "model.safetensors")
    assert identical(saved, vae)


def test_without_patience_the_last_weights_stay() -> None:
    last: dict[str, Tensor] = {}
    vae = small_vae()

    def keep(epoch: int) -> dict[str, float]:
        last.update(copy_weights(vae))
        return {}

    train(vae, learning_rate=0.5, epochs=5, trackers=[keep])
    assert identical(vae, last)


def test_gradient_clipping_clips() -> None:
    """With SGD at rate 1 the update is the gradient: its norm is at most the clip, and is it."""
    clip = 0.01

    def updates(gradient_clip: float | None) -> list[float]:
        vae = small_vae()
        steps = [copy_weights(vae)]
        train(
            vae, binary(48), epochs=5, batch_size=48, gradient_clip=gradient_clip,
            optimizer=lambda p: torch.optim.SGD(p, 1.0),
            trackers=[lambda _: steps.append(copy_weights(vae)) or {}],
        )  # fmt: skip
        pairs = pairwise(steps)
        return [math.sqrt(sum(float(((b[n] - a[n]) ** 2).sum()) for n in a)) for a, b in pairs]

    assert min(updates(None)) > 10 * clip
    assert updates(clip) == pytest.approx([clip] * 5, rel=1e-4)
    assert updates(1e6) == pytest.approx(updates(None), rel=1e-9)


def test_step_lr_steps_once_an_epoch() -> None:
    _, run = train(
        epochs=5, learning_rate=0.1,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    )  # fmt: skip
    assert [row["learning_rate"] for row in run.metrics] == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("with_valid", [True, False])
def test_reduce_on_plateau_sees_the_loss(with_valid: bool) -> None:
    seen: list[float] = []

    class Spy(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: float, *args: Any) -> None:  # type: ignore[override]
            seen.append(metrics)
            super().step(metrics, *args)

    # a threshold that no gain reaches: every epoch after the first is bad
    _, run = train(
        data=binary_data() if with_valid else binary(48), epochs=4,
        scheduler=lambda o: Spy(o, factor=0.1, patience=0, threshold=0.9),
    )  # fmt: skip
    column = "valid_loss" if with_valid else "train_loss"
    assert seen == [row[column] for row in run.metrics]
    rates = [row["learning_rate"] for row in run.metrics]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_a_guide_with_dropout_has_no_path_derivative(gradient: str) -> None:
    """It would be another function the second time it is run: the gradient would be wrong."""
    vae = small_vae(dropout=0.5)
    before = copy_weights(vae)
    objective = pv.ELBO("monte_carlo", "stl") if gradient == "stl" else pv.IWAE(3, "dreg")
    with pytest.raises(SiteError, match=r'another density at site "z".*dropout'):
        train(vae, objective=objective)
    assert identical(vae, before)
    train(vae, objective=pv.IWAE(3))


def test_trying_the_gradient_leaves_batch_normalisation_alone() -> None:
    def batch_norm(fan_in: int, fan_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(fan_in, 4), nn.BatchNorm1d(4), nn.Linear(4, fan_out))

    counted = []
    for gradient in ("standard", "stl"):
        with seeded(0):
            vae = pv.VAE(
                pv.priors.StandardNormal(2),
                pv.likelihoods.Bernoulli(batch_norm(2, FEATURES)),
                pv.posteriors.DiagonalNormal(batch_norm(FEATURES, 4)),
            )
        _, run = train(vae, objective=pv.ELBO("monte_carlo", gradient), epochs=1)
        counted.append([int(vae.posterior.network[1].num_batches_tracked), run.metrics[-1]["step"]])
    assert counted[0] == counted[1] == [counted[0][1]] * 2


def test_kl_schedule_warms_up_from_zero_and_the_weight_comes_back() -> None:
    asked: list[int] = []
    weights: list[float] = []

    def warm_up(step: int) -> float:
        if in_training():
            asked.append(step)
        return min(1.0, step / 6)

    class Spy(pv.ELBO):
        def terms(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                weights.append(float(self.kl_weight))
            return super().terms(*args, **kwargs)

    spy = Spy(kl_weight=2.0)
    _, run = train(objective=spy, kl_schedule=warm_up)
    assert asked == list(range(9))
    assert weights == [2.0 * min(1.0, step / 6) for step in range(9)]
    assert float(spy.kl_weight) == 2.0
    assert [row["kl_weight"] for row in run.metrics] == pytest.approx([2 / 3, 5 / 3, 2.0])
    for row in run.metrics:  # validation has the objective's own weight from the first epoch on
        own = 2.0 * row["valid_kl"] - row["valid_reconstruction"]
        assert row["valid_loss"] == pytest.approx(own, rel=1e-9)


def test_the_weight_comes_back_when_training_fails() -> None:
    objective = pv.ELBO(kl_weight=0.25)

    def breaks(step: int) -> float:
        if step == 4:
            raise RuntimeError("from the schedule")
        return 0.5

    with pytest.raises(RuntimeError, match="from the schedule"):
        train(objective=objective, kl_schedule=breaks)
    assert float(objective.kl_weight) == 0.25


def test_kl_weight_zero_trains_an_autoencoder() -> None:
    _, run = train(objective=pv.ELBO(kl_weight=0.0))
    assert run.metrics[-1]["train_loss"] == -run.metrics[-1]["train_reconstruction"]


def test_trackers_give_columns_even_now_and_then(tmp_path: Path) -> None:
    def often(epoch: int) -> dict[str, Any]:
        return {"often": torch.tensor(float(epoch))}

    def seldom(epoch: int) -> dict[str, float] | None:
        return {"seldom": -1.0} if epoch % 2 else None

    _, run = train(epochs=4, out=tmp_path / "run", trackers=[seldom, often])
    table = pandas.read_csv(tmp_path / "run" / "metrics.csv")
    assert table["often"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert table["seldom"].fillna(0).tolist() == [-1.0, 0.0, -1.0, 0.0]
    assert pv.read_metrics(tmp_path / "run" / "metrics.csv") == run.metrics


def test_dynamic_binarisation_is_drawn_at_every_visit() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(x.clone())
            return self.network(x)

    vae = small_vae()
    vae.guide.posterior.network = Spy(vae.guide.posterior.network)
    grey = intensities(1).expand(400, FEATURES).clone()
    train(vae, pv.Split(grey, draw=lambda x, g: torch.bernoulli(x, generator=g)), batch_size=400)
    first, second, third = seen
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    # each pixel's mean over 1200 draws within 5 deviations of its intensity: odds 1 in 140,000
    p = grey[0]
    z = (torch.cat(seen).mean(0) - p) / (p * (1 - p) / 1200).sqrt()
    assert z.abs().max() < 5


def test_any_model_and_guide_train() -> None:
    class Pair:
        def __init__(self) -> None:
            vae = small_vae()
            self.model, self.guide = vae.model, vae.guide

    pair, vae = Pair(), small_vae()
    train(pair)
    train(vae)
    assert identical(pair.model, vae.model)
    assert identical(pair.guide, vae.guide)


def test_pyro_params_in_modules_train() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(3.0), dist.constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.expand_as(x), self.scale).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.width = PyroParam(torch.tensor(0.5), dist.constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.mean(-1, True), self.width).to_event(1))

    class Pair:
        model, guide = Model(), Guide()

    _, run = train(Pair(), intensities(48), epochs=60, learning_rate=0.05)
    assert Pair.model.scale.item() < 1.0
    assert run.metrics[-1]["train_loss"] < run.metrics[0]["train_loss"]


def test_a_parameter_outside_the_modules_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> None:
            scale = pyro.param("scale", torch.tensor(1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, True), scale).expand(x.shape).to_event(1),
                            obs=x)  # fmt: skip

    class Pair:
        model, guide = Model(), small_vae().guide

    with pytest.raises(SiteError, match=r'pyro\.param "scale" belongs to no module'):
        train(Pair(), binary(48))


def test_frozen_parts_stay_and_are_saved(tmp_path: Path) -> None:
    vae = small_vae()
    vae.guide.requires_grad_(False)
    before = copy_weights(vae)
    train(vae, out=tmp_path / "run")
    moved = {name for name, tensor in copy_weights(vae).items() if not tensor.equal(before[name])}
    assert moved == {name for name in before if name.startswith("model.")}
    other = small_vae(seed=1)
    pv.load_weights(other, tmp_path / "run" / "model.safetensors")
    assert identical(vae, other)


def test_the_trial_before_training_changes_no_mode_and_no_statistic() -> None:
    vae = small_vae()
    norm = nn.BatchNorm1d(4)
    vae.guide.posterior.network.layers.append(norm)
    frozen = nn.BatchNorm1d(4).eval()
    vae.guide.posterior.network.layers.append(frozen)
    vae.check_shape(binary(2))
    assert norm.training
    assert not frozen.training
    train(vae, binary(48), epochs=2)
    assert int(norm.num_batches_tracked) == 2 * 3


def test_a_user_model_with_context_from_a_loader() -> None:
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.networks.MLP(2 + 4, [8], FEATURES)),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(FEATURES + 4, [8], 4)),
    )
    x, context = binary(48), torch.eye(4)[torch.arange(48) % 4]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, context), batch_size=16, shuffle=True
    )
    _, run = train(vae, loader)
    assert math.isfinite(run.metrics[-1]["train_loss"])


def test_iwae_trains_and_has_no_kl_weight_to_schedule() -> None:
    _, run = train(objective=pv.IWAE(num_particles=4))
    assert run.estimators == {"z": "monte_carlo"}
    with pytest.raises(ConfigError, match="IWAE has no KL weight"):
        train(objective=pv.IWAE(num_particles=4), kl_schedule=lambda step: 1.0)


def test_64_true_trains_in_float64() -> None:
    torch.set_default_dtype(torch.float32)
    vae, seen = normal_vae(), []
    vae.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = intensities(48).double() + 1e-12  # what float32 would round away
    train(vae, x, precision="64-true", epochs=1)
    assert all(parameter.dtype == torch.float64 for parameter in vae.parameters())
    assert all(value.dtype == torch.float64 for value in seen)
    rows = {tuple(row.tolist()) for value in seen for row in value}
    assert {tuple(row.tolist()) for row in x} <= rows


def test_bf16_mixed_leaves_data_and_parameters_alone() -> None:
    torch.set_default_dtype(torch.float32)
    x = intensities(48)
    runs = {}
    for precision in ("32-true", "bf16-mixed"):
        vae, seen = normal_vae(scale=0.01), []
        vae.model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        _, run = train(vae, x, precision=precision, epochs=1, learning_rate=1e-9)
        assert all(parameter.dtype == torch.float32 for parameter in vae.parameters())
        rows = {tuple(row.tolist()) for value in seen for row in value}
        assert {tuple(row.tolist()) for row in x} <= rows
        runs[precision] = run.metrics[0]
    # bfloat16 products have 8 bits; the terms themselves are summed in float32
    assert runs["bf16-mixed"]["train_loss"] != runs["32-true"]["train_loss"]
    assert runs["bf16-mixed"]["train_loss"] == pytest.approx(
        runs["32-true"]["train_loss"], rel=0.01
    )


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_progress_bar_goes_to_stderr_and_can_be_off(
    progress: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.training.progress.SECONDS_BETWEEN_LOOKS", 0.0)
    train(progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("loss" in err and "KL" in err and "data/s" in err) is bool(progress)


def test_tensorboard_holds_every_epoch_once_also_after_a_crash(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    data = binary_data()

    def crash(epoch: int) -> dict[str, float]:
        if epoch == 3:
            raise RuntimeError("crash")
        return {}

    with pytest.raises(RuntimeError, match="crash"):
        train(data=data, out=folder, tensorboard=True, epochs=4, trackers=[crash])
    _, run = train(data=data, out=folder, tensorboard=True, epochs=4, resume=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for column in ("train_loss", "valid_kl"):
        scalars = events.Scalars(column.replace("_", "/", 1))
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4]
        values = [row[column] for row in run.metrics]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)


def test_without_the_package_tensorboard_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        train(out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    train(out=tmp_path / "run")  # and nobody else needs it


def test_more_epochs_go_on_where_the_run_ended(tmp_path: Path) -> None:
    vae, run = train(out=tmp_path / "run", epochs=2)
    vae, run = train(small_vae(seed=9), out=tmp_path / "run", epochs=5, resume=True)
    whole, whole_run = train(epochs=5)
    assert identical(vae, whole)
    assert without_time(run.metrics) == without_time(whole_run.metrics)
    assert saved_state(tmp_path / "run")["epoch"] == 5


def test_a_linear_decoder_reaches_the_maximum_likelihood_of_ppca() -> None:
    """Tipping & Bishop 1999, eq. 3.8: the largest log-likelihood follows from the eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    n, features, latent = 400, 8, 2
    loadings = torch.randn(features, latent, generator=generator)
    z = torch.randn(n, latent, generator=generator)
    x = 1.0 + z @ loadings.T + 0.5 * torch.randn(n, features, generator=generator)

    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = eigenvalues[latent:].mean()
    maximum = -0.5 * (
        features * math.log(2 * math.pi) + eigenvalues[:latent].log().sum()
        + (features - latent) * noise.log() + features
    )  # fmt: skip

    vae = pv.VAE(
        pv.priors.StandardNormal(latent),
        pv.likelihoods.Normal(pv.networks.MLP(latent, [], features), "learned"),
        pv.posteriors.DiagonalNormal(pv.networks.MLP(features, [], 2 * latent)),
    )
    pv.fit(
        vae, x, epochs=300, batch_size=100, learning_rate=0.02, seed=1,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300),
    )  # fmt: skip
    layer = vae.likelihood.network.layers[0]
    scale = vae.decode(torch.zeros(latent)).base_dist.scale.flatten()[0]
    covariance = layer.weight @ layer.weight.T + scale**2 * torch.eye(features)
    log_p = dist.MultivariateNormal(layer.bias, covariance).log_prob(x).mean()
    assert log_p.item() <= maximum.item() + 1e-9
    assert log_p.item() == pytest.approx(maximum.item(), rel=0.005)
