"""Every notebook runs from top to bottom, and is stored with what it shows."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


# what a notebook finds in a kernel where another ran: nothing of it, but libraries are imported
AFRESH = """
%reset -f
import os, matplotlib.pyplot, pyro, torch
os.chdir({folder!r})
matplotlib.pyplot.close("all")
pyro.clear_param_store()
torch.set_default_dtype(torch.float32)
%reset -f
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One kernel for all notebooks, as most of what a short one takes is its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_VAE_QUICK", "1")
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


def execute(notebook: NotebookNode, folder: Path, kernel: KernelManager) -> None:
    """Run every cell in `folder`, with the short training of a test."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(AFRESH.format(folder=str(folder))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machinery here; the notebook has its own process
        client = NotebookClient(notebook, timeout=600, km=kernel)
        try:
            client.execute()
        finally:
            client.kc.stop_channels()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, kernel):
    execute(nbformat.read(path, as_version=4), tmp_path, kernel)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_executed(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_cell_that_fails_is_a_failure(tmp_path, kernel):
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    first = code_cells(notebook)[0]
    notebook.cells = [first, nbformat.v4.new_code_cell("assert epochs < 0, epochs")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path, kernel)


def test_a_notebook_finds_nothing_of_the_one_before(tmp_path, kernel):
    before = "import pyro, torch; pyro.param('a', torch.ones(2)); left = 1; open('left', 'w')"
    after = (
        "import os, pyro; assert 'left' not in [*dir(), *os.listdir()]\n"
        "assert not list(pyro.get_param_store())"
    )
    for name, source in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        execute(notebook, tmp_path / name, kernel)
