"""How the code hangs together: which folder imports which, no circles between files, no folder or file too large.

The hub stands left of training: a run starts from its folders, and hands it what it exports.
"""

import ast
import collections
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = [
    "types",
    "errors",
    "options",
    "config",
    "interrupt",
    "backend",
    "distributed",
    "storage",
    "outputs",
    "sharding",
    "similarity",
    "progress",
    "data",
    "ingest",
    "model",
    "objectives",
    "hub",
    "training",
    "serving",
    "embedders",
    "evaluation",
    "augment",
    "commands",
    "cli",
]
"""From left to right: a file imports only from the left, or from its own folder."""

BY_NAME = ("moon_jax", "moon_jax.commands")
"""Modules that import others of the package by name: lazily, and to their left."""

LARGEST_FILE = 500
MOST_FILES = 15
LARGEST_SHARE = 0.2


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file of every module below a package; the package itself is its __init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: dict[str, Path], package: str) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, at the top or inside of functions."""
    arrows = {}
    for name, path in known.items():
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith(package) for alias in node.names), f"{path}: use from … import"
            if isinstance(node, ast.Attribute | ast.Name) and name not in BY_NAME:
                called = node.attr if isinstance(node, ast.Attribute) else node.id
                assert called not in ("import_module", "__import__"), f"{path}: imports by name; use from … import"
            if not isinstance(node, ast.ImportFrom):
                continue
            assert not node.level, f"{path}: a relative import"
            if node.module.split(".")[0] != package:
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # A name of the package itself, such as `train`, would hide where it comes from.
                assert whole in known or node.module != package, f"{path}: import {alias.name} from its own module"
                arrows[name].add(whole if whole in known else node.module)
        arrows[name] -= {package, name}
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there are none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        state[name] = 1
        path.append(name)
        for other in sorted(arrows.get(name, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[name] = 2
        path.pop()
        return []

    for name in arrows:
        if name not in state and (found := visit(name)):
            return found
    return []


def wrong_arrows(arrows: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports from the right."""
    folder = lambda name: name.split(".")[1]  # noqa: E731
    return [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in sorted(others)
        if "." in name and order.index(folder(other)) > order.index(folder(name))
    ]


def test_imports_go_left_without_circles():
    known = modules(ROOT / "moon_jax")
    arrows = imports(known, "moon_jax")
    assert len(arrows) > 80 and sum(map(len, arrows.values())) > 300
    assert wrong_arrows(arrows, ORDER) == []
    assert circle(arrows) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/x.py": "from p.b import y", "b/y.py": ""}, ["p.a.x imports p.b.y"]),
        ({"a/x.py": "def f():\n    from p.b.y import g", "b/y.py": ""}, ["p.a.x imports p.b.y"]),
        ({"a/x.py": "", "b/y.py": "from p.a import x"}, []),
    ],
)
def test_an_import_from_the_right_is_found(tmp_path, files, expected):
    assert wrong_arrows(imports(write(tmp_path, files), "p"), ["a", "b"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import p.b.y", "use from … import"),
        ("from . import y", "a relative import"),
        ("def f():\n    from p import train", "import train from its own module"),
        ("import importlib\nimportlib.import_module('p.b.y')", "imports by name"),
        ("m = __import__('p.b.y')", "imports by name"),
    ],
)
def test_an_import_that_hides_its_target_is_refused(tmp_path, text, message):
    with pytest.raises(AssertionError, match=message):
        imports(write(tmp_path, {"a/x.py": text, "b/y.py": ""}), "p")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/x.py": "from p.a.y import f", "a/y.py": "def f():\n    from p.a import x"}, ["p.a.x", "p.a.y", "p.a.x"]),
        ({"a/x.py": "from p.a import y", "a/y.py": "from p.a import z", "a/z.py": "from p.a import x"}, 4),
        ({"a/x.py": "from p.a import y, z", "a/y.py": "from p.a import z", "a/z.py": ""}, []),
    ],
)
def test_a_circle_is_found(tmp_path, files, expected):
    found = circle(imports(write(tmp_path, files), "p"))
    assert (len(found) if isinstance(expected, int) else found) == expected


def write(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, text in ({"a/__init__.py": "", "b/__init__.py": ""} | files).items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return modules(folder / "p")


def test_no_file_and_no_folder_is_too_large():
    lines: collections.Counter[str] = collections.Counter()
    files: collections.Counter[str] = collections.Counter()
    for name, path in modules(ROOT / "moon_jax").items():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= LARGEST_FILE, f"{name}: {count} lines"
        folder = name.split(".")[1] if name.count(".") > 1 else ""
        lines[folder] += count
        files[folder] += path.name != "__init__.py"
    assert max(files.values()) <= MOST_FILES, files
    del lines[""]
    assert max(lines.values()) <= LARGEST_SHARE * lines.total(), lines


def test_reading_order_stays_short():
    files = ("types.py", "data/rows.py", "model/encoder.py", "objectives/alignment.py", "training/step.py")
    lines = sum(len((ROOT / "moon_jax" / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert lines < 1500
