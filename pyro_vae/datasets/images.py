"""The image data sets: their files, with public address and checksum, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pyro_vae.datasets.formats import mat_names, read_amat, read_idx, read_mat, read_npz
from pyro_vae.datasets.sources import Source, Store
from pyro_vae.datasets.splits import Part, Parts
from pyro_vae.errors import CorruptFileError


def read_digits(store: Store) -> Parts:
    """scikit-learn's embedded digits: 1,797 images of 8x8, grey 0 to 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"all": Part(digits.data, digits.target)}


def idx_reader(sources: dict[str, Source]) -> Callable[[Store], Parts]:
    """A reader of MNIST's four idx files, `train` and `t10k`, images and labels."""

    def read(store: Store) -> Parts:
        parts = {}
        for part, prefix in (("train", "train"), ("test", "t10k")):
            paths = [store.fetch(sources[f"{prefix}-{what}"]) for what in ("images", "labels")]
            images, labels = map(read_idx, paths)
            _expect(paths[0], "images", images, (None, 28, 28))
            _expect(paths[1], "labels", labels, (len(images),))
            parts[part] = Part(images, labels)
        return parts

    return read


STATIC_PACKED = Source(
    "static_binarized_mnist/binarized_mnist_larochelle_packed.npz",
    checksum="sha256:6cf41efaaff1a0df1d21e88b822403b324c63c238f9b2165207b0b7ce33861bb",
)
STATIC_TEXT = {
    part: Source(
        f"static_binarized_mnist/binarized_mnist_{part}.amat",
        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
        f"binarized_mnist_{part}.amat",
        f"sha256:{checksum}",
    )
    for part, checksum in {
        "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    }.items()
}


def read_static_mnist(store: Store) -> Parts:
    """The fixed binarisation, from packed bits where they are supplied, else the text files."""
    packed = store.find(STATIC_PACKED)
    if packed is None and store.find(STATIC_TEXT["train"]) is None:
        packed = store.mirrored(STATIC_PACKED)
    if packed is None:
        return {p: Part(read_amat(store.fetch(s), 784)) for p, s in STATIC_TEXT.items()}
    arrays = read_npz(packed, list(STATIC_TEXT))
    return {part: Part(np.unpackbits(bits, axis=1)) for part, bits in arrays.items()}


FREY_ARRAY = Source(
    "frey_faces/frey_faces_uint8.npz",
    checksum="sha256:3c70375e0a9c4751ad49ad5f1f692bd094c46f133cf4aa8ea77d1cb14e1efcd1",
)
FREY_MAT = Source("frey_faces/frey_rawface.mat", "https://cs.nyu.edu/~roweis/data/frey_rawface.mat")


def read_frey_faces(store: Store) -> Parts:
    """1,965 frames of 28x20, grey 0 to 255, in filming order."""
    array = store.find(FREY_ARRAY)
    if array is None and store.find(FREY_MAT) is None:
        array = store.mirrored(FREY_ARRAY)
    path = array or store.fetch(FREY_MAT)
    images = read_npz(path, ["images"])["images"] if array else read_mat(path, ["ff"])["ff"].T
    images = images.reshape(len(images), -1)
    _expect(path, "images", images, (1965, 560))
    return {"all": Part(images)}


OMNIGLOT = Source(
    "omniglot/chardata.mat",
    "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
)


def read_omniglot(store: Store) -> Parts:
    """Burda et al.'s 28x28 OMNIGLOT: images are columns, each written column by column."""
    path = store.fetch(OMNIGLOT)
    parts = {}
    for part, key, labels, rows in (
        ("train", "data", "target", 24_345),
        ("test", "testdata", "testtarget", 8_070),
    ):
        x = read_mat(path, [key])[key].T
        _expect(path, key, x, (rows, 784))
        y = read_mat(path, [labels])[labels].argmax(0) if labels in mat_names(path) else None
        parts[part] = Part.of(_row_major(x), y, str(path))
    return parts


CALTECH = Source(
    "caltech101_silhouettes/caltech101_silhouettes_28_split1.mat",
    "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat",
    "sha256:eb6735e8d84b1850fabc5590124aab1755e90c9fd28123585324398405e1e42a",
)


def read_caltech(store: Store) -> Parts:
    """Marlin et al.'s silhouettes, written column by column, turned to 1 = figure."""
    path = store.fetch(CALTECH)
    present = mat_names(path)
    parts = {}
    for part, key, rows in (
        ("train", "train", 4100),
        ("valid", "val", 2264),
        ("test", "test", 2307),
    ):
        x = read_mat(path, [f"{key}_data"])[f"{key}_data"]
        _expect(path, f"{key}_data", x, (rows, 784))
        labels = f"{key}_labels"
        y = read_mat(path, [labels])[labels] if labels in present else None
        parts[part] = Part.of(1 - _row_major(x), y, str(path))
    return parts


def _row_major(columns: np.ndarray) -> np.ndarray:
    """28x28 images written column by column, as rows written row by row."""
    return columns.reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784)


def _expect(path: Path, what: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = len(shape) == array.ndim and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = tuple("N" if size is None else size for size in shape)
        raise CorruptFileError(f"{path}: expected {what} of shape {wanted}, found {array.shape}")


def _mnist_files(
    folder: str, base: str, sums: dict[str, str], unpacked: str | None
) -> dict[str, Source]:
    sources = {}
    for name, checksum in sums.items():
        kind = "idx3" if name.endswith("images") else "idx1"
        file = f"{name}-{kind}-ubyte.gz"
        inside = unpacked if name == "train-images" else None
        sources[name] = Source(f"{folder}/{file}", base + file, f"md5:{checksum}", inside)
    return sources


MNIST = _mnist_files(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    unpacked="md5:6bbc9ace898e44ae57da46a324031adb",
)
FASHION_MNIST = _mnist_files(
    "fashion_mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    unpacked=None,
)
