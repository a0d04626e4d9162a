"""`load`: a data set of the catalogue by name, in a published split, binarised as asked."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pyro_vae.checks import look_up
from pyro_vae.data import Data
from pyro_vae.datasets.binarization import assemble
from pyro_vae.datasets.catalogue import DATASETS
from pyro_vae.datasets.files import READERS, load_file
from pyro_vae.datasets.sources import Store
from pyro_vae.errors import ConfigError, UnknownNameError


def names() -> tuple[str, ...]:
    """Names of the data sets that `load` knows."""
    return tuple(DATASETS)


def load(
    name: str | os.PathLike[str],
    *,
    binarize: str | None = None,
    split: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    folder: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
) -> Data:
    """A data set in its published splits, as rows `(N, features)`.

    | name | rows | values | splits, the default first |
    |---|---|---|---|
    | `digits` | 1,797 of 8x8 | grey / 16 | `shuffled` 1,297/250/250 |
    | `mnist` | 70,000 of 28x28 | grey / 255 | `larochelle` 50k/10k/10k, `burda` 60k/-/10k |
    | `fashion_mnist` | 70,000 of 28x28 | grey / 255 | `held_out` 50k/10k/10k, `xiao` 60k/-/10k |
    | `static_binarized_mnist` | 70,000 of 28x28 | 0, 1 | `larochelle` 50k/10k/10k |
    | `frey_faces` | 1,965 of 28x20 | grey / 255 | `vampprior` 1,565/200/200, `aevb` 1,765/-/200, \
`filmed` 1,565/200/200 |
    | `omniglot` | 32,415 of 28x28 | [0, 1] | `vampprior` 23,000/1,345/8,070, \
`burda` 24,345/-/8,070 |
    | `caltech101_silhouettes` | 8,671 of 28x28 | 0, 1 | `marlin` 4,100/2,264/2,307 |

    Kingma & Welling (2013) state no split of the Frey faces, and Tomczak & Welling's code shuffles
    them (and OMNIGLOT) by the run's seed: the sizes are theirs, the shuffles ours and fixed. The
    test rows of `static_binarized_mnist` are filed by class: shuffle before taking a subset.

    Files are looked for in `folder`, then in the cache (`PYRO_VAE_CACHE`, or the user's cache
    folder), and are downloaded into the cache where a checksum is known. `digits` is embedded in
    scikit-learn and needs none.

    Args:
        name: of the data set, or the path of a file for `load_file`.
        binarize: None leaves intensities in [0, 1] as they are. `"dynamic"` draws each training
            value from a Bernoulli anew at every visit (Burda et al. 2015) and the validation and
            test sets once; `"fixed"` draws every set once; `"threshold"` is x > 0.5. Draws are
            made at float32, so a seed gives one test set whatever `dtype`.
        split: name of a protocol; None is the data set's default.
        seed: of the draws. It does not move rows between splits.
        dtype: of the rows; floating point.
        folder: files already here, in one folder a data set; None is `PYRO_VAE_DATA`, if set.
        mirror: base URL to download from in place of the public ones; None is
            `PYRO_VAE_MIRROR`, if set.

    Returns:
        `Data` whose `image_shape` is the images' and whose `preparation` says how it was made.

    Raises:
        UnknownNameError: no such data set, split or binarisation; lists the known.
        ConfigError: binarising what is binary, or options that don't go together.
        CorruptFileError: a file that is not the published one, or a download that broke.
        DataError: a file that can't be had; says where to put it by hand.
    """
    if not isinstance(name, str | os.PathLike):
        raise UnknownNameError(f"a data set is named by text, got {name!r}; known: {names()}")
    if Path(name).suffix.lower() in READERS:
        for option, value in {"split": split, "folder": folder, "mirror": mirror}.items():
            if value is not None:
                raise ConfigError(
                    f"{option}={value!r} means nothing for the file {name}; load_file says what "
                    "does"
                )
        return load_file(name, binarize=binarize, seed=seed, dtype=dtype)
    files = f", or the path of a file ending in {', '.join(READERS)}"
    entry = look_up("data set", os.fspath(name), DATASETS, files)
    name = os.fspath(name)
    split = entry.default_split if split is None else split
    protocol = look_up(f"split of {name}", split, entry.splits)
    if entry.binary and binarize is not None:
        raise ConfigError(
            f"{name} is binary already: binarize={binarize!r} means nothing, use None"
        )
    parts = entry.read(Store.open(folder, mirror))
    return assemble(
        parts,
        protocol.rule,
        name=name,
        binarize=binarize,
        seed=seed,
        dtype=dtype,
        scale=entry.scale,
        image_shape=entry.image_shape,
        preparation={"source": entry.about, "split": split, "about_split": protocol.about},
    )
