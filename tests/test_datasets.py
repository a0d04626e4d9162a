"""The catalogue: what `load` returns, its splits, its binarisation, and the real files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits

from pyro_vae import datasets
from pyro_vae.data import Data, Split
from pyro_vae.datasets import DATASETS, DataSet, Part, Protocol, Store, images, load
from pyro_vae.datasets.splits import as_filed, permutation
from pyro_vae.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    ShapeError,
    SupportError,
    UnknownNameError,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's files, or writes among them."""
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.delenv("PYRO_VAE_MIRROR", raising=False)
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))


def sizes(data: Data) -> tuple[int, ...]:
    return tuple(0 if s is None else len(s) for s in (data.train, data.valid, data.test))


def sorted_rows(x: np.ndarray) -> np.ndarray:
    return x[np.lexsort(x.T)]


# --- digits: the embedded default ------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    data = load("digits")
    assert sizes(data) == (1297, 250, 250)
    assert data.image_shape == (8, 8)
    assert data.valid is not None
    parts = (data.train, data.valid, data.test)
    ours = np.concatenate([np.c_[s.x.numpy(), s.y.numpy()] for s in parts])
    theirs = load_digits()
    expected = np.c_[theirs.data / 16, theirs.target]
    assert np.array_equal(sorted_rows(ours), sorted_rows(expected))
    assert data.preparation["split"] == "shuffled"


def test_the_fixed_shuffle_stays_the_same() -> None:
    """A published split must outlive upgrades: these rows were written down once."""
    assert permutation(1797)[:5].tolist() == PINNED
    target = load_digits().target
    assert load("digits").train.y[:5].tolist() == target[PINNED].tolist()


PINNED = [1081, 1707, 927, 713, 262]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_have_the_type_asked_for(dtype: torch.dtype) -> None:
    data = load("digits", dtype=dtype, binarize="fixed")
    assert data.train.x.dtype == data.test.x.dtype == dtype
    assert data.train.y.dtype == torch.int64
    reference = load("digits", binarize="fixed").test.x
    assert torch.equal(data.test.x.float(), reference), "one seed, one test set at any precision"


# --- binarisation ----------------------------------------------------------------------------


def test_dynamic_draws_differ_at_each_visit_and_have_the_intensities_as_mean() -> None:
    data = load("digits", binarize="dynamic")
    p = data.train.x.double()
    assert ((p > 0) & (p < 1)).any(), "the training rows stay intensities"
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([data.train.draw(data.train.x, generator) for _ in range(20)]).double()
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(draws[0], draws[1])
    # A sum of independent Bernoullis: |z| > 5 happens by chance once in 1.7 million.
    z = (draws.sum() - 20 * p.sum()) / (20 * (p * (1 - p)).sum()).sqrt()
    assert abs(z) < 5
    # The same at each of the 64 pixels: some |z| > 6 by chance once in 8 million.
    spread = (20 * (p * (1 - p)).sum(0)).sqrt()
    z = ((draws.sum((0, 1)) - 20 * p.sum(0)) / spread)[spread > 0]
    assert z.abs().max() < 6


def test_dynamic_and_fixed_share_their_fixed_draws() -> None:
    dynamic, fixed = (load("digits", binarize=b, seed=3) for b in ("dynamic", "fixed"))
    for part in ("train", "valid", "test"):
        ours, theirs = getattr(dynamic, part), getattr(fixed, part)
        assert theirs.draw is None
        assert torch.equal(ours.fixed().x, theirs.x)
        assert torch.equal(ours.y, theirs.y)
    assert dynamic.valid.draw is None
    assert dynamic.test.draw is None


