"""The evaluation of a log: one row per query, all its held-out purchases relevant, its training purchases left out."""

import dataclasses

import numpy as np
import pytest

from moon_jax.evaluation import metrics, retrieval
from moon_jax.types import Triplet


class Oracle:
    """Embeds a query as the sum of all products that it wants, and a product as its own axis."""

    name = "oracle"
    fixed = True

    def __init__(self, prepared, weights):
        """`weights`: (query, product) → how much the query wants it."""
        self.prepared, self.weights = prepared, weights
        self.place = {id_: n for n, id_ in enumerate(product.id for product in prepared.products)}

    def encode_views(self, products, alteration=None, seed=0, advance=lambda count: None):
        count = len(self.prepared.products)
        vectors = np.zeros((len(products), 3, count), np.float32)
        for row in range(len(products)):
            number = self.place[products[row].id]
            own = {p: w for (q, p), w in self.weights.items() if q == number}
            for product, weight in (own or {number: 1.0}).items():
                vectors[row, :, product] = weight
        advance(len(products))
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.ones((len(products), 3), bool)


@pytest.fixture
def log(prepared):
    """Two queries. The first bought four titles in training, and three others later; one of them more often."""
    first = np.unique(prepared.group[list(prepared.train)], return_index=True)[1]
    titles = [int(n) for n in first if prepared.group[n] >= 0]
    query, other = titles[10:12]
    held_out = [(query, titles[0], 1.0), (query, titles[1], 3.0), (query, titles[2], 1.0), (other, titles[3], 1.0)]
    trained = [Triplet(query, titles[n], None) for n in (4, 5, 6, 7)] + [Triplet(other, titles[0], None)]
    candidates = [n for n in prepared.train if n not in (query, other)]  # queries are not products
    return dataclasses.replace(prepared, val=candidates, val_queries=held_out, triplets=trained), titles


def scores(prepared, weights):
    encoded = retrieval.encode(Oracle(prepared, weights), prepared)
    found = {d: m for name, d, _, m in retrieval.directions(encoded) if name == "queries"}
    return encoded.queries["queries"], found["t→mm"]


def test_a_model_that_knows_all_purchases_is_right(log):
    """It ranks the purchases of training first. R@10 was 59 on a made log when they counted as wrong."""
    prepared, titles = log
    query, other = titles[10:12]
    weights = {(q, p): w for q, p, w in prepared.val_queries} | {(q, p): 9.0 for q, p, *_ in prepared.triplets}
    queries, found = scores(prepared, weights)
    assert len(queries.product) == 2 and queries.product.tolist() == sorted([query, other])
    for name in ("R@1", "R@5", "R@10", "MRR", "nDCG@10", "mAP"):
        np.testing.assert_allclose(found[name], 100.0, err_msg=name)
    first = queries.product.tolist().index(query)
    assert queries.target[first] == titles[1]  # the product that it bought most


def test_the_order_of_relevant_products_counts_by_weight(log):
    prepared, titles = log
    query, other = titles[10:12]
    weights = {(query, titles[0]): 3.0, (query, titles[1]): 1.0, (query, titles[2]): 2.0, (other, titles[3]): 1.0}
    queries, found = scores(prepared, weights)
    row = queries.product.tolist().index(query)
    gain = lambda *grades: sum(g / np.log2(n + 2) for n, g in enumerate(grades))  # noqa: E731
    assert found["mAP"][row] == 100.0
    assert found["nDCG@10"][row] == pytest.approx(100 * gain(1, 1, 3) / gain(3, 1, 1))


def test_products_bought_in_training_leave_the_ranking_of_their_query_alone(log):
    """The other query's ranking still holds what the first one bought."""
    prepared, titles = log
    weights = {(q, p): 9.0 for q, p, *_ in prepared.triplets}
    encoded = retrieval.encode(Oracle(prepared, weights), prepared)
    task = retrieval.search(encoded, "queries", "t", "mm")
    top = task.candidate_product[task.found(5)]
    rows = {int(product): set(top[row].tolist()) for row, product in enumerate(task.query_product)}
    query, other = titles[10:12]
    key = lambda products: {int(prepared.group[p]) for p in products}  # noqa: E731
    assert not key(rows[query]) & key(titles[4:8])
    assert key(rows[other]) & key(titles[4:8]) and int(prepared.group[titles[0]]) not in key(rows[other])
    everything = task.found(len(task.candidates))
    assert all(sorted(row) == list(range(len(task.candidates))) for row in everything.tolist())


def test_qrels_by_key_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    query, key, grade = rng.integers(0, 6, 40), rng.integers(0, 9, 40), rng.integers(1, 5, 40).astype(float)
    candidates = rng.integers(0, 12, 25)
    found = metrics.Qrels.by_key(query, key, grade, candidates, 6)
    pairs = {}
    for q, k, g in zip(query.tolist(), key.tolist(), grade.tolist(), strict=True):
        for candidate in np.flatnonzero(candidates == k).tolist():
            pairs[q, candidate] = max(g, pairs.get((q, candidate), 0))
    expected = metrics.Qrels.of(pairs, 6, 25)
    for name in ("query", "candidate", "grade", "queries", "candidates"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
