"""A compiled program on a GPU as one launch: captured as a CUDA graph, then replayed.

Each kernel of a small network takes less time than its launch does. A captured graph launches them
all at once, but it reads and writes the memory that it was captured with. So arguments are copied
into buffers of the graph's own, and where anything else has moved since, or a number on the CPU has
changed, the program is captured anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiled.fused import Call
from pyro_vae.compiled.program import Program

# calls before a capture, on a stream of their own: torch asks for a few
SETTLED = 3

Outputs = list[Tensor]
Capture = Callable[[Callable[[], Outputs], torch.device], Callable[[], Outputs]]


class Replayed:
    """Runs compiled programs: those on a GPU a few times as they are, and captured from then on.

    Args:
        capture: makes something that repeats a function, without running it.
        device_type: of the devices where it can.
    """

    def __init__(self, capture: Capture | None = None, device_type: str = "cuda") -> None:
        self._capture = capture or cuda_graph
        self._device_type = device_type
        self._captured: dict[Program, _Captured] = {}
        self._failed = False

    def __call__(self, call: Call) -> Outputs:
        """What the program computes. On a GPU the tensors hold until the next call."""
        device = call.program.device
        if device.type != self._device_type or self._failed:
            return call.run().outputs
        where = tuple(map(self._address, call.captured))
        captured = self._captured.get(call.program)
        if captured is None or captured.where != where:
            captured = self._captured[call.program] = _Captured(where)
        if captured.replay is None and captured.runs == SETTLED:
            self._try_to_capture(captured, call, device)
        if captured.replay is None:
            captured.runs += 1
            with _side_stream(device):
                return call.run().outputs
        return captured(call.arguments)

    def again(self, call: Call) -> Outputs:
        """The same, where everything but the arguments is known to be where it was."""
        captured = self._captured.get(call.program)
        if captured is None or captured.replay is None:
            return self(call)
        return captured(call.arguments)

    def _address(self, tensor: Tensor) -> Any:
        """Where a tensor lies; a number elsewhere, which is read at capture alone, as its value."""
        if tensor.device.type != self._device_type and tensor.dim() == 0:
            return repr(tensor.item())  # NaN is not equal to itself
        return tensor.data_ptr()

    def _try_to_capture(self, captured: _Captured, call: Call, device: torch.device) -> None:
        if call.program.obstacle is not None:
            _warn(call.program.obstacle)
            return
        captured.buffers = [_memory(argument).clone() for argument in call.arguments]
        onto_buffers = call.given([
            buffer.as_strided(argument.shape, argument.stride())
            for buffer, argument in zip(captured.buffers, call.arguments, strict=True)
        ])  # fmt: skip
        try:
            captured.replay = self._capture(lambda: onto_buffers.run().outputs, device)
        except RuntimeError as error:
            self._failed = True
            self._captured.clear()
            _warn(str(error).strip().splitlines()[0])


@dataclass
class _Captured:
    """A program that finds everything but its arguments where it was."""

    where: tuple[Any, ...]
    runs: int = 0
    buffers: list[Tensor] = field(default_factory=list)
    replay: Callable[[], Outputs] | None = None

    def __call__(self, arguments: list[Tensor]) -> Outputs:
        """Replay it on these."""
        assert self.replay is not None
        torch._foreach_copy_(self.buffers, [*map(_memory, arguments)], non_blocking=True)
        return self.replay()


def _memory(tensor: Tensor) -> Tensor:
    """The memory that a tensor lies in, from its first number to its last, whatever the strides
    that it was compiled for: in a row, where a clone would lay it out anew."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((last + 1 if tensor.numel() else 0,), (1,))


def _warn(reason: str) -> None:
    warnings.warn(f"running without a captured CUDA graph: {reason}", stacklevel=6)


def cuda_graph(function: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
    """Capture a function as a CUDA graph. torch's generators advance from replay to replay."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with _capturing(graph, device):
            outputs = function()
    except RuntimeError:
        # torch leaves its stream current, its allocator asking the failed graph, and its generator
        # in the midst of the capture, which the end of any other gets it out of
        _FAILED.append(graph)
        with torch.cuda.device(device):
            torch.cuda.set_stream(before)
        with _capturing(torch.cuda.CUDAGraph(), device):
            torch.zeros(1, device=device)
        raise

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


_FAILED: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Capture what the body has the device do."""
    with (
        torch.cuda.device(device),
        # torch's own stream is of the device that it captured on first; other threads (of a
        # DataLoader, say) may go on using the GPU meanwhile
        torch.cuda.graph(graph, stream=_side_stream_of(device), capture_error_mode="thread_local"),
    ):
        yield


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run the body on a stream of its own, in its place among the work of the current one."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), _side_stream_of(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


@cache
def _side_stream_of(device: torch.device) -> torch.cuda.Stream:
    # always the same: cuBLAS keeps memory for each that it has seen
    return torch.cuda.Stream(device)
