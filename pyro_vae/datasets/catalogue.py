"""The catalogue: each data set's reader, image shape and published splits, under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyro_vae.datasets import images
from pyro_vae.datasets.sources import Store
from pyro_vae.datasets.splits import Parts, Protocol, as_filed, cut, hold_out


@dataclass(frozen=True)
class DataSet:
    """A data set that `load` knows by name.

    Args:
        read: takes a `Store` and returns the parts of the files.
        image_shape: `(height, width)` of a row, or None.
        splits: its protocols by name; the first is the default.
        about: what it is and where it comes from, in a line.
        scale: what brings its values to [0, 1] by division, or None.
        binary: whether its values are 0 and 1 already.
    """

    read: Callable[[Store], Parts]
    image_shape: tuple[int, ...] | None
    splits: dict[str, Protocol]
    about: str
    scale: float | None = None
    binary: bool = False

    @property
    def default_split(self) -> str:
        """Name of the protocol used where none is asked for."""
        return next(iter(self.splits))


HELD_OUT = Protocol(hold_out(10_000), "50,000/10,000/10,000: the last 10,000 of train validate")

DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        images.read_digits,
        (8, 8),
        {
            "shuffled": Protocol(
                cut(1297, 250, 250, shuffled=True), "1,297/250/250 after a fixed shuffle, ours"
            )
        },
        "scikit-learn's handwritten digits, from UCI (Alpaydin & Kaynak 1998); needs no download",
        scale=16,
    ),
    "mnist": DataSet(
        images.idx_reader(images.MNIST),
        (28, 28),
        {
            "larochelle": HELD_OUT,
            "burda": Protocol(as_filed, "60,000/none/10,000, Burda et al. 2015"),
        },
        "LeCun, Cortes & Burges 1998",
        scale=255,
    ),
    "fashion_mnist": DataSet(
        images.idx_reader(images.FASHION_MNIST),
        (28, 28),
        {
            "held_out": HELD_OUT,
            "xiao": Protocol(as_filed, "60,000/none/10,000, as published"),
        },
        "Xiao, Rasul & Vollgraf 2017",
        scale=255,
    ),
    "static_binarized_mnist": DataSet(
        images.read_static_mnist,
        (28, 28),
        {"larochelle": Protocol(as_filed, "50,000/10,000/10,000, Larochelle & Murray 2011")},
        "MNIST binarised once: Salakhutdinov & Murray 2008, Larochelle & Murray 2011",
        binary=True,
    ),
    "frey_faces": DataSet(
        images.read_frey_faces,
        (28, 20),
        {
            "vampprior": Protocol(
                cut(1565, 200, 200, shuffled=True),
                "1,565/200/200, sizes of Tomczak & Welling 2018's code, our fixed shuffle",
            ),
            "aevb": Protocol(
                cut(1765, 0, 200, shuffled=True),
                "1,765/none/200 by the same shuffle; Kingma & Welling 2013 state no split",
            ),
            "filmed": Protocol(
                cut(1565, 200, 200, shuffled=False),
                "1,565/200/200 in filming order: no test frame has its neighbour in train",
            ),
        },
        "Brendan Frey's face, frame by frame (Roweis, Saul & Hinton 2002)",
        scale=255,
    ),
    "omniglot": DataSet(
        images.read_omniglot,
        (28, 28),
        {
            "vampprior": Protocol(
                hold_out(1345, shuffled=True),
                "23,000/1,345/8,070, the sizes of Tomczak & Welling 2018's code, our fixed shuffle",
            ),
            "burda": Protocol(as_filed, "24,345/none/8,070, Burda et al. 2015"),
        },
        "Lake, Salakhutdinov & Tenenbaum 2015, at 28x28 by Burda et al. 2015",
    ),
    "caltech101_silhouettes": DataSet(
        images.read_caltech,
        (28, 28),
        {"marlin": Protocol(as_filed, "4,100/2,264/2,307, Marlin et al. 2010")},
        "Marlin, Swersky, Chen & de Freitas 2010, as 1 - x so that the figure is 1",
        binary=True,
    ),
}
"""Every data set that `load` knows; add a `DataSet` to make another one known."""
