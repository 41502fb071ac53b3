"""Dynamic sample filtering: triplets whose purchase contradicts the embeddings are weighed down, not dropped.

    φ = σ( κ ( r_q·r_p − r_q·r_n − m̄ ) )

The threshold 0.6 is the paper's; κ, the schedule of m̄ and the weight below the threshold are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array


def margin_at(margin: tuple[float, float], progress: Array) -> Array:
    """m̄: a cosine from margin[0] at progress 0 to margin[1] at progress 1. f32[]."""
    first, last = margin
    return last + (first - last) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def phi(query: Array, positive: Array, negative: Array, slope: float, margin: Array) -> Array:
    """φ of each triplet, in (0, 1). f32[B] from three unit f32[B,D]."""
    difference = (query * positive).sum(-1) - (query * negative).sum(-1)
    return jax.nn.sigmoid(slope * (difference - margin))


def sample_weight(phi: Array, threshold: float) -> Array:
    """1 from the threshold on, φ / threshold below it; 1 where φ is NaN, that is, where nothing speaks against.

    A threshold of 0 lets every triplet count fully.

    Carries no gradient: the loss must not fall by making a triplet look doubtful.
    """
    weight = jnp.where(phi < threshold, phi / threshold, 1.0)
    return jax.lax.stop_gradient(weight)
