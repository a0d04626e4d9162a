"""Which line of a program an error is about, and who called into torch."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

REMEDY = (
    "Compute with tensors instead (torch.where for a choice, a mask for a subset), pass a Python "
    "number as an argument, or run this program without compiling it"
)


# what lies between the one who calls and us
_BETWEEN = (
    "torch.overrides", "torch._tensor", "torch.functional",
    "torch._compile", "torch._dynamo.eval_frame",
    "pyro_vae.compiled.where", "pyro_vae.compiled.answers", "pyro_vae.compiled.indexing",
    "pyro_vae.compiled.recorder",
)  # fmt: skip
# whose lines tell why a line of the user's asks for something
_EXPLAINING = ("/pyro/", "/torch/distributions/", "/torch/nn/")


def where(error: Exception) -> str:
    """The line that raised an error."""
    return _describe(traceback.extract_tb(error.__traceback__))


def where_now() -> str:
    """The line of the program that runs now, and none of whoever compiles it."""
    stack = traceback.extract_stack()
    entered = [
        i for i, frame in enumerate(stack) if frame.name in ("_run", "program")
        and frame.filename.endswith(("compiled/record.py", "compiled/trace.py"))
    ]  # fmt: skip
    return _describe(stack[max(entered, default=0) :])


def _describe(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that the user wrote, and where in Pyro or torch it led to; a line of this
    library, or of Pyro's, where the user wrote none."""
    for libraries in (("torch", "pyro", "pyro_vae"), ("torch", "pyro_vae/compiled")):
        for i, frame in reversed([*enumerate(stack)]):
            foreign = any(f"/{library}/" in frame.filename for library in libraries)
            if frame.line and not foreign and frame.filename != contextlib.__file__:
                place = f"{frame.filename}, line {frame.lineno}, in {frame.name}"
                return f'"{frame.line}" ({place}{_led_to(stack[i + 1 :])})'
    return "the program"


def _led_to(deeper: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of Pyro's or of torch's modules and distributions, if any."""
    for frame in reversed(deeper):
        for library in _EXPLAINING:
            if library in frame.filename:
                file = frame.filename[frame.filename.rindex(library) + 1 :]
                return f"; {file}, line {frame.lineno}"
    return ""


def caller() -> tuple[str, str]:
    """Module and name of the function that made the call."""
    frame = calling_frame()
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def calling_frame() -> FrameType:
    """Of the function that made the call: outside of torch's own frames, and of who asks here."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame
