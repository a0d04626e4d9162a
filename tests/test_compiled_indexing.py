"""Masks that select, numbers that index, flags that choose: of tensors that stay what they are, and
of others."""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from compiled_helpers import agree, program, programs
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.compiled.backend import inductor
from pyro_vae.compiled.conventions import as_strided_scatter
from pyro_vae.errors import CompileError

MASK = torch.tensor([True, False, True])
HOLES = torch.tensor([1.0, torch.nan, -2.0], dtype=torch.float64)
LAST = torch.tensor(-1)
PLACES = [torch.tensor(2), torch.tensor(0)]
X = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def compiled(loss: nn.Module, backend: str = "eager") -> Any:
    return pv.compile(loss, X, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "pick",
    [
        lambda x: x[torch.arange(3) != 1],
        lambda x: x[[True, False, True]],
        lambda x: x[np.array([True, False, True])],
        lambda x: x.expand(4, 3)[1:, torch.ones(3) > 0].sum(0),
        lambda x: x.expand(2, 3)[torch.tensor([[True, False, True], [False, True, False]])],
        lambda x: x[torch.zeros(3) > 0],
        lambda x: torch.cat([x, x[torch.ones(3).copysign(torch.tensor(-1.0)) < 0]]),
        lambda x: x[MASK],
        lambda x: x[~HOLES.isnan()] * HOLES[~HOLES.isnan()],
        lambda x: x.expand(2, 3)[:, MASK],
        lambda x: x.expand(2, 3).mT[None][torch.ones(1, 3) > 0, LAST],
        lambda x: x.expand(2, 3).masked_select(MASK),
        lambda x: torch.masked_select(x, MASK[:, None]),
        lambda x: x[MASK.nonzero()],
        lambda x: x[torch.nonzero(MASK, as_tuple=True)],
        lambda x: x[torch.argwhere(MASK).squeeze(1)],
        lambda x: x[torch.where(MASK)],
        lambda x: torch.where(MASK, x, 0.0),
        lambda x: torch.stack([[x, 2 * x, 3 * x][i] for i in PLACES]),
    ],
    ids=[
        "sizes", "list", "array", "beside a slice", "two dimensions", "nothing", "all", "held",
        "what is not missing", "held, beside a slice", "two dimensions, beside a number",
        "masked_select", "masked_select, spread",
        "nonzero", "nonzero as tuple", "argwhere", "where", "where of three", "places in a list",
    ],
)  # fmt: skip
def test_values_that_are_the_same_in_every_run(pick: Any, backend: str) -> None:
    loss = program(lambda x: pick(x).sum())
    agree(loss, compiled(loss, backend), torch.randn(3))


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: torch.rand(3) > 0.5,
        lambda x: torch.zeros(3).copy_(x) > 0,
        lambda x: torch.zeros(3).uniform_() > 0.5,
        lambda x: torch.stack([x, torch.ones(3)])[1] > 0,
        lambda x: (HOLES > 0) & (x > 0),
        lambda x: pyro.param("loc").detach().expand(3) > 0,
    ],
    ids=["drawn", "copied", "drawn in place", "beside another", "of an argument", "of a parameter"],
)
@pytest.mark.parametrize(
    "select",
    [lambda x, mask: x[mask], Tensor.masked_select, lambda x, mask: x[mask.nonzero()]],
    ids=["index", "masked_select", "nonzero"],
)
def test_a_mask_that_may_vary(select: Any, mask: Any) -> None:
    with pytest.raises(CompileError, match="the shape of its result depends"):
        compiled(program(lambda x: select(x, mask(x)).sum()))


def test_a_place_in_a_list_that_may_vary() -> None:
    with pytest.raises(CompileError, match=r"x\.argmax\(\).*asks for the value of a tensor"):
        compiled(program(lambda x: [x, 2 * x, 3 * x][x.argmax()]))


