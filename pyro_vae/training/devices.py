"""Where training runs and in which precision: a launched Lightning Fabric, or a typed error."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import DoublePrecision, MixedPrecision, Precision

from pyro_vae.errors import ConfigError, DeviceError

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class Double(DoublePrecision):
    """float64 throughout; the terms leave it as float64 too."""

    def convert_output(self, data: Any) -> Any:
        return data


class BFloat16Autocast(MixedPrecision):
    """Matrix products in bfloat16, parameters and data as they are.

    Fabric's own would round the data to eight bits as well: the log-density of other data.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_input(self, data: Any) -> Any:
        return data


def launch(device: str, devices: int, precision: str) -> Fabric:
    """A launched Fabric on the device asked for.

    Raises:
        DeviceError: the device is unknown, or torch does not see it.
        ConfigError: the precision or the number of devices means nothing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}")
    if devices < 1:
        raise ConfigError(f"devices must be at least 1, got {devices}")
    kind, index = _resolve(device)
    if index is not None and devices > 1:
        raise ConfigError(f"device={device!r} is one device, and devices={devices} asks for more")
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise DeviceError(f"devices={devices}: torch sees {torch.cuda.device_count()} CUDA devices")
    fabric = Fabric(
        accelerator=kind,
        devices=devices if index is None else [index],
        strategy="auto" if devices == 1 else "ddp",
        plugins=_plugin(precision, kind),
    )
    fabric.launch()
    return fabric


def parameter_dtype(module: torch.nn.Module, precision: str) -> torch.dtype:
    """The dtype that parameters have in training, and so the data."""
    if precision == "64-true":
        return torch.float64
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _resolve(device: str) -> tuple[str, int | None]:
    """Kind and index of a device that is there."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise DeviceError(f'device is "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={device!r} was asked for, and torch sees no CUDA device")
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return kind, int(index) if index else None


def _plugin(precision: str, kind: str) -> Precision:
    if precision == "64-true":
        return Double()
    return BFloat16Autocast(kind) if precision == "bf16-mixed" else Precision()
