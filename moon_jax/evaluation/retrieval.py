"""Zero-shot retrieval: the nine directions q→c of {t, i, mm}.

Protocol: all products of the split are candidates. A hit is a candidate with the same title as the query; titles
repeat. A query counts in a direction if it has the query view and some hit has the candidate view; the tables show the
number of queries. If query and candidate share a modality, the query is altered (a cropped image, a partial title):
otherwise a product would only have to find an exact copy of itself. Candidates are never altered, nor are the
catalogue's own queries.

A crop shares its pixels with the photo that is sought; a colour histogram finds nearly all. So the directions from
image to image are also scored with changed photos, each change in a set of its own (PHOTOS): the product before another
background, from another viewpoint, a detail of it, and a whole scene with it as the candidate. data/editing.py makes
them with SEED, so no photo that a run was trained on equals them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moon_jax import options, similarity
from moon_jax.data import editing, images, records
from moon_jax.data import known as known_lib
from moon_jax.data.pipeline import Alteration
from moon_jax.data.prepared import Prepared
from moon_jax.embedders.protocol import Embedder
from moon_jax.errors import UserError
from moon_jax.evaluation import metrics
from moon_jax.types import VIEWS, Product

QUERY_SETS = {
    "products": "products as queries, altered if they share a modality with the candidates",
    "products_trained_on": "products as queries, altered if they share a modality; seen in training",
    "queries": "the catalogue's own queries",
    "photos_background": "products as queries, their photos before another background",
    "photos_viewpoint": "products as queries, their photos from another viewpoint",
    "photos_detail": "products as queries, a detail of their photos",
    "photos_scene": "product photos as queries, whole scenes as candidates",
    "qrels": "your queries, evaluated by your qrels on the whole catalogue",
}
"""Sets of queries: their names in metrics.json, and their descriptions in tables and pictures."""

SEED = 0
ALTERATION = Alteration(keep_word=0.5, least_words=1, crop=(0.6, 0.9), flip=0.0)
"""How queries are altered, with SEED; fixed, so that every evaluation uses the same queries."""

PHOTOS = {f"photos_{edit}": edit for edit in editing.EDITS}
"""The sets of queries with changed photos, and the edit of each."""

MOST_PHOTOS = 1000
"""Products whose photos are changed; a larger catalogue is sampled."""


def brief(name: str) -> str:
    """The description of a set of queries in messages: in full only where sets differ by how photos are changed."""
    return QUERY_SETS[name] if name in PHOTOS else QUERY_SETS[name].partition(",")[0]


MAX_PIXELS = options.Data().max_pixels

TEXT_ALTERATION = dataclasses.replace(ALTERATION, crop=(1.0, 1.0))
"""Of queries whose photo is changed already."""

DIRECTIONS = tuple((query, candidate) for query in VIEWS for candidate in VIEWS)


def shares_modality(query: str, candidate: str) -> bool:
    """Whether two views both contain text, or both contain an image: true for all pairs but t→i and i→t."""
    return {query, candidate} != {"t", "i"}


class Photos(Sequence[Product]):
    """Products with their first photo changed; without a photo where that is not possible."""

    def __init__(self, products: Sequence[Product], edit: str, max_pixels: int):
        """`edit` is one of editing.EDITS."""
        self._products, self._edit, self._max_pixels = products, edit, max_pixels

    def __len__(self) -> int:
        return len(self._products)

    def __getitem__(self, index: int) -> Product:
        product = self._products[index]
        if not product.images:
            return product
        rng = np.random.default_rng((SEED, index, *self._edit.encode()))
        try:
            changed = editing.edited(images.decode(product.images[0], self._max_pixels), self._edit, rng)
        except images.BadImage as error:
            raise UserError(f"product {product.id}: image: {error}") from None
        return dataclasses.replace(product, images=() if changed is None else (changed,))


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is searched, embedded."""

    product: np.ndarray  # i32[C], product indices
    vectors: np.ndarray  # [C,3,…]
    present: np.ndarray  # bool[C,3]


