"""Router losses, from the encoder's sums. Means over the global batch are taken here."""

from __future__ import annotations

import jax.numpy as jnp

from moon_jax.types import Array


def load_balance(load: Array, prob: Array, valid: Array, per_token: int) -> Array:
    """L_aux in the form of Switch (arXiv 2101.03961, eq. 4): E Σ_e f_e P_e, mean over layers; 1 when balanced.

    Args:
        load: f32[L,E], valid tokens routed to each expert; f = load / (K · valid).
        prob: f32[L,E], router probability summed over valid tokens; P = prob / valid.
        valid: i32[].
        per_token: K.

    Returns:
        f32[]; 0 if there are no layers with experts or no valid tokens.
    """
    layers, experts = load.shape
    if layers == 0:
        return jnp.zeros(())
    tokens = jnp.maximum(valid, 1).astype(jnp.float32)
    return experts * (load / (per_token * tokens) * (prob / tokens)).sum(axis=1).mean()


def router_z(z: Array, valid: Array) -> Array:
    """The router z-loss (arXiv 2202.08906, eq. 5): mean squared logsumexp of the logits. f32[] from f32[L]."""
    if z.shape[0] == 0:
        return jnp.zeros(())
    return (z / jnp.maximum(valid, 1)).mean()
