"""Compile time of a training step with 36 decoder layers against one with 4, with and without a repeating pattern.

Layers are stacked and scanned, so the program's size does not depend on their number. The model is the quickstart's
with more layers. This process compiles every step from scratch, in alternation.

    python benchmarks/compile_time.py
"""

from __future__ import annotations

import statistics
import time

import jax

from moon_jax import backend, sharding
from moon_jax import config as config_lib
from moon_jax.training import loop

ROUNDS = 5
CASES = {
    "4 layers": {"language.layers": 4},
    "36 layers": {"language.layers": 36},
    "4 layers, every second with experts": {"language.layers": 4, "experts.every": 2},
    "36 layers, every second with experts": {"language.layers": 36, "experts.every": 2},
}


def seconds(config: config_lib.Config) -> float:
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = loop.abstract_batch(config, mesh)
        state = loop.abstract_state(config, batch.rows, mesh)
        jax.clear_caches()
        began = time.perf_counter()
        loop.lower_step(config, state, batch).compile(compiler_options=backend.compiler_options())
        return time.perf_counter() - began


def main() -> None:
    base = config_lib.replace(config_lib.load("quickstart"), {"training.remat": "full"})
    configs = {name: config_lib.replace(base, case) for name, case in CASES.items()}
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, config in configs.items():
            found[name].append(seconds(config))
    names = list(CASES)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: trace, lower and compile, median of {ROUNDS}")
    for few, many in (names[:2], names[2:]):
        ratio = statistics.median(b / a for a, b in zip(found[few], found[many], strict=True))
        first, second = (statistics.median(found[name]) for name in (few, many))
        print(f"{few}: {first:.1f} s; {many}: {second:.1f} s; x {ratio:.2f}")


if __name__ == "__main__":
    main()
