"""A checkpoint's metadata: config, code version, data fingerprint, and digests of every array and of the metadata."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.types import Array


def describe(config: config_lib.Config, fingerprint: str) -> dict[str, Any]:
    """The run's part of the metadata: config, code version, fingerprint of the data."""
    version = metadata.version("moon_jax")
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # our own clone: an installed package may be inside another project's
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
            version += "+" + subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return {"config": json.loads(config_lib.to_json(config)), "version": version, "data": fingerprint}


def name_of(path: Any) -> str:
    """A leaf's path as written in the metadata, such as params/encoder/token_embedding."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(items: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(items)}


def seal(about: dict[str, Any]) -> dict[str, Any]:
    """The metadata with its own digest added."""
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()
    return about | {"digest": digest}


def digest(x: Array) -> Array:
    """Two checksums, u32[2], modulo 2^32, of an array's bits and their positions. Flipping any single bit changes both.

    Integer sums do not depend on order, so the result is the same on any number of devices and processes. Each device
    sums the part of the array that it holds.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    sums = []
    for salt in (2654435761, 2246822519):
        # Murmur's finalizer is a bijection: at a given position different words give different sums.
        mixed = bits ^ (position * jnp.uint32(salt) + jnp.uint32(salt >> 7))
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        sums.append((mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)


@functools.cache
def _digests() -> Callable[[list[Array]], Array]:
    return jax.jit(lambda leaves: jnp.stack([digest(leaf) for leaf in leaves]))


def arrays(items: dict[str, Any]) -> dict[str, list]:
    """The shape, dtype and digest of every array, by name."""
    leaves = flatten(items)
    sums = np.asarray(_digests()(list(leaves.values())))
    return {
        name: [list(leaf.shape), str(leaf.dtype), "".join(f"{number:08x}" for number in pair)]
        for (name, leaf), pair in zip(leaves.items(), sums.tolist(), strict=True)
    }


def check_architecture(path: Path, about: dict[str, Any], like: dict[str, Any]) -> None:
    """Raises UserError for the first array whose shape differs between checkpoint and config."""
    here = {name: tuple(leaf.shape) for name, leaf in flatten(like).items()}
    there = {name: tuple(entry[0]) for name, entry in about["arrays"].items() if name.split("/")[0] in like}
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{path}: a checkpoint of another architecture: {name.removeprefix('params/')} has shape"
                f" {there.get(name, 'none')} there, and {here.get(name, 'none')} by config.json; give the config that"
                " it was trained with"
            )
