"""The notebooks run from the first cell to the last, unchanged but for fewer steps and products and a smaller model."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import QUICK, ROOT, TINY, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_have_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 20, cell.source
        assert cell.cell_type == "markdown" or not cell.outputs, cell.source
    assert "absl" not in nbformat.writes(notebook)
    assert f"colab.research.google.com/github/moon-jax/moon_jax/blob/main/notebooks/{path.name}" in nbformat.writes(
        notebook
    )
    assert "%pip install" in notebook.cells[1].source


def executed(name, folder, monkeypatch, replacements=()):
    """The printed text of all cells, and the number of pictures."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for old, new in replacements:
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        cell.source = cell.source.replace(old, new)
    monkeypatch.delenv("XLA_FLAGS")
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_quickstart(tmp_path, monkeypatch):
    smaller = {name: value for name, value in TINY.items() if not name.startswith("training.")}
    fewer = [
        ("steps, products = 160, 4000", "steps, products = 4, 200"),
        ('"data.synthetic": products}', f'"data.synthetic": products}} | {smaller!r}'),
    ]
    _, pictures = executed("quickstart", tmp_path, monkeypatch, fewer)
    assert pictures == 8  # the catalogue, four pictures of the run, three searches
    assert (tmp_path / "runs" / "notebook" / "metrics.json").exists()


@pytest.mark.slow
def test_sharding_experts(tmp_path, monkeypatch):
    """Both strategies agree with the dense reference, and use the collectives that the text names."""
    quick = [('" ".join(flags)', f'" ".join((*flags, "{QUICK}"))')]
    printed, pictures = executed("expert_sharding", tmp_path, monkeypatch, quick)
    assert printed.startswith("8 devices") and pictures == 3
    for strategy, travels in (("grouped", "all-gather"), ("expert_parallel", "all-to-all")):
        (agreed,) = [line for line in printed.splitlines() if line.startswith(f"{strategy:16} loss")]
        assert float(agreed.rsplit(" ", 1)[1]) < 1e-5
        (sent,) = [line for line in printed.splitlines() if line.startswith(strategy + " {")]
        assert f"'{travels}'" in sent and ("all-to-all" in sent) == (travels == "all-to-all")
