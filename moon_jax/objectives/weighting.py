"""The weights ω of the objectives, from the dual-alignment matrix W* and the routing of the tokens they pool.

    p_{e,m} = exp(W*_{e,m}) / Σ_k exp(W*_{e,k})
    ω_m     = (1/|B_m|) Σ_{b∈B_m} Σ_e p_{e,m} G̃_{e,b}          (mean over the layers with experts)
    L_sparsity = (1/E) Σ_e ( −Σ_m p_{e,m} log p_{e,m} )         (mean over the same layers)

Ours, because the paper leaves it open: one W* per layer, and the gradient of ω (`weighted_sum`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array


def affinity(dual: Array) -> Array:
    """p: softmax of W* over the objectives. f32[L,E,M]."""
    return jax.nn.softmax(dual, axis=-1)


def omega(dual: Array, routing: Array) -> Array:
    """ω. Sums to about 1 over the objectives; 1/M each if no layer has experts.

    Args:
        dual: W*, f32[L,E,M].
        routing: f32[L,M,E], G̃ averaged over each span's tokens and then over B_m.

    Returns:
        f32[M].
    """
    if dual.shape[0] == 0:
        return jnp.full(dual.shape[-1], 1.0 / dual.shape[-1])
    return jnp.einsum("lem,lme->m", affinity(dual), routing) / dual.shape[0]


def sparsity(dual: Array) -> Array:
    """L_sparsity, in nats: at most log M, 0 when every expert has settled on one objective. f32[]."""
    if dual.shape[0] == 0:
        return jnp.zeros(())
    entropy = -(affinity(dual) * jax.nn.log_softmax(dual, axis=-1)).sum(-1)
    return entropy.mean()


def weighted_sum(dual: Array, routing: Array, loss: Array, count: Array, mode: str, inter: int) -> tuple[Array, Array]:
    """Σ_m ω_m L_m and ω. `mode` determines the gradients; in all modes but `counted` the value is the paper's.

    product: the plain product. ω drifts to the easiest objective.
    stopped: ω has no gradient; only L_sparsity changes W*.
    balanced: the network's gradient is that of Σ sg(ω_m) L_m; the gradient of W* is that of
        Σ ω_m sg(L_m) − (1/M) Σ log(M ω_m), a barrier that keeps every objective active. ω passes no gradient to the
        router.
    counted: ω_m = (I/M) |B_m| / Σ_k |B_k| over the I inter-product objectives: a plain mean over queries, as when they
        are mixed at a fixed ratio. Intra-product objectives weigh 1/M. Experts and W* have no influence.

    Args:
        dual, routing: as in `omega`.
        loss: f32[M].
        count: i32[M], |B_m|; an objective without samples is ignored.
        inter: I, the number of inter-product objectives; these come first.

    Returns:
        f32[], and f32[M].
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
