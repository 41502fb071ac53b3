"""Strategies that move tokens to SwiGLU experts and back, with one signature:

    (hidden [T,D], gate f32[T,E], index i32[T,K], keep bool[T,K], gate_up [E,2,D,F], down [E,F,D], capacity) → [T,D]

`gate` is G̃. `keep` marks the routes that count: per shard of tokens at most `capacity` for each expert. The router
decides both. Every strategy agrees with `dense` in values and gradients.

- `dense`: every expert computes every token. The reference; E/K times the cost.
- `grouped`: routes are sorted by expert, and each expert computes its own rows: the cost of the routed tokens. On a
  mesh the tokens stay on their devices, and a layer's experts are gathered from the axes `expert` and `fsdp`.
- `expert_parallel`: experts stay on their devices. Each device sends its tokens to the devices of the axis `expert`
  that hold the chosen experts and gets results back: two all-to-alls of static buffers with `capacity` rows per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moon_jax import sharding
from moon_jax.model import grouped_matmul
from moon_jax.model.attention import KEPT
from moon_jax.types import Array


def dense(hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array, capacity: int) -> Array:
    """Every expert on every token, weighted by G̃: the reference."""
    del capacity
    kept = (jax.nn.one_hot(index, gate.shape[1]) * keep[..., None]).sum(axis=1)
    gate = (gate * kept).astype(hidden.dtype)
    first, up = jnp.einsum("td,egdf->getf", hidden, gate_up)
    return jnp.einsum("etf,efd->td", jax.nn.silu(first) * up * gate.T[..., None], down)


def sort_routes(index: Array, keep: Array, experts: int) -> tuple[Array, Array, Array]:
    """Sorts the kept routes by expert.

    Args:
        index, keep: [T,K]. Route t·K + k is token t's k-th.

    Returns:
        position: i32[T·K], the sorted position of each route; T·K if it is not kept.
        order: i32[T·K], the route at each sorted position; T·K after the last one.
        sizes: i32[E], routes of each expert.
    """
    routes = index.size
    expert = jnp.where(keep, index, experts).reshape(-1)
    number = jnp.arange(routes, dtype=jnp.int32)
    # lax.sort, not argsort: inside shard_map argsort's result counts as replicated, which makes gradients wrong.
    expert, order = jax.lax.sort((expert, number), num_keys=1)
    position = jax.lax.sort((order, number), num_keys=1)[1]
    sizes = (expert[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
    kept = sizes.sum()
    return jnp.where(position < kept, position, routes), jnp.where(number < kept, order, routes), sizes


@jax.custom_vjp
def permute(x: Array, source: Array, target: Array) -> Array:
    """Row m of the result is x[source[m]], or zero if there is no such row.

    Args:
        x: [N,D].
        source: i32[M].
        target: i32[N], the inverse: row n of x goes to target[n]. With it the backward pass is a gather, not a scatter.
    """
    del target
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


def _permute_forward(x: Array, source: Array, target: Array) -> tuple[Array, Array]:
    return permute(x, source, target), target


def _permute_backward(target: Array, cotangent: Array) -> tuple[Array, None, None]:
    return jnp.take(cotangent, target, axis=0, mode="fill", fill_value=0), None, None


permute.defvjp(_permute_forward, _permute_backward)


def _routed(hidden: Array, per_token: int) -> Array:
    """One row per route. [T,D] → [T·K,D]."""
    return jnp.broadcast_to(hidden[:, None], (hidden.shape[0], per_token, hidden.shape[1])).reshape(-1, hidden.shape[1])


def _combined(y: Array, gate: Array, index: Array) -> Array:
    """Σ_k G̃_k y_k. [T·K,D] → [T,D]."""
    weight = jnp.take_along_axis(gate, index, axis=1).astype(y.dtype)
    return jnp.einsum("tk,tkd->td", weight, y.reshape(*index.shape, -1))


def _grouped(hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array) -> Array:
    """`grouped` on one device that holds all experts."""
    position, order, sizes = sort_routes(index, keep, gate_up.shape[0])
    y = grouped_matmul.swiglu(permute(_routed(hidden, index.shape[1]), order, position), gate_up, down, sizes)
    return _combined(permute(y, position, order), gate, index)


def _expert_parallel(
    hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array, capacity: int
) -> Array:
    """`expert_parallel` on one device of the axis `expert`, which holds its share of the experts."""
    experts, width = gate.shape[1], hidden.shape[1]
    position, order, sizes = sort_routes(index, keep, experts)
    routes = position.size
    start = jnp.cumsum(sizes) - sizes
    # From sorted routes to slots, C per expert.
    rank = jnp.arange(capacity)
    at = start[:, None] + rank
    order = jnp.where(rank < sizes[:, None], jnp.take(order, at, mode="fill", fill_value=routes), routes).reshape(-1)
    rank = position - start[index.reshape(-1)]
    position = jnp.where((position < routes) & (rank < capacity), index.reshape(-1) * capacity + rank, order.size)

    slots = permute(_routed(hidden, index.shape[1]), order, position).reshape(experts, capacity, width)
    slots = jax.lax.all_to_all(slots, "expert", split_axis=0, concat_axis=1, tiled=True)  # [E/n, n·C, D]
    slots = checkpoint_name(slots, KEPT)
    first, up = checkpoint_name(jnp.einsum("ecd,egdf->gecf", slots, gate_up), KEPT)
    y = jnp.einsum("ecf,efd->ecd", jax.nn.silu(first) * up, down)
    y = jax.lax.all_to_all(y, "expert", split_axis=1, concat_axis=0, tiled=True)  # [E, C, D]
    y = checkpoint_name(y, KEPT)
    return _combined(permute(y.reshape(-1, width), position, order), gate, index)


def capacity_of(tokens: int, per_token: int, experts: int, factor: float) -> int:
    """C, how many of a shard's `tokens` one expert may take: `factor` times the even share; all for factor 0."""
    if not factor:
        return tokens
    return min(tokens, -(-int(-(-factor * tokens * per_token // experts)) // 8) * 8)


def _on_mesh(local: Callable[..., Array], gathered: tuple[str, ...], *arrays: Array) -> Array:
    """`local` on each device's tokens, with the matrices gathered from the axes `gathered`. `tensor` splits F."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, held = sharding.ROWS, "expert"

    def body(hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array) -> Array:
        for axis in gathered:
            gate_up = jax.lax.all_gather(gate_up, axis, axis=0 if axis == held else 2, tiled=True)
            down = jax.lax.all_gather(down, axis, axis=0 if axis == held else 2, tiled=True)
        y = local(hidden, gate, index, keep, gate_up, down)
        # Each device has summed over its part of F, and keeps its part of D.
        return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)

    tokens = PartitionSpec(rows)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tokens,) * 4 + (PartitionSpec(held, None, "fsdp", "tensor"), PartitionSpec(held, "tensor", "fsdp")),
        out_specs=PartitionSpec(rows, "tensor"),
        check_vma=False,  # Pallas kernels do not declare over which axes their results vary
    )(*arrays)


def grouped(hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array, capacity: int) -> Array:
    """Tokens stay and experts are gathered. Dropless, at the cost of the routed tokens."""
    del capacity
    arrays = (hidden, gate, index, keep, gate_up, down)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return _grouped(*arrays)
    return _on_mesh(_grouped, ("fsdp", "expert"), *arrays)


def expert_parallel(
    hidden: Array, gate: Array, index: Array, keep: Array, gate_up: Array, down: Array, capacity: int
) -> Array:
    """Experts stay and tokens are exchanged.

    Raises:
        ValueError: no mesh is set.
    """
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("expert_parallel: no mesh is set; enter one with jax.set_mesh")
    local = functools.partial(_expert_parallel, capacity=capacity)
    return _on_mesh(local, ("fsdp",), hidden, gate, index, keep, gate_up, down)


STRATEGIES = {"dense": dense, "grouped": grouped, "expert_parallel": expert_parallel}
