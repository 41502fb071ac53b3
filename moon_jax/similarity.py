"""Similarities of unit vectors: top-k and logsumexp in chunks, memory flat in the number of candidates; truncation.

The losses, retrieval and search share these functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moon_jax.types import Array

PRECISION = jax.lax.Precision.HIGHEST  # the default on TPU multiplies in bfloat16, which reorders near ties


def truncate(vectors: Array, width: int) -> Array:
    """The first `width` dimensions, brought back to unit length (Matryoshka, arXiv 2205.13147); zero stays zero.

    Args:
        vectors: f32[…,D], unit or zero.

    Returns:
        f32[…,width]; `vectors` themselves where that is D.
    """
    if width == vectors.shape[-1]:
        return vectors
    short = jnp.asarray(vectors)[..., :width]
    square = (short**2).sum(axis=-1, keepdims=True)
    # Absent views are zero: neither they nor their gradient may grow.
    return short * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _chunks(candidates: Array, chunk: int) -> tuple[Array, Array]:
    """f32[C,D] → f32[C/chunk,chunk,D], padded with zeros, and the columns i32[C/chunk,chunk]."""
    count = candidates.shape[0]
    pad = -count % chunk
    padded = jnp.pad(candidates, ((0, pad), (0, 0)))
    columns = jnp.arange(count + pad, dtype=jnp.int32)
    return padded.reshape(-1, chunk, candidates.shape[1]), columns.reshape(-1, chunk)


def masked_logsumexp(
    queries: Array, candidates: Array, keep: Callable[[Array], Array], scale: Array, chunk: int
) -> tuple[Array, Array]:
    """log Σ_c exp(scale · q·c) over the candidates that `keep` admits.

    Args:
        queries: f32[Q,D].
        candidates: f32[C,D].
        keep: columns i32[c] → bool[Q,c].
        scale: f32[], the inverse temperature.
        chunk: candidates whose similarities are held at once; the backward pass computes them anew.

    Returns:
        f32[Q], -inf where nothing is kept; and i32[Q], the candidates kept.
    """
    total = candidates.shape[0]

    @jax.checkpoint
    def step(carry: tuple[Array, Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        largest, summed, kept = carry
        block, columns = part
        mask = keep(columns) & (columns < total)
        logits = jnp.einsum("qd,cd->qc", queries, block, precision=PRECISION) * scale
        logits = jnp.where(mask, logits, -jnp.inf)
        # The running maximum only guards against overflow: its gradient cancels, so none is taken.
        new = jnp.maximum(largest, jax.lax.stop_gradient(logits.max(axis=1)))
        base = jnp.where(jnp.isneginf(new), 0.0, new)
        # Masked terms are cut before exp: exp(-inf) would give 0 · inf in the backward pass.
        terms = jnp.where(mask, jnp.exp(jnp.where(mask, logits, base[:, None]) - base[:, None]), 0.0)
        summed = summed * jnp.exp(largest - base) + terms.sum(axis=1)
        return (new, summed, kept + mask.sum(axis=1, dtype=jnp.int32)), None

    size = queries.shape[0]
    start = (jnp.full(size, -jnp.inf), jnp.zeros(size), jnp.zeros(size, jnp.int32))
    (largest, summed, kept), _ = jax.lax.scan(step, start, _chunks(candidates, min(chunk, total)))
    some = kept > 0
    return jnp.where(some, jnp.where(some, largest, 0.0) + jnp.log(jnp.where(some, summed, 1.0)), -jnp.inf), kept


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def top_k(queries: Array, candidates: Array, k: int, chunk: int = 65536) -> tuple[Array, Array]:
    """The k most similar candidates of each query; of equal ones the lowest index comes first.

    Args:
        queries: f32[Q,D].
        candidates: f32[C,D]; k ≤ C.

    Returns:
        similarities f32[Q,k], falling; and indices i32[Q,k].
    """
    total = candidates.shape[0]
    if k > total:
        raise ValueError(f"top_k: k={k} of {total} candidates")

    def step(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        block, columns = part
        scores = jnp.einsum("qd,cd->qc", queries, block, precision=PRECISION)
        scores = jnp.where(columns < total, scores, -jnp.inf)
        # The best so far have lower indices and stand first; lax.top_k keeps the order of equal ones.
        scores = jnp.concatenate([best[0], scores], axis=1)
        indices = jnp.concatenate([best[1], jnp.broadcast_to(columns, (queries.shape[0], columns.shape[0]))], axis=1)
        top, where = jax.lax.top_k(scores, k)
        return (top, jnp.take_along_axis(indices, where, axis=1)), None

    size = queries.shape[0]
    start = (jnp.full((size, k), -jnp.inf), jnp.zeros((size, k), jnp.int32))
    best, _ = jax.lax.scan(step, start, _chunks(candidates, max(k, min(chunk, total))))
    return best
