"""The rooms of the house, from left to right: a module imports only from rooms to its left, or from its own.

The hub stands left of training: a run begins from its folders, and what it exports it is handed.
"""

import ast
from pathlib import Path

from tests.conftest import ROOT

ORDER = [
    "types",
    "config",
    "interrupt",
    "backend",
    "hosts",
    "places",
    "sharding",
    "similarity",
    "data",
    "model",
    "objectives",
    "hub",
    "training",
    "serving",
    "evaluation",
    "augment",
    "flags",
    "commands",
    "cli",
]


def test_imports_go_left():
    package = ROOT / "moon_jax"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        room = path.relative_to(package).with_suffix("").parts[0]
        if room in ("__init__", "configs"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("moon_jax") for alias in node.names), f"{path}: use from … import"
            if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("moon_jax")):
                continue
            assert not node.level, f"{path}: a relative import"
            parts = node.module.split(".")[1:]
            for other in [parts[0]] if parts else [alias.name for alias in node.names]:
                assert ORDER.index(other) <= ORDER.index(room), f"{path}: imports {other}"


def test_reading_order_stays_short():
    files = ("types.py", "data/rows.py", "model/encoder.py", "objectives/alignment.py", "training/step.py")
    lines = sum(len(Path(ROOT / "moon_jax" / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert lines < 1500
