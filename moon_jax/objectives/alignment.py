"""Dual-level alignment, and the paper's total loss.

    L_inter^ϑ = −log exp(r_q^ϑ·r_p^mm/ε) / ( exp(r_q^ϑ·r_p^mm/ε) + Σ_{N_q} exp(r_q^ϑ·r_n^mm/ε) ),  ϑ ∈ {t, i, mm}
    L_intra^ϖ = −log exp(r_ϖ^i·r_ϖ^t/ε̃) / ( exp(r_ϖ^i·r_ϖ^t/ε̃) + Σ_{t'} exp(r_ϖ^i·r_{t'}/ε̃) ),  ϖ ∈ {p, n}
    L = Σ_m ω_m L_m + ρ L_aux + ς L_sparsity

Both are one contrastive loss: an anchor, its own candidate, all other candidates of the global batch. Ours, because
the paper leaves it open: the negatives are all other p and n of the batch, except those of the same product or with
an equal title; φ weights the inter objectives only; ω also multiplies the intra objectives (M = 5); by default there
are no Matryoshka widths, and φ uses the whole vector.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moon_jax import config as config_lib
from moon_jax import similarity
from moon_jax.objectives import balance, filtering, weighting
from moon_jax.types import OBJECTIVES, VIEWS, Array, Batch, EncoderOutput, Objectives

T, I, MM = range(len(VIEWS))

INTER = (0, 1, 2)
"""The indices of the inter-product OBJECTIVES."""

LEVELS = {"dual": (*INTER, 3, 4), "inter": INTER, "mm→mm": (2,)}
"""The objectives that train, by `config.objective.levels`: the whole method, then the subsets for ablations."""


def contrastive_loss(
    anchors: Array,
    candidates: Array,
    own: Array,
    present: Array,
    product: Array,
    group: Array,
    temperature: Array,
    chunk: int,
    widths: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """−log softmax probability of each anchor's own candidate, averaged over D and the Matryoshka `widths`.

    Args:
        anchors: f32[B,D], unit.
        candidates: f32[C,D], unit.
        own: i32[B], index of each anchor's own candidate.
        present: bool[C], candidates that exist.
        product, group: i32[C]. A candidate that shares either with the anchor's own candidate is not a negative. -1
            equals nothing, not even -1.
        temperature: f32[].
        chunk: number of candidates with similarities in memory at once.
        widths: widths below D at which the vectors are also compared (arXiv 2205.13147).

    Returns:
        f32[B], and i32[B], the negatives of each anchor. Both are meaningless if the own candidate is absent.
    """

    def keep(columns: Array) -> Array:
        def differs(key: Array) -> Array:
            mine, theirs = key[own][:, None], jnp.take(key, columns, mode="fill", fill_value=-1)[None]
            return (mine != theirs) | (mine < 0)

        exists = jnp.take(present, columns, mode="fill", fill_value=False)
        return (columns == own[:, None]) | (exists & differs(product) & differs(group))

    losses = []
    for width in (*widths, anchors.shape[-1]):
        query, candidate = similarity.truncate(anchors, width), similarity.truncate(candidates, width)
        own_logit = (query * candidate[own]).sum(-1) / temperature
        normaliser, kept = similarity.masked_logsumexp(query, candidate, keep, 1.0 / temperature, chunk)
        losses.append(normaliser - own_logit)
    return sum(losses) / len(losses), kept - 1


def _mean(values: Array, weight: Array) -> Array:
    """Σ w·v / Σ w over the samples with positive weight, 0 if there are none; f32[] from two f32[B]."""
    # A value with weight 0 may be anything, NaN included.
    return jnp.where(weight > 0, values * weight, 0.0).sum() / jnp.maximum(weight.sum(), 1e-9)


def objectives(
    output: EncoderOutput, alignment: dict[str, Array], batch: Batch, config: config_lib.Config, step: Array
) -> Objectives:
    """All losses of a batch.

    Args:
        output: for the batch's rows, R = 3B.
        alignment: {"dual": W* f32[L,E,M], absent if no layer has experts, "log_temperature": f32[2], for ε and ε̃}.
        batch: for identities and weights.
        config: uses `objective`, `experts` and the steps and warm-up of `training`.
        step: i32[], steps done; determines m̄ and when L_sparsity starts.
    """
    options = config.objective
    size = batch.weight.shape[0]
    q, p, n = range(3)
    embedding = output.embedding.reshape(3, size, len(VIEWS), -1)
    present = (batch.rows.view > 0).reshape(3, size, len(VIEWS))
    # Candidates are all positives, then all negatives: p_b has index b, n_b has index B + b.
    items = embedding[p:].reshape(2 * size, len(VIEWS), -1)
    items_present = present[p:].reshape(2 * size, len(VIEWS))
    product, group = batch.product[size:], batch.group[size:]
    first = jnp.arange(size)
    temperature, intra_temperature = jnp.exp(alignment["log_temperature"])

    # φ compares the query's richest view with the items' mm. NaN if one of the three is missing.
    richest = jnp.where(present[q, :, MM], MM, jnp.where(present[q, :, I], I, T))
    query = jnp.take_along_axis(embedding[q], richest[:, None, None], axis=1)[:, 0]
    margin = filtering.margin_at(options.margin, step / config.training.steps)
    phi = filtering.phi(query, embedding[p, :, MM], embedding[n, :, MM], options.phi_slope, margin)
    phi = jnp.where(present[q].any(-1) & present[p, :, MM] & present[n, :, MM], phi, jnp.nan)
    weight = batch.weight * filtering.sample_weight(phi, options.phi_threshold)

    # G̃ averaged over each span's tokens: f32[L,3,B,G,E].
    routing = output.gate / jnp.maximum(output.tokens, 1)[None, :, :, None]
    routing = routing.reshape(routing.shape[0], 3, size, *routing.shape[2:])

    losses, counts, served, negatives = [], [], [], jnp.zeros(size, jnp.int32)
    for view in (T, I, MM):
        loss, others = contrastive_loss(
            embedding[q, :, view],
            items[:, MM],
            first,
            items_present[:, MM],
            product,
            group,
            temperature,
            options.chunk,
            options.matryoshka,
        )
        exists = present[q, :, view] & present[p, :, MM]
        losses.append(_mean(loss, weight * exists))
        counts.append(exists.sum())
        served.append((routing[:, q, :, view] * exists[:, None]).sum(1) / jnp.maximum(exists.sum(), 1))
        negatives = jnp.where(exists, others, negatives)
    for item in (p, n):
        own = first + (item - p) * size
        loss, _ = contrastive_loss(
            embedding[item, :, I],
            items[:, T],
            own,
            items_present[:, T],
            product,
            group,
            intra_temperature,
            options.chunk,
            options.matryoshka,
        )
        exists = present[item, :, I] & present[item, :, T]
        losses.append(_mean(loss, exists.astype(jnp.float32)))
        counts.append(exists.sum())
        pair = 0.5 * (routing[:, item, :, I] + routing[:, item, :, T])
        served.append((pair * exists[:, None]).sum(1) / jnp.maximum(exists.sum(), 1))

    # Objectives that do not train are left out: M and the columns of W* shrink.
    kept = np.array(LEVELS[options.levels])
    loss, count = jnp.stack(losses)[kept], jnp.stack(counts)[kept]
    dual = alignment.get("dual", jnp.zeros((0, config.experts.count, len(OBJECTIVES))))[..., kept]
    inter = sum(number in INTER for number in LEVELS[options.levels])
    routed = jnp.stack(served, axis=1)[:, kept]
    value, weights = weighting.weighted_sum(dual, routed, loss, count, options.weighting, inter)
    balanced = balance.load_balance(output.load, output.prob, output.valid, config.experts.per_token)
    sparsity = weighting.sparsity(dual)
    # During the warm-up the entropy of p reflects only W*'s initial noise.
    warm = step >= config_lib.warmup_steps(config.training)
    total = value + options.balance * balanced + jnp.where(warm, options.sparsity, 0.0) * sparsity
    if options.router_z:
        total = total + options.router_z * balance.router_z(output.z, output.valid)
    return Objectives(
        total=total,
        loss=jnp.zeros(len(OBJECTIVES)).at[kept].set(loss),
        weight=jnp.zeros(len(OBJECTIVES)).at[kept].set(jax.lax.stop_gradient(weights)),
        count=jnp.zeros(len(OBJECTIVES), jnp.int32).at[kept].set(count),
        balance=balanced,
        sparsity=sparsity,
        phi=jax.lax.stop_gradient(phi),
        negatives=negatives,
    )
