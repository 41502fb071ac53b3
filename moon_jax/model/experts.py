"""Banks of SwiGLU experts behind one signature, `(hidden, gate, index, valid, gate_up, down) → [T,D]`.

    hidden [T,D]; gate f32[T,E] is G̃; index i32[T,K]; valid bool[T]; gate_up [E,D,2F]; down [E,F,D]

`dense` computes every expert for every token: the oracle. `grouped` sorts the routes by expert and multiplies blocks
of routes by their expert's matrices: dropless, the cost of the routed tokens. They agree in values and gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array

BLOCK = 128
"""Routes of one expert that `grouped` multiplies at once; each expert wastes half a block on average."""


def swiglu(x: Array, gate_up: Array, down: Array) -> Array:
    """silu(x·gate) ⊙ (x·up) · down, with gate and up side by side. [..., T, D] → [..., T, D]."""
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down


def dense(hidden: Array, gate: Array, index: Array, valid: Array, gate_up: Array, down: Array) -> Array:
    """Every expert on every token, weighed by G̃: the oracle."""
    del index
    gate = jnp.where(valid[:, None], gate, 0.0).astype(hidden.dtype)
    activated = jnp.einsum("td,edf->etf", hidden, gate_up)
    first, up = jnp.split(activated, 2, axis=-1)
    activated = jax.nn.silu(first) * up * gate.T[..., None]
    return jnp.einsum("etf,efd->td", activated, down)


def grouped(hidden: Array, gate: Array, index: Array, valid: Array, gate_up: Array, down: Array) -> Array:
    """Routes sorted by expert, each expert's padded to whole blocks, one batched product over the blocks."""
    tokens, per_token = index.shape
    experts = gate_up.shape[0]
    routes = tokens * per_token
    expert = jnp.where(valid[:, None], index, experts).reshape(-1)  # padding sorts behind the last expert
    block = min(BLOCK, -(-routes // 8) * 8)
    blocks = -(-routes // block) + experts

    # The place of each route: its expert's first block, then its rank among that expert's routes.
    chosen = jax.nn.one_hot(expert, experts, dtype=jnp.int32)
    rank = (jnp.cumsum(chosen, axis=0) * chosen).sum(axis=1) - 1
    needed = -(-chosen.sum(axis=0) // block)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(needed)])
    nowhere = blocks * block
    place = jnp.where(expert < experts, first[jnp.minimum(expert, experts - 1)] * block + rank, nowhere)
    owner = jnp.minimum(jnp.searchsorted(first[1:], jnp.arange(blocks), side="right"), experts - 1)

    source = jnp.full(nowhere, routes, jnp.int32).at[place].set(jnp.arange(routes, dtype=jnp.int32), mode="drop")
    filled = jnp.take(hidden, source // per_token, axis=0, mode="fill", fill_value=0)
    y = swiglu(filled.reshape(blocks, block, -1), gate_up[owner], down[owner]).reshape(nowhere, -1)
    routed = jnp.take(y, place, axis=0, mode="fill", fill_value=0).reshape(tokens, per_token, -1)
    weight = jnp.take_along_axis(gate, index, axis=1).astype(hidden.dtype)
    return jnp.einsum("tk,tkd->td", weight, routed)


DISPATCH = {"dense": dense, "grouped": grouped}
