"""What turns a graph into machine code: Inductor, called on the graph as it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pyro_vae.compiled.memory import keep_freed_memory
from pyro_vae.compiled.program import Backend
from pyro_vae.errors import CompileError

aten = torch.ops.aten
_WHOLE = (
    # torch would compare with uniforms in float32, which are other draws than eager's in float64
    aten.bernoulli.default, aten.bernoulli.p,
    # of a place that is NaN it would make a number
    aten.grid_sampler_2d.default,
)  # fmt: skip
# it raises, and returns nothing: before PyTorch 2.13 it would be left out
torch.fx.node.has_side_effect(aten._linalg_check_errors.default)
_DRAWS_IN_ANY_ORDER = torch.__version__ < "2.13"
_DIVISIONS = (aten.div.Tensor_mode, aten.div.Scalar_mode)
_REMAINDERS = (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)


def resolve(backend: str | Backend, objective: Any = None) -> Backend:
    """A backend by name, `"inductor"` or one of `torch.compile`'s, or itself.

    Args:
        objective: whose graphs it compiles, if one objective's.
    """
    if backend == "inductor":
        # of Pyro's enumeration TorchInductor 2.13 makes vector code that is wrong, or writes
        # where it must not (a hidden Markov chain of 4 or 10 steps); its scalar code is right
        enumerates = isinstance(objective, TraceEnum_ELBO | TraceTMC_ELBO)
        return partial(inductor, vectorized=False) if enumerates else inductor
    if isinstance(backend, str):
        return torch._dynamo.lookup_backend(backend)
    return backend


def inductor(
    graph: fx.GraphModule, inputs: list[Tensor], vectorized: bool = True
) -> Callable[..., Sequence[Tensor]]:
    """Fuse the graph with TorchInductor. Random draws are those that eager operations make.

    Compiled kernels are kept on disk by torch (`TORCHINDUCTOR_CACHE_DIR`). On a CPU the process
    keeps the memory that steps free, see `keep_freed_memory`.

    Raises:
        CompileError: there is no compiler for the device, or it fails.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    if on_cpu:
        keep_freed_memory()
    with warnings.catch_warnings():
        # of torch's use of its own
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*_prims_common.check", category=FutureWarning)
        # of a choice that is the user's, and one of the compiler's, on a GPU
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled")
        from torch._inductor.compile_fx import compile_fx

        _prepare(graph)
        options = _options(on_cpu, vectorized)
        # torch keeps on disk what it compiled for inputs that are known by shape, not by value
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
        try:
            with (
                _decomposing(on_cpu), _drawing(), _shims_unmentioned(),
                tracing(TracingContext(mode)),
            ):  # fmt: skip
                return compile_fx(graph, fake, config_patches=options)  # type: ignore[return-value]
        except Exception as error:
            said = _said(error)
            raise CompileError(f"TorchInductor cannot compile the program: {said}") from error


def _prepare(graph: fx.GraphModule) -> None:
    """Write the graph as TorchInductor makes the right and the faster code of it."""
    from pyro_vae.compiled import convolutions, draws
    from pyro_vae.compiled.biases import add_up_biases
    from pyro_vae.compiled.elementary import approximate
    from pyro_vae.compiled.rows import make_rows

    make_rows(graph)
    draws.draw_at_once(graph)
    draws.draw_as_it_lies(graph)
    draws.draw_row_by_row(graph)
    convolutions.lay_out(graph)
    convolutions.multiply_out(graph)
    add_up_biases(graph)
    approximate(graph)


