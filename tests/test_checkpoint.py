"""Checkpoints: what goes in comes out, and nothing but a whole one of ours is read."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from training_helpers import contents, identical, small_vae

import pyro_vae as pv
from pyro_vae.errors import CheckpointError, RunPermissionError
from pyro_vae.training.checkpoint import (
    HEADER,
    _checksum,
    load_tree,
    save_tree,
    set_weights,
    weights,
)


def round_trip(tree: Any, folder: Path) -> Any:
    save_tree(folder / "tree.safetensors", tree)
    return load_tree(folder / "tree.safetensors")


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": [1, 2.5, "text", True, None, float("inf")], "b": (1, (2,)), "c": {"d": {}}},
        {1: "int", "1": "text"},
        {"number": 0.1 + 0.2, "large": 2**80, "Greek": "β", "tensor": "the word"},
        {"dict": 1, "list": [], "tuple": ()},
    ],
)
def test_plain_values_come_back_as_they_were(tree: Any, tmp_path: Path) -> None:
    again = round_trip(tree, tmp_path)
    assert again == tree
    assert str(again) == str(tree)  # 1 is not True, a tuple not a list


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([[0.0, 1.0, 3.0], [7.0, 1.0, 0.0]]).to(dtype)
    tree = {"x": values, "transposed": values.T, "scalar": values[0, 1], "empty": values[:0]}
    again = round_trip(tree, tmp_path)
    for name, tensor in tree.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor)


def test_nan_and_infinity_in_tensors_survive(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    again = round_trip({"x": values}, tmp_path)["x"]
    assert torch.equal(again.view(torch.int64), values.view(torch.int64))


def test_tensors_that_share_memory_or_a_place_are_kept_apart(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    tree = {"x": x, "again": x, "part": x[2:4], 1: x + 1, "1": x + 2, "a/b": x + 3, "a": {"b": x}}
    again = round_trip(tree, tmp_path)
    assert torch.equal(again["again"], x)
    assert torch.equal(again["part"], x[2:4])
    assert torch.equal(again[1], x + 1)
    assert torch.equal(again["1"], x + 2)
    assert torch.equal(again["a/b"], x + 3)
    assert torch.equal(again["a"]["b"], x)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": {"b": [0, object()]}}, "/a/b/1 is a object"),
        ({"f": print}, "/f is a builtin_function_or_method"),
        ({"a": {(1, 2): 3}}, r"/a has the key \(1, 2\)"),
    ],
)
def test_what_is_no_plain_value_is_refused_by_its_place(
    tree: Any, place: str, tmp_path: Path
) -> None:
    save_tree(tmp_path / "t.safetensors", {"old": 1})
    with pytest.raises(CheckpointError, match=place):
        save_tree(tmp_path / "t.safetensors", tree)
    assert load_tree(tmp_path / "t.safetensors") == {"old": 1}


@pytest.mark.parametrize("make", ["adam", "sgd", "rmsprop"])
def test_optimizer_states_come_back(make: str, tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    optimizer: torch.optim.Optimizer = {
        "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
    }[make](module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state, again = optimizer.state_dict(), round_trip(optimizer.state_dict(), tmp_path)
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    for key, entries in state["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(again["state"][key][name]), torch.as_tensor(value))


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at any moment of the writing leaves the old file."""
    path = tmp_path / "t.safetensors"
    save_tree(path, {"x": torch.zeros(3)})
    real = safetensors.torch.save_file

    def dies_half_way(tensors: Any, file: Path, metadata: Any) -> None:
        real(tensors, file, metadata)
        Path(file).write_bytes(Path(file).read_bytes()[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", dies_half_way)
    with pytest.raises(OSError, match="No space"):
        save_tree(path, {"x": torch.ones(3)})
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", dies_half_way)
    with pytest.raises(TypeError):
        save_tree(path, {"x": torch.ones(3)})
    assert torch.equal(load_tree(path)["x"], torch.zeros(3))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    (tmp_path / ".file.part").touch(0o600)  # of a run that was killed
    before = os.umask(umask)
    try:
        save_tree(tmp_path / "file", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"a": torch.ones(3)})
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunPermissionError, match=f"{path}.*No space left.*intact"):
        save_tree(path, {"a": torch.zeros(3)})
    assert contents(tmp_path) == before


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            load_tree(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tree(path, {"x": torch.arange(5.0), "note": "text"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_tree(path)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tree(path, {"x": torch.arange(5.0), "note": "text"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_tree(path)


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_disguise_is_refused_and_never_opened(how: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "model.safetensors", tmp_path / "mark"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"weights": Bomb(mark)}))
    else:
        torch.save({"weights": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        pv.load_weights(small_vae(), path)
    assert not mark.exists()


def test_a_safetensors_file_of_others_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one of pyro_vae"):
        load_tree(path)


@pytest.mark.parametrize(
    "header",
    ["{", "[1", '{"dict": 5}', '{"dict": [5]}', '{"tensor": "y"}', '{"tensor": []}', '{"what": [0',
     '{"dict": [[{}, 1]]}', '{"a": 1, "b": 2}', '{"list": 7}'],
)  # fmt: skip
def test_a_damaged_header_is_a_checkpoint_error(header: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"x": torch.zeros(2)}
    metadata = {HEADER: f"{_checksum(header, tensors)} {header}"}
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        load_tree(path)


def test_equal_trees_make_equal_files(tmp_path: Path) -> None:
    for i in range(8):
        save_tree(tmp_path / f"{i}", {"weights": weights(small_vae()), "state": {"step": 3}})
    assert len(set(contents(tmp_path).values())) == 1


def test_weights_of_another_architecture_change_nothing() -> None:
    wide, vae = small_vae(hidden=9), small_vae()
    before = {name: tensor.clone() for name, tensor in weights(vae).items()}
    with pytest.raises(CheckpointError, match=r"another architecture.*has shape \(9,\)") as caught:
        set_weights(vae, weights(wide))
    assert "(and " in str(caught.value)
    deeper = OrderedDict(weights(vae), extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match='no "extra" in the model'):
        set_weights(vae, deeper)
    deeper.pop("extra")
    name, _ = deeper.popitem()
    with pytest.raises(CheckpointError, match=f'no "{name}" in the checkpoint'):
        set_weights(vae, deeper)
    assert identical(vae, before)


def test_tied_weights_and_buffers_round_trip(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight
            nn.init.constant_(self.a.weight, value)
            self.register_buffer("view", self.a.weight.detach()[0])
            self.register_buffer("scratch", torch.zeros(1), persistent=False)
            self.norm = nn.BatchNorm1d(2)
            nn.init.constant_(self.norm.running_mean, value)

    source, target = Tied(1.5), Tied(-2.0)
    pv.save_weights(source, tmp_path / "w.safetensors")
    pv.load_weights(target, tmp_path / "w.safetensors")
    assert identical(source.state_dict(), target.state_dict())
    assert target.b.weight is target.a.weight


def test_weights_are_saved_where_text_or_a_path_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae()
    monkeypatch.chdir(tmp_path)
    pv.save_weights(vae, "w.safetensors")
    pv.save_weights(vae, tmp_path / "path.safetensors")
    files = contents(tmp_path)
    assert files["w.safetensors"] == files["path.safetensors"]
    other = small_vae(seed=1)
    assert not identical(weights(other), weights(vae))
    pv.load_weights(other, "w.safetensors")
    assert identical(weights(other), weights(vae))
    with pytest.raises(RunPermissionError, match="cannot write nowhere/w"):
        pv.save_weights(vae, "nowhere/w.safetensors")


def test_a_file_without_weights(tmp_path: Path) -> None:
    save_tree(tmp_path / "t.safetensors", {"note": 1})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        pv.load_weights(small_vae(), tmp_path / "t.safetensors")
    assert contents(tmp_path) == before
