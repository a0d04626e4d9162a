"""Bad input to `fit`: a typed error that names value and place, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyro.infer
import pyro.optim
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_helpers import (
    FEATURES,
    binary,
    binary_data,
    contents,
    identical,
    intensities,
    normal_vae,
    small_vae,
)

import pyro_vae as pv
from pyro_vae.data import bernoulli_draw
from pyro_vae.errors import (
    CheckpointError,
    CompileError,
    ConfigError,
    DataError,
    DeviceError,
    RunExistsError,
    RunPermissionError,
    ShapeError,
    SupportError,
)
from pyro_vae.training.checkpoint import copy_weights
from pyro_vae.training.devices import launch


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 5] = value
    return x


def splits(train: Tensor, valid: Tensor) -> pv.Data:
    return pv.Data(pv.Split(train), pv.Split(valid), pv.Split(valid))


def wide_decoder() -> pv.VAE:
    vae = small_vae()
    vae.model.likelihood = pv.likelihoods.Bernoulli(pv.networks.MLP(2, [], FEATURES + 1))
    return vae


def plain_encoder() -> pv.VAE:
    """An encoder that is no network of this library, and knows nothing of its errors."""
    vae = small_vae()
    vae.guide.posterior.network = nn.Linear(FEATURES + 2, 4)
    return vae


BAD_DATA = [
    ("nan", lambda: spoiled(binary(20), float("nan")), DataError,
     r"x\[3, 5\] = nan \(row 3, column 5\)"),
    ("inf", lambda: spoiled(binary(20), float("-inf")), DataError,
     r"x\[3, 5\] = -inf \(row 3, column 5\)"),
    ("nan in validation", lambda: splits(binary(20), spoiled(binary(20), float("nan"))), DataError,
     r"x\[3, 5\] = nan"),
    ("nan under a draw",
     lambda: pv.Split(spoiled(intensities(20), float("nan")), draw=bernoulli_draw), DataError,
     r"x\[3, 5\] = nan"),
    ("grey", lambda: spoiled(binary(20), 0.25), SupportError,
     r"values 0 and 1, but x\[3, 5\] = 0\.25 .*Binarize.*continuous Bernoulli"),
    ("grey in validation", lambda: splits(binary(20), intensities(20)), SupportError, "Binarize"),
    ("features", lambda: binary(20)[:, :-1], ShapeError, r"takes vectors of 12 values.*11\)"),
    ("features in validation", lambda: splits(binary(20), binary(20)[:, 1:]), ShapeError, r"11\)"),
    ("empty", lambda: binary(0), DataError, r"at least one datum; x has shape \(0, 12\)"),
    ("one dimension", lambda: binary(20)[0], DataError, r"one row a datum; x has shape \(12,\)"),
    ("small", lambda: binary(5), ConfigError, r"batch_size=16 is larger than the data \(5 rows\)"),
    ("text", lambda: ["a", "b"], DataError, "data of type list is no array"),
    ("none", lambda: None, DataError, "data of type NoneType is no array.*pv.datasets.load"),
    ("name", lambda: "digits", DataError, r"type str is no array.*pv\.datasets\.load\(\"digits"),
    ("dict", lambda: {"x": binary(20)}, DataError, "type dict is no array.*a Split, an array"),
    ("pair", lambda: (binary(20), torch.zeros(20)), DataError, "tuple is no array.*DataLoader"),
    ("pair of equals", lambda: (binary(20), binary(20)), DataError, "type tuple is no array"),
    ("ragged", lambda: [[0.0, 1.0], [0.0]], DataError, "type list is no array.*inhomogeneous"),
    ("dataset", lambda: TensorDataset(binary(20)), DataError, "TensorDataset is no array.*Loader"),
    ("masked", lambda: np.ma.masked_less(binary(20).numpy(), 0.5), DataError,
     r"must be finite, but x\[.*\] = nan"),
    ("complex", lambda: binary(20) + 0j, DataError, "dense real numbers; x has torch.complex"),
    ("sparse", lambda: binary(20).to_sparse(), DataError, "real numbers; .* layout torch.sparse"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [case[1:] for case in BAD_DATA],
    ids=[case[0] for case in BAD_DATA],
)
def test_bad_data(make: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    vae = small_vae()
    before = copy_weights(vae)
    with pytest.raises(error, match=message):
        pv.fit(vae, make(), epochs=1, batch_size=16, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert identical(vae, before)


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epochs": 0}, ConfigError, "epochs must be at least 1, got 0"),
    ({"epochs": 2.5}, ConfigError, "epochs must be a whole number, got 2.5"),
    ({"epochs": None}, ConfigError, "epochs must be a whole number, got None"),
    ({"batch_size": "16"}, ConfigError, "batch_size must be a whole number, got '16'"),
    ({"seed": 0.0}, ConfigError, "seed must be a whole number, got 0.0"),
    ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
    ({"batch_size": 49}, ConfigError, r"batch_size=49 is larger than the data \(48 rows\)"),
    ({"learning_rate": 0.0}, ConfigError, r"learning_rate must be positive and finite, got 0\.0"),
    ({"learning_rate": float("nan")}, ConfigError, "learning_rate must be positive.*got nan"),
    ({"gradient_clip": -1.0}, ConfigError, r"gradient_clip must be positive and finite, got -1\.0"),
    ({"learning_rate": "0.1"}, ConfigError, "learning_rate must be positive.*got '0.1'"),
    ({"patience": 2.5}, ConfigError, "patience must be a whole number, got 2.5"),
    ({"trackers": print}, ConfigError, "trackers is a list of functions of the epoch, got <built"),
    ({"trackers": [1]}, ConfigError, r"trackers is a list of functions of the epoch, got \[1\]"),
    ({"compile": "yes"}, ConfigError, "compile is True, False or \"auto\", got 'yes'"),
    ({"patience": 0}, ConfigError, "patience must be at least 1, got 0"),
    ({"seed": -1}, ConfigError, "seed must not be negative, got -1"),
    ({"objective": pyro.infer.Trace_ELBO()}, ConfigError, "got Trace_ELBO; train with others"),
    ({"precision": "banana"}, ConfigError, "precision is one of 32-true.*got 'banana'"),
    ({"precision": "16-mixed"}, ConfigError, "precision is one of 32-true"),
    ({"device": "tpu"}, DeviceError, "got 'tpu'"),
    ({"device": "cuda:x"}, DeviceError, "got 'cuda:x'"),
    ({"device": "cpu:1"}, DeviceError, "got 'cpu:1'"),
    ({"devices": 0}, ConfigError, "devices must be at least 1, got 0"),
    ({"resume": True}, CheckpointError, "nothing to resume"),
    ({"resume": True, "overwrite": True}, ConfigError, "choose one"),
    ({"resume": True, "out": None}, ConfigError, "resume=True needs out="),
    ({"tensorboard": True, "out": None}, ConfigError, "tensorboard=True needs out="),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_a_number_too_large_for_the_precision(streamed: bool, tmp_path: Path) -> None:
    """Finite as it is, and infinite in float32."""
    torch.set_default_dtype(torch.float32)
    x = spoiled(intensities(20).double(), 1e300)
    data = DataLoader(TensorDataset(x), 4, shuffle=False) if streamed else x
    with pytest.raises(DataError, match=r"finite in float32, but x\[3, 5\] = 1e\+300 \(row 3"):
        pv.fit(normal_vae(), data, epochs=1, batch_size=4, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS, ids=[case[2] for case in BAD_ARGUMENTS]
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    settings = {"epochs": 1, "batch_size": 16, "out": tmp_path / "run", **arguments}
    with pytest.raises(error, match=message):
        pv.fit(small_vae(), binary_data(), **settings)
    assert list(tmp_path.iterdir()) == []


def test_patience_without_validation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience=3 needs validation data"):
        pv.fit(small_vae(), binary(48), patience=3, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(
            DeviceError, match=f"device='{device}' was asked for, and torch sees no"
        ):
            pv.fit(small_vae(), binary(48), device=device, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "devices", "error", "message"),
    [
        ("cuda:1", 1, DeviceError, "device='cuda:1': torch sees 1 CUDA devices"),
        ("cuda", 2, DeviceError, "devices=2: torch sees 1 CUDA devices"),
        ("cuda:0", 2, ConfigError, "is one device, and devices=2 asks for more"),
    ],
)
def test_more_cuda_devices_than_there_are(
    device: str, devices: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(error, match=message):
        launch(device, devices, "32-true")


def test_a_decoder_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"data of shape \(13,\), got data of shape \(12,\)"):
        pv.fit(wide_decoder(), binary(48), batch_size=16, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_network_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot run on a batch of shape \(2, 12\)"):
        pv.fit(plain_encoder(), binary(48), batch_size=16, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def mlp_encoder() -> pv.VAE:
    """Takes a context of four values beside the data, so that labels `(N,)` do not fit."""
    vae = small_vae()
    vae.guide.posterior.network = pv.networks.MLP(FEATURES + 4, [], 4)
    return vae


@pytest.mark.parametrize("make", [small_vae, plain_encoder, mlp_encoder])
@pytest.mark.parametrize("labels", [torch.arange(48), torch.zeros(48, 1), torch.zeros(48, 3)])
def test_labels_that_were_taken_as_context(make: Any, labels: Tensor, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(binary(48), labels), 16)
    with pytest.raises(
        (ConfigError, ShapeError),
        match="second tensor, is passed to model and guide as `context`: where it holds labels",
    ):
        pv.fit(make(), loader, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_and_guide() -> None:
    for thing in (object(), nn.Linear(2, 2), lambda x: x):
        with pytest.raises(ConfigError, match=r"needs an object with nn\.Modules model and guide"):
            pv.fit(thing, binary(48))

    class Functions:
        model = small_vae().model

        @staticmethod
        def guide(x: Tensor) -> None: ...

    with pytest.raises(ConfigError, match="the guide of this Functions is function"):
        pv.fit(Functions(), binary(48))


def test_nothing_to_train() -> None:
    vae = small_vae().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameters to train"):
        pv.fit(vae, binary(48), batch_size=16)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A folder that a run of two epochs left."""
    folder = tmp_path / "run"
    pv.fit(small_vae(), binary_data(), epochs=2, batch_size=16, out=folder)
    return folder


def again(folder: Path, vae: Any = None, data: Any = None, **settings: Any) -> pv.Run:
    vae = small_vae(seed=3) if vae is None else vae
    data = binary_data() if data is None else data
    return pv.fit(vae, data, **{"epochs": 3, "batch_size": 16, "out": folder, **settings})


def test_a_run_folder_that_exists(old_run: Path) -> None:
    before = contents(old_run)
    with pytest.raises(RunExistsError, match="run is not empty: resume that run, choose another"):
        again(old_run)
    assert contents(old_run) == before


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunExistsError, match="is not empty"):
        again(tmp_path)
    again(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwriting_leaves_nothing_of_the_old_run(old_run: Path) -> None:
    (old_run / "tensorboard").mkdir()
    (old_run / "tensorboard" / "events").write_text("old")
    run = again(old_run, overwrite=True, epochs=1)
    assert len(run.metrics) == len(pv.read_metrics(old_run / "metrics.csv")) == 1
    assert json.loads((old_run / "config.json").read_text())["fit"]["epochs"] == 1
    assert not (old_run / "tensorboard").exists()


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    again(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["/proc/pyro-vae-run", "a file", "in a file"])
def test_a_folder_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    """Each fails for root as well."""
    file = tmp_path / "file"
    file.write_text("mine")
    folder = {"a file": file, "in a file": file / "run"}.get(place, Path(place))
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    with pytest.raises(RunPermissionError, match="cannot write the run folder"):
        again(folder)
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunPermissionError, match="cannot write the run folder"):
        again(tmp_path / "run")
    tmp_path.chmod(0o700)


OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "has seed=0, not 1"),
    ({"batch_size": 8}, "has batch_size=16, not 8"),
    ({"learning_rate": 0.1}, r"has learning_rate=0\.001, not 0\.1"),
    ({"optimizer": lambda p: torch.optim.SGD(p, 0.1)}, "has optimizer='Adam', not 'SGD'"),
    (
        {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)},
        "scheduler=None, not 'StepLR'",
    ),
    ({"objective": pv.ELBO(kl_weight=2.0)}, "has objective=.*'kl_weight': 1.0"),
    ({"kl_schedule": lambda step: 1.0}, r"has kl_schedule=None, not \[1\.0, 1\.0"),
    ({"gradient_clip": 1.0}, r"has gradient_clip=None, not 1\.0"),
    ({"patience": 4}, "has patience=None, not 4"),
    ({"precision": "64-true"}, "has precision='32-true', not '64-true'"),
    ({"data": binary_data(64)}, "has batches=3, not 4"),
    ({"data": binary(48, seed=5)}, "has train_data='[0-9a-f]{16}', not '[0-9a-f]{16}'"),
    (
        {"optimizer": lambda p: torch.optim.Adam(p, betas=(0.5, 0.9), fused=True)},
        r"has optimizer_options=.*'betas': \[0\.9, 0\.999\].*, not .*'betas': \[0\.5, 0\.9\]",
    ),
]


