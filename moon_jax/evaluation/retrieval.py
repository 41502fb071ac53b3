"""Zero-shot retrieval: the nine directions q→c of {t, i, mm}.

Protocol: all products of the split are candidates, and a hit is a candidate with the query's title (titles repeat).
A query takes part where it has the view asked with and some hit has the view sought; the table counts them.
Where query and candidate share a modality the query is altered (a cropped image, a partial title), else a product
would only have to find itself byte for byte; candidates never are. Queries that a catalogue brings are not altered.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moon_jax import similarity
from moon_jax.data import records
from moon_jax.data.pipeline import Alteration
from moon_jax.data.prepared import Prepared
from moon_jax.embedders.protocol import Embedder
from moon_jax.errors import UserError
from moon_jax.evaluation import metrics
from moon_jax.types import VIEWS, Product

QUERY_SETS = {
    "products": "products as queries, altered where they share a modality with what they seek",
    "products_trained_on": "products as queries, altered where they share a modality; seen in training",
    "queries": "the catalogue's own queries",
    "judged": "your queries, by your judgements, in the whole catalogue",
}
"""What is asked with, by name, and how it is said."""
SEED = 0
ALTERATION = Alteration(keep_word=0.5, least_words=1, crop=(0.6, 0.9), flip=0.0)
"""How a query is altered, and by which seed: every evaluation asks with the same queries."""

DIRECTIONS = tuple((query, candidate) for query in VIEWS for candidate in VIEWS)


def shares_modality(query: str, candidate: str) -> bool:
    """Whether two views have text or image in common: all pairs but t→i and i→t."""
    return {query, candidate} != {"t", "i"}


@dataclasses.dataclass(frozen=True)
class Queries:
    """What is asked with. `altered` and `plain` are [Q,3,…], what the embedder makes of the views."""

    product: np.ndarray  # i32[Q], indices of products
    sought: np.ndarray  # i32[Q], that of a product which it shall find
    altered: np.ndarray
    plain: np.ndarray
    altered_present: np.ndarray  # bool[Q,3], the altered views that there are
    plain_present: np.ndarray  # bool[Q,3]
    relevance: metrics.Relevance  # of all candidates


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The vectors of an evaluation, from which every number follows.

    `queries` holds one or two of QUERY_SETS: "products", the candidates as their own queries ("products_trained_on", if
    the catalogue keeps none of them apart), and "queries", those that the catalogue brings, if any; or "judged" alone.
    """

    product: np.ndarray  # i32[C], indices of products
    candidates: np.ndarray  # [C,3,…]
    present: np.ndarray  # bool[C,3]
    queries: dict[str, Queries]
    rank: Callable[[Any, Any, int], tuple[np.ndarray, np.ndarray]] = similarity.top_k

    def truncated(self, width: int) -> Encoded:
        """The same at `width` dimensions."""

        def cut(vectors: np.ndarray) -> np.ndarray:
            return np.asarray(similarity.truncate(vectors, width))

        queries = {
            name: dataclasses.replace(asked, altered=cut(asked.altered), plain=cut(asked.plain))
            for name, asked in self.queries.items()
        }
        return dataclasses.replace(self, candidates=cut(self.candidates), queries=queries)


@dataclasses.dataclass(frozen=True)
class Search:
    """One direction of one set of queries, ready to be searched."""

    queries: np.ndarray  # [Q,…]
    candidates: np.ndarray  # [C,…]
    query_product: np.ndarray  # i32[Q]
    sought: np.ndarray  # i32[Q]
    candidate_product: np.ndarray  # i32[C]
    relevance: metrics.Relevance
    rank: Callable[[Any, Any, int], tuple[np.ndarray, np.ndarray]]

    def found(self, depth: int = metrics.DEPTH) -> np.ndarray:
        """The candidates i32[Q,k] of each query by falling similarity; of equal ones the lowest index comes first."""
        return self.rank(self.queries, self.candidates, min(depth, len(self.candidates)))[1]


