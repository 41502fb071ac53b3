"""Grouped matmul: SwiGLU experts over rows sorted by expert, with one implementation per backend.

Rows after the last group belong to no expert: their outputs are undefined, and their cotangents are ignored.

- TPU: JAX's Pallas kernels of MegaBlox (arXiv 2211.15841). `jax.lax.ragged_dot` has a kernel for the forward matmul
  there, but XLA computes the gradient of the matrices from every row for every expert (libtpu 0.0.42).
- GPU: tokamax's Triton kernel for the same operation. XLA's own would multiply every row with every expert.
- CPU and others: a loop over blocks of each expert's rows. `ragged_dot` would multiply every row with every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moon_jax import backend
from moon_jax.errors import UserError
from moon_jax.model.attention import KEPT
from moon_jax.types import Array

INTERPRET = False
"""Whether the TPU kernels run in Pallas's interpreter, for tests on a CPU."""

BLOCK = 256
"""Maximum rows per step of the loops. An expert's last block is half empty on average."""


def swiglu(x: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    """silu(x·gate_e) ⊙ (x·up_e) · down_e for each row, with e the expert of the row's group.

    Args:
        x: [M,D], sorted by group.
        gate_up: [E,2,D,F].
        down: [E,F,D].
        sizes: i32[E], rows of each group; their sum is at most M.

    Returns:
        [M,D].
    """
    platform = backend.platform()
    if platform == "tpu":
        rows = -(-x.shape[0] // TILE) * TILE
        padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
        return ragged(padded, gate_up, down, sizes, _megablox)[: x.shape[0]]
    if platform == "gpu":
        return ragged(x, gate_up, down, sizes, _tokamax())
    return _looped(x, gate_up, down, sizes)


TILE = 128
"""Rows per tile of the TPU kernels."""


def _tiling(rows: int, inner: int, columns: int) -> tuple[int, int, int]:
    """The whole inner axis, so that a tile of a matrix (about 4 MB) is read once for all rows of its expert."""
    del rows
    return TILE, inner, min(columns, max(128, 2**21 // inner // 128 * 128))


@jax.custom_vjp
def _megablox(x: Array, matrices: Array, sizes: Array) -> Array:
    """Rows [M,·] times their groups' matrices [E,·,·]; M is a multiple of TILE."""
    return gmm(x, matrices, sizes, x.dtype, _tiling, interpret=INTERPRET)


def _megablox_forward(x: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return _megablox(x, matrices, sizes), (x, matrices, sizes)


def _megablox_backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    x, matrices, sizes = kept
    dx = gmm(cotangent, matrices, sizes, x.dtype, _tiling, transpose_rhs=True, interpret=INTERPRET)
    tiles = (TILE, *(min(size, 1024) for size in matrices.shape[1:]))
    dmatrices = tgmm(x.swapaxes(0, 1), cotangent, sizes, matrices.dtype, tiles, interpret=INTERPRET)
    return dx, dmatrices, None


_megablox.defvjp(_megablox_forward, _megablox_backward)


def _tokamax() -> Callable[..., Array]:
    try:
        import tokamax
    except ImportError:
        raise UserError(
            "config.experts.dispatch: on a GPU the grouped matmul needs tokamax; pip install -e '.[cuda]'"
        ) from None

    def dot(x: Array, matrices: Array, sizes: Array) -> Array:
        try:
            return tokamax.ragged_dot(x, matrices, sizes, implementation="triton")
        except ValueError as error:  # newer versions of tokamax leave Triton to an extra
            if "implementation" not in str(error):
                raise
            raise UserError(
                "config.experts.dispatch: on a GPU tokamax needs triton and jax-triton; pip install -e '.[cuda]'"
            ) from None

    return dot


def ragged(x: Array, gate_up: Array, down: Array, sizes: Array, dot: Callable[..., Array]) -> Array:
    """`swiglu` by a grouped matmul `dot`: (rows [M,·], matrices [E,·,·], sizes) → [M,·]."""
    x = checkpoint_name(x, KEPT)
    gate, up = (checkpoint_name(dot(x, gate_up[:, half], sizes), KEPT) for half in (0, 1))
    return checkpoint_name(dot(_activate(gate, up), down, sizes), KEPT)


def _activate(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _block(rows: int, experts: int) -> int:
    """Rows per block: an expert's even share, rounded up to a multiple of 8, at most BLOCK."""
    return min(BLOCK, -(-rows // experts // 8) * 8)


def _each_block(block: int, body: Callable[[Array, Any], Any], start: Array, stop: Array, carry: Any) -> Any:
    """body(at, carry) for at = start, start + block, … below stop."""
    step = lambda state: (state[0] + block, body(state[0], state[1]))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < stop, step, (start, carry))[1]


def _put(x: Array, rows: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, at, axis=0)


@jax.custom_vjp
def _looped(x: Array, gate_up: Array, down: Array, sizes: Array) -> Array:
    return _looped_forward(x, gate_up, down, sizes)[0]


def _looped_forward(x: Array, gate_up: Array, down: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    # A block may reach into the next group; that group overwrites those rows later.
    rows, inner = x.shape[0], down.shape[1]
    block = _block(rows, down.shape[0])
    stop = jnp.cumsum(sizes)
    x = jnp.pad(x, ((0, block), (0, 0)))  # the last block may reach past the end

    def expert(carry, part):
        (gate_matrix, up_matrix), down_matrix, start, stop = part

        def body(at, carry):
            y, gate, up = carry
            mine = jax.lax.dynamic_slice_in_dim(x, at, block)
            gated, upped = mine @ gate_matrix, mine @ up_matrix
            return _put(y, _activate(gated, upped) @ down_matrix, at), _put(gate, gated, at), _put(up, upped, at)

        return _each_block(block, body, start, stop, carry), None

    activations = jnp.zeros((x.shape[0], inner), x.dtype)
    carry = (jnp.zeros_like(x), activations, activations)
    (y, gate, up), _ = jax.lax.scan(expert, carry, (gate_up, down, stop - sizes, stop))
    x, y, gate, up = (checkpoint_name(array, KEPT) for array in (x, y, gate, up))
    return y[:rows], (x, gate, up, gate_up, down, sizes)


def _looped_backward(kept: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, Array, None]:
    x, gate, up, gate_up, down, sizes = kept
    rows = cotangent.shape[0]
    block = _block(rows, down.shape[0])
    stop = jnp.cumsum(sizes)
    cotangent = jnp.pad(cotangent, ((0, block), (0, 0)))

    def outer(a: Array, b: Array) -> Array:
        return jnp.einsum("nd,nf->df", a, b, preferred_element_type=jnp.float32)

    def expert(dx, part):
        (gate_matrix, up_matrix), down_matrix, start, stop = part
        gate_transposed, up_transposed, down_transposed = gate_matrix.T, up_matrix.T, down_matrix.T

        def body(at, carry):
            dx, dgate, dup, ddown = carry
            arrays = (x, cotangent, gate, up)
            mine, dy, gated, upped = (jax.lax.dynamic_slice_in_dim(array, at, block) for array in arrays)
            dy = jnp.where((at + jnp.arange(block) < stop)[:, None], dy, 0)  # mask the next group's rows
            activated, pull = jax.vjp(_activate, gated, upped)
            dgated, dupped = pull(dy @ down_transposed)
            dx = _put(dx, dgated @ gate_transposed + dupped @ up_transposed, at)
            return dx, dgate + outer(mine, dgated), dup + outer(mine, dupped), ddown + outer(activated, dy)

        zeros = [jnp.zeros(matrix.shape, jnp.float32) for matrix in (gate_matrix, up_matrix, down_matrix)]
        dx, dgate, dup, ddown = _each_block(block, body, start, stop, (dx, *zeros))
        return dx, (jnp.stack([dgate, dup]).astype(gate_up.dtype), ddown.astype(down.dtype))

    dx, (dgate_up, ddown) = jax.lax.scan(expert, jnp.zeros_like(x), (gate_up, down, stop - sizes, stop))
    return dx[:rows], dgate_up, ddown, None


_looped.defvjp(_looped_forward, _looped_backward)
