"""Parsers and your own files: round trips, and every kind of damage by name and place."""

import gzip
import io
import itertools
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.sparse import csr_matrix

from pyro_vae.datasets import load, load_file
from pyro_vae.datasets.formats import read_amat, read_idx, read_mat, read_npz
from pyro_vae.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    ShapeError,
    SupportError,
    UnknownNameError,
)

TABLE = np.arange(60.0).reshape(20, 3)


def rows_of(data: Any) -> np.ndarray:
    parts = [s.x for s in (data.train, data.valid, data.test) if s is not None]
    x = torch.cat(parts).numpy()
    return x[np.lexsort(x.T)]


# --- idx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("code", "letter"), [(8, "B"), (9, "b"), (0x0B, "h"), (0x0C, "i"), (0x0D, "f"), (0x0E, "d")]
)
def test_idx_reads_what_struct_writes(tmp_path: Path, code: int, letter: str, packed: bool) -> None:
    values = [1, 2, 3, 100, 5, 6] if letter == "B" else [1, -2, 3, -100, 5, 6]
    raw = struct.pack(">4B2I", 0, 0, code, 2, 2, 3) + struct.pack(f">6{letter}", *values)
    path = tmp_path / "a.idx"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    array = read_idx(path)
    assert array.dtype == np.dtype(letter)
    assert array.tolist() == [values[:3], values[3:]]


HEADER = struct.pack(">4B2I", 0, 0, 8, 2, 2, 3)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "00 00"),
        (b"PK\3\4 and so on", "50 4b 03 04"),
        (b"\0\0\x07\1" + bytes(8), "found 0x07"),
        (b"\0\0\x08\0", "header of 0 sizes"),
        (HEADER[:9], "12 bytes; the file has 9"),
        (HEADER + bytes(5), "expected 6 bytes of data for shape (2, 3), found 5"),
        (HEADER + bytes(7), "expected 6 bytes of data for shape (2, 3), found 7"),
        (struct.pack(">4B2I", 0, 0, 14, 2, 2**32 - 1, 2**32 - 1), "found 0"),
        (gzip.compress(HEADER + bytes(6), mtime=0)[:-5], "EOFError"),
        (gzip.compress(HEADER + bytes(6), mtime=0)[:-8] + bytes(8), "BadGzipFile"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "a-ubyte"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError) as caught:
        read_idx(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


# --- amat ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0 1 1\n1 0 0\n", "0 1 1 \r\n1 0 0 ", "011\n100\n\n"])
def test_amat(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.amat"
    path.write_text(text, newline="")
    assert read_amat(path, 3).tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 1 1\n1 0\n", "line 2: expected 3 values 0 or 1, found 2 characters"),
        ("0 1 2\n1 0 0\n", "line 1: expected 3 values 0 or 1, found 3 characters, b'2' among"),
        ("0 1 1\n1 0 /\n", "line 2"),
        ("0 1 1 0\n", "line 1"),
        ("0 1 1\n\n1 0 0\n", "line 2: expected 3 values 0 or 1, found 0"),
        ("", "line 1"),
    ],
)
def test_damaged_amat_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.amat"
    path.write_text(text)
    with pytest.raises(CorruptFileError) as caught:
        read_amat(path, 3)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


# --- your own files --------------------------------------------------------------------------


