"""Zero-shot retrieval: R@k for the nine directions q→c of {t, i, mm}.

Protocol: all products of the split are candidates, and a hit is a candidate with the query's title (titles repeat).
A query takes part where it has the view asked with and some hit has the view sought; the table counts them.
Where query and candidate share a modality the query is altered (a cropped image, a partial title), else a product
would only have to find itself byte for byte; candidates never are. Queries that a catalogue brings are not altered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moon_jax import similarity
from moon_jax.data.pipeline import Alteration
from moon_jax.data.prepare import Prepared
from moon_jax.serving.embedder import Embedder
from moon_jax.types import VIEWS

RANKS = (1, 5, 10)
DIRECTIONS = tuple((query, candidate) for query in VIEWS for candidate in VIEWS)


def shares_modality(query: str, candidate: str) -> bool:
    """Whether two views have text or image in common: all pairs but t→i and i→t."""
    return {query, candidate} != {"t", "i"}


def recall(
    queries: np.ndarray, candidates: np.ndarray, query_key: np.ndarray, candidate_key: np.ndarray, ranks: Sequence[int]
) -> dict[str, float]:
    """R@k in percent: the share of queries with a candidate of their key among the k most similar.

    Of equally similar candidates the one with the lower index ranks first.

    Args:
        queries: f32[Q,D], unit.
        candidates: f32[C,D], unit.
        query_key, candidate_key: i64[Q], i64[C].
        ranks: the k; beyond the number of candidates all of them count.
    """
    _, found = similarity.top_k(queries, candidates, min(max(ranks), len(candidates)))
    hits = candidate_key[np.asarray(found)] == query_key[:, None]
    return {f"R@{k}": round(100.0 * float(hits[:, :k].any(axis=1).mean()), 4) for k in ranks}


def directions(
    embedder: Embedder, prepared: Prepared, advance: Callable[[int], None] = lambda count: None
) -> tuple[dict[str, dict[str, dict[str, float]]], tuple[np.ndarray, np.ndarray]]:
    """R@1, 5, 10 of all directions that the split has views for.

    Returns:
        {"products": {"t→i": {"R@1": …, "queries": …, "candidates": …}, …}, "queries": …}, where "products" are the
        candidates as their own queries ("products_trained_on", if the catalogue keeps none of them apart) and
        "queries" those that the catalogue brings, if any; and the candidates' views f32[C,3,D] with their presence
        bool[C,3].
    """
    options = embedder.config.evaluation
    alteration = Alteration(options.keep_word, 1, options.crop, mirror=0.0)
    products = [prepared.products[index] for index in prepared.val]
    # A product without title is sought by itself alone: below -1, apart from every group.
    key = np.where(prepared.group >= 0, prepared.group, -2 - np.arange(len(prepared.group)))
    candidate_key = key[prepared.val]
    plain, present = embedder.encode_views(products, advance=advance)
    altered, _ = embedder.encode_views(products, alteration, options.seed, advance)
    name = "products_trained_on" if set(prepared.val) & set(prepared.train) else "products"
    sets = {name: (altered, plain, present, candidate_key)}
    if prepared.val_queries:
        asked, targets = zip(*prepared.val_queries, strict=True)
        own, own_present = embedder.encode_views([prepared.products[index] for index in asked], advance=advance)
        sets["queries"] = (own, own, own_present, key[list(targets)])

    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, (sharing, apart, query_present, query_key) in sets.items():
        results[name] = {}
        for query, candidate in DIRECTIONS:
            q, c = VIEWS.index(query), VIEWS.index(candidate)
            offered = present[:, c]
            # A query that no candidate with this view could answer says nothing about the model.
            chosen = query_present[:, q] & np.isin(query_key, candidate_key[offered])
            if not chosen.any():
                continue
            vectors = (sharing if shares_modality(query, candidate) else apart)[chosen, q]
            scores = recall(vectors, plain[offered, c], query_key[chosen], candidate_key[offered], RANKS)
            counts = {"queries": int(chosen.sum()), "candidates": int(offered.sum())}
            results[name][f"{query}→{candidate}"] = scores | counts
    return results, (plain, present)
