"""What every evaluation stands on: its arguments checked and moved, nothing else disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_vae import precision, programs
from pyro_vae.data import Data, Split, as_tensor
from pyro_vae.errors import ConfigError, DataError, NonFiniteError
from pyro_vae.seeding import generators_put_back
from pyro_vae.typing import Program

CHUNK_BYTES = 64 * 2**20


def prepare(
    model: Program, guide: Program, x: Any, args: tuple[Any, ...]
) -> tuple[Tensor, tuple[Any, ...]]:
    """Data on the device, and real numbers in the precision, of the programs' parameters.

    Where the guide has a `check_context`, it is shown the context once, all of it, and may refuse.

    Raises:
        DataError: `x` is no array of numbers, or holds no datum.
        ConfigError: model or guide cannot be called, or the guide was never run.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise ConfigError(f"the {name} must be a Pyro program, a callable; got {program!r}")
    if isinstance(x, Split):
        x, *context = x.fixed().args
        args = (*context, *args)
    if hasattr(guide, "check_context") and args and isinstance(args[0], Tensor):
        guide.check_context(args[0])
    if isinstance(x, Data):
        raise DataError('x is a Data of several splits: give one of them, such as "data.test"')
    x = as_tensor(x)
    if x.dim() == 0 or len(x) == 0:
        raise DataError(f"x holds no datum to evaluate: its shape is {tuple(x.shape)}")
    modules = programs.modules_of(model, guide)
    for module in modules:
        if isinstance(module, AutoGuide) and module.prototype_trace is None:
            raise ConfigError(
                f"the {type(module).__name__} has no parameters yet: train it, or call it on data"
            )
    parameters = [p for module in modules for p in module.parameters()]
    like = next((p for p in parameters if p.is_floating_point()), None)

    def fit(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_inference():
            value = value.clone()  # annealing takes gradients
        if like is None or not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    with torch.inference_mode(False):
        return fit(x), tuple(map(fit, args))


def refuse_nan(values: Tensor, rows: range) -> Tensor:
    """The values `(rows, ...)`, unless one is NaN.

    Raises:
        NonFiniteError: which row's.
    """
    if values.isnan().any():
        row = rows.start + int(values.isnan().flatten(1).any(1).nonzero()[0])
        raise NonFiniteError(
            f"the log weights of row {row} are NaN: check that the datum is finite and that "
            "the parameters of model and guide are"
        )
    return values


@contextmanager
def undisturbed(*programs_: Program, tf32: bool = False) -> Iterator[None]:
    """The ground for an evaluation: no gradients, evaluation mode, full precision, no validation
    by Pyro (supports are checked once instead of at every draw); all as it was afterwards.

    Args:
        tf32: let a GPU round the factors of float32 products to TF32.
    """
    store = pyro.get_param_store()
    with (
        _precision(tf32),
        torch.inference_mode(False),  # annealing takes gradients
        torch.no_grad(),
        generators_put_back(),
        programs.evaluating(*programs_),
        store.scope(store.get_state()),
        pyro.validation_enabled(False),
    ):
        yield


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in float32 or TF32, whatever was chosen for training.

    Rounded weights do not average out over draws: TF32 costs about 0.1 nats a datum on a confident
    decoder, bfloat16 nearly 1.
    """
    with (
        precision.products(tf32),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