def write(path: Path, **arrays: Any) -> Path:
    """The arrays in the format that the ending says; a .npy or .csv takes `x` only."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".mat":
        savemat(path, arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        np.savetxt(path, arrays["x"], delimiter=",")
    return path


@pytest.mark.parametrize("ending", [".npz", ".npy", ".mat", ".csv", ".NPZ"])
def test_one_array_is_shuffled_and_divided(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"mine{ending.lower()}", x=TABLE)
    path = path.rename(tmp_path / f"mine{ending}")
    data = load_file(path)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [16, 2, 2]
    assert np.array_equal(rows_of(data), TABLE)
    assert (data.name, data.image_shape, data.features) == ("mine", None, 3)
    again, other, named = load_file(path), load_file(path, seed=1), load(str(path))
    assert torch.equal(data.test.x, again.test.x)
    assert torch.equal(data.test.x, named.test.x)
    assert not torch.equal(data.train.x, other.train.x)


@pytest.mark.parametrize("ending", [".npz", ".mat"])
def test_given_parts_stay_as_they_are(tmp_path: Path, ending: str) -> None:
    arrays = {"train": TABLE[:10], "valid": TABLE[10:14], "test": TABLE[14:]}
    labels = {"y_train": np.arange(10), "y_test": np.arange(6) / 4}
    data = load_file(write(tmp_path / f"a{ending}", **arrays, **labels, other=np.eye(2)))
    for part, x in arrays.items():
        assert np.array_equal(getattr(data, part).x.numpy(), x)
    assert data.train.y.tolist() == list(range(10))
    assert data.train.y.dtype == torch.int64
    assert data.valid.y is None
    assert data.test.y.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        ({"x": TABLE, "y": TABLE[:, 0]}, {}),
        ({"x": TABLE, "y": TABLE[:, :1]}, {}),
        ({"pixels": TABLE, "y": TABLE[:, 0]}, {}),
        ({"x": TABLE * 0, "b": TABLE, "y": TABLE[:, 0]}, {"key": "b"}),
        ({"x": TABLE, "kind": TABLE[:, 0]}, {"label_key": "kind"}),
    ],
)
@pytest.mark.parametrize("ending", [".npz", ".mat"])
def test_labels_follow_their_rows(
    tmp_path: Path, ending: str, arrays: dict[str, np.ndarray], options: dict[str, str]
) -> None:
    data = load_file(write(tmp_path / f"a{ending}", **arrays), **options)
    for split in (data.train, data.valid, data.test):
        assert split.y.tolist() == split.x[:, 0].tolist()


def test_images_keep_their_shape_and_scale(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 3, 4, 5), dtype=np.uint8)
    path = write(tmp_path / "a.npz", x=x)
    data = load_file(path, scale=255, binarize="dynamic", fractions=(0.9, 0, 0.1))
    assert data.image_shape == (3, 4, 5)
    assert data.valid is None
    assert data.train.x.shape == (27, 60)
    assert data.train.draw is not None
    assert set(data.test.x.unique().tolist()) == {0, 1}
    grey = load_file(path, scale=255, image_shape=(12, 5))
    assert grey.image_shape == (12, 5)
    assert rows_of(grey).max() == x.max() / 255


@pytest.mark.parametrize("dtype", [bool, np.uint8, ">i2", np.float16, ">f8"])
def test_number_types(tmp_path: Path, dtype: Any) -> None:
    x = (TABLE % 2).astype(dtype)
    data = load_file(write(tmp_path / "a.npy", x=x), dtype=torch.float64)
    assert np.array_equal(rows_of(data), rows_of(load_file(write(tmp_path / "b.npy", x=TABLE % 2))))
    assert data.train.x.dtype == torch.float64


def test_sparse_matlab_matrices_are_made_dense(tmp_path: Path) -> None:
    data = load_file(write(tmp_path / "a.mat", x=csr_matrix(TABLE)))
    assert np.array_equal(rows_of(data), TABLE)


@pytest.mark.parametrize(
    ("text", "label", "x"),
    [
        ("1,2\n3,4\n5,6\n", None, [[1, 2], [3, 4], [5, 6]]),
        ("a,b\n1,2\n3,4\n5,6", None, [[1, 2], [3, 4], [5, 6]]),
        ('"a, b",c\r\n1,2\r\n3,"4"\r\n5,6\r\n', None, [[1, 2], [3, 4], [5, 6]]),
        ("\ufeffa,b\n1, 2\n\n3,4e0\n5,6\n\n", None, [[1, 2], [3, 4], [5, 6]]),
        ("a,#b,kind\n1,2,0\n3,4,1\n5,6,2\n", "kind", [[1, 2], [3, 4], [5, 6]]),
        ("0,1,2\n1,3,4\n2,5,6\n", "0", [[1, 2], [3, 4], [5, 6]]),
        ("\n\na,b\n1,2\n3,4\n5,6\n", None, [[1, 2], [3, 4], [5, 6]]),
        ("7\n8\n9\n", None, [[7], [8], [9]]),
    ],
)
def test_csv(tmp_path: Path, text: str, label: str | None, x: list[list[float]]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    data = load_file(path, label_key=label, fractions=(1 / 3, 1 / 3, 1 / 3))
    assert rows_of(data).tolist() == x
    if label is not None:
        for split in (data.train, data.valid, data.test):
            assert split.y.item() == (split.x[0, 0].item() - 1) / 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["no rows"]),
        ("\n\n", ["no rows"]),
        ("a,b\n", ["no rows", "below the header"]),
        ("a,b\n1,2\n3,x\n", ["line 3", "column 'b'", "'x' is not a number"]),
        ("1,2\n3,\n", ["line 2", "column '1'", "'' is not a number"]),
        ("1,2,oops\n3,4,5\n", ["line 1", "column '2'", "'oops'"]),
        ("a,b\n1,2\n3,4,5\n", ["line 3", "3 cells, expected 2"]),
        ("1,2\n3\n", ["line 2", "1 cells, expected 2"]),
        ("a,b,c\n1,2\n3,4\n", ["line 2", "2 cells, expected 3"]),
        ("a,b\n1,2\n3,nan\n", ["nan", "row 1 ", "column 'b'"]),
        ("1,2\n-inf,4\n", ["-inf", "row 1 ", "column '0'"]),
    ],
)
def test_bad_csv_cells_are_placed(tmp_path: Path, text: str, says: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_file(path, fractions=(0.5, 0, 0.5))
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "says"),
    [
        ({"x": np.array([[0.5, 2.5]] * 9)}, {"binarize": "fixed"}, SupportError, ["2.5", "scale="]),
        ({"x": np.full((9, 2), 255, "u1")}, {"binarize": "threshold"}, SupportError, ["255"]),
        ({"x": np.full((9, 2), -1)}, {"binarize": "dynamic"}, SupportError, ["-1", "row 0, col"]),
        ({"x": np.full((9, 2), np.inf)}, {}, DataError, ["inf", "row 0, column 0", "float32"]),
        ({"x": np.full((9, 2), 1e300)}, {}, DataError, ["1e+300", "float32"]),
        ({"x": np.full((9, 2), 1e5)}, {"dtype": torch.float16}, DataError, ["100000", "float16"]),
        ({"x": np.full((9, 2), 1j)}, {}, DataError, ["complex128"]),
        ({"x": np.array([["a"]] * 9)}, {}, DataError, ["<U1"]),
        ({"x": np.zeros((0, 4))}, {}, DataError, ["(0, 4)"]),
        ({"x": np.zeros((4, 0))}, {"fractions": (0.5, 0, 0.5)}, DataError, ["(4, 0)"]),
        ({"x": np.zeros(9)}, {}, ShapeError, ["(9,)", "'x'"]),
        ({"x": np.float64(3)}, {}, ShapeError, ["()"]),
        ({"x": TABLE, "y": np.zeros(7)}, {}, ShapeError, ["(7,)", "20 rows"]),
        ({"x": TABLE, "y": np.full(20, np.nan)}, {}, DataError, ["label nan at row 0"]),
        ({"x": TABLE, "y": np.array(["a"] * 20)}, {}, DataError, ["labels", "<U1"]),
        ({"x": TABLE}, {"image_shape": (2, 2)}, ShapeError, ["(2, 2)", "3 values"]),
        ({"x": TABLE}, {"key": "z"}, DataError, ["'z'", "['x']"]),
        ({"x": TABLE}, {"label_key": "z"}, DataError, ["'z'", "['x']"]),
        ({"a": TABLE, "b": TABLE}, {}, DataError, ["['a', 'b']", "key="]),
        ({"train": TABLE}, {}, DataError, ["'train'", "no 'test'"]),
        ({"train": TABLE, "test": TABLE[:, :2]}, {}, ShapeError, ["'train': 3", "'test': 2"]),
        ({"train": TABLE, "test": TABLE}, {"fractions": (0.5, 0, 0.5)}, ConfigError, ["0.5"]),
        ({"x": TABLE}, {"fractions": (0.5, 0.1, 0.1)}, ConfigError, ["0.5, 0.1, 0.1"]),
        ({"x": TABLE}, {"fractions": (1.5, -0.6, 0.1)}, ConfigError, ["-0.6"]),
        ({"x": TABLE}, {"fractions": (1.0, 0, 0)}, ConfigError, ["test on"]),
        ({"x": TABLE[:2]}, {}, DataError, ["2 rows", "valid and test"]),
        ({"x": TABLE}, {"scale": 0}, ConfigError, ["scale must be positive and finite, got 0"]),
        ({"x": TABLE}, {"seed": 2**32}, ConfigError, ["4294967296"]),
        ({"x": TABLE}, {"binarize": "never"}, UnknownNameError, ["'never'", "'dynamic'"]),
    ],
)
def test_refusals_of_own_files(
    tmp_path: Path,
    arrays: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    says: list[str],
) -> None:
    with pytest.raises(error) as caught:
        load_file(write(tmp_path / "a.npz", **arrays), **options)
    for words in says:
        assert words in str(caught.value)


def test_the_row_of_a_bad_value_is_that_of_the_file(tmp_path: Path) -> None:
    """Checked before the shuffle, so that the row can be found again."""
    for row, column in itertools.product((0, 7, 19), (0, 2)):
        x = TABLE.copy()
        x[row, column] = math.nan
        with pytest.raises(DataError, match=f"nan at row {row}, column {column} "):
            load_file(write(tmp_path / "a.npy", x=x))


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("a.npy", {"key": "x"}, ConfigError, "key"),
        ("a.csv", {"key": "x"}, ConfigError, "key 'x'"),
        ("a.csv", {"label_key": "kind"}, DataError, "no column 'kind' among ['0', '1', '2']"),
        ("a.csv", {"label_key": "3"}, DataError, "no column '3'"),
        ("a.txt", {}, UnknownNameError, "'.npz', '.npy', '.mat', '.csv'"),
    ],
)
def test_options_that_do_not_fit_the_format(
    tmp_path: Path, name: str, options: dict, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        load_file(write(tmp_path / name, x=TABLE), **options)
    assert says in str(caught.value)


class Bomb:
    """Unpickling this would be seen."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("ending", [".npz", ".npy"])
