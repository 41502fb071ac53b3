"""A bank of SwiGLU experts over rows that are sorted by expert: the grouped matmul, chosen per backend.

Rows past the last group are nobody's: what comes back there may be anything, and what is passed back there is not read.

- TPU: `jax.lax.ragged_dot`, which the compiler knows.
- GPU: tokamax's Triton kernel of the same meaning (XLA's own would multiply every row with every expert).
- CPU, and whatever else: loops over blocks of each expert's rows, as many as it has. `ragged_dot` there would multiply
  every row with every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moon_jax import backend
from moon_jax.config import UserError
from moon_jax.types import Array

BLOCK = 128
"""Rows that the loops multiply at once; an expert's last block is half empty on average."""


def swiglu(x: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    """silu(x·gate_e) ⊙ (x·up_e) · down_e, where e is the expert whose group a row lies in.

    Args:
        x: [M,D], groups one after the other.
        gate_up: [E,2,D,F].
        down: [E,F,D].
        sizes: i32[E], rows of each group; they add up to at most M.

    Returns:
        [M,D].
    """
    platform = backend.platform()
    if platform == "tpu":
        return _ragged(x, gate_up, down, sizes, jax.lax.ragged_dot)
    if platform == "gpu":
        return _ragged(x, gate_up, down, sizes, _tokamax())
    return _looped(x, gate_up, down, sizes)


def _tokamax() -> Callable[..., Array]:
    try:
        import tokamax
    except ImportError:
        raise UserError(
            "config.experts.dispatch: on a GPU the grouped matmul is tokamax's; pip install 'moon_jax[cuda]'"
        ) from None
    return lambda x, matrices, sizes: tokamax.ragged_dot(x, matrices, sizes, implementation="triton")


def _ragged(x: Array, gate_up: Array, down: Array, sizes: Array, dot: Callable[..., Array]) -> Array:
    return dot(jax.nn.silu(dot(x, gate_up[:, 0], sizes)) * dot(x, gate_up[:, 1], sizes), down, sizes)


def _activate(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _each_block(
    body: Callable[[Array, Any], Any], start: Array, stop: Array, carry: Any
) -> Any:
    """body(at, carry) for at = start, start + BLOCK, … below stop."""
    step = lambda state: (state[0] + BLOCK, body(state[0], state[1]))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < stop, step, (start, carry))[1]


def _block(x: Array, at: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, at, BLOCK)


def _put(x: Array, block: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, at, axis=0)


def _padded(x: Array) -> Array:
    """Room for the last block to reach past the end."""
    return jnp.pad(x, ((0, BLOCK), (0, 0)))


@jax.custom_vjp
def _looped(x: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    return _looped_forward(x, gate_up, down, sizes)[0]


def _looped_forward(x: Array, gate_up: Array, down: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    # A block that reaches into the next group writes there what that group, later, overwrites.
    rows, inner = x.shape[0], down.shape[1]
    stop = jnp.cumsum(sizes)
    x = _padded(x)

    def expert(carry, part):
        (gate_matrix, up_matrix), down_matrix, start, stop = part

        def body(at, carry):
            y, gate, up = carry
            mine = _block(x, at)
            gated, upped = mine @ gate_matrix, mine @ up_matrix
            return _put(y, _activate(gated, upped) @ down_matrix, at), _put(gate, gated, at), _put(up, upped, at)

        return _each_block(body, start, stop, carry), None

    activations = jnp.zeros((x.shape[0], inner), x.dtype)
    carry = (jnp.zeros_like(x), activations, activations)
    (y, gate, up), _ = jax.lax.scan(expert, carry, (gate_up, down, stop - sizes, stop))
    return y[:rows], (x, gate, up, gate_up, down, sizes)


def _looped_backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array, None]:
    x, gate, up, gate_up, down, sizes = kept
    rows = cotangent.shape[0]
    stop = jnp.cumsum(sizes)
    cotangent = _padded(cotangent)

    def expert(dx, part):
        (gate_matrix, up_matrix), down_matrix, start, stop = part
        gate_turned, up_turned, down_turned = gate_matrix.T, up_matrix.T, down_matrix.T

        def body(at, carry):
            dx, dgate_up, ddown = carry
            inside = (at + jnp.arange(BLOCK) < stop)[:, None]  # the next group's rows are not this expert's
            mine, dy, gated, upped = (
                jnp.where(inside, _block(array, at), 0) for array in (x, cotangent, gate, up)
            )
            activated, pull = jax.vjp(_activate, gated, upped)
            dgated, dupped = pull(dy @ down_turned)
            dx = _put(dx, dgated @ gate_turned + dupped @ up_turned, at)
            dgate_up = (dgate_up[0] + mine.T @ dgated, dgate_up[1] + mine.T @ dupped)
            return dx, dgate_up, ddown + activated.T @ dy

        zeros = jnp.zeros_like(gate_matrix)
        dx, dgate_up, ddown = _each_block(body, start, stop, (dx, (zeros, zeros), jnp.zeros_like(down_matrix)))
        return dx, (jnp.stack(dgate_up), ddown)

    dx, (dgate_up, ddown) = jax.lax.scan(expert, jnp.zeros_like(x), (gate_up, down, stop - sizes, stop))
    return dx[:rows], dgate_up, ddown, None


_looped.defvjp(_looped_forward, _looped_backward)
