"""Host memory over a long run: the quickstart's model, trained in small batches with checkpoints and evaluations.

    python benchmarks/training_memory.py            2,000 steps, about ten minutes on two cores

Prints the process's peak memory in every hundred steps, and its growth after the first 200 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import moon_jax
from moon_jax import config as config_lib

EACH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="triplets per step (default: 8)")
    parsed = parser.parse_args()
    options = {
        "data.synthetic": 600,
        "data.batch": parsed.batch,
        "training.steps": parsed.steps,
        "training.save_every": EACH,
        "training.log_every": 10,
        "evaluation.every": 5 * EACH,
    }
    config = config_lib.replace(config_lib.load("quickstart"), options)
    with tempfile.TemporaryDirectory() as folder:
        moon_jax.train(config, Path(folder) / "w")
        lines = [json.loads(line) for line in (Path(folder) / "w" / "speed.jsonl").read_text().splitlines()]
    most: dict[int, int] = {}
    for line in lines:
        part = -(-line["step"] // EACH) * EACH
        most[part] = max(most.get(part, 0), line["host_bytes"])
    for part, size in most.items():
        print(f"steps to {part:5d}: {size / 1e6:8.1f} MB")
    early = max(size for part, size in most.items() if part <= 200)
    late = max(size for part, size in most.items() if part > 200)
    print(f"peak: {early / 1e6:.1f} MB in the first 200 steps, {late / 1e6:.1f} MB later ({late / early - 1:+.2%})")


if __name__ == "__main__":
    main()
