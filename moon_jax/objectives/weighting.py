"""The weights ω of the objectives, from the dual-alignment matrix W* and the routing of the tokens they pool.

    p_{e,m} = exp(W*_{e,m}) / Σ_k exp(W*_{e,k})                 (k: objectives that have samples)
    ω_m     ∝ (1/|B_m|) Σ_{b∈B_m} Σ_e p_{e,m} G̃_{e,b}          (mean over the layers with experts), Σ_m ω_m = 1
    L_sparsity = (1/E) Σ_e ( −Σ_m p_{e,m} log p_{e,m} )         (mean over the same layers)

Ours, because the paper leaves it open: one W* per layer; objectives without samples take no part; ω is divided by its
sum, which is 1 anyway if all objectives are routed alike; and the gradient of ω (`weighted_sum`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moon_jax.types import Array

ITERATIONS = 60
"""Bisections for μ in `fixed_point`: float32 cannot resolve more."""


def affinity(dual: Array, active: Array) -> Array:
    """p: softmax of W* over the active objectives, 0 for the others. f32[L,E,M] from f32[L,E,M] and bool[M]."""
    return jnp.where(active, jax.nn.softmax(jnp.where(active, dual, -1e30), axis=-1), 0.0)


def uniform(active: Array) -> Array:
    """The same weight for every active objective, 0 for the others. f32[M]."""
    return active / jnp.maximum(active.sum(), 1)


def shares(count: Array, queries: Array, inter: int) -> Array:
    """s: the weight of each objective in a mean over samples; sums to 1, uniform if nothing lacks a view. f32[M].

    A query counts for I samples, whichever views it has: the I inter-product objectives share them by |B_m|. With photo
    queries alone, q_i→p_mm has the weight of all three. Each pair of an image and a text counts for one sample; those
    of a triplet's N negatives count for one together, so that mined negatives take nothing from the queries.

    Args:
        count: f32[M], |B_m|, for the negatives divided by N.
        queries: i32[], queries that serve any inter-product objective.
        inter: I, number of inter-product objectives; these come first.
    """
    within = count[:inter] / jnp.maximum(count[:inter].sum(), 1)
    samples = jnp.concatenate([inter * queries * within, count[inter:].astype(jnp.float32)])
    return samples / jnp.maximum(samples.sum(), 1e-9)


def omega(dual: Array, routing: Array, active: Array) -> Array:
    """ω. Sums to 1 over the active objectives; uniform if no layer has experts.

    Args:
        dual: W*, f32[L,E,M].
        routing: f32[L,M,E], G̃ averaged over each span's tokens and then over B_m.
        active: bool[M], objectives that have samples.

    Returns:
        f32[M].
    """
    if dual.shape[0] == 0:
        return uniform(active)
    served = jnp.where(active, jnp.einsum("lem,lme->m", affinity(dual, active), routing), 0.0)
    return served / jnp.maximum(served.sum(), 1e-9)


def sparsity(dual: Array, active: Array) -> Array:
    """L_sparsity, in nats: at most log M, 0 when every expert has settled on one objective. f32[]."""
    if dual.shape[0] == 0:
        return jnp.zeros(())
    share = affinity(dual, active)
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1.0))).sum(-1)
    return entropy.mean()


def fixed_point(relative: Array, share: Array) -> Array:
    """The ω that maximises Σ_m ω_m ℓ_m + Σ_m s_m log ω_m over the simplex: ω_m = s_m / (μ − ℓ_m).

    Proof. The function is strictly concave, and −∞ on the boundary, so its only maximum is inside. There the gradient
    ℓ_m + s_m / ω_m is the same μ for every m (Lagrange), hence the formula; μ > max ℓ since ω > 0, and Σ ω = 1
    determines it, because each term falls as μ grows. So ω_m / s_m rises with ℓ_m: of objectives with equally many
    samples, the one that lags most weighs most. And none starves: at μ = max ℓ + 1 the sum is at most Σ s = 1, so
    μ ≤ max ℓ + 1 and ω_m ≥ s_m / (1 + max ℓ − ℓ_m).

    Args:
        relative: ℓ, f32[M].
        share: s, f32[M]: sums to 1; objectives with 0 take no part.

    Returns:
        f32[M], 0 for objectives that take no part.
    """
    active = share > 0
    top = jnp.max(jnp.where(active, relative, -jnp.inf), initial=-jnp.inf)
    gap = jnp.where(active, top - relative, jnp.inf)  # of each objective to the one that lags most

    def weights(excess: Array) -> Array:
        return jnp.where(active, share / (excess + gap), 0.0)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        over = weights(middle).sum() > 1
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    # μ − max ℓ lies between the smallest share, where the largest weight alone is 1 or more, and 1.
    least = jnp.min(jnp.where(active, share, 1.0), initial=1.0)
    low, high = jax.lax.fori_loop(0, ITERATIONS, halve, (least, jnp.ones(())))
    return weights((low + high) / 2)


def weighted_sum(
    dual: Array, routing: Array, loss: Array, share: Array, chance: Array, mode: str
) -> tuple[Array, Array]:
    """Σ_m ω_m L_m and ω. `mode` determines ω and its gradients.

    samples: ω = s, a mean over samples; 1/M if nothing lacks a view. Experts and W* have no influence.
    uniform: ω_m = 1/M over the objectives that have samples, however few.
    product: the paper's formula, a plain product. ω drifts to the easiest objective.
    stopped: ω has no gradient; only L_sparsity changes W*.
    lagging: more weight to the objectives that lag. The network's gradient is that of Σ sg(ω_m) L_m; W* ascends
        Σ ω_m ℓ_m + Σ s_m log ω_m, where ℓ_m = sg(L_m / chance_m) is the loss relative to that of a model that knows
        nothing. `fixed_point` proves where it ends. A dense model uses the fixed point itself.
    routed: like lagging, and the router follows: it, too, ascends that function, so that tokens go to the experts that
        serve what lags.

    Args:
        dual, routing: as in `omega`.
        loss: f32[M].
        share: s, f32[M], of `shares`; an objective without samples has no weight.
        chance: f32[M], positive: the loss of a model for which all candidates are equally similar.
        mode: see above.

    Returns:
        f32[], and f32[M].
    """
    stop = jax.lax.stop_gradient
    active = share > 0
    if mode in ("samples", "uniform"):
        weight = share if mode == "samples" else uniform(active)
        return (weight * loss).sum(), weight
    if mode in ("lagging", "routed"):
        relative = stop(loss / chance)
        if dual.shape[0] == 0:
            weight = fixed_point(relative, share)
            return (weight * loss).sum(), weight
        learned = omega(dual, routing if mode == "routed" else stop(routing), active)
        barrier = share * jnp.log(jnp.where(active, learned, 1.0))
        gain = (learned * relative + barrier).sum()
        return (stop(learned) * loss).sum() + stop(gain) - gain, learned
    weight = omega(dual, routing, active)
    if mode == "product":
        return (weight * loss).sum(), weight
    return (stop(weight) * loss).sum(), weight
