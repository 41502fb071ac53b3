"""The notebook on sharding runs from its first cell to its last, as it stands, on devices that it simulates itself."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, environment


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "notebooks" / "expert_sharding.ipynb", as_version=4)


def test_cells_are_short_and_hold_no_output(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 20, cell.source
        assert cell.cell_type == "markdown" or not cell.outputs, cell.source
    assert "colab.research.google.com" in notebook.cells[0].source and "%pip install" in notebook.cells[1].source


def test_it_runs(notebook, tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.startswith("8 devices")
    # The two strategies agree with the oracle, and what travels is what the text says.
    for strategy, travels in (("grouped", "all-gather"), ("expert_parallel", "all-to-all")):
        (agreed,) = [line for line in printed.splitlines() if line.startswith(f"{strategy:16} loss")]
        assert float(agreed.rsplit(" ", 1)[1]) < 1e-5
        (sent,) = [line for line in printed.splitlines() if line.startswith(strategy + " {")]
        assert f"'{travels}'" in sent and ("all-to-all" in sent) == (travels == "all-to-all")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
