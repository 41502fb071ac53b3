"""The notebook runs from its first cell to its last, as it stands but for fewer steps and products."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.training.test_run import environment


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)


def test_cells_are_short_and_hold_no_output(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 20, cell.source
        assert cell.cell_type == "markdown" or not cell.outputs, cell.source
    assert "absl" not in nbformat.writes(notebook)
    assert "colab.research.google.com" in notebook.cells[0].source and "%pip install" in notebook.cells[1].source


def test_it_runs(notebook, tmp_path, monkeypatch):
    chosen = "steps, products = 160, 4000"
    (parameters,) = [cell for cell in notebook.cells if chosen in cell.source]
    parameters.source = parameters.source.replace(chosen, "steps, products = 4, 200")
    monkeypatch.delenv("XLA_FLAGS")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 8  # the catalogue, four pictures of the run, three searches
    assert (tmp_path / "runs" / "notebook" / "metrics.json").exists()
