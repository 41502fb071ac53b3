"""Host memory used to load public weights, in addition to the parameters, also as a share of the largest leaf.

Writes a folder with Qwen3-VL-2B's sizes, fewer layers and random bfloat16 weights. For each row of the table a process
loads it: dense, upcycled, or divided over eight simulated devices. Memory is anonymous memory (RssAnon of
/proc/self/status; Linux only), sampled while loading.

    python benchmarks/load_memory.py             8 layers, 2 GB on disk, at most 10 GB of memory, five minutes
    python benchmarks/load_memory.py --layers 28 --rows dense
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS = {
    "dense": ["experts.count=0"],
    "dense, bfloat16": ["experts.count=0", "training.param_dtype=bfloat16"],
    "upcycled": ["experts.count=4"],
    "upcycled, half reinitialized": ["experts.count=4", "experts.reinitialized=0.5"],
    "upcycled, eight devices": ["experts.count=4", "mesh.data=1", "mesh.fsdp=8"],
    "reinitialized, eight devices": ["experts.count=4", "experts.reinitialized=0.5", "mesh.data=1", "mesh.fsdp=8"],
}


def anonymous() -> int:
    """This process's anonymous memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def write(folder: Path, layers: int) -> None:
    """Writes the folder: config.json, tokenizer.json, and weights in files of about 1 GB."""
    import jax
    import ml_dtypes
    import numpy as np
    from tokenizers import Tokenizer, models

    from moon_jax import config as config_lib
    from moon_jax.data.text import SPECIAL
    from moon_jax.data.text import Tokenizer as Ours
    from moon_jax.hub import export, keys
    from moon_jax.serving.embedder import abstract_params

    base = Tokenizer(models.WordLevel({token: number for number, token in enumerate(SPECIAL)}, unk_token=SPECIAL[0]))
    tokenizer = Ours.of(base, "the benchmark's tokenizer")
    config = config_lib.replace(config_lib.Config(), {"experts.count": 0, "language.layers": layers})
    leaves = keys.flatten(
        jax.tree.map(
            lambda leaf: leaf.shape,
            abstract_params(config, tokenizer)["encoder"],
            is_leaf=lambda leaf: hasattr(leaf, "shape"),
        )
    )
    rng = np.random.default_rng(0)

    def tensors():
        for row in keys.table(config):
            shape = leaves[row.ours] if row.stack_index is None else leaves[row.ours][1:]
            array = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            yield f"model.{row.theirs}", np.ascontiguousarray(keys.to_theirs(array, row.transform))

    export.write_weights(folder, tensors(), file_bytes=1_000_000_000)
    (folder / "config.json").write_text(json.dumps(export.model_config(config, tokenizer)))
    tokenizer.save(folder / "tokenizer.json")


def measure(folder: Path, options: list[str]) -> dict[str, float]:
    """Loads the folder in this process; returns bytes (held, largest leaf, peak beyond those held) and seconds."""
    import jax

    from moon_jax import config as config_lib
    from moon_jax import sharding
    from moon_jax.data import rows as rows_lib
    from moon_jax.data.text import Tokenizer
    from moon_jax.hub import folder as folder_lib
    from moon_jax.hub import weights
    from moon_jax.training.loop import abstract_state

    config = config_lib.override(folder_lib.config(folder, {}), [f"--config.{option}" for option in options])
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        rows = rows_lib.pack([[]] * mesh.size, rows_lib.Layout.of(config), tokenizer.pad)
        like = abstract_state(config, rows, mesh).params["encoder"]
        before, peak, done = anonymous(), 0, threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(0.002)

        sampler = threading.Thread(target=sample)
        sampler.start()
        began = time.monotonic()
        params = jax.block_until_ready(weights.load(folder, config, like))
        seconds = time.monotonic() - began
        done.set()
        sampler.join()
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return {"held": held, "largest": largest, "beyond": peak - before - held, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "ROW"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.measure:
        print(json.dumps(measure(Path(parsed.measure[0]), ROWS[parsed.measure[1]])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), parsed.layers)
        print(f"{'':29}{'parameters':>12}{'largest leaf':>14}{'beyond':>10}{'of the leaf':>13}{'seconds':>9}")
        for row in parsed.rows:
            devices = 8 if "eight" in row else 1
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            command = [sys.executable, __file__, "--measure", folder, row]
            found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            print(
                f"{row:29}{found['held'] / 1e9:>9.2f} GB{found['largest'] / 1e9:>11.2f} GB"
                f"{found['beyond'] / 1e9:>7.2f} GB{found['beyond'] / found['largest']:>13.2f}{found['seconds']:>9.1f}"
            )


if __name__ == "__main__":
    main()