def _options(on_cpu: bool, vectorized: bool) -> dict[str, Any]:
    """What TorchInductor is told."""
    from pyro_vae.compiled.conventions import Conventions
    from pyro_vae.compiled.draws import InOrder
    from pyro_vae.compiled.matmul import FasterProducts

    # torch's own generators, so that a compiled run draws what an eager run draws
    options: dict[str, Any] = {"fallback_random": True}
    # checked once, against the eager run (`Program`), instead of at every step
    options |= {"size_asserts": False, "alignment_asserts": False}
    # on a CPU the calls of the kernels are a good part of a small step: they too in C++, and
    # what they leave for one another in one piece of memory instead of dozens
    options["cpp_wrapper"] = options["memory_planning"] = on_cpu
    options["unsafe_marked_cacheable_functions"] = _own_functions()
    if not vectorized:
        options["cpp.simdlen"] = 1
    # or a mask that is drawn in place may come after what reads it (in attention's weights)
    options["reorder_for_peak_memory"] = False
    if _DRAWS_IN_ANY_ORDER:
        options["reorder_for_locality"] = False
        options["post_grad_custom_pre_pass"] = InOrder()
    options["joint_custom_pre_pass"] = Conventions()
    options["post_grad_custom_post_pass"] = FasterProducts()
    return options


def _drawing() -> AbstractContextManager[None]:
    """See `masks_in_new_memory`; from PyTorch 2.13 on the order of things is kept without."""
    from pyro_vae.compiled.draws import masks_in_new_memory

    return masks_in_new_memory() if _DRAWS_IN_ANY_ORDER else nullcontext()


def _own_functions() -> dict[str, str]:
    """The functions of ours that stand in graphs, with what they are made of: torch keeps on disk
    what it made of graphs with these only if it is told when they change."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    from pyro_vae.compiled import biases, elementary, one_channel

    modules = (biases, elementary, one_channel)
    made_of = get_hash_for_files(tuple(module.__file__ for module in modules)).hex()
    return {
        f"{function.__module__}.{function.__name__}": made_of
        for module in modules for function in vars(module).values()
        if isinstance(function, FunctionType) and function.__module__ == module.__name__
    }  # fmt: skip


def _said(error: Exception) -> str:
    """The line that tells most of an error of TorchInductor, which may be hundreds long, and what
    may be done about those that are of the machine."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    lines = str(error).strip().splitlines() or [type(error).__name__]
    kept = (
        f"what torch keeps compiled in {cache_dir()} is whole and may be written: delete it, or "
        "set TORCHINDUCTOR_CACHE_DIR to another folder"
    )
    if "[Errno" in lines[0]:
        return f"{lines[0]}. See that {kept}"
    if not any("C++ compile" in line for line in lines):
        return lines[0]
    told = next((line for line in lines if "error:" in line), lines[0])
    return (
        f"{told}. On a CPU it needs a working C++ compiler, g++ or clang++. If there is one, see "
        f"that {kept}"
    )


@contextmanager
def _shims_unmentioned() -> Iterator[None]:
    """Without a line of log for each operation that C++ calls by way of torch's dispatcher."""
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _decomposing(on_cpu: bool) -> Iterator[None]:
    """Have TorchInductor leave `_WHOLE` alone, mind the bounds of indices, take our division that
    rounds down, our remainder and, on a CPU, our exp(x) - 1, of which it makes others (`elu`).

    (A table of our own, handed to `compile_fx`, would be part of the key of torch's cache, which
    cannot hold it.)
    """
    from torch._inductor.decomposition import decompositions

    from pyro_vae.compiled.conventions import TAKEN_APART, as_strided_scatter, from_the_start
    from pyro_vae.compiled.elementary import divide_and_round, exp_minus_one, remainder

    before = dict(decompositions)
    for operation in _WHOLE:
        decompositions.pop(operation, None)
    for operation in TAKEN_APART:
        decompositions[operation] = from_the_start(before[operation])
    decompositions[aten.as_strided_scatter.default] = as_strided_scatter
    decompositions |= dict.fromkeys(_DIVISIONS, divide_and_round)
    decompositions |= dict.fromkeys(_REMAINDERS, remainder)
    if on_cpu:
        decompositions[aten.expm1.default] = exp_minus_one
    try:
        yield
    finally:
        decompositions.clear()
        decompositions.update(before)
