"""Splits and data sets: rows, draws, and what is refused."""

import numpy as np
import pytest
import torch

from pyro_vae import Data, Split
from pyro_vae.data import UNKNOWN, as_tensor, bernoulli_draw, hide_labels, one_hot
from pyro_vae.errors import DataError


def test_bernoulli_draws_are_bits_with_the_intensity_as_mean():
    x = torch.tensor([0.0, 0.25, 0.7, 1.0])
    draws = torch.stack([bernoulli_draw(x, torch.Generator().manual_seed(i)) for i in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert draws.dtype == x.dtype
    error = (x * (1 - x) / 2000).sqrt()
    assert ((draws.mean(0) - x).abs() <= 4.5 * error).all()
    again = bernoulli_draw(x, torch.Generator().manual_seed(1))
    assert torch.equal(again, draws[1])


def test_rows_of_a_split():
    x, y = torch.rand(5, 3), torch.arange(5)
    split = Split(x, y, bernoulli_draw, seed=3)
    assert len(split) == 5
    for rows in (slice(1, 4), torch.tensor([4, 0]), [2, 2], y > 2):
        part = split[rows]
        assert torch.equal(part.x, x[rows])
        assert torch.equal(part.y, y[rows])
        assert part.draw is bernoulli_draw
        assert part.seed == 3
    assert Split(x)[1:].y is None


def test_a_fixed_split_is_drawn_once():
    split = Split(torch.rand(50, 3), torch.arange(50), bernoulli_draw, seed=3)
    state = torch.get_rng_state()
    fixed = split.fixed()
    assert torch.equal(torch.get_rng_state(), state)
    assert fixed.draw is None
    assert fixed.fixed() is fixed
    assert torch.equal(fixed.x, split.fixed().x)
    assert torch.equal(fixed.y, split.y)
    assert not torch.equal(fixed.x, Split(split.x, None, bernoulli_draw, seed=4).fixed().x)
    np.testing.assert_array_equal(np.asarray(split), fixed.x)


def test_numpy_sees_the_data_and_owns_its_copies():
    split = Split(torch.rand(4, 3))
    assert np.asarray(split, dtype=np.float32).dtype == np.float32
    before = split.x.clone()
    np.array(split)[:] = 9
    assert torch.equal(split.x, before)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.rand(5), None, r"shape \(5,\)"),
        (torch.rand(0, 5), None, r"shape \(0, 5\)"),
        (torch.rand(4, 5), torch.arange(3), "3 labels for 4 data"),
    ],
)
def test_splits_that_cannot_be(x, y, match):
    with pytest.raises(DataError, match=match):
        Split(x, y)


def test_data_knows_its_features_and_mean():
    train = Split(torch.rand(5, 6))
    data = Data(train, None, train[:2], image_shape=(2, 3))
    assert data.features == 6
    np.testing.assert_allclose(data.train_mean(), train.x.numpy().mean(0))
    assert Data(Split(torch.rand(5, 2, 3)), None, train).features == 6


def test_contexts_go_with_their_rows():
    x, context = torch.rand(5, 3), torch.arange(10.0).reshape(5, 2)
    split = Split(x, draw=bernoulli_draw, context=context)
    assert torch.equal(split[1:3].context, context[1:3])
    assert torch.equal(split[[4, 0]].context, context[[4, 0]])
    assert torch.equal(split.fixed().context, context)
    assert split.fixed().draw is None
    assert [len(Split(x).args), len(split.args)] == [1, 2]
    assert split.given(None).context is None


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (torch.zeros(4, 2), "5 data need as many contexts"),
        (torch.tensor(1.0), "as many contexts"),
        (torch.tensor([[0.0, 1.0]] * 4 + [[0.0, float("nan")]]), r"context\[4, 1\] = nan"),
        (torch.tensor([0.0, float("inf"), 0, 0, 0]), r"context\[1\] = inf"),
    ],
)
def test_contexts_that_are_refused(context, words):
    with pytest.raises(DataError, match=words):
        Split(torch.rand(5, 3), context=context)


