"""The router chooses each token's experts; experts.py moves the tokens and computes.

G = softmax(W_g h + term),  G̃ = the K largest, renormalised to sum 1,  y = Σ_e G̃_e f_e(h)

The term is our option: the paper's router sees h alone. It depends on what a token is: with `learned` and `hard` its
*composition*, the view that its segment forms; with `token` and `token_hard` its modality, text or image. The hard ones
reserve experts (−inf for all others), the others are trained.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moon_jax.types import VIEWS, Array


@struct.dataclass
class Routing:
    """The router's result for each token, in float32."""

    gate: Array  # f32[T,E]: G̃, zero for experts not chosen
    index: Array  # i32[T,K]: chosen experts, the strongest first
    prob: Array  # f32[T,E]: G
    logsumexp: Array  # f32[T]


TERMS = {"learned": len(VIEWS), "hard": len(VIEWS), "token": 2, "token_hard": 2}
"""The router terms, and how many kinds of token each distinguishes: the views, or text (0) and image (1)."""


def own_experts(kinds: int, experts: int, per_token: int) -> np.ndarray:
    """bool[kinds,E]: which experts belong to which kind of token: groups of K = `per_token` consecutive ones, taken by
    the views in turn, or by text and image one half each.

    K consecutive experts may be the slices of one feed-forward (hub/weights.py), which must stay together.
    """
    groups = experts // per_token
    group = np.minimum(np.arange(experts) // per_token, groups - 1)  # experts left over belong to the last one
    kind = group % kinds if kinds == len(VIEWS) else group * kinds // groups
    return kind == np.arange(kinds)[:, None]


def hard_term(kinds: int, experts: int, per_token: int) -> np.ndarray:
    """f32[kinds,E]: 0 if the kind of token may use the expert, else −inf."""
    return np.where(own_experts(kinds, experts, per_token), 0.0, -np.inf).astype(np.float32)


def route(hidden: Array, kernel: Array, per_token: int, term: Array | None = None) -> Routing:
    """Routes tokens.

    Args:
        hidden: [T,D].
        kernel: W_g, [D,E].
        per_token: K; at most E, and at most the number of experts that the term allows a token.
        term: f32[T,E], added to the logits.
    """
    logits = jnp.einsum(
        "td,de->te", hidden.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    logits = logits if term is None else logits + term
    prob = jax.nn.softmax(logits, axis=-1)
    # Rank the logits, not G: if G underflows to 0, a forbidden expert would tie with an allowed one.
    _, index = jax.lax.top_k(logits, per_token)
    chosen = jax.nn.one_hot(index, prob.shape[-1], dtype=jnp.float32).sum(axis=1)
    gate = prob * chosen
    gate = gate / gate.sum(axis=-1, keepdims=True)
    return Routing(gate=gate, index=index, prob=prob, logsumexp=jax.nn.logsumexp(logits, axis=-1))


def keep_strongest(routing: Routing, valid: Array, capacity: int, shards: int) -> Array:
    """The routes within capacity: from each shard, an expert takes the C tokens with the largest G for it.

    Ties go to the earlier token (batch prioritised routing, arXiv 2106.05974). The gate of a dropped route is not
    redistributed to the token's other experts.

    Args:
        routing: of T tokens.
        valid: bool[T]; invalid tokens use no capacity.
        capacity: C.
        shards: number of equal, consecutive parts of the tokens.

    Returns:
        bool[T,K].
    """
    index, experts = routing.index, routing.prob.shape[-1]
    tokens = index.shape[0] // shards
    if capacity >= tokens:  # an expert has at most one route per token
        return jnp.broadcast_to(valid[:, None], index.shape)
    strength = jax.lax.stop_gradient(jnp.take_along_axis(routing.prob, index, axis=1)).reshape(shards, -1)
    expert = jnp.where(valid[:, None], index, experts).reshape(shards, -1)
    route = jax.lax.broadcasted_iota(jnp.int32, expert.shape, 1)
    expert, _, route = jax.lax.sort((expert, -strength, route), num_keys=3)
    one_hot = expert[..., None] == jnp.arange(experts)
    counts = one_hot.sum(axis=1, keepdims=True)
    first = (one_hot * (jnp.cumsum(counts, axis=-1) - counts)).sum(axis=-1)
    kept = (jax.lax.broadcasted_iota(jnp.int32, expert.shape, 1) - first < capacity) & (expert < experts)
    return jax.lax.sort((route, kept), num_keys=1)[1].reshape(index.shape)
