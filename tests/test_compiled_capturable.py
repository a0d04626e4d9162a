"""What keeps a program from being captured on a GPU, for which the device "meta" stands in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.capturable import obstacle, without_raising

ON = torch.ones(3, device="meta")
NUMBER, VECTOR = torch.tensor(2.0), torch.ones(3)


def found(function: Callable[..., Tensor], *args: Tensor, handed: int = 1) -> str | None:
    graph = make_fx(function)(*args)
    return obstacle(graph, ["an argument" if i < handed else None for i in range(len(args))])


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (lambda x: x.exp().sum(), None),
        (lambda x, s: x * s, NUMBER),
        (lambda x, s: torch.where(x > s, x, 2 * s), NUMBER),  # computed on the CPU from a number
        (lambda x: x * torch.tensor(2.0), None),
        (lambda x: x + torch.randn(3, device="meta"), None),
    ],
)
def test_nothing(function: Callable[..., Tensor], other: Tensor | None) -> None:
    assert found(function, ON, *([] if other is None else [other])) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.linalg.cholesky(x.diag()),
        lambda x: torch.normal(x, x),
        lambda x: torch.normal(0.0, x),
    ],
    ids=["cholesky", "normal", "normal of a scale"],
)
def test_what_checks_values(function: Callable[..., Tensor]) -> None:
    said = found(function, ON)
    assert said is not None
    assert "waits for values of the GPU" in said


@pytest.mark.parametrize("argument", [NUMBER, VECTOR])
def test_an_argument_on_the_cpu(argument: Tensor) -> None:
    """Its value would be that of the capture for ever."""
    said = found(lambda x, s: x * s.sum(), ON, argument, handed=2)
    assert said == f"an argument of shape {tuple(argument.shape)} is on the CPU: put it on the GPU"


@pytest.mark.parametrize(
    ("function", "other", "match"),
    [
        (lambda x, v: x * v.sum(), VECTOR, "a tensor of shape (3,) is on the CPU"),
        (lambda x, s: x * s.to("meta"), NUMBER, "moves a tensor"),
        (lambda x, s: x.sum() + torch.zeros((), device="meta").copy_(s), NUMBER, "moves a tensor"),
        (lambda x, s: x + torch.zeros(3).add_(s).to("meta"), NUMBER, "moves a tensor"),
        (lambda x, s: x[torch.zeros(2, dtype=torch.long)] * s, NUMBER, "moves a tensor"),
    ],
    ids=["a vector", "a number moved", "a number copied", "made on the CPU", "indices"],
)
def test_what_moves(function: Callable[..., Tensor], other: Tensor, match: str) -> None:
    said = found(function, ON, other)
    assert said is not None
    assert match in said


def test_what_fails_is_nan_and_raises_nothing() -> None:
    """In a batch, the one that fails alone; gradients are those of what has a factor."""

    def compute(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        factor = torch.linalg.cholesky(a)
        solved = torch.linalg.solve(a, b)
        values = (factor, torch.linalg.inv(a), solved, torch.linalg.solve(a[0], b[0, :, 0]))
        (gradient,) = torch.autograd.grad(sum(value.sin().sum() for value in values), a)
        return (*values, gradient)

    a = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[1.0, 0.5], [0.5, 2.0]]], requires_grad=True)
    b = torch.tensor([[[1.0], [2.0]], [[0.3], [0.4]]])
    graph = make_fx(compute)(a, b)
    without_raising(graph)
    for found, wanted in zip(graph(a, b), compute(a, b), strict=True):
        assert torch.equal(found, wanted)
    singular = a.detach().clone()
    singular[1] = 0.0
    with pytest.raises(torch.linalg.LinAlgError):
        compute(singular.requires_grad_(), b)
    found = graph(singular, b)
    for value, wanted in zip(found[:-1], compute(a, b), strict=False):
        if len(value) == len(a) and value.dim() > 1:
            assert torch.equal(value[0], wanted[0])
            assert value[1].isnan().all()
    assert found[-1][1].isnan().all()
