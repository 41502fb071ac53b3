"""Zero-shot retrieval: R@k for the nine directions q→c of {t, i, mm}.

Protocol: all products of the split are candidates, and a hit is a candidate with the query's title (titles repeat).
A query takes part where it has the view asked with and some hit has the view sought; the table counts them.
Where query and candidate share a modality the query is altered (a cropped image, a partial title), else a product
would only have to find itself byte for byte; candidates never are. Queries that a catalogue brings are not altered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moon_jax import similarity
from moon_jax.data.pipeline import Alteration
from moon_jax.data.prepared import Prepared
from moon_jax.serving.embedder import Embedder
from moon_jax.types import VIEWS

RANKS = (1, 5, 10)
QUERY_SETS = {
    "products": "products as queries, altered where they share a modality with what they seek",
    "products_trained_on": "products as queries, altered where they share a modality; seen in training",
    "queries": "the catalogue's own queries",
}
"""What is asked with, by name, and how it is said."""
SEED = 0
ALTERATION = Alteration(keep_word=0.5, least_words=1, crop=(0.6, 0.9), mirror=0.0)
"""How a query is altered, and by which seed: every evaluation asks with the same queries."""

DIRECTIONS = tuple((query, candidate) for query in VIEWS for candidate in VIEWS)


def shares_modality(query: str, candidate: str) -> bool:
    """Whether two views have text or image in common: all pairs but t→i and i→t."""
    return {query, candidate} != {"t", "i"}


@dataclasses.dataclass(frozen=True)
class Queries:
    """What is asked with. `altered` and `plain` are f32[Q,3,D], `present` bool[Q,3]."""

    product: np.ndarray  # i32[Q], indices of products
    altered: np.ndarray
    plain: np.ndarray
    present: np.ndarray
    key: np.ndarray  # i64[Q]; a candidate of an equal key is a hit


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The vectors of an evaluation, from which every number follows.

    `queries` holds one or two of QUERY_SETS: "products", the candidates as their own queries ("products_trained_on", if
    the catalogue keeps none of them apart), and "queries", those that the catalogue brings, if any.
    """

    product: np.ndarray  # i32[C], indices of products
    candidates: np.ndarray  # f32[C,3,D]
    present: np.ndarray  # bool[C,3]
    key: np.ndarray  # i64[C]
    queries: dict[str, Queries]

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

    queries: np.ndarray  # f32[Q,D]
    candidates: np.ndarray  # f32[C,D]
    query_product: np.ndarray  # i32[Q]
    candidate_product: np.ndarray  # i32[C]
    query_key: np.ndarray  # i64[Q]
    candidate_key: np.ndarray  # i64[C]


def encode(embedder: Embedder, prepared: Prepared, advance: Callable[[int], None] = lambda count: None) -> Encoded:
    """Embeds candidates and queries; `advance` is told of `count(prepared)` in all."""
    products = [prepared.products[index] for index in prepared.val]
    # A product without title is sought by itself alone: below -1, apart from every group.
    key = np.where(prepared.group >= 0, prepared.group, -2 - np.arange(len(prepared.group)))
    place = np.array(prepared.val, np.int32)
    plain, present = embedder.encode_views(products, advance=advance)
    altered, _ = embedder.encode_views(products, ALTERATION, SEED, advance)
    name = "products_trained_on" if prepared.val == prepared.train else "products"
    queries = {name: Queries(place, altered, plain, present, key[place])}
    if prepared.val_queries:
        asked, targets = (np.array(column, np.int32) for column in zip(*prepared.val_queries, strict=True))
        own, own_present = embedder.encode_views([prepared.products[index] for index in asked], advance=advance)
        queries["queries"] = Queries(asked, own, own, own_present, key[targets])
    return Encoded(place, plain, present, key[place], queries)


def count(prepared: Prepared) -> int:
    """Products and queries that `encode` embeds."""
    return 2 * len(prepared.val) + len(prepared.val_queries)


def search(encoded: Encoded, name: str, query: str, candidate: str) -> Search:
    """The direction query → candidate of the set of queries `name`, without queries that no candidate could answer."""
    asked = encoded.queries[name]
    q, c = VIEWS.index(query), VIEWS.index(candidate)
    offered = encoded.present[:, c]
    # A query that no candidate with this view could answer says nothing about the model.
    chosen = asked.present[:, q] & np.isin(asked.key, encoded.key[offered])
    vectors = asked.altered if shares_modality(query, candidate) else asked.plain
    return Search(
        queries=vectors[chosen, q],
        candidates=encoded.candidates[offered, c],
        query_product=asked.product[chosen],
        candidate_product=encoded.product[offered],
        query_key=asked.key[chosen],
        candidate_key=encoded.key[offered],
    )


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


def chance(query_key: np.ndarray, candidate_key: np.ndarray, k: int) -> float:
    """R@k in percent of candidates in random order: 1 − C(C−h, k) / C(C, k), the mean over queries with h hits."""
    total, k = len(candidate_key), min(k, len(candidate_key))
    hits = (np.sort(candidate_key).searchsorted(query_key, side) for side in ("right", "left"))
    numbers, queries = np.unique(np.subtract(*hits), return_counts=True)
    missed = [math.comb(total - number, k) / math.comb(total, k) for number in numbers.tolist()]
    return round(100.0 * (1 - float(np.dot(missed, queries)) / len(query_key)), 4)


def directions(encoded: Encoded) -> Iterator[tuple[str, str, dict[str, float]]]:
    """R@1, 5, 10, one direction of one set of queries after the other; those that have no query are left out.

    Yields:
        The set's name, the direction as "t→i", and {"R@1": …, "chance@10": …, "queries": …, "candidates": …}.
    """
    for name in encoded.queries:
        for query, candidate in DIRECTIONS:
            task = search(encoded, name, query, candidate)
            if not len(task.queries):
                continue
            scores = recall(task.queries, task.candidates, task.query_key, task.candidate_key, RANKS)
            scores["chance@10"] = chance(task.query_key, task.candidate_key, 10)
            sizes = {"queries": len(task.queries), "candidates": len(task.candidates)}
            yield name, f"{query}→{candidate}", scores | sizes