@pytest.mark.parametrize(
    ("settings", "message"), OTHER_SETTINGS, ids=[str(case[0].keys()) for case in OTHER_SETTINGS]
)
def test_resume_with_other_settings(settings: dict[str, Any], message: str, old_run: Path) -> None:
    before, vae = contents(old_run), small_vae(seed=3)
    weights = copy_weights(vae)
    with pytest.raises(CheckpointError, match=message):
        again(old_run, vae, resume=True, **settings)
    assert contents(old_run) == before
    assert identical(vae, weights)


ADAM, STEP = torch.optim.Adam, torch.optim.lr_scheduler.StepLR
OTHER_VALUES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"kl_schedule": pv.schedules.Warmup(10)}, {"kl_schedule": pv.schedules.Warmup(20)},
        r"has kl_schedule=\[0\.0, 0\.1, 1\.0.*, not \[0\.0, 0\.05, 0\.5",
    ),
    (
        {"kl_schedule": [0.1, 0.2, *[1.0] * 10].__getitem__},
        {"kl_schedule": [0.1, 0.3, *[1.0] * 10].__getitem__},
        r"has kl_schedule=\[0\.1, 0\.2, 1\.0, 'IndexError'",
    ),
    ({"optimizer": lambda p: ADAM(p, 0.01)}, {"optimizer": lambda p: ADAM(p, 0.02)},
     "has optimizer_options=.*0.01.*not.*0.02"),
    ({"scheduler": lambda o: STEP(o, 2)}, {"scheduler": lambda o: STEP(o, 3)},
     "has scheduler_options=.*'step_size': 2.*not.*'step_size': 3"),
    ({"data": pv.Split(intensities(48), draw=bernoulli_draw)},
     {"data": pv.Split(bernoulli_draw(intensities(48)))}, "has train_data="),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "message"), OTHER_VALUES, ids=[case[2] for case in OTHER_VALUES]
)
def test_resume_with_other_values_of_a_setting(
    before: dict[str, Any], after: dict[str, Any], message: str, tmp_path: Path
) -> None:
    again(tmp_path, **before)
    old = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        again(tmp_path, resume=True, **after)
    assert contents(tmp_path) == old
    assert len(again(tmp_path, resume=True, **before, epochs=4).metrics) == 4


def test_resume_with_other_validation_data(old_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has valid_data='[0-9a-f]{16}', not None"):
        again(old_run, data=binary_data().train, resume=True)


def test_the_data_of_a_loader_have_no_fingerprint(tmp_path: Path) -> None:
    again(tmp_path, data=DataLoader(binary(48), 16))
    settings = json.loads((tmp_path / "config.json").read_text())["fit"]
    assert settings["train_data"] is settings["valid_data"] is None


BAD_MAKERS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": lambda p: None}, "a torch.optim.Optimizer from the parameters, got NoneType"),
    ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, "got PyroOptim: pyro.optim is for SVI, give"),
    ({"optimizer": lambda p: pyro.optim.Adam({"lr": 0.1})}, "got PyroOptim: pyro.optim is for SVI"),
    ({"optimizer": ADAM(nn.Linear(1, 1).parameters())}, "from the parameters, got Adam"),
    ({"optimizer": "adam"}, "from the parameters, got str"),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss several times a step, through a"),
    ({"scheduler": lambda o: 0.5}, "one of torch.optim.lr_scheduler's .* got float"),
    ({"scheduler": 0.5}, "one of torch.optim.lr_scheduler's .* got float"),
    ({"kl_schedule": 0.5}, "kl_schedule maps a step to a factor, got 0.5"),
    ({"kl_schedule": lambda step: float("nan")}, r"kl_schedule\(0\) must be finite.*, got nan"),
    ({"kl_schedule": lambda step: -0.1}, r"kl_schedule\(0\) must be .*not negative, got -0\.1"),
    ({"kl_schedule": lambda step: None}, r"kl_schedule\(0\) must be finite.*, got None"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_MAKERS, ids=[case[1] for case in BAD_MAKERS])