@pytest.mark.parametrize("binarize", ["dynamic", "fixed"])
def test_the_seed_decides_the_draws_and_nothing_else(binarize: str) -> None:
    a, again, other = (load("digits", binarize=binarize, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.test.x, again.test.x)
    assert not torch.equal(a.test.x, other.test.x)
    assert torch.equal(a.test.y, other.test.y)
    assert not torch.equal(a.train.fixed().x, other.train.fixed().x)


def test_parts_with_equal_rows_get_different_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Part(np.full((50, 50), 0.5))
    _register(monkeypatch, {"train": half, "valid": half, "test": half})
    data = load("tiny", binarize="fixed")
    # Shared draws would agree everywhere; independent ones agree in 1250 ± 25 of 2500 places.
    for a, b in ((data.train, data.valid), (data.train, data.test), (data.valid, data.test)):
        assert abs((a.x == b.x).sum().item() - 1250) < 6 * 25


def test_threshold_is_above_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.array([[0.0, 0.5, 0.5000001, 1.0]])
    _register(monkeypatch, {"train": Part(x), "test": Part(x)})
    assert load("tiny", binarize="threshold").test.x.tolist() == [[0, 0, 1, 1]]


def test_intensities_stay_by_default() -> None:
    data = load("digits")
    assert data.train.draw is None
    assert torch.equal(data.train.x * 16, (data.train.x * 16).round())
    assert data.train.x.unique().numel() == 17


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("mnits", {}, UnknownNameError, ["'mnits'", "did you mean 'mnist'", *DATASETS, ".npz"]),
        ("MNIST", {}, UnknownNameError, ["did you mean 'mnist'"]),
        (None, {}, UnknownNameError, ["got None", *DATASETS]),
        ("digits", {"split": "burda"}, UnknownNameError, ["'burda'", "digits", "'shuffled'"]),
        ("mnist", {"split": "burder"}, UnknownNameError, ["mean 'burda'", "'larochelle'"]),
        (
            "digits",
            {"binarize": "dynamics"},
            UnknownNameError,
            ["mean 'dynamic'", "'fixed'", "'threshold'", "None"],
        ),
        (
            "static_binarized_mnist",
            {"binarize": "dynamic"},
            ConfigError,
            ["static_binarized_mnist", "binary already", "'dynamic'"],
        ),
        ("caltech101_silhouettes", {"binarize": "fixed"}, ConfigError, ["binary already"]),
        ("digits", {"dtype": torch.int64}, ConfigError, ["int64", "floating point"]),
        ("digits", {"seed": -1}, ConfigError, ["-1"]),
        ("rows.csv", {"split": "burda"}, ConfigError, ["'burda'", "rows.csv"]),
        ("omniglot", {}, DataError, ["chardata.mat", "github.com/yburda", "checksum"]),
        ("frey_faces", {}, DataError, ["frey_rawface.mat", "roweis", "by hand"]),
        ("mnist", {"folder": "/nowhere/at/all"}, DataError, ["/nowhere/at/all"]),
    ],
)
def test_refusals_name_the_value_and_the_way_out(
    name: str, options: dict, error: type[Exception], says: list[str]
) -> None:
    with pytest.raises(error) as caught:
        load(name, **options)
    for words in says:
        assert words in str(caught.value)


def test_a_file_to_supply_is_asked_for_at_the_folder_and_at_the_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("omniglot", folder=tmp_path)
    for place in (tmp_path, tmp_path / "cache"):
        assert str(place / "omniglot" / "chardata.mat") in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "error", "says"),
    [
        ({"train": np.zeros((0, 3))}, DataError, ["tiny, train", "(0, 3)"]),
        ({"test": np.array([[0.0, 1.0], [1.0, 1.5]])}, SupportError, ["1.5", "row 1, column 1"]),
        ({"test": np.array([[0.0, np.nan]])}, DataError, ["tiny, test", "nan", "row 0, column 1"]),
        ({"test": np.zeros((2, 3))}, ShapeError, ["'train': 2", "'test': 3"]),
        ({"test": np.array([["a", "b"]])}, DataError, ["<U1"]),
    ],
)
def test_bad_values_are_placed(
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, np.ndarray],
    error: type[Exception],
    says: list[str],
) -> None:
    good = {"train": np.zeros((4, 2)), "test": np.zeros((4, 2))}
    _register(monkeypatch, {part: Part(x) for part, x in (good | parts).items()})
    with pytest.raises(error) as caught:
        load("tiny", binarize="fixed")
    for words in says:
        assert words in str(caught.value)


def _register(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part]) -> None:
    entry = DataSet(lambda store: parts, None, {"all": Protocol(as_filed, "as it is")}, "a test")
    monkeypatch.setitem(DATASETS, "tiny", entry)


