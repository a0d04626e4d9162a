"""A Pyro computation run as compiled graphs: one for each kind of arguments it is called with."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch._C import _autograd as autograd
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from tqdm import tqdm

from pyro_vae import precision
from pyro_vae.compiled.inputs import signature
from pyro_vae.compiled.places import Territory, stands_for_another
from pyro_vae.compiled.program import Backend, Program, Results
from pyro_vae.errors import CompileError, PyroVAEError
from pyro_vae.seeding import generators_put_back

logger = logging.getLogger("pyro_vae")

# a computation: tensors, the loss first, and a static rest that may differ by kind of arguments
Computation = Callable[..., tuple[Sequence[Tensor], Any]]
_MANY, _FEW = 16, 4
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


class Fused:
    """Compiles `computation` at the first call with each kind of arguments, and remembers it.

    Of one kind are calls whose tensors agree in shape, strides, dtype, device and whether they
    require a gradient, whose other arguments are equal, and that find gradients, autocast, default
    dtype and the programs' own Python attributes (`training` among them) alike.

    Args:
        computation: any function of tensors, plain Python values, and lists, tuples and
            dictionaries of these.
        territory: what the computation uses.
        backend: compiles a graph.
    """

    def __init__(
        self,
        computation: Computation,
        territory: Territory,
        backend: Backend,
    ) -> None:
        self._computation = computation
        self._territory = territory
        self._backend = backend
        self._programs: dict[Any, list[Program]] = {}
        self._numbers: dict[Any, list[tuple[float, ...]]] = {}  # that programs were made for

    @property
    def seconds(self) -> list[dict[str, float]]:
        """What each compilation took, "trace" and "compile" (the check included)."""
        return [p.seconds for programs in self._programs.values() for p in programs]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Any]:
        """The computation's tensors, the first differentiable, and its static rest."""
        return self.prepare(*args, **kwargs).differentiable()

    def prepare(self, *args: Any, **kwargs: Any) -> Call:
        """The compiled program for these arguments, made if there is none, and its inputs."""
        if _PYRO_STACK:
            names = [type(handler).__name__ for handler in _PYRO_STACK]
            raise CompileError(
                f"a compiled program does not see the effect handlers around its call ({names}): "
                "put them inside the model or guide"
            )
        if torch._C._functorch.peek_interpreter_stack() or forward_ad._current_level >= 0:
            raise CompileError(
                "a compiled loss knows its gradient already, and no transform of torch.func and "
                "no forward-mode derivative: take that of the eager loss, or the gradient with "
                "autograd"
            )
        leaves, structure = flatten(args, kwargs)
        read = {
            id(leaf): leaf.resolve_conj().resolve_neg()
            for leaf in leaves if isinstance(leaf, Tensor) and stands_for_another(leaf)
        }  # fmt: skip
        leaves = [read.get(id(leaf), leaf) for leaf in leaves] if read else leaves
        tensors = _each_once(leaves)
        key = (structure, *map(_describe, leaves), *_surroundings())
        programs = self._programs.setdefault(key, [])
        for program in programs:
            inputs = program.inputs(tensors)
            if inputs is not None:
                return Call(program, inputs)
        self._note_numbers(leaves, key)
        program = self._compile(leaves, structure)
        if program.checked:  # or it is made again
            programs.insert(0, program)
        inputs = program.inputs(tensors)
        if inputs is None:
            raise CompileError(
                "something that the program holds is another each time it is looked at (an object "
                "whose `__dict__` is a property, say), so that no graph of it could be used again"
            )
        return Call(program, inputs)

    def _note_numbers(self, leaves: list[Any], key: tuple[Any, ...]) -> None:
        """Say so where nothing but a Python number changes from call to call."""
        numbers = tuple(leaf for leaf in leaves if isinstance(leaf, float))
        kind = tuple(part for part in key if not (isinstance(part, tuple) and part[:1] == (float,)))
        values = self._numbers.setdefault(kind, [])
        values.append(numbers)
        if numbers and len(values) == _FEW:
            changed = [v for v in zip(*values, strict=True) if len(set(v)) > 1]
            shown = "; ".join(", ".join(map(str, v)) for v in changed)
            warnings.warn(
                f"compiled {_FEW} times for other values of a Python number ({shown}): pass one "
                "that changes as a tensor, torch.tensor(value)",
                stacklevel=4,
            )

    def _compile(self, leaves: list[Any], structure: Any) -> Program:
        given = _each_once(leaves)
        position = {id(tensor): n for n, tensor in enumerate(given)}
        own = [*given]  # in whose place every run has objects of its own
        count = sum(map(len, self._programs.values())) + 1
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in own)
        _tell(
            f"compiling for arguments of shape {shapes}: once, which may take a minute or more ..."
        )

        def run() -> tuple[Sequence[Tensor], Any]:
            handed = [
                own[position[id(leaf)]] if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ]
            if isinstance(structure, int):  # by position
                return self._computation(*handed)
            args, kwargs = tree_unflatten(handed, structure.tree)
            return self._computation(*args, **kwargs)

        try:
            with _alone():
                program = Program(run, own, self._territory, self._backend)
        except PyroVAEError:
            raise
        except Exception as error:
            if _fails(run):
                raise
            said = str(error).strip().split("\n")[0]
            raise CompileError(
                "compiling fails where the program itself does not, with a "
                f"{type(error).__name__}: {said}. Run it without compiling, and please report it"
            ) from error
        trace, compile = program.seconds["trace"], program.seconds["compile"]
        _tell(f"traced in {trace:.1f} s, compiled and checked in {compile:.1f} s")
        if count == _MANY:
            warnings.warn(
                f"compiled {count} times: every new shape, Python argument or Python attribute of "
                "a module is another program. Pad batches to few shapes, and pass numbers that "
                "change as tensors",
                stacklevel=2,
            )
        return program


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments and how they hang together: of tensors by position, each another,
    their number, which is quickly made and looked up."""
    plain = not kwargs and all(type(argument) is Tensor for argument in args)
    if plain and len({*map(id, args)}) == len(args):
        return list(args), len(args)
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    # as it reads, too: keys of dictionaries may be equal, such as 1, 1.0 and True
    return leaves, _Structure(tree, repr(tree), tuple(map(tensors.index, tensors)))


class _Structure(NamedTuple):
    """How arguments hang together, and which tensors among them are the same."""

    tree: TreeSpec
    reading: str
    ties: tuple[int, ...]


def _each_once(leaves: list[Any]) -> list[Tensor]:
    """The tensors among the leaves."""
    return [*{id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()]


class Call(NamedTuple):
    """A compiled program with its inputs as they are now."""

    program: Program
    inputs: list[Tensor]

    def run(self) -> Results:
        """The computation's tensors, detached, and the gradients of the first."""
        return self.program(self.inputs)

    def differentiable(self, results: Results | None = None) -> tuple[list[Tensor], Any]:
        """The computation's tensors, the first differentiable, and its static rest.

        Args:
            results: of `run`, if it was called already.
        """
        results = results or self.run()
        first, *rest = results.outputs
        if results.wanted and torch.is_grad_enabled():
            first = _Differentiable.apply((first, results.gradients), *results.wanted)
        return [first, *rest], results.static

    def given(self, arguments: Sequence[Tensor]) -> Call:
        """The same call of other arguments."""
        inputs = list(self.inputs)
        for position, argument in zip(self.program.arguments, arguments, strict=True):
            inputs[position] = argument
        return Call(self.program, inputs)

    @property
    def arguments(self) -> list[Tensor]:
        """The inputs that were handed to the call."""
        return [self.inputs[position] for position in self.program.arguments]

    @property
    def captured(self) -> list[Tensor]:
        """The inputs that the program found by itself: parameters, buffers, numbers."""
        handed = set(self.program.arguments)
        return [tensor for i, tensor in enumerate(self.inputs) if i not in handed]


