"""One of two processes that each save part of a state: python -m tests.training.torn WORKDIR

The second process's part of the newest checkpoint is truncated. Then both restore, and each prints its result.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moon_jax import config as config_lib
from moon_jax import distributed, sharding, storage
from moon_jax.training import checkpoints
from tests.training.test_checkpoints import ABOUT, like, state, training, truncate

distributed.initialize()
workdir = Path(sys.argv[1])
mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=2))


def placed(number):
    """The state with its kernel divided between the two."""
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))

    def put(x):
        placement = divided if x.ndim == 3 else everywhere
        return jax.make_array_from_callback(x.shape, placement, lambda index: np.asarray(x)[index])

    return jax.tree.map(put, state(number))


opened = checkpoints.Checkpoints(storage.Store(workdir).checkpoints, training())
for step in (5, 7):
    opened.save(placed(step), step, ABOUT)
opened.close()
distributed.allgather("")
if distributed.is_primary():
    parts = (workdir / "checkpoints" / "7" / "params" / "ocdbt.process_1" / "d").iterdir()
    truncate(max(parts, key=lambda path: path.stat().st_size))
distributed.allgather("")

warnings = []
opened = checkpoints.Checkpoints(storage.Store(workdir).checkpoints, training())
step, found = opened.restore(like(placed(0)), {"data": "catalogue"}, warnings.append)
whole = np.asarray(state(5).params["encoder"]["kernel"])
kernel = found.params["encoder"]["kernel"]
equal = all(np.array_equal(part.data, whole[part.index]) for part in kernel.addressable_shards)
# One write: two processes share the pipe, and print() writes its newline apart when Python is unbuffered.
os.write(1, f"process {jax.process_index()}: step {step}, equal {equal}, warnings {len(warnings)}\n".encode())
opened.close()