def test_the_catalogue_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    _register(monkeypatch, {"train": Part(np.eye(3)), "test": Part(np.eye(3))})
    data = load("tiny")
    assert sizes(data) == (3, 0, 3)
    assert datasets.names()[-1] == "tiny"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import pyro_vae.datasets, sys; print(*{m.split('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sklearn", "scipy", "pooch", "requests"} & set(run.stdout.split())


# --- files of the published layout, made here --------------------------------------------------


def test_omniglot_is_turned_upright(tmp_path: Path) -> None:
    """Against the reshape of the published code: rows in Fortran order."""
    rng = np.random.default_rng(0)
    train = np.zeros((784, 24_345), np.uint8)
    test = np.zeros((784, 8_070), np.uint8)
    train[:, :3] = rng.integers(0, 2, (784, 3))
    test[:, -2:] = rng.integers(0, 2, (784, 2))
    target = np.eye(50, dtype=np.uint8)[:, np.arange(24_345) % 50]
    (tmp_path / "omniglot").mkdir()
    savemat(
        tmp_path / "omniglot" / "chardata.mat",
        {"data": train, "testdata": test, "target": target},
        do_compression=True,
    )
    data = load("omniglot", folder=tmp_path, split="burda")
    assert sizes(data) == (24_345, 0, 8_070)
    upright = train.T.reshape(-1, 28, 28).reshape(-1, 784, order="F")
    assert np.array_equal(data.train.x.numpy(), upright)
    assert np.array_equal(data.test.x[-1].reshape(28, 28).numpy(), test[:, -1].reshape(28, 28).T)
    assert data.train.y[:3].tolist() == [0, 1, 2]
    assert data.test.y is None
    assert sizes(load("omniglot", folder=tmp_path)) == (23_000, 1_345, 8_070)


def test_caltech_figures_are_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": 4100, "val": 2264, "test": 2307}
    image = np.ones((28, 28), np.uint8)
    image[2:5, 20] = 0  # a short upright bar, on a background of 1
    columns = image.ravel(order="F")
    arrays = {f"{k}_data": np.tile(columns, (n, 1)) for k, n in rows.items()}
    arrays |= {f"{k}_labels": np.full((n, 1), 7) for k, n in rows.items()}
    (tmp_path / "caltech101_silhouettes").mkdir()
    savemat(tmp_path / images.CALTECH.path, arrays, do_compression=True)
    with pytest.raises(CorruptFileError, match=r"split1\.mat: expected sha256:eb67.*found"):
        load("caltech101_silhouettes", folder=tmp_path)
    monkeypatch.setattr(images, "CALTECH", replace(images.CALTECH, checksum=None))
    data = load("caltech101_silhouettes", folder=tmp_path)
    assert sizes(data) == (4100, 2264, 2307)
    assert np.array_equal(data.valid.x[5].reshape(28, 28).numpy(), 1 - image)
    assert data.test.y.tolist() == [7] * 2307


@pytest.mark.parametrize(
    ("path", "arrays", "says"),
    [
        ("frey_faces/frey_rawface.mat", {"ff": np.zeros((560, 9), np.uint8)}, "(9, 560)"),
        ("frey_faces/frey_rawface.mat", {"faces": np.zeros((2, 2))}, "'ff', found ['faces']"),
        ("omniglot/chardata.mat", {"data": np.zeros((784, 5))}, "(24345, 784), found (5, 784)"),
    ],
)
def test_a_supplied_file_of_another_content_is_refused(
    tmp_path: Path, path: str, arrays: dict[str, np.ndarray], says: str
) -> None:
    (tmp_path / path).parent.mkdir()
    savemat(tmp_path / path, arrays)
    with pytest.raises(CorruptFileError) as caught:
        load(path.split("/")[0], folder=tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path / path) in str(caught.value)


# --- the real files --------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "expected", "shape"),
    [
        ("mnist", None, (50_000, 10_000, 10_000), (28, 28)),
        ("mnist", "burda", (60_000, 0, 10_000), (28, 28)),
        ("static_binarized_mnist", None, (50_000, 10_000, 10_000), (28, 28)),
        ("frey_faces", None, (1565, 200, 200), (28, 20)),
        ("frey_faces", "aevb", (1765, 0, 200), (28, 20)),
        ("frey_faces", "filmed", (1565, 200, 200), (28, 20)),
    ],
)
def test_real_splits(
    real_data: Path, name: str, split: str | None, expected: tuple, shape: tuple
) -> None:
    data = load(name, split=split, folder=real_data)
    assert sizes(data) == expected
    assert data.image_shape == shape
    assert data.features == shape[0] * shape[1]
    assert data.train.x.dtype == torch.float32
    assert data.train.x.min() >= 0
    assert data.train.x.max() <= 1


@pytest.mark.data
def test_static_mnist_has_the_published_means(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(real_data))
    data = load("static_binarized_mnist")
    assert set(data.train.x.unique().tolist()) == {0, 1}
    means = [s.x.double().mean().item() for s in (data.train, data.valid, data.test)]
    assert means == pytest.approx([0.13056, 0.13113, 0.13251], abs=5e-6)


@pytest.mark.data
def test_static_mnist_text_is_the_packed_array(real_data: Path, tmp_path: Path) -> None:
    """The array rendered as text passes the checksums published for the text files."""
    store = Store.open(real_data)
    for part, source in images.STATIC_TEXT.items():
        bits = images.read_static_mnist(store)[part].x
        text = np.full((len(bits), 2 * 784), ord(" "), np.uint8)
        text[:, ::2] = bits + ord("0")
        text[:, -1] = ord("\n")
        path = tmp_path / source.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.tobytes())
    packed = load("static_binarized_mnist", folder=real_data)
    read = load("static_binarized_mnist", folder=tmp_path)
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(read, part).x, getattr(packed, part).x)