def encode(
    embedder: Embedder,
    prepared: Prepared,
    advance: Callable[[int], None] = lambda count: None,
    judgements: metrics.Judgements | None = None,
) -> Encoded:
    """Embeds candidates and queries; `advance` is told of `count(prepared, judgements)` in all.

    Args:
        judgements: of prepared.val_queries and prepared.val, by their places; with them nothing else is asked.

    Raises:
        UserError: a vector is not finite.
    """
    products = records.Chosen(prepared.products, prepared.val)
    # A product without title is sought by itself alone: below -1, apart from every group.
    key = np.where(prepared.group >= 0, prepared.group, -2 - np.arange(len(prepared.group)))
    place = np.array(prepared.val, np.int32)
    plain, present = _finite(*embedder.encode_views(products, advance=advance), products)
    queries = {}
    if judgements is None:
        altered, asks = _finite(*embedder.encode_views(products, ALTERATION, SEED, advance), products)
        name = "products_trained_on" if prepared.val == prepared.train else "products"
        queries[name] = Queries(place, place, altered, plain, asks, present, metrics.Keys(key[place], key[place]))
    if prepared.val_queries:
        asked, targets = (np.array(column, np.int32) for column in zip(*prepared.val_queries, strict=True))
        own_queries = records.Chosen(prepared.products, asked)
        own, own_present = _finite(*embedder.encode_views(own_queries, advance=advance), own_queries)
        name, relevance = ("judged", judgements) if judgements else ("queries", metrics.Keys(key[targets], key[place]))
        queries[name] = Queries(asked, targets, own, own, own_present, own_present, relevance)
    return Encoded(place, plain, present, queries, getattr(embedder, "rank", similarity.top_k))


def _finite(vectors: np.ndarray, present: np.ndarray, products: Sequence[Product]) -> tuple[np.ndarray, np.ndarray]:
    """Both, if every vector can be compared."""
    if vectors.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=(1, 2)))
        if len(wrong):
            raise UserError(f"product {products[int(wrong[0])].id}: its vector is not finite; is the model damaged?")
    return vectors, present


def count(prepared: Prepared, judgements: metrics.Judgements | None = None) -> int:
    """Products and queries that `encode` embeds."""
    return (2 if judgements is None else 1) * len(prepared.val) + len(prepared.val_queries)


def search(encoded: Encoded, name: str, query: str, candidate: str) -> Search:
    """The direction query → candidate of the set of queries `name`, without queries that no candidate could answer."""
    asked = encoded.queries[name]
    q, c = VIEWS.index(query), VIEWS.index(candidate)
    offered = encoded.present[:, c]
    altered = shares_modality(query, candidate)
    vectors, present = (asked.altered, asked.altered_present) if altered else (asked.plain, asked.plain_present)
    # A query that no candidate with this view could answer says nothing about the model.
    chosen = present[:, q] & (asked.relevance.take(metrics.ALL, offered).number > 0)
    return Search(
        queries=vectors[chosen, q],
        candidates=encoded.candidates[offered, c],
        query_product=asked.product[chosen],
        sought=asked.sought[chosen],
        candidate_product=encoded.product[offered],
        relevance=asked.relevance.take(chosen, offered),
        rank=encoded.rank,
    )


def directions(encoded: Encoded) -> Iterator[tuple[str, str, Search, dict[str, np.ndarray]]]:
    """One direction of one set of queries after the other; those that have no query are left out.

    Yields:
        The set's name, the direction as "t→i", what was searched, and the measures of each query (metrics.by_query).
    """
    for name in encoded.queries:
        for query, candidate in DIRECTIONS:
            task = search(encoded, name, query, candidate)
            if len(task.query_product):
                yield name, f"{query}→{candidate}", task, metrics.by_query(task.found(), task.relevance)


def summary(task: Search, measures: dict[str, np.ndarray]) -> dict[str, Any]:
    """What metrics.json holds of a direction.

    Returns:
        {"R@1": …, "R@5", "R@10", "MRR", "nDCG@10", "mAP", "chance@10", "interval": {"R@1": [low, high], …}, "queries",
        "candidates", "pool": which these are: equal ones compare}.
    """
    return {
        **{name: round(float(values.mean()), 4) for name, values in measures.items()},
        "chance@10": round(metrics.chance(task.relevance.number, len(task.candidates), 10), 4),
        "interval": {name: metrics.rounded(ends) for name, ends in metrics.intervals(measures).items()},
        "queries": len(task.query_product),
        "candidates": len(task.candidates),
        "pool": hashlib.blake2b(task.candidate_product.tobytes(), digest_size=4).hexdigest(),
    }


def by_category(task: Search, measures: dict[str, np.ndarray], category: dict[int, str]) -> dict[str, dict[str, float]]:
    """R@10 of the queries that seek a product of a category, the commonest first.

    Args:
        category: of products by index.
    """
    groups: dict[str, list[int]] = {}
    for place, product in enumerate(task.sought.tolist()):
        if product in category:
            groups.setdefault(category[product], []).append(place)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        name: {"R@10": round(float(measures["R@10"][places].mean()), 4), "queries": len(places)}
        for name, places in ordered
    }