class Selecting(nn.Module):
    """Uses what its buffer selects."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.mask: Tensor
        self.counts = counts
        self.register_buffer("mask", MASK.clone())

    def forward(self, x: Tensor) -> Tensor:
        selected = x[self.mask]
        if self.counts:
            self.mask.logical_not_()
        return selected


def other_values(module: Any) -> None:
    module.mask.copy_(torch.tensor([True, True, True]))


def by_numpy(module: Any) -> None:
    module.mask.numpy()[:] = [False, True, False]


def through_data(module: Any) -> None:
    module.mask.data[1] = True


def another(module: Any) -> None:
    module.mask = torch.tensor([True, False, False])


@pytest.mark.parametrize(
    "change", [other_values, by_numpy, through_data, another], ids=lambda c: c.__name__
)
def test_a_mask_that_changes_between_calls_is_another_program(change: Any) -> None:
    selecting = Selecting()
    loss = program(lambda x: selecting(x).sum())
    fused = compiled(loss)
    agree(loss, fused, X)
    assert programs(fused) == 1
    change(selecting)
    agree(loss, fused, X)
    assert programs(fused) == 2
    selecting.mask = MASK.clone()  # as it was
    agree(loss, fused, X)
    assert programs(fused) == 2


def test_a_mask_that_the_program_changes_is_refused() -> None:
    selecting = Selecting(counts=True)
    with pytest.raises(CompileError, match=r"x\[self\.mask\].*mask, which the program changes"):
        compiled(program(lambda x: selecting(x).sum()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "pick",
    [
        lambda x, i: x[i],
        lambda x, i: x.expand(4, 3)[..., i],
        lambda x, i: x.expand(4, 3)[1:, i, None],
        lambda x, i: x.expand(4, 2, 3)[i, :, torch.tensor([0, 2])],
        lambda x, i: x.expand(4, 2, 3)[:, 0, i],
        lambda x, i: x.expand(3, 2, 3)[i, ..., i],
        lambda x, i: x.expand(3, 2, 3)[None, i, :, MASK],
        lambda x, i: x.expand(3, 3)[MASK, i],
        lambda x, i: x.expand(3, 3)[MASK[:, None].expand(3, 3)][i],
    ],
    ids=[
        "alone", "at the end", "between", "apart from others", "beside a number", "twice",
        "beside a mask", "after a mask", "of what a mask selects",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "number",
    [lambda x: x.argmax(), lambda x: LAST, lambda x: -x.argmax() - 1, lambda x: (x > 9).sum()],
    ids=["of an argument", "held, from the end", "of an argument, from the end", "zero"],
)
def test_a_number_in_a_tensor_indexes_whatever_it_is(number: Any, pick: Any, backend: str) -> None:
    """Torch would select by it as a number of Python's."""
    loss = program(lambda x: pick(x, number(x)).sum())
    fused = compiled(loss, backend)
    for x in (X, X.flip(0), X.roll(1)):
        agree(loss, fused, x)
    assert programs(fused) == 1


@pytest.mark.parametrize("outside", [3, -4])
def test_a_number_that_is_out_of_bounds(outside: int) -> None:
    number = torch.tensor(0)
    loss = program(lambda x: x[number])
    fused = compiled(loss, "inductor")
    number.fill_(outside)
    with pytest.raises(IndexError, match="out of bounds"):
        fused(X)


def test_a_number_that_is_drawn_indexes() -> None:
    def body(x: Tensor) -> Tensor:
        return x[torch.randint(3, ())]

    loss = program(body)
    fused = compiled(loss)
    agree(loss, fused, X)
    assert len({fused(X).item() for _ in range(20)}) == 3


def test_correlations() -> None:
    """Pyro's LKJ takes the lower triangle by a mask."""

    def model(x: Tensor) -> None:
        root = pyro.sample("root", dist.LKJCholesky(3, 1.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=root), obs=x)

    guide, x = AutoNormal(model), torch.randn(5, 3)
    guide(x)
    loss = pv.ELBO("monte_carlo")(model, guide)
    agree(loss, pv.compile(loss, x, backend="eager"), x)


