"""Dynamic sample filtering: triplets in which the purchase contradicts the embeddings are down-weighted, not dropped.

    φ = σ( κ ( r_q·r_p − r_q·r_n − m̄ ) )

The threshold 0.6 is the paper's; κ, the schedule of m̄ and the weight below the threshold are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array


def margin_at(margin: tuple[float, float], progress: Array) -> Array:
    """m̄: a cosine schedule from margin[0] at progress 0 to margin[1] at progress 1. f32[]."""
    first, last = margin
    return last + (first - last) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def phi(query: Array, positive: Array, negative: Array, slope: float, margin: Array) -> Array:
    """φ of each triplet, in (0, 1). f32[B] from three unit f32[B,D]."""
    difference = (query * positive).sum(-1) - (query * negative).sum(-1)
    return jax.nn.sigmoid(slope * (difference - margin))


def sample_weight(phi: Array, threshold: float) -> Array:
    """φ / threshold below the threshold, else 1; also 1 if φ is NaN, because nothing contradicts the triplet. f32[B].

    With a threshold of 0 every triplet has weight 1. There is no gradient: the model must not lower its loss by making
    a triplet look doubtful.
    """
    weight = jnp.where(phi < threshold, phi / threshold, 1.0)
    return jax.lax.stop_gradient(weight)