def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / f"a{ending}", x=np.array([[Bomb(), 1]], dtype=object))
    with pytest.raises(DataError, match=r"a\.np.: holds Python objects"):
        load_file(path)
    assert not Path("unpickled").exists()


def test_objects_in_a_matlab_file_and_too_few_rows_are_named_by_the_file(tmp_path: Path) -> None:
    cells = np.array([["a"], ["b"]], dtype=object)
    with pytest.raises(DataError, match="a: values of type object are not real numbers"):
        load_file(write(tmp_path / "a.mat", x=cells))
    with pytest.raises(DataError, match=r"b\.npy: 3 rows .* no row for valid and test"):
        load_file(write(tmp_path / "b.npy", x=TABLE[:3]))


@pytest.mark.parametrize("ending", [".npz", ".npy", ".mat", ".csv"])
def test_a_missing_file_or_a_folder_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    with pytest.raises(DataError, match=rf"a\{ending}: cannot be read: No such file"):
        load_file(path)
    path.mkdir()
    with pytest.raises(DataError, match=rf"a\{ending}: cannot be read: Is a directory"):
        load_file(path)


@pytest.mark.parametrize("keep", [0, 3, 60, 150, 0.5, 0.95])
@pytest.mark.parametrize("ending", [".npz", ".npy", ".mat"])
def test_truncated_files(tmp_path: Path, ending: str, keep: float) -> None:
    path = write(tmp_path / f"a{ending}", x=TABLE)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    with pytest.raises(CorruptFileError, match=rf"a\{ending}: expected .*, but reading it failed"):
        load_file(path)


