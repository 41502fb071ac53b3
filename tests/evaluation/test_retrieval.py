"""Retrieval in all directions, with known vectors."""

import numpy as np
import pytest

from moon_jax.data.prepared import Prepared
from moon_jax.evaluation import metrics, retrieval
from moon_jax.types import VIEWS, Product
from tests.conftest import tiny


class Fake:
    """An embedder with known vectors: a product's axis in all views; the next product's axis if it is altered."""

    config = tiny()

    def __init__(self, products):
        self.axis = {product.id: number for number, product in enumerate(products)}

    def encode_views(self, products, alteration=None, seed=0, advance=None):
        present = np.array([[bool(p.text), bool(p.images), bool(p.text and p.images)] for p in products])
        vectors = np.zeros((len(products), 3, len(self.axis)), np.float32)
        for row, product in enumerate(products):
            vectors[row, :, (self.axis[product.id] + (alteration is not None)) % len(self.axis)] = 1.0
        return vectors * present[..., None], present


def test_all_directions_with_absent_views_and_own_queries():
    names = [("a", 1), ("b", 1), (None, 1), ("c", 0), ("d", 1), ("d", 0)]
    products = [Product(text=t, images=(b"x",) * n, id=str(k)) for k, (t, n) in enumerate(names)]
    products.append(Product(images=(b"x",), id="0"))  # a photo of product 0
    encoded = retrieval.encode(Fake(products[:6]), prepared_of(products))
    found = {name: {} for name in encoded.queries}
    for name, direction, task, measures in retrieval.directions(encoded):
        entry = retrieval.summary(task, measures)
        found[name][direction] = {
            key: entry[key] for key in ("R@1", "R@5", "R@10", "chance@10", "queries", "candidates")
        }
    assert set(found) == {"products", "queries"}
    by_itself = found["products"]
    # Unaltered views always find their product. Altered views point at the next product, so R@1 counts a hit only for
    # the first of the two products with title d, because the next one has the same title.
    scores = {"R@1": 75.0, "R@5": 100.0, "R@10": 100.0, "chance@10": 100.0, "queries": 4, "candidates": 4}
    assert by_itself["t→i"] == scores
    assert by_itself["i→t"]["R@1"] == 100.0 and by_itself["i→t"]["queries"] == 3
    assert by_itself["t→t"]["R@1"] == 20.0 and by_itself["t→t"]["queries"] == 5
    assert by_itself["i→i"]["R@1"] == 0.0 and by_itself["i→i"]["queries"] == 4
    for direction in ("t→mm", "i→mm", "mm→t", "mm→i", "mm→mm"):
        assert by_itself[direction]["R@1"] < 50.0, direction
    assert set(found["queries"]) == {"i→t", "i→i", "i→mm"}
    assert all(entry["R@1"] == 100.0 and entry["queries"] == 1 for entry in found["queries"].values())


def prepared_of(products):
    group = np.array([0, 1, -1, 2, 3, 3, -1])
    return Prepared(products, group, [], [], list(range(6)), [(6, 0)], {})


def test_truncated_vectors_are_cut_everywhere():
    products = [Product(text=f"x{k}", images=(b"x",), id=str(k)) for k in range(6)]
    products.append(Product(images=(b"x",), id="0"))
    encoded = retrieval.encode(Fake(products[:6]), prepared_of(products)).truncated(2)
    queries = encoded.queries["products"]
    for vectors in (encoded.candidates, queries.plain, queries.altered):
        assert vectors.shape == (6, 3, 2)
        lengths = np.linalg.norm(vectors, axis=-1)
        assert set(np.round(lengths, 6).ravel().tolist()) == {0.0, 1.0}  # the other axes were cut away


def test_only_t_and_i_share_no_modality():
    apart = [(q, c) for q, c in retrieval.DIRECTIONS if not retrieval.shares_modality(q, c)]
    assert apart == [("t", "i"), ("i", "t")] and len(retrieval.DIRECTIONS) == 9


def test_measures_of_a_direction_equal_loops_over_all_similarities():
    """With ties, title groups, and views that some products do not have."""
    from tests.evaluation.test_metrics import oracle

    rng = np.random.default_rng(0)
    count = 40
    vectors = rng.integers(-1, 2, (2, count, 3, 4)).astype(np.float32)
    key, present = rng.integers(0, 25, count), rng.random((count, 3)) < 0.8
    index = np.arange(count)
    queries = retrieval.Queries(index, index, vectors[0], vectors[1], present, present, metrics.Keys(key, key))
    encoded = retrieval.Encoded(index, vectors[1], present, {"products": queries})
    for _, direction, task, measures in retrieval.directions(encoded):
        q, c = (VIEWS.index(view) for view in direction.split("→"))
        source = vectors[0] if retrieval.shares_modality(*direction.split("→")) else vectors[1]
        offered = [n for n in range(count) if present[n, c]]
        expected = []
        for n in range(count):
            grades = [float(key[n] == key[m]) for m in offered]
            if present[n, q] and any(grades):
                expected.append(oracle([float(source[n, q] @ vectors[1][m, c]) for m in offered], grades))
        assert len(expected) == len(task.query_product) > 20
        entry = retrieval.summary(task, measures)
        for name in measures:
            values = [value[name] for value in expected]
            np.testing.assert_allclose(measures[name], values, atol=1e-9)
            low, high = entry["interval"][name]
            assert low <= entry[name] <= high and entry[name] == pytest.approx(np.mean(values), abs=1e-4)


def test_categories_partition_the_queries_of_a_direction():
    products = [Product(text=f"x{k}", images=(b"x",), id=str(k)) for k in range(6)]
    products.append(Product(images=(b"x",), id="0"))
    encoded = retrieval.encode(Fake(products[:6]), prepared_of(products))
    category = {0: "mugs", 1: "mugs", 3: "hats", 4: "hats", 5: "hats"}
    for name, direction, task, measures in retrieval.directions(encoded):
        found = retrieval.by_category(task, measures, category)
        if name == "queries":
            assert found == {"mugs": {"R@10": 100.0, "queries": 1}}  # the category of the target
            continue
        assert {part: entry["queries"] for part, entry in found.items()} == {"hats": 3, "mugs": 2}, direction
        whole = sum(entry["R@10"] * entry["queries"] for entry in found.values())
        kept = np.isin(task.target, list(category))
        assert whole == pytest.approx(measures["R@10"][kept].sum(), abs=1e-3)