@dataclasses.dataclass(frozen=True)
class Queries:
    """One set of queries, embedded. `altered` and `plain` are the embedder's output [Q,3,…] for the three views."""

    product: np.ndarray  # i32[Q], product indices of the queries
    target: np.ndarray  # i32[Q], product index of one relevant product
    altered: np.ndarray
    plain: np.ndarray
    altered_present: np.ndarray  # bool[Q,3], which altered views exist
    plain_present: np.ndarray  # bool[Q,3]
    relevance: metrics.Relevance  # for all candidates
    candidates: Candidates | None = None  # if other than those of Encoded
    excluded: metrics.Qrels | None = None  # candidates that are left out of a query's ranking


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The vectors of an evaluation; every score is computed from them.

    `queries` holds one or two of QUERY_SETS: "products", the candidates as queries ("products_trained_on" if the
    catalogue has no held-out products), and "queries", the catalogue's own, if any; or "qrels" alone.
    """

    product: np.ndarray  # i32[C], product indices of the candidates
    candidates: np.ndarray  # [C,3,…]
    present: np.ndarray  # bool[C,3]
    queries: dict[str, Queries]
    rank: Callable[[Any, Any, int], tuple[np.ndarray, np.ndarray]] = similarity.top_k

    def truncated(self, width: int) -> Encoded:
        """The same at `width` dimensions."""

        def cut(vectors: np.ndarray) -> np.ndarray:
            return np.asarray(similarity.truncate(vectors, width))

        queries = {}
        for name, part in self.queries.items():
            own = part.candidates and dataclasses.replace(part.candidates, vectors=cut(part.candidates.vectors))
            queries[name] = dataclasses.replace(part, altered=cut(part.altered), plain=cut(part.plain), candidates=own)
        return dataclasses.replace(self, candidates=cut(self.candidates), queries=queries)


@dataclasses.dataclass(frozen=True)
class Search:
    """One direction of one set of queries: what is searched for, and where."""

    queries: np.ndarray  # [Q,…]
    candidates: np.ndarray  # [C,…]
    query_product: np.ndarray  # i32[Q], product indices
    target: np.ndarray  # i32[Q], see Queries
    candidate_product: np.ndarray  # i32[C], product indices
    relevance: metrics.Relevance
    rank: Callable[[Any, Any, int], tuple[np.ndarray, np.ndarray]]
    excluded: metrics.Qrels | None = None  # see Queries

    def found(self, depth: int = metrics.DEPTH) -> np.ndarray:
        """The top `depth` candidates i32[Q,k] of each query by descending similarity; ties go to the lower index.

        Candidates that are excluded for a query come last.
        """
        depth = min(depth, len(self.candidates))
        if self.excluded is None or not len(self.excluded.query):
            return self.rank(self.queries, self.candidates, depth)[1]
        number = self.excluded.number
        found = np.zeros((len(self.queries), depth), np.int32)
        # Queries that exclude about equally many, within a factor of two, are searched together.
        digits = np.ceil(np.log2(number + 1))
        for size in np.unique(digits):
            rows = np.flatnonzero(digits == size)
            deep = min(depth + int(number[rows].max()), len(self.candidates))
            ranked = self.rank(self.queries[rows], self.candidates, deep)[1]
            out = self.excluded.take(rows).gains(ranked) > 0
            order = np.argsort(out, axis=1, kind="stable")[:, :depth]
            found[rows] = np.take_along_axis(ranked, order, axis=1)
        return found


def photo_sets(embedder: Embedder) -> tuple[str, ...]:
    """The sets of PHOTOS that the embedder can be evaluated on: all, or none without images or with fixed vectors."""
    able = "i" in getattr(embedder, "sees", VIEWS) and not getattr(embedder, "fixed", False)
    return tuple(PHOTOS) if able else ()


def _changed(prepared: Prepared) -> np.ndarray:
    """i32: positions in prepared.val of the products whose photos are changed: all, or MOST_PHOTOS drawn by SEED."""
    count = len(prepared.val)
    return np.sort(np.random.default_rng(SEED).permutation(count)[:MOST_PHOTOS]).astype(np.int32)


def encode(
    embedder: Embedder,
    prepared: Prepared,
    advance: Callable[[int], None] = lambda count: None,
    qrels: metrics.Qrels | None = None,
    photos: Sequence[str] = (),
) -> Encoded:
    """Embeds candidates and queries.

    Args:
        advance: called with numbers of embedded items, in total `count(prepared, qrels, photos)`.
        qrels: indices into prepared.val_queries and prepared.val; if given, only these queries are evaluated.
        photos: the sets of changed photos to evaluate, of PHOTOS.

    Raises:
        UserError: a vector is not finite.
    """
    products = records.Subset(prepared.products, prepared.val)
    key = known_lib.keys(prepared.group, np.arange(len(prepared.group)))
    index = np.array(prepared.val, np.int32)
    plain, present = _finite(*embedder.encode_views(products, advance=advance), products)
    queries = {}
    if qrels is None:
        altered, altered_present = _finite(*embedder.encode_views(products, ALTERATION, SEED, advance), products)
        name = "products_trained_on" if prepared.val == prepared.train else "products"
        relevance = metrics.Keys(key[index], key[index])
        queries[name] = Queries(index, index, altered, plain, altered_present, present, relevance)
        chosen = _changed(prepared)
        mine = key[index[chosen]]
        for name in photos:
            scenes = PHOTOS[name] == "scene"
            changed = Photos(records.Subset(prepared.products, index[chosen]), PHOTOS[name], MAX_PIXELS)
            alteration = None if scenes else TEXT_ALTERATION
            found, there = _finite(*embedder.encode_views(changed, alteration, SEED, advance), changed)
            if scenes:
                vectors, have = altered[chosen], altered_present[chosen]
                relevance = metrics.Keys(mine, mine)
                other = Candidates(index[chosen], found, there)
            else:
                vectors, have, relevance, other = found, there, metrics.Keys(mine, key[index]), None
            queries[name] = Queries(index[chosen], index[chosen], vectors, vectors, have, have, relevance, other)
    if prepared.val_queries:
        own_index, targets, found = judgements(prepared)
        own_queries = records.Subset(prepared.products, own_index)
        own, own_present = _finite(*embedder.encode_views(own_queries, advance=advance), own_queries)
        if qrels is None:
            name, excluded = "queries", bought(prepared, own_index)
        else:
            name, found, excluded = "qrels", qrels, None
        queries[name] = Queries(own_index, targets, own, own, own_present, own_present, found, excluded=excluded)
    return Encoded(index, plain, present, queries, getattr(embedder, "rank", similarity.top_k))


def judgements(prepared: Prepared) -> tuple[np.ndarray, np.ndarray, metrics.Qrels]:
    """The catalogue's own evaluation queries, each once, with all products that are relevant to it.

    Returns:
        i32[Q], record indices of the queries; i32[Q], a product of the highest grade of each; and the relevant
        candidates: those with the title of such a product, in the order of prepared.val.
    """
    query, positive, grade = (np.array(column) for column in zip(*prepared.val_queries, strict=True))
    order = np.lexsort((-grade, query))
    own, first, number = np.unique(query[order], return_index=True, return_inverse=True)
    candidates = known_lib.keys(prepared.group, np.array(prepared.val))
    key = known_lib.keys(prepared.group, positive[order])
    found = metrics.Qrels.by_key(number, key, grade[order].astype(np.float64), candidates, len(own))
    return own.astype(np.int32), positive[order][first].astype(np.int32), found


def bought(prepared: Prepared, queries: np.ndarray) -> metrics.Qrels:
    """The candidates that the queries i32[Q], record indices, are known to want from training. They are left out of the
    rankings: a model that was trained to find them is not wrong when it does. None is relevant in the evaluation, too.
    """
    known = known_lib.Known(prepared.triplets, prepared.group)
    parts = [known.of(query) for query in queries.tolist()]
    number = np.repeat(np.arange(len(queries)), [len(part) for part in parts])
    key = np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
    candidates = known_lib.keys(prepared.group, np.array(prepared.val))
    return metrics.Qrels.by_key(number, key, np.ones(len(key)), candidates, len(queries))


def _finite(vectors: np.ndarray, present: np.ndarray, products: Sequence[Product]) -> tuple[np.ndarray, np.ndarray]:
    """Both arguments, after checking that every vector is finite."""
    if vectors.dtype.kind == "f":
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=(1, 2)))
        if len(wrong):
            raise UserError(f"product {products[int(wrong[0])].id}: its vector is not finite; check the model")
    return vectors, present


def count(prepared: Prepared, qrels: metrics.Qrels | None = None, photos: Sequence[str] = ()) -> int:
    """The number of products and queries that `encode` embeds."""
    changed = len(photos) * len(_changed(prepared)) if qrels is None else 0
    own = len({query for query, *_ in prepared.val_queries})
    return (2 if qrels is None else 1) * len(prepared.val) + own + changed


def search(encoded: Encoded, name: str, query: str, candidate: str) -> Search:
    """The direction query → candidate for the set of queries `name`, without queries that no candidate answers."""
    queries = encoded.queries[name]
    q, c = VIEWS.index(query), VIEWS.index(candidate)
    pool = queries.candidates or Candidates(encoded.product, encoded.candidates, encoded.present)
    offered = pool.present[:, c]
    altered = shares_modality(query, candidate)
    vectors, present = (queries.altered, queries.altered_present) if altered else (queries.plain, queries.plain_present)
    # A query without a relevant candidate in this view says nothing about the model.
    chosen = present[:, q] & (queries.relevance.take(metrics.ALL, offered).number > 0)
    return Search(
        queries=vectors[chosen, q],
        candidates=pool.vectors[offered, c],
        query_product=queries.product[chosen],
        target=queries.target[chosen],
        candidate_product=pool.product[offered],
        relevance=queries.relevance.take(chosen, offered),
        rank=encoded.rank,
        excluded=queries.excluded and queries.excluded.take(chosen, offered),
    )


def directions(encoded: Encoded) -> Iterator[tuple[str, str, Search, dict[str, np.ndarray]]]:
    """Searches all directions of all sets of queries; skips directions without queries.

    Yields:
        The set's name, the direction such as "t→i", the search, and the measures of each query (metrics.by_query).
    """
    for name in encoded.queries:
        for query, candidate in DIRECTIONS:
            if name in PHOTOS and "t" in (query, candidate):
                continue
            task = search(encoded, name, query, candidate)
            if len(task.query_product):
                yield name, f"{query}→{candidate}", task, metrics.by_query(task.found(), task.relevance)


def summary(task: Search, measures: dict[str, np.ndarray]) -> dict[str, Any]:
    """The entry of one direction in metrics.json.

    Returns:
        {"R@1": …, "R@5", "R@10", "MRR", "nDCG@10", "mAP", "chance@10", "interval": {"R@1": [low, high], …}, "queries",
        "candidates", "pool": a hash of the candidates, since scores compare only if these are the same}.
    """
    relevant = task.relevance.number
    ranked = len(task.candidates) - (0 if task.excluded is None else task.excluded.number)
    return {
        **{name: round(float(values.mean()), 4) for name, values in measures.items()},
        "chance@10": round(metrics.chance(relevant, np.broadcast_to(ranked, relevant.shape), 10), 4),
        "interval": {name: metrics.rounded(ends) for name, ends in metrics.intervals(measures).items()},
        "queries": len(task.query_product),
        "candidates": len(task.candidates),
        "pool": hashlib.blake2b(task.candidate_product.tobytes(), digest_size=4).hexdigest(),
    }


def by_category(task: Search, measures: dict[str, np.ndarray], category: dict[int, str]) -> dict[str, dict[str, float]]:
    """R@10 by category of the query's target, largest category first.

    Args:
        category: product index → category.
    """
    groups: dict[str, list[int]] = {}
    for query, product in enumerate(task.target.tolist()):
        if product in category:
            groups.setdefault(category[product], []).append(query)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        name: {"R@10": round(float(measures["R@10"][queries].mean()), 4), "queries": len(queries)}
        for name, queries in ordered
    }