def labelled(n: int, classes: int = 3) -> Split:
    return Split(torch.rand(n, 2), torch.arange(n) % classes)


def test_classes_as_context():
    data = Data(labelled(6), None, labelled(4)).given_classes()
    assert data.num_classes == 3
    assert torch.equal(data.train.context, torch.eye(3).repeat(2, 1))
    assert data.train.context.dtype == data.train.x.dtype
    assert data.test.context.shape == (4, 3)
    assert data.valid is None
    for labels, words in (([0, 1, 3], r"y\[2\] = 3"), ([0, -1], "= -1"), ([0.5], r"= 0\.5")):
        with pytest.raises(DataError, match=words):
            one_hot(torch.tensor(labels), 3)
    with pytest.raises(DataError, match="no labels"):
        Data(labelled(3), Split(torch.rand(2, 2)), labelled(3)).given_classes()


def test_hidden_labels_are_balanced():
    data = Data(labelled(30), labelled(6), labelled(6)).given_labels(8, seed=1)
    known = data.train.context
    counts = [int((known == label).sum()) for label in range(3)]
    assert counts == [3, 3, 2]
    assert ((known == UNKNOWN) | (known == data.train.y)).all()
    assert data.valid.context is None
    assert not torch.equal(known, hide_labels(data.train.y, 8, seed=2))
    with pytest.raises(DataError, match="10 labels of class"):
        hide_labels(torch.arange(6) % 2, 20)
    with pytest.raises(DataError, match="got -10"):
        hide_labels(torch.arange(6) % 2, -10)
    with pytest.raises(DataError, match="no training labels"):
        Data(Split(torch.rand(2, 2)), None, labelled(3)).given_labels(1)


def test_labels_that_are_hidden_already():
    """-1 is no class of its own, and None keeps what is known."""
    labels = torch.tensor([-1, 2, 0, -1, 2, 1, 0, -1])
    kept = hide_labels(labels, 3)
    assert sorted(kept.tolist()) == [-1, -1, -1, -1, -1, 0, 1, 2]
    assert (kept[labels < 0] == UNKNOWN).all()
    split = Split(torch.rand(8, 2), labels.double())
    known = Data(split, None, split).given_labels().train.context
    assert torch.equal(known, labels)
    assert torch.equal(hide_labels(torch.full((3,), -1), None), torch.full((3,), -1))
    for wrong, words in ((0.5, r"y\[1\] = 0\.5"), (-2.0, r"y\[1\] = -2")):
        with pytest.raises(DataError, match=words):
            hide_labels(torch.tensor([-1.0, wrong, 1.0]), None)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8, np.bool_])
def test_what_numpy_masks_is_nan(dtype):
    values, mask = np.array([[1, 0], [0, 1]], dtype), np.array([[True, False], [False, True]])
    x = as_tensor(np.ma.masked_array(values, mask))
    assert x.is_floating_point()
    assert x.nan_to_num(nan=-1.0).tolist() == [[-1, 0], [0, -1]]
    whole = as_tensor(np.ma.masked_array(values))
    assert torch.equal(whole, torch.from_numpy(values))
    assert as_tensor(x) is x


def test_arrays_of_any_layout_will_do_and_other_things_will_not():
    x = np.arange(6.0).reshape(2, 3)
    x.flags.writeable = False
    for array in (x, x[::-1, ::-1][::-1, ::-1], np.asfortranarray(x), x.tolist()):
        assert torch.equal(as_tensor(array), torch.arange(6.0).reshape(2, 3))
    for nothing in (None, "digits", ["a"], [[1.0, 2.0], [3.0]], (x, x), {"x": x}):
        with pytest.raises(DataError, match=f"type {type(nothing).__name__} is no array of num"):
            as_tensor(nothing)
