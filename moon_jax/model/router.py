"""The router decides which experts a token goes to; experts.py moves and computes (house rule: three things).

G = softmax(W_g h),  G̃ = the K largest, renormalised to sum 1,  y = Σ_e G̃_e f_e(h)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from moon_jax.types import Array


@struct.dataclass
class Routing:
    """What the router says of each token, in float32."""

    gate: Array  # f32[T,E]: G̃, zero for experts not chosen
    index: Array  # i32[T,K]: chosen experts, the strongest first
    prob: Array  # f32[T,E]: G
    logsumexp: Array  # f32[T]


def route(hidden: Array, kernel: Array, per_token: int) -> Routing:
    """Routes tokens.

    Args:
        hidden: [T,D].
        kernel: W_g, [D,E].
        per_token: K ≤ E.
    """
    logits = jnp.einsum(
        "td,de->te", hidden.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    prob = jax.nn.softmax(logits, axis=-1)
    _, index = jax.lax.top_k(prob, per_token)
    chosen = jax.nn.one_hot(index, prob.shape[-1], dtype=jnp.float32).sum(axis=1)
    gate = prob * chosen
    gate = gate / gate.sum(axis=-1, keepdims=True)
    return Routing(gate=gate, index=index, prob=prob, logsumexp=jax.nn.logsumexp(logits, axis=-1))