def fill_where_negative(x: Tensor) -> Tensor:
    y = x.sum() * 2
    y[y < 0] = 0.5
    return y


def fill_by_data(x: Tensor) -> Tensor:
    y = x.sum().log()
    y.data[y.data != y.data] = 0
    return y


def fill_all(x: Tensor) -> Tensor:
    y = torch.stack([x, 2 * x])
    y[x.sum() < 0] = x.mean()
    return y


def fill_whole_numbers(x: Tensor) -> Tensor:
    y = (x * 2**58).long() | 1
    y[x.sum() > 2] = 0.5
    return ((y & 1) * x).sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("body", [fill_where_negative, fill_by_data, fill_all, fill_whole_numbers])
def test_what_one_truth_value_writes(body: Any, backend: str) -> None:
    """As Pyro's stable distributions of one number do."""
    loss = program(body)
    run = compiled(loss, backend)
    for x in (X, -X, 3 * X, torch.tensor([0.1, -9.0, 3.0])):
        agree(loss, run, x)


class Choosing(nn.Module):
    """Goes one way or the other by a flag that it holds."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.flag: Tensor
        self.counts = counts
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.exp() if self.flag else x.sin()
        if self.counts:
            self.flag.logical_not_()
        return chosen if (torch.arange(3) < 3).all() else 0 * chosen


class TestChoices:
    def test_a_flag_that_is_held_chooses_and_another_value_is_another_program(self) -> None:
        choosing = Choosing()
        loss = program(choosing)
        run = compiled(loss)
        for flag in (True, False, True):
            choosing.flag.fill_(flag)
            agree(loss, run, torch.randn(3))
        assert programs(run) == 2

    def test_a_flag_that_the_program_changes(self) -> None:
        with pytest.raises(CompileError, match=r"asks for the values of .*flag, which the program"):
            compiled(program(Choosing(counts=True)))

    def test_a_choice_by_data_beside_one_by_a_flag(self) -> None:
        choosing = Choosing()
        with pytest.raises(CompileError, match=r"if choosing\(x\)\.sum\(\) > 0.*asks for"):
            compiled(program(lambda x: x if choosing(x).sum() > 0 else 2 * x))

    def test_a_choice_in_a_backward_pass(self) -> None:
        """Which is recorded no more, and so not to be taken for another's."""

        class Chosen(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient if MASK[0] else 2 * gradient

        choosing = Choosing()
        with pytest.raises(CompileError, match="asks for the value of a tensor"):
            compiled(program(lambda x: Chosen.apply(choosing(x) * pyro.param("loc"))))

    def test_attention_asks_whether_its_mask_is_causal(self) -> None:
        layer = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0).double()
        decoder = nn.TransformerDecoder(layer, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(5).double()
        loss = program(lambda x: decoder(x, x, tgt_mask=mask))
        run = pv.compile(loss, backend="eager")
        for _ in range(2):
            agree(loss, run, torch.randn(5, 2, 4, dtype=torch.float64))
        mask[0, 1] = 0.0
        agree(loss, run, torch.randn(5, 2, 4, dtype=torch.float64))
        assert programs(run) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++")
class TestBounds:
    """Of indices that are arguments, and so other ones at a later call."""

    @pytest.mark.parametrize("wrong", [-1, 3, -9])
    @pytest.mark.parametrize(
        "take",
        [
            lambda x, i: x.index_select(0, i),
            lambda x, i: x.index_add(0, i, x),
            lambda x, i: x.gather(0, i),
            lambda x, i: F.embedding(i, x[:, None]),
            lambda x, i: F.cross_entropy(x.expand(3, 3), i, reduction="none"),
        ],
        ids=["index_select", "index_add", "gather", "embedding", "cross_entropy"],
    )
    def test_what_is_beyond_is_an_error(self, take: Any, wrong: int) -> None:
        x, i = torch.randn(3), torch.tensor([2, 0, 1])
        run = inductor(make_fx(lambda x, i: [take(x, i)])(x, i), [x, i])
        torch.testing.assert_close(run(x, i)[0], take(x, i))
        with pytest.raises((IndexError, RuntimeError)):
            take(x, torch.tensor([2, wrong, 1]))
        with pytest.raises(RuntimeError, match="index out of bounds"):
            run(x, torch.tensor([2, wrong, 1]))

    def test_what_counts_from_the_end_may(self) -> None:
        def take(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
            return x[i], x.index_fill(0, i, 2.0), x.roll(2), x.flip(0), x.take(i)

        x, i = torch.randn(3), torch.tensor([2, 0, 1])
        run = inductor(make_fx(take)(x, i), [x, i])
        for index in (i, torch.tensor([-1, 0, -3])):
            for found, want in zip(run(x, index), take(x, index), strict=True):
                torch.testing.assert_close(found, want)

    @pytest.mark.parametrize(
        "cost",
        [F.cross_entropy, lambda x, labels: (x - F.one_hot(labels, 4)).square()],
        ids=["cross_entropy", "one_hot"],
    )
    def test_a_class_that_there_is_not(self, cost: Any) -> None:
        labels = torch.tensor([0, 3, 1])
        loss = program(lambda x: cost(x.expand(4, 3).T, labels).sum())
        run = compiled(loss, "inductor")
        labels.fill_(4)
        for each in (loss, run):
            with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|must be smaller"):
                each(X)
        labels.fill_(3)
        agree(loss, run, X)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    "flow",
    [
        lambda: transforms.block_autoregressive(3),
        lambda: transforms.affine_autoregressive(3, hidden_dims=[4]),
        lambda: transforms.affine_autoregressive(3, hidden_dims=[4], stable=True),
    ],
    ids=["block autoregressive", "affine autoregressive", "affine autoregressive, stable"],
)
def test_flows_that_index_by_their_buffers(flow: Any, inverse: bool) -> None:
    made = flow()
    if inverse and isinstance(made, transforms.BlockAutoregressive):
        pytest.skip("Pyro has no inverse of it")

    def body(x: Tensor) -> Tensor:
        pyro.module("flow", made)
        made.clear_cache()
        y = made.inv(x) if inverse else made(x)
        volume = made.log_abs_det_jacobian(y, x) if inverse else made.log_abs_det_jacobian(x, y)
        return y.sum() + volume.sum()

    loss = program(body)
    loss(X)
    agree(loss, compiled(loss), torch.randn(5, 3))


FROM_2_13 = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="PyTorch cannot take it apart: a CompileError"
)


