"""The weights ω of the objectives, from the dual-alignment matrix W* and the routing of the tokens they pool.

    p_{e,m} = exp(W*_{e,m}) / Σ_k exp(W*_{e,k})
    ω_m     = (1/|B_m|) Σ_{b∈B_m} Σ_e p_{e,m} G̃_{e,b}          (mean over the layers that hold experts)
    L_sparsity = (1/E) Σ_e ( −Σ_m p_{e,m} log p_{e,m} )         (mean over those layers)

Ours, since the paper leaves it open: one W* per layer, and how ω carries gradient (`weighted_sum`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array


def affinity(dual: Array) -> Array:
    """p: softmax of W* over the objectives. f32[L,E,M]."""
    return jax.nn.softmax(dual, axis=-1)


def omega(dual: Array, routing: Array) -> Array:
    """ω. Sums to about 1 over the objectives; 1/M each where no layer holds experts.

    Args:
        dual: W*, f32[L,E,M].
        routing: f32[L,M,E], G̃ averaged over a span's tokens and then over B_m.

    Returns:
        f32[M].
    """
    if dual.shape[0] == 0:
        return jnp.full(dual.shape[-1], 1.0 / dual.shape[-1])
    return jnp.einsum("lem,lme->m", affinity(dual), routing) / dual.shape[0]


def sparsity(dual: Array) -> Array:
    """L_sparsity, in nats: log M at most, 0 when every expert has settled on one objective. f32[]."""
    if dual.shape[0] == 0:
        return jnp.zeros(())
    entropy = -(affinity(dual) * jax.nn.log_softmax(dual, axis=-1)).sum(-1)
    return entropy.mean()


def weighted_sum(dual: Array, routing: Array, loss: Array, count: Array, mode: str, inter: int) -> tuple[Array, Array]:
    """Σ_m ω_m L_m and ω, with gradients as `mode` says. The value is the paper's in every mode.

    product: the plain product. ω drifts to the easiest objective.
    stopped: ω is a constant of the gradient; only L_sparsity moves W*.
    balanced: the network sees Σ sg(ω_m) L_m; W* sees Σ ω_m sg(L_m) − (1/M) Σ log(M ω_m), a barrier that keeps every
        objective alive. The router is not moved through ω.
    counted: ω_m = (I/M) |B_m| / Σ_k |B_k| over the I inter-product objectives, a plain mean over queries, as where they
        are mixed at a fixed ratio; intra-product ones weigh 1/M. Experts and W* have no say.

    Args:
        dual, routing: as in `omega`.
        loss: f32[M].
        count: i32[M], |B_m|; an objective without samples takes no part.
        inter: I, how many of them are inter-product; these come first.
    """
    stop = jax.lax.stop_gradient
    if mode == "counted":
        queries = count[:inter] / jnp.maximum(count[:inter].sum(), 1)
        weight = jnp.concatenate([queries * inter, jnp.ones(loss.size - inter)]) / loss.size
        return (weight * loss).sum(), weight
    weight = omega(dual, routing)
    if mode == "product":
        return (weight * loss).sum(), weight
    value = (stop(weight) * loss).sum()
    if mode == "balanced":
        learned = omega(dual, stop(routing))
        served = (count > 0) & (learned > 0)
        barrier = jnp.where(served, jnp.log(loss.size * jnp.where(served, learned, 1.0)), 0.0)
        surrogate = (learned * stop(loss)).sum() - barrier.sum() / loss.size
        value = value + surrogate - stop(surrogate)
    return value, weight
