"""The device mesh, and the single table from logical axis names to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.types import Array, Batch

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
"""The mesh axes that shard rows, and with them tokens."""

RULES = (
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("layers", None),
    ("norm", None),
)
"""Logical name → mesh axis. A name that is missing here is an error in `nn.logical_to_mesh_sharding`."""


def make_mesh(config: config_lib.Mesh, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes in `AXES`.

    If there are several slices (TPU pods joined only by the slower data-center network), `data` is split over them
    first, so that traffic along the other axes stays inside a slice.

    Raises:
        UserError: the product of the sizes is not the number of devices, or `data` is not a multiple of the slices.
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
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data: {data} does not divide over {slices} slices; make it a multiple of {slices}"
        )
    split = {"allow_split_physical_axes": True}  # for example 8 of the 4 x 4 x 4 chips of a torus
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, **split), AXES, types)
    between = (slices,) + (1,) * len(inner)
    return Mesh(mesh_utils.create_hybrid_device_mesh((data // slices, *inner), between, devices, **split), AXES, types)


def check(config: config_lib.Config, mesh: Mesh) -> None:
    """Checks that the mesh divides the config's sizes.

    Raises:
        UserError: names the axis, the option, and what to do.
    """
    divided = [("fsdp", "language.width"), ("fsdp", "vision.width"), ("tensor", "language.vocab")]
    divided += [("tensor", "language.width"), ("tensor", "vision.mlp_width")]
    if not all(config_lib.sparse_layers(config)):
        divided.append(("tensor", "language.mlp_width"))
    if any(config_lib.sparse_layers(config)):
        divided += [("expert", "experts.count"), ("tensor", "experts.width")]
    values = config_lib.leaves(config)
    for axis, name in divided:
        if values[name] % mesh.shape[axis]:
            raise UserError(
                f"config.mesh.{axis}: {mesh.shape[axis]} does not divide config.{name}, {values[name]}; choose a"
                " divisor, and give the remaining devices to config.mesh.data"
            )
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if config.data.batch % parts:
        raise UserError(
            f"config.data.batch: {config.data.batch} triplets do not divide over data x fsdp x expert, {parts} devices;"
            f" give a multiple of {parts}"
        )


def of_variables(mesh: Mesh, variables: Any) -> Any:
    """Shardings of abstract linen variables, from the logical names in their partitioning boxes.

    Raises:
        UserError: a mesh axis does not divide the axis of a variable that it shards; names both.
    """

    def named(box: Any) -> Any:
        """An optimizer may keep a smaller array for a matrix, such as its row means: it is replicated."""
        if not isinstance(box, nn.LogicallyPartitioned) or not hasattr(box.value, "shape"):
            return getattr(box, "value", box)  # an optimizer may skip a parameter
        if len(box.names) != len(box.value.shape):
            return box.value
        whole = [None if size == 1 else name for name, size in zip(box.names, box.value.shape, strict=True)]
        return box.replace(names=tuple(whole))

    is_box = lambda node: isinstance(node, nn.LogicallyPartitioned)  # noqa: E731
    variables = jax.tree.map(named, variables, is_leaf=is_box)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), mesh, RULES)

    def check(path: tuple[Any, ...], leaf: Any, sharding: NamedSharding) -> None:
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
                raise UserError(
                    f"config.mesh.{axis}: {parts} does not divide {size}, an axis of {name} {leaf.shape};"
                    " choose a divisor, and give the remaining devices to config.mesh.data"
                )

    jax.tree_util.tree_map_with_path(check, nn.unbox(variables), shardings)
    return shardings


def shards() -> int:
    """The number of parts into which the mesh in use divides rows; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ROWS)


def by_rows(x: Array) -> Array:
    """Constrains `x` to be sharded by rows along its first axis only. Does nothing without a mesh.

    Applied to the input of every layer: otherwise the compiler may shard activations like the weights, and compute all
    rows on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def lookup(table: Array, index: Array) -> Array:
    """table[index] for a table [N,D] that `fsdp` shards along D: i32[R,…] → [R,…,D], also sharded along D by `fsdp`.

    Each device looks up its part of D for all rows of its group; `by_rows` then exchanges parts for rows. Otherwise the
    compiler would gather the table on every device, and sum its whole gradient there.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table[index]
    groups = tuple(axis for axis in ROWS if axis != "fsdp")
    index = jax.lax.with_sharding_constraint(index, PartitionSpec(groups))
    return jax.lax.with_sharding_constraint(table[index], PartitionSpec(groups, *[None] * (index.ndim - 1), "fsdp"))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of everything whose first axis is R or B."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def share(mesh: Mesh, count: int) -> list[int]:
    """The indices, ascending, of the rows (out of `count`) that this process's devices hold.

    Raises:
        UserError: processes would hold different numbers of rows.
    """
    parts = rows(mesh).devices_indices_map((count,))
    held: dict[int, set[int]] = {}
    for device, (part,) in parts.items():
        held.setdefault(device.process_index, set()).update(range(*part.indices(count)))
    sizes = {index: len(numbers) for index, numbers in held.items()}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{size} in process {index}" for index, size in sorted(sizes.items()))
        raise UserError(
            f"config.mesh: rows do not divide evenly over processes ({listed}); give all the same number of devices"
        )
    return sorted(held[jax.process_index()])


def spread(mesh: Mesh, tree: Any, held: Sequence[int] | None = None, count: int = 0) -> Any:
    """Places numpy arrays on the devices, sharded by rows along the first axis.

    Args:
        held: the rows, out of `count`, that the arrays hold (the result of `share`). By default all.
    """
    start_of = {number: index for index, number in enumerate(held or ())}

    def put(array: np.ndarray) -> Array:
        whole = count if held else len(array)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(whole)
            start = start_of[first] if held else first
            return array[start : start + stop - first]

        return jax.make_array_from_callback((whole, *array.shape[1:]), rows(mesh), part)

    return jax.tree.map(put, tree)


def place(mesh: Mesh, batch: Batch, held: Sequence[int]) -> Batch:
    """Places a batch on the devices.

    Args:
        batch: numpy arrays; `rows` holds only the rows of this process, everything else is complete.
        held: the indices of these rows (the result of `share`).
    """
    local = spread(mesh, batch.rows, held, len(batch.product))
    return spread(mesh, batch.replace(rows=None)).replace(rows=local)