def zeroed(z: Tensor, rows: Tensor) -> Tensor:
    logs = z.log()
    logs[z > 3] = 0.0
    logs[logs.isnan()] = 0.0
    return logs


@pytest.mark.parametrize(
    "write",
    [
        zeroed,
        pytest.param(lambda z, rows: z.log().index_fill(0, rows, 0.0), marks=FROM_2_13),
        pytest.param(lambda z, rows: z.log().index_copy(0, rows, z[:2]), marks=FROM_2_13),
        lambda z, rows: z.log().index_put((rows,), z[:2]),
        lambda z, rows: z.exp()[0, 0].expand(z.shape).index_put((rows,), z[:2]) * z,
        lambda z, rows: z.exp()[0, 0].expand(z.shape).select_scatter(z[1], 0, 2) * z,
        lambda z, rows: z.exp()[0].expand(z.shape).slice_scatter(z[1:3], 0, 2, 4) * z,
        lambda z, rows: z.exp()[0, 0].expand(4, 4).diagonal_scatter(z[0]) * z[:4],
    ],
    ids=["mask", "fill", "copy", "put", "put scalar", "select", "slice", "diagonal"],
)
@pytest.mark.parametrize("reduce", [Tensor.sum, lambda t: t.sum(0).exp().sum()])
def test_gradients_of_what_is_written_over(
    write: Callable[..., Tensor], reduce: Callable[[Tensor], Tensor]
) -> None:
    """That of a sum is one number in memory, and TorchInductor wrote into it."""

    def compute(z: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        loss = reduce(write(z, rows))
        return (loss, *torch.autograd.grad(loss, z))

    rows = torch.tensor([0, 2])
    z = torch.linspace(0.5, 2.5, 24, dtype=torch.float64).view(6, 4).requires_grad_()
    run = inductor(make_fx(compute)(z, rows), [z, rows])
    for scale in (1.0, 2.0, -1.0):
        other = (scale * z.detach()).requires_grad_()
        for found, want in zip(run(other, rows), compute(other, rows), strict=True):
            torch.testing.assert_close(found, want, equal_nan=True)


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda t: t[1],
    "columns": lambda t: t[:, 1:3],
    "steps": lambda t: t[::2, ::3],
    "diagonals": lambda t: t.diagonal(0, 1, 2),
    "transposed": lambda t: t.transpose(0, 2)[1:4:2],
    "number": lambda t: t[2, 3, 4],
    "flat": lambda t: t.as_strided((7,), (7,), 7),
    "whole": lambda t: t,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_part_is_written_by_looking_it_up(part: str, order: tuple[int, ...]) -> None:
    shape = [(3, 4, 5)[i] for i in order]
    whole = torch.arange(60.0).view(shape).permute(*np.argsort(order).tolist())
    view = PARTS[part](whole)
    values = -torch.rand(view.shape)
    place = list(view.shape), list(view.stride()), view.storage_offset()
    found = as_strided_scatter(whole, values, *place)
    assert torch.equal(found, torch.as_strided_scatter(whole, values, *place))


def test_a_part_whose_numbers_interleave_is_left_alone() -> None:
    part = torch.rand(2, 3)
    assert as_strided_scatter(torch.rand(9), part, [2, 3], [1, 2], 0) is not NotImplemented
    assert as_strided_scatter(torch.rand(9), part, [2, 3], [3, 2], 0) is NotImplemented


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t[1].zero_(),
        lambda t: t[:, 1:3].zero_(),
        lambda t: t.T[1].copy_(t[:, 0].detach()),
        lambda t: t.diagonal().zero_(),
    ],
    ids=["row", "columns", "column", "diagonal"],
)
def test_writes_beside_one_another(write: Callable[[Tensor], Tensor]) -> None:
    """The gradient of one was read before it was zero where the other had been written over."""

    def compute(a: Tensor, b: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        first = a * 1.0
        write(first)
        second = b.sin()
        second[rows] += b
        loss = -(first.sum() + second.mean())
        return (loss, *torch.autograd.grad(loss, [a, b]))

    rows = torch.arange(5)
    a = (torch.arange(1.0, 21).view(5, 4) / 10).double().requires_grad_()
    b = (torch.arange(-8.0, 12).view(5, 4) / 4).double().requires_grad_()
    run = inductor(make_fx(compute)(a, b, rows), [a, b, rows])
    for found, want in zip(run(a, b, rows), compute(a, b, rows), strict=True):
        torch.testing.assert_close(found, want)


def test_a_row_written_over_beside_an_indexed_write() -> None:
    a, b = (nn.Parameter(torch.rand(5, 4, dtype=torch.float64)) for _ in range(2))

    def model(x: Tensor, rows: Tensor) -> None:
        first = a * x
        first[1] = 0.0
        second = (b * x).sin()
        second[rows] += b * x
        pyro.factor("x", first.sum() + second.mean())

    loss = pv.ELBO()(model, lambda *_: None)
    rows = torch.arange(5)
    x = torch.full((5, 4), -0.5, dtype=torch.float64)
    x[1] = 0.0  # as in padded data, where the gradient is zero either way
    compiled = pv.compile(loss, x, rows)
    for scale in (1.0, -2.0):
        other = scale * (x + 1)
        wanted = torch.autograd.grad(loss(other, rows), [a, b])
        for found, want in zip(
            torch.autograd.grad(compiled(other, rows), [a, b]), wanted, strict=True
        ):
            torch.testing.assert_close(found, want)
