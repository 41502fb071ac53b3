"""The device mesh, and the one table from the logical names of array axes to mesh axes."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moon_jax import config as config_lib
from moon_jax.config import UserError

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
"""The axes over which rows, and with them tokens, are divided."""

RULES = (
    ("rows", ROWS),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("layers", None),
    ("norm", None),
)
"""Logical name → mesh axes. A name that is not here is an error in `nn.logical_to_mesh_sharding`."""


def make_mesh(config: config_lib.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the axes of `AXES`.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = 1
    for size in sizes:
        fixed *= size if size != -1 else 1
    if sizes.count(-1) > 1 or fixed < 1 or len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"config.mesh: {shape} does not fit {len(devices)} devices; set one axis to -1 for the rest")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def of_variables(mesh: Mesh, variables: Any) -> Any:
    """Shardings of abstract linen variables, from the logical names that their partitioning boxes carry."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), mesh, RULES)


def shards() -> int:
    """Into how many parts the mesh in use divides rows; 1 without one."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ROWS)


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of everything whose first axis is R or B."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