@pytest.mark.parametrize("ending", [".npz", ".npy", ".mat", ".csv"])
def test_garbage_is_never_more_than_a_typed_error(tmp_path: Path, ending: str) -> None:
    """Bytes overwritten anywhere: the numbers change or a `DataError` names the file."""
    rng = np.random.default_rng(0)
    whole = write(tmp_path / f"a{ending}", x=TABLE).read_bytes()
    path = tmp_path / f"b{ending}"
    complaints = []
    for _ in range(60):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, len(raw), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(raw.tobytes())
        try:
            load_file(path)
        except DataError as error:
            complaints.append(str(error))
    assert complaints
    assert all(str(path) in words or words.startswith("b: ") for words in complaints)


def test_wrong_format_under_an_ending(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, TABLE)
    (tmp_path / "a.npz").write_bytes(stream.getvalue())
    with pytest.raises(CorruptFileError, match=r"expected an \.npz archive, found a single array"):
        load_file(tmp_path / "a.npz")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe1\x00,\x002\x00")
    with pytest.raises(CorruptFileError, match=r"a\.csv: expected UTF-8 text"):
        load_file(tmp_path / "a.csv")
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400))
    with pytest.raises(DataError, match=r"a\.mat: save this Matlab file with -v7"):
        load_file(tmp_path / "a.mat")


@pytest.mark.parametrize("read", [read_npz, read_mat])
def test_a_lacking_array_is_listed(tmp_path: Path, read: Any) -> None:
    path = write(tmp_path / f"a.{read.__name__[-3:]}", x=TABLE, y=TABLE)
    with pytest.raises(CorruptFileError, match=r"expected an array 'z', found \['x', 'y'\]"):
        read(path, ["z"])


@pytest.mark.parametrize("option", [{"split": "burda"}, {"folder": "x"}, {"mirror": "https://x"}])
def test_load_refuses_what_means_nothing_for_a_file(option, tmp_path: Path) -> None:
    ((name, value),) = option.items()
    path = write(tmp_path / "a.npz", x=TABLE)
    with pytest.raises(
        ConfigError, match=f"{name}='{value}' means nothing for the file .*load_file"
    ):
        load(path, **option)