def test_what_cannot_train_leaves_the_old_run_alone(
    settings: dict[str, Any], message: str, old_run: Path
) -> None:
    before, vae = contents(old_run), small_vae(seed=3)
    weights = copy_weights(vae)
    with pytest.raises(ConfigError, match=message):
        again(old_run, vae, overwrite=True, **settings)
    assert contents(old_run) == before
    assert identical(vae, weights)


class Peeking(pv.likelihoods.Bernoulli):
    """What it does depends on a value, which no graph can hold."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Any:
        return super().forward(z if z.sum() > 0 else -z, context)


def test_what_cannot_be_traced_leaves_the_old_run_alone(old_run: Path) -> None:
    before, vae = contents(old_run), small_vae()
    vae.model.likelihood = Peeking(vae.likelihood.network)
    with pytest.raises(CompileError, match=r"z\.sum\(\) > 0"):
        again(old_run, vae, overwrite=True, compile=True)
    assert contents(old_run) == before


def damage(file: str, how: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / file
        new = how(path.read_bytes())
        if new is None:
            path.unlink()
        else:
            path.write_bytes(new)

    return spoil


DAMAGES = {
    "truncated checkpoint": (damage("checkpoint.safetensors", lambda b: b[:-7]), "is damaged"),
    "empty checkpoint": (damage("checkpoint.safetensors", lambda b: b""), "is damaged"),
    "changed byte": (damage("checkpoint.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
                     "checksum does not match"),
    "no checkpoint": (damage("checkpoint.safetensors", lambda b: None), "nothing to resume in"),
    "truncated configuration": (damage("config.json", lambda b: b[:50]), "missing or damaged"),
    "no configuration": (damage("config.json", lambda b: None), "missing or damaged"),
    "strange configuration": (damage("config.json", lambda b: b"[1, 2]"), "missing or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_of_a_damaged_run(name: str, old_run: Path) -> None:
    spoil, message = DAMAGES[name]
    spoil(old_run)
    before, vae = contents(old_run), small_vae(seed=3)
    weights = copy_weights(vae)
    with pytest.raises(CheckpointError, match=message):
        again(old_run, vae, resume=True)
    assert contents(old_run) == before
    assert identical(vae, weights)


def test_resume_with_weights_in_place_of_a_checkpoint(old_run: Path) -> None:
    shutil.copy(old_run / "model.safetensors", old_run / "checkpoint.safetensors")
    before = contents(old_run)
    with pytest.raises(CheckpointError, match="holds no state of training"):
        again(old_run, resume=True)
    assert contents(old_run) == before


@pytest.mark.parametrize("make", [lambda: small_vae(hidden=9), normal_vae])
def test_resume_with_another_architecture(make: Any, old_run: Path) -> None:
    before, vae = contents(old_run), make()
    weights = copy_weights(vae)
    if isinstance(vae.likelihood, pv.likelihoods.Normal):
        vae.model.likelihood.extra = nn.Linear(1, 1)
        weights = copy_weights(vae)
    with pytest.raises(CheckpointError, match="another architecture"):
        again(old_run, vae, resume=True)
    assert contents(old_run) == before
    assert identical(vae, weights)


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume in"):
        again(tmp_path / "none", resume=True)
    assert list(tmp_path.iterdir()) == []