@pytest.mark.data
def test_mnist_statistics_and_labels(real_data: Path) -> None:
    data = load("mnist", split="burda", folder=real_data)
    # Mean and deviation that every torchvision example normalises by.
    assert data.train.x.double().mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert data.train.x.double().std().item() == pytest.approx(0.3081, abs=5e-5)
    # Class counts of the test labels as LeCun's page and many tables give them.
    counts = torch.bincount(data.test.y).tolist()
    assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.y[:5].tolist() == [5, 0, 4, 1, 9]


@pytest.mark.data
def test_mnist_validates_on_its_last_ten_thousand(real_data: Path) -> None:
    held, whole = (load("mnist", split=s, folder=real_data) for s in ("larochelle", "burda"))
    assert torch.equal(torch.cat([held.train.x, held.valid.x]), whole.train.x)
    assert torch.equal(torch.cat([held.train.y, held.valid.y]), whole.train.y)


@pytest.mark.data
def test_static_mnist_is_a_draw_from_mnist(real_data: Path) -> None:
    """A binarised pixel can be one only where its intensity is not nought.

    The files keep MNIST's training images in another order, so this holds on the pixels that
    are nought in all of them; the training means agree besides.
    """
    grey = load("mnist", folder=real_data).train.x
    binary = load("static_binarized_mnist", folder=real_data).train.x
    assert binary[:, grey.amax(0) == 0].sum() == 0
    # Means of 39 million pixels whose standard error is near 2e-4 between sets of images.
    assert binary.mean().item() == pytest.approx(grey.mean().item(), abs=1e-3)


@pytest.mark.data
def test_frey_faces_are_divided_by_255(real_data: Path) -> None:
    data = load("frey_faces", split="filmed", folder=real_data)
    with np.load(real_data / "frey_faces" / "frey_faces_uint8.npz") as archive:
        frames = archive["images"].reshape(1965, 560) / np.float32(255)
    parts = (data.train, data.valid, data.test)
    assert np.array_equal(np.concatenate([s.x for s in parts]), frames)
    shuffled = load("frey_faces", folder=real_data)
    ours = np.concatenate([s.x for s in (shuffled.train, shuffled.valid, shuffled.test)])
    assert np.array_equal(sorted_rows(ours), sorted_rows(frames))
    aevb = load("frey_faces", split="aevb", folder=real_data)
    assert torch.equal(aevb.test.x, shuffled.test.x)


@pytest.mark.data
def test_frey_faces_from_the_original_matlab_file(real_data: Path, tmp_path: Path) -> None:
    """The published variable: a column a frame, of 20x28 written column by column."""
    with np.load(real_data / "frey_faces" / "frey_faces_uint8.npz") as archive:
        frames = archive["images"]
    (tmp_path / "frey_faces").mkdir()
    savemat(tmp_path / "frey_faces" / "frey_rawface.mat", {"ff": frames.reshape(1965, -1).T})
    a, b = (load("frey_faces", folder=folder) for folder in (real_data, tmp_path))
    assert torch.equal(a.train.x, b.train.x)


@pytest.mark.data
def test_a_file_with_a_flipped_byte_is_refused(real_data: Path, tmp_path: Path) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "mnist").mkdir()
    for file in (real_data / "mnist").iterdir():
        raw = bytearray(file.read_bytes())
        if file.name == name:
            raw[2000] ^= 1
        (tmp_path / "mnist" / file.name).write_bytes(raw)
    with pytest.raises(CorruptFileError, match=f"{name}: expected md5:ec29112dd5afa0.*found md5:"):
        load("mnist", folder=tmp_path)


@pytest.mark.data
def test_dynamic_mnist_visits(real_data: Path) -> None:
    data = load("mnist", binarize="dynamic", folder=real_data)
    rows: Split = data.train[:2000]
    p = rows.x.double()
    drawn = rows.draw(rows.x, torch.Generator().manual_seed(1)).double()
    z = (drawn.sum() - p.sum()) / (p * (1 - p)).sum().sqrt()
    assert abs(z) < 5  # by chance once in 1.7 million
    assert set(data.test.x.unique().tolist()) == {0, 1}
