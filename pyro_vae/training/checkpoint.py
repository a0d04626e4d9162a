"""Checkpoints: any tree of tensors and plain values in one safetensors file, no code in it.

A tree is made of dicts, lists, tuples, tensors, numbers, strings, booleans and None. Its tensors
are stored as tensors and the rest as JSON in the file's header, after a checksum. Equal trees make
equal files, byte for byte. Writing is atomic: whatever happens, the file on disk is a whole one,
the old or the new.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pyro_vae.errors import CheckpointError, RunPermissionError

HEADER = "pyro_vae"  # one entry of metadata, for safetensors writes several in any order


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree to `path`, atomically.

    Raises:
        CheckpointError: the tree holds something that is neither tensor nor plain value; the
            message says where.
        RunPermissionError: the file cannot be written (a full disk); the one before is intact.
    """
    encoder = _Encoder()
    header = json.dumps(encoder.encode(tree, ""))
    part = path.with_name(f".{path.name}.part")
    metadata = {HEADER: f"{_checksum(header, encoder.tensors)} {header}"}
    try:
        # safetensors makes files for their owner alone; a new file has the mode the user wants
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode
        safetensors.torch.save_file(encoder.tensors, part, metadata=metadata)
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (safetensors.SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise RunPermissionError(
            f"cannot write {path}: {error}. What was there before, if anything, is intact"
        ) from error


def load_tree(path: Path) -> Any:
    """Read a tree written by `save_tree`. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    if HEADER not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not one of pyro_vae")
    checksum, _, header = metadata[HEADER].partition(" ")
    if checksum != _checksum(header, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    try:
        return _decode(json.loads(header), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r} in its header") from error


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tensor shared by two submodules once."""
    unique = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    return {n: t.detach() for n, t in module.state_dict().items() if n in unique}


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of `weights` that later training leaves alone."""
    return {name: tensor.clone() for name, tensor in weights(module).items()}


@torch.no_grad()
def set_weights(module: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, in place.

    Raises:
        CheckpointError: names or shapes differ, that is, the checkpoint is of another
            architecture; nothing has been changed then.
    """
    target = weights(module)
    complaints = [f'no "{n}" in the checkpoint' for n in target.keys() - source.keys()]
    complaints += [f'no "{n}" in the model' for n in source.keys() - target.keys()]
    complaints += [
        f'"{n}" has shape {tuple(source[n].shape)} in the checkpoint, {tuple(t.shape)} in the model'
        for n, t in target.items()
        if n in source and source[n].shape != t.shape
    ]
    if complaints:
        more = f" (and {len(complaints) - 3} more)" if len(complaints) > 3 else ""
        raise CheckpointError(
            f"the checkpoint is of another architecture: {'; '.join(sorted(complaints)[:3])}{more}"
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write a module's weights alone, in place of any file at `path`: what to hand to others.

    Raises:
        RunPermissionError: the file cannot be written (no such folder, a full disk); the one
            before is intact.
    """
    save_tree(Path(path), {"weights": weights(module)})


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load weights from `model.safetensors` or `checkpoint.safetensors` into a module, in place.

    Raises:
        CheckpointError: the file is missing or damaged, or of another architecture.
    """
    tree = load_tree(Path(path))
    if not isinstance(tree, dict) or "weights" not in tree:
        raise CheckpointError(f"{path} holds no weights")
    set_weights(module, tree["weights"])


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of it all: safetensors itself notices a missing byte, but not a changed one."""
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


class _Encoder:
    """Turns a tree into JSON, and collects its tensors under the names of their places."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._keep(value, place)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            items = [self.encode(v, f"{place}/{i}") for i, v in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if isinstance(value, Mapping):
            return {"dict": [[self._key(k, place), self.encode(v, f"{place}/{k}")]
                             for k, v in value.items()]}  # fmt: skip
        raise CheckpointError(f"{place} is a {type(value).__name__}, which no checkpoint can hold")

    def _keep(self, value: Tensor, place: str) -> str:
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._storages:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        self._storages.add(storage)
        name = place
        while name in self.tensors:  # the keys 1 and "1", or "a/b" and "a" within "b"
            name += "'"
        self.tensors[name] = tensor
        return name

    @staticmethod
    def _key(key: Any, place: str) -> str | int:
        if not isinstance(key, str | int):
            raise CheckpointError(f"{place} has the key {key!r}; a checkpoint's are text or int")
        return key


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
