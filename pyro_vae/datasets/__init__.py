"""Data sets: scikit-learn's digits, MNIST and its relatives, and files of your own.

`load` reads a data set of the catalogue by name, `load_file` reads your own arrays; both return
a `pyro_vae.data.Data` of train, valid and test rows, binarised only as asked for. `DATASETS` is
the catalogue itself; adding a `DataSet` to it makes it loadable.
"""

from pyro_vae.datasets.binarization import BINARIZATIONS
from pyro_vae.datasets.catalogue import DATASETS, DataSet
from pyro_vae.datasets.files import load_file
from pyro_vae.datasets.loading import load, names
from pyro_vae.datasets.sources import Source, Store
from pyro_vae.datasets.splits import Part, Protocol

__all__ = [
    "BINARIZATIONS",
    "DATASETS",
    "DataSet",
    "Part",
    "Protocol",
    "Source",
    "Store",
    "load",
    "load_file",
    "names",
]
