"""Shared by all tests: eight simulated devices, a persistent compilation cache, tiny configs, a tiny catalogue.

`pytest` runs on the CPU, also where there is an accelerator. `pytest --gpu` runs the tests marked `gpu`, and only them,
on the accelerator that JAX finds.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Compiling takes most of the time: turn LLVM's optimisations off.
QUICK = "--xla_backend_optimization_level=0"
# Collectives one by one: see backend.compiler_options.
FLAGS = f"--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false {QUICK}"
# Here rather than in a hook, since JAX reads them when it is imported; the variable reaches the processes of xdist.
ON_GPU = "--gpu" in sys.argv or bool(os.environ.get("MOON_JAX_TEST_GPU"))
if ON_GPU:
    os.environ["MOON_JAX_TEST_GPU"] = "1"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the device's memory
else:
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from moon_jax import config as config_lib  # noqa: E402
from moon_jax.data import text  # noqa: E402
from moon_jax.data.prepared import Prepared  # noqa: E402
from moon_jax.ingest import prepare  # noqa: E402
from moon_jax.ingest.synthetic import SCHEMA  # noqa: E402

CACHE = ROOT / ".jax_cache" / f"{sys.version_info.major}.{sys.version_info.minor}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu, and only them, on an accelerator")
    parser.addoption("--kills", type=int, default=2, help="random kills in each test that kills at random moments")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("gpu") and not ON_GPU:
        raise pytest.UsageError("--gpu: give it on the command line, or set MOON_JAX_TEST_GPU=1")
    if ON_GPU and jax.default_backend() == "cpu":
        raise pytest.UsageError("--gpu: JAX finds no accelerator here; install '.[cuda]' on a machine with a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests marked gpu for --gpu, and the others for a run without it."""
    wanted = [item for item in items if (item.get_closest_marker("gpu") is not None) == ON_GPU]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `kill_seed` runs once for each of --kills seeds."""
    if "kill_seed" in metafunc.fixturenames:
        metafunc.parametrize("kill_seed", range(1, metafunc.config.getoption("kills") + 1))


def but_slow(cases: Iterable[Any], fast: Sequence[Any]) -> list[Any]:
    """Parameters of a test, of which all but the `fast` ones are marked slow."""
    missing = [case for case in fast if case not in (cases := [*cases])]
    assert not missing, missing
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process that a test starts: simulated devices and the shared compilation cache."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = FLAGS.replace("device_count=8", f"device_count={devices}")
    return os.environ | cache | {"XLA_FLAGS": flags}


COLOURS = {"red": (200, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 200), "yellow": (220, 210, 40)}
THINGS = ("shirt", "shoe", "bag", "hat", "watch")

TINY = {
    "vision.depth": 2,
    "vision.width": 16,
    "vision.mlp_width": 24,
    "vision.heads": 2,
    "vision.positions": 16,
    "vision.deepstack": (0,),
    "vision.patch": 8,
    "language.vocab": 300,
    "language.width": 24,
    "language.layers": 2,
    "language.heads": 4,
    "language.kv_heads": 2,
    "language.head_dim": 12,
    "language.mlp_width": 40,
    "language.rope_theta": 10_000.0,
    "language.rope_sections": (2, 2, 2),
    "experts.count": 4,
    "experts.width": 20,
    "data.batch": 8,
    "data.text_tokens": 12,
    "data.visual_tokens": 6,
    "data.min_visual_tokens": 2,
    "evaluation.batch": 8,
    "training.steps": 12,
    "training.learning_rate": 1e-3,
    "training.min_warmup": 2,
    "training.log_every": 1,
    "training.save_every": 3,
}


def tiny(**differences: object) -> config_lib.Config:
    """A config small enough for tests; `__` in names stands for a dot."""
    values = TINY | {name.replace("__", "."): value for name, value in differences.items()}
    return config_lib.replace(config_lib.Config(), values)


def overrides(config: config_lib.Config) -> list[str]:
    """Command-line arguments that turn the defaults into `config`."""
    defaults = config_lib.leaves(config_lib.Config())
    return [
        f"--config.{k}={v!r}" for k, v in config_lib.leaves(config).items() if v != defaults[k] and k != "data.path"
    ]


def jpeg(colour: tuple[int, int, int], size: tuple[int, int], seed: int) -> bytes:
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 25, (size[1], size[0], 3))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def records(count: int) -> list[dict]:
    """Products whose titles name their colour; every 7th has no image, every 11th no title."""
    made = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        thing = THINGS[number // len(COLOURS) % len(THINGS)]
        size = ((20, 30), (30, 20), (24, 24))[number % 3]
        image = {"bytes": jpeg(COLOURS[colour], size, number), "path": f"{number}.jpg"}
        made.append(
            {
                "product_id": f"p{number}",
                "title": None if number % 11 == 10 else f"plain {colour} {thing} number {number % 9}",
                "category": ["goods", thing],
                "brand": None,
                "attributes": [("colour", colour)],
                "images": [] if number % 7 == 6 else [image],
            }
        )
    return made


def prepared_from(source: Path, output: Path, columns: str = "own", **differences: object) -> Prepared:
    """Prepares a source with two threads."""
    options = prepare.Options.of(tiny(**differences), columns)
    return prepare.prepare(source, output, options, lambda: ThreadPoolExecutor(2), 2)


def quarantine(prepared: Prepared) -> list[dict]:
    return [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]


def random_params(config: config_lib.Config, tokenizer: text.Tokenizer, seed: int = 0):
    """The encoder's parameters as numpy arrays, all random, including norms and biases."""
    from moon_jax.serving.embedder import abstract_params

    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        return (1 + 0.2 * noise if path[-1].key == "scale" else 0.15 * noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, tokenizer)["encoder"])


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with products.parquet: 60 products, some without image or title."""
    folder = tmp_path_factory.mktemp("catalogue")
    pq.write_table(pa.Table.from_pylist(records(60), SCHEMA), folder / "products.parquet")
    return folder


@pytest.fixture(scope="session")
def bucket():
    """The address of a bucket on a local server."""
    from tests import bucket as lib

    with lib.bucket() as address:
        yield address


@pytest.fixture(scope="session")
def prepared(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared_from(catalogue, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def tokenizer(prepared: Prepared) -> text.Tokenizer:
    return text.train((p.text for p in prepared.products if p.text), 300)


QUICKSTART = tiny(training__steps=40, training__save_every=6)
"""The config of a small quickstart."""


def quickstart(catalogue: Path, workdir: Path, *more: object) -> list[str]:
    """The command line of that quickstart."""
    command = [sys.executable, "-m", "moon_jax.cli", "quickstart", "--data", catalogue, "--workdir", workdir]
    return [*map(str, command), *overrides(QUICKSTART), *map(str, more)]


@pytest.fixture(scope="session")
def finished(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The workdir and the output of that quickstart."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    command = quickstart(catalogue, workdir)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout
