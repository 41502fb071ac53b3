"""The configs and column maps are found from a clone, and from a wheel that is installed where there is no clone."""

import os
import shutil
import subprocess
import sys

import pytest

from moon_jax import config as config_lib
from moon_jax.errors import UserError
from tests.conftest import ROOT, environment

MINE = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(dict(seed=7))\n"
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

USE = """
import sys
from moon_jax import config
from moon_jax.ingest import columns
assert config.__file__.startswith(sys.argv[1]), config.__file__
for name in sys.argv[2:]:
    assert config.load(name) == config.load(f"configs/{name}.py") != config.Config()
assert config.load("path/of/mine.py").seed == 7
assert columns.load("mbe") and columns.load("fashion200k")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which a wheel, built from a copy of the clone, was installed without what it depends on."""
    pytest.importorskip("setuptools", minversion="70.1", reason="setuptools, which builds the wheel, is not installed")
    copy, site = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("moon_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", site / "wheels", copy],
        [*pip, "install", "--no-deps", "--no-index", "--find-links", site / "wheels", "--target", site, "moon_jax"],
    ):
        subprocess.run(command, cwd=site, check=True, capture_output=True)
    return site


def outside(site, folder, *command):
    """Runs Python away from the clone, with the installed package first on its path."""
    variables = environment() | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def test_a_wheel_brings_configs_and_column_maps(site, tmp_path):
    (tmp_path / "path" / "of").mkdir(parents=True)
    (tmp_path / "path" / "of" / "mine.py").write_text(MINE)
    done = outside(site, tmp_path, "-c", USE, site, *SHIPPED)
    assert done.returncode == 0, done.stderr
    assert not (site / "tests").exists() and not (site / "configs").exists()  # nothing but the package


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_outside_the_clone(site, tmp_path):
    done = outside(site, tmp_path, "-m", "moon_jax.cli", "quickstart", "--steps", 2, "--config.data.synthetic=200")
    assert done.returncode == 0, done.stderr
    assert "done in" in done.stdout and (tmp_path / "moon-jax-quickstart" / "metrics.json").is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_clone_has_its_configs_by_name_and_by_path(monkeypatch, tmp_path, name):
    expected = config_lib.load(name)
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert config_lib.load(f"configs/{name}.py") == config_lib.load(name) == expected


def test_a_path_wins_over_a_shipped_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.makedirs("configs")
    for path in ("configs/quickstart.py", "mine.py"):
        (tmp_path / path).write_text(MINE)
        assert config_lib.load(path).seed == 7
    assert config_lib.load("quickstart").seed == 0
    with pytest.raises(UserError, match=r"--config configs/mine.py: no such config; give a path, or one of: moon2_"):
        config_lib.load("configs/mine.py")
