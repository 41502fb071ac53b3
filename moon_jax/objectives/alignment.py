"""Dual-level alignment, and the paper's total loss.

    L_inter^ϑ = −log exp(r_q^ϑ·r_p^mm/ε) / ( exp(r_q^ϑ·r_p^mm/ε) + Σ_{N_q} exp(r_q^ϑ·r_n^mm/ε) ),  ϑ ∈ {t, i, mm}
    L_intra^ϖ = −log exp(r_ϖ^i·r_ϖ^t/ε̃) / ( exp(r_ϖ^i·r_ϖ^t/ε̃) + Σ_{t'} exp(r_ϖ^i·r_{t'}/ε̃) ),  ϖ ∈ {p, n}
    L = Σ_m ω_m L_m + ρ L_aux + ς L_sparsity

Both are one contrastive loss: an anchor, its own candidate, all other candidates of the global batch. Ours, because
the paper leaves it open: the negatives are all other p and n of the batch, except those of the same product or with
an equal title, and those that the query is known to want; φ weights the inter objectives only; ω also multiplies the
intra objectives (M = 5). Off by default: the second direction of each loss (`symmetric`), known positives that count as
positives, a limit on the similarity of negatives, Matryoshka widths (φ always uses the whole vector).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moon_jax import config as config_lib
from moon_jax import similarity
from moon_jax.objectives import balance, filtering, weighting
from moon_jax.types import OBJECTIVES, VIEWS, Array, Batch, EncoderOutput, Objectives

T, I, MM = range(len(VIEWS))

LEAST_CHANCE = 0.6
"""Floor of an objective's loss by chance, for batches with next to no negatives. One negative would give log 2."""

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
    known: Callable[[Array], Array] | None = None,
    further: Array | None = None,
    margin: float = 0.0,
) -> tuple[Array, Array, Array]:
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
        known: column indices i32[c] → bool[B,c], further candidates that are not negatives.
        further: i32[B,W], indices of candidates that are positives like the own one, -1 for none; the loss is then the
            mean over all positives, each against the negatives alone. `known` must exclude them from the negatives.
        margin: if positive, a candidate more similar to the anchor than its own one by more than this is not a negative
            (Qwen3-VL-Embedding, eq. 1). No gradient flows through the comparison.

    Returns:
        f32[B]; i32[B], the negatives of each anchor; and i32[B], the candidates that `margin` excluded. All are
        meaningless if the own candidate is absent.
    """

    def negative(columns: Array) -> Array:
        def differs(key: Array) -> Array:
            mine, theirs = key[own][:, None], jnp.take(key, columns, mode="fill", fill_value=-1)[None]
            return (mine != theirs) | (mine < 0)

        found = jnp.take(present, columns, mode="fill", fill_value=False) & differs(product) & differs(group)
        found &= columns != own[:, None]
        return found if known is None else found & ~known(columns)

    positives = own[:, None] if further is None else jnp.concatenate([own[:, None], further], axis=1)
    real = (positives >= 0) & present[jnp.maximum(positives, 0)]
    real = real.at[:, 0].set(True)
    losses = []
    for width in (*widths, anchors.shape[-1]):
        query, candidate = similarity.truncate(anchors, width), similarity.truncate(candidates, width)
        own_similarity = jnp.einsum(
            "bd,bwd->bw", query, candidate[jnp.maximum(positives, 0)], precision=similarity.PRECISION
        )
        limit = jax.lax.stop_gradient(own_similarity[:, :1]) + margin if margin else jnp.inf

        def keep(columns: Array, similar: Array, limit: Array = limit) -> tuple[Array, Array]:
            others, suspect = negative(columns), similar > limit
            return others & ~suspect, others & suspect

        normaliser, kept, excluded = similarity.masked_logsumexp(query, candidate, keep, 1.0 / temperature, chunk)
        logit = own_similarity / temperature
        each = jnp.logaddexp(normaliser[:, None], logit) - logit
        losses.append(jnp.where(real, each, 0.0).sum(1) / real.sum(1))
    return sum(losses) / len(losses), kept, excluded


def first_true(mask: Array, most: int) -> Array:
    """i32[N,min(most,C)]: the indices of the first true columns of bool[N,C], then -1."""
    count = mask.shape[1]
    early, _ = jax.lax.top_k(jnp.where(mask, count - jnp.arange(count), 0), min(most, count))
    return jnp.where(early > 0, count - early, -1)


def _mean(values: Array, weight: Array) -> Array:
    """Σ w·v / Σ w over the samples with positive weight, 0 if there are none; f32[] from two f32[B]."""
    # A value with weight 0 may be anything, NaN included.
    return jnp.where(weight > 0, values * weight, 0.0).sum() / jnp.maximum(weight.sum(), 1e-9)


def objectives(
    output: EncoderOutput, alignment: dict[str, Array], batch: Batch, config: config_lib.Config, step: Array
) -> Objectives:
    """All losses of a batch.

    Args:
        output: for the batch's rows, R = (2 + N) B with N negatives per triplet.
        alignment: {"dual": W* f32[L,E,M], absent if no layer has experts, "log_temperature": f32[2], for ε and ε̃}.
        batch: for identities and weights.
        config: uses `objective`, `experts` and the steps and warm-up of `training`.
        step: i32[], steps done; determines m̄ and when L_sparsity starts.
    """
    options = config.objective
    size = batch.weight.shape[0]
    q, p = 0, 1
    embedding = output.embedding.reshape(-1, size, len(VIEWS), output.embedding.shape[-1])
    present = (batch.rows.view > 0).reshape(-1, size, len(VIEWS))
    # Candidates are all positives, then all negatives: p_b has index b, the k-th negative n_b has index k B + b.
    items = embedding[p:].reshape(-1, *embedding.shape[2:])
    items_present = present[p:].reshape(-1, len(VIEWS))
    product, group = batch.product[size:], batch.group[size:]
    first, every = jnp.arange(size), jnp.arange(len(items))
    temperature, intra_temperature = jnp.exp(alignment["log_temperature"])

    # φ compares the query's richest view with the items' mm: the positive, and the most similar of its negatives. NaN
    # if one of the three is missing.
    richest = jnp.where(present[q, :, MM], MM, jnp.where(present[q, :, I], I, T))
    query = jnp.take_along_axis(embedding[q], richest[:, None, None], axis=1)[:, 0]
    margin = filtering.margin_at(options.margin, step / config.training.steps)
    similar = jnp.einsum("bd,nbd->nb", query, embedding[p + 1 :, :, MM])
    hardest = jnp.where(present[p + 1 :, :, MM], similar, -jnp.inf).argmax(0)
    negative = jnp.take_along_axis(embedding[p + 1 :, :, MM], hardest[None, :, None], axis=0)[0]
    phi = filtering.phi(query, embedding[p, :, MM], negative, options.phi_slope, margin)
    known_phi = present[q].any(-1) & present[p, :, MM] & present[p + 1 :, :, MM].any(0)
    phi = jnp.where(known_phi, phi, jnp.nan)
    weight = batch.weight * filtering.sample_weight(phi, options.phi_threshold)

    def compare(
        anchors: Array,
        anchor_view: int,
        candidates: Array,
        view: int,
        own: Array,
        keys: slice,
        scale: Array,
        **more: Any,
    ) -> tuple[Array, Array, Array]:
        """contrastive_loss between two views; `keys` selects the products that the candidates stand for."""
        return contrastive_loss(
            anchors[:, anchor_view],
            candidates[0][:, view],
            own,
            candidates[1][:, view],
            product[keys],
            group[keys],
            scale,
            options.chunk,
            options.matryoshka,
            margin=options.similar_margin,
            **more,
        )

    known = jnp.unpackbits(batch.known, axis=1, count=len(items), bitorder="little") > 0

    def wanted(columns: Array) -> Array:
        """bool[B,c]: the query is known to want the candidate."""
        return jnp.take(known, columns, axis=1, mode="fill", fill_value=False)

    def wanting(columns: Array) -> Array:
        """bool[B,c]: the query of that triplet is known to want the positive of this one."""
        return jnp.take(known[:, :size], columns, axis=0, mode="clip").T

    # G̃ averaged over each span's tokens: f32[L,2+N,B,G,E].
    routing = output.gate / jnp.maximum(output.tokens, 1)[None, :, :, None]
    routing = routing.reshape(routing.shape[0], len(embedding), size, *routing.shape[2:])

    losses, counts, served, chances = [], [], [], []
    negatives, excluded = jnp.full(size, -1, jnp.int32), jnp.zeros(size, jnp.int32)
    further = first_true(known, options.further) if options.known == "positive" else None
    whole = (items, items_present)
    for view in (T, I, MM):
        exists = present[q, :, view] & present[p, :, MM]
        loss, others, out = compare(
            embedding[q], view, whole, MM, first, slice(None), temperature, known=wanted, further=further
        )
        if options.symmetric == "all":
            queries = (embedding[q], present[q])
            back, _, _ = compare(embedding[p], MM, queries, view, first, slice(size), temperature, known=wanting)
            loss = (loss + back) / 2
        losses.append(_mean(loss, weight * exists))
        counts.append(exists.sum())
        chances.append(_mean(jnp.log1p(others), exists))
        served.append((routing[:, q, :, view] * exists[:, None]).sum(1) / jnp.maximum(exists.sum(), 1))
        negatives, excluded = jnp.where(exists, others, negatives), jnp.where(exists, out, excluded)
    paired = items_present[:, I] & items_present[:, T]
    for part in (slice(size), slice(size, None)):
        own, exists = every[part], paired[part]
        loss, others, _ = compare(items[part], I, whole, T, own, slice(None), intra_temperature)
        if options.symmetric != "none":
            loss = (loss + compare(items[part], T, whole, I, own, slice(None), intra_temperature)[0]) / 2
        losses.append(_mean(loss, exists.astype(jnp.float32)))
        counts.append(exists.sum())
        chances.append(_mean(jnp.log1p(others), exists))
        pair = 0.5 * (routing[:, p:, :, I] + routing[:, p:, :, T])
        pair = pair.reshape(pair.shape[0], len(items), pair.shape[-1])[:, part]
        served.append((pair * exists[:, None]).sum(1) / jnp.maximum(exists.sum(), 1))

    # Objectives that do not train are left out: M and the columns of W* shrink.
    kept = np.array(LEVELS[options.levels])
    loss, count, chance = (jnp.stack(values)[kept] for values in (losses, counts, chances))
    dual = alignment.get("dual", jnp.zeros((0, config.experts.count, len(OBJECTIVES))))[..., kept]
    inter = sum(number in INTER for number in LEVELS[options.levels])
    routed = jnp.stack(served, axis=1)[:, kept]
    queries = (present[q][:, np.array(LEVELS[options.levels])[:inter]].any(1) & present[p, :, MM]).sum()
    value, weights = weighting.weighted_sum(
        dual,
        routed,
        loss,
        weighting.shares(count / np.array([1, 1, 1, 1, len(embedding) - 2])[kept], queries, inter),
        jnp.maximum(chance, LEAST_CHANCE),
        options.weighting,
    )
    balanced = balance.load_balance(output.load, output.prob, output.valid, config.experts.per_token)
    sparsity = weighting.sparsity(dual, count > 0)
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
        known=known.sum(1),
        excluded=excluded,
    )