def _fails(run: Callable[[], Any]) -> bool:
    """Whether a program cannot run, compiled or not."""
    with generators_put_back():
        try:
            run()
        except Exception:
            return True
    return False


@contextmanager
def _alone() -> Iterator[None]:
    """Keep out what would stand still in a graph, or have no place there.

    Torch's caches: of casts, under autocast, and of what parametrizations work out. Hooks on what
    autograd saves (those of `checkpoint`, which calls the compiled program again): a graph knows
    its gradient.
    """
    casts, parametrizations = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
    hooks = []
    while (pair := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = parametrizations
        torch.set_autocast_cache_enabled(casts)
        for pair in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(*pair)


def _tell(message: str) -> None:
    """Log it; and where somebody watches, at a terminal or in a notebook, say why nothing moves,
    beside a progress bar if any."""
    logger.info(message)
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        tqdm.write(f"pyro_vae: {message}", file=sys.stderr)


class _Differentiable(torch.autograd.Function):
    """A loss whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, results: tuple[Tensor, list[Tensor]], *wanted: Tensor) -> Tensor:
        loss, gradients = results
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise CompileError(
                "a compiled loss can be differentiated once: it holds its gradient, and not how "
                "that depends on the parameters. Take a penalty of the gradient of the eager loss"
            )
        gradients = ctx.saved_tensors
        if scale.device.type != "cpu" or _is_batched(scale) or scale.item() != 1.0:
            gradients = [gradient * scale for gradient in gradients]
        return None, *gradients


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, as `autograd.grad(..., is_grads_batched=True)` has it."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _describe(leaf: Any) -> Any:
    """What a graph assumes of an argument."""
    if type(leaf) is Tensor and leaf.layout is torch.strided:  # as nearly all are
        return signature(leaf)
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided or type(leaf) is not torch.nn.Parameter:
            raise CompileError(
                f"a compiled program takes plain dense tensors, got a {type(leaf).__name__} of "
                f"layout {leaf.layout}"
            )
        return signature(leaf)
    if isinstance(leaf, _PLAIN):
        return type(leaf), repr(leaf)  # NaN is not equal to itself, and -0.0 is to 0.0
    remedy = "pass its parts, or have the program hold it"
    if isinstance(leaf, np.ndarray | np.generic):
        remedy = "pass torch.as_tensor of it"
    raise CompileError(
        f"a compiled program takes tensors, numbers and strings, and lists, tuples and "
        f"dictionaries of these, got {type(leaf).__name__}: {remedy}"
    )


def _surroundings() -> tuple[Any, ...]:
    """The state of torch and Pyro that a program runs under."""
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        precision.of_products(),
        # by which libraries, whose results are laid out in memory as each likes
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch._C._get_deterministic_algorithms(),
        tuple(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            for device in ("cpu", "cuda")
        ),
        pyro.settings.get("module_local_params"),
        # the default device is one, and another for every `with`
        *(
            mode.device if isinstance(mode, DeviceContext) else mode
            for mode in _get_current_function_mode_stack()
        ),
        # on every module that is called; one that has no hash, by torch's number for it
        *(
            tuple(hook if isinstance(hook, Hashable) else number for number, hook in hooks.items())
            for hooks in _HOOKS
        ),
    )


_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)
