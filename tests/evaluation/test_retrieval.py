"""Retrieval in all directions, with known vectors."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from moon_jax.data import images
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
    return Prepared(products, group, [], [], list(range(6)), [(6, 0, 1.0)], {})


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


class Whole:
    """Embeds images by their 8 × 6 thumbnails, and text as nothing."""

    def encode_views(self, products, alteration=None, seed=0, advance=lambda count: None):
        present = np.zeros((len(products), 3), bool)
        vectors = np.zeros((len(products), 3, 144), np.float32)
        self.alterations = [*getattr(self, "alterations", ()), alteration]
        for row in range(len(products)):
            product = products[row]
            if product.images:
                picture = images.decode(product.images[0], 10**6).resize((8, 6))
                vectors[row, 1:] = np.asarray(picture, np.float32).ravel() + 1
                present[row, 1:] = [True, bool(product.text)]
        advance(len(products))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9), present


@pytest.fixture
def photographed():
    """Six products on white, one of them without a photo and one with nothing but background, and a query."""
    products = []
    for number in range(6):
        picture = Image.new("RGB", (48, 40), "white")
        corner = 12 + number
        ImageDraw.Draw(picture).ellipse((corner, 8, corner + 20, 32), fill=(40 * number, 90, 200 - 30 * number))
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        products.append(Product(text=f"x{number}", images=(stream.getvalue(),), id=str(number)))
    products[3] = dataclasses.replace(products[3], images=())
    products[4] = dataclasses.replace(products[4], images=(Image.new("RGB", (48, 40), "teal"),))
    return prepared_of([*products, Product(images=(b"x",), id="q")])


def test_photos_are_changed_in_sets_of_their_own(photographed, monkeypatch):
    prepared = dataclasses.replace(photographed, val_queries=[])
    asked = []
    encoded = retrieval.encode(Whole(), prepared, asked.append, photos=tuple(retrieval.PHOTOS))
    assert sum(asked) == retrieval.count(prepared, None, tuple(retrieval.PHOTOS)) == 6 * (2 + 4)
    found = {}
    for name, direction, task, measures in retrieval.directions(encoded):
        found.setdefault(name, {})[direction] = task, measures
    assert list(retrieval.PHOTOS) == [name for name in found if name != "products"]
    for name, edit in retrieval.PHOTOS.items():
        assert set(found[name]) == {"i→i", "i→mm", "mm→i", "mm→mm"}
        task, _ = found[name]["i→i"]
        # Without a subject there is no other background and no scene; without a photo there is nothing. The product
        # without a scene still finds that of the product with its title.
        assert len(task.query_product) == (4 if edit == "background" else 5)
        assert len(task.candidates) == (4 if edit == "scene" else 5)
    # Each product and each set has its own random numbers.
    one = photographed.products[photographed.val[0]]
    made = [retrieval.Photos([one, one], edit, 10**6) for edit in ("background", "viewpoint")]
    shown = [np.asarray(photos[number].images[0]).tobytes() for photos in made for number in (0, 1)]
    assert len(set(shown)) == 4 and shown[0] == np.asarray(made[0][0].images[0]).tobytes()
    # The same photos again, whatever their number; no photo is the original.
    again = retrieval.encode(Whole(), prepared, photos=("photos_detail", "photos_background"))
    for name in ("photos_detail", "photos_background"):
        np.testing.assert_array_equal(again.queries[name].plain, encoded.queries[name].plain)
        own = (encoded.queries[name].plain[:, 1] * encoded.candidates[:, 1]).sum(-1)
        assert own[[0, 1, 2, 5]].max() < 0.9999


def test_the_text_of_a_query_with_a_changed_photo_is_altered_and_its_photo_is_whole(photographed):
    embedder = Whole()
    retrieval.encode(embedder, dataclasses.replace(photographed, val_queries=[]), photos=("photos_background",))
    plain, crop, changed = embedder.alterations
    assert plain is None and crop == retrieval.ALTERATION
    assert changed == dataclasses.replace(retrieval.ALTERATION, crop=(1.0, 1.0))


def test_large_catalogues_are_sampled_and_scenes_are_searched_among_themselves(photographed, monkeypatch):
    monkeypatch.setattr(retrieval, "MOST_PHOTOS", 3)
    prepared = dataclasses.replace(photographed, val_queries=[])
    encoded = retrieval.encode(Whole(), prepared, photos=("photos_detail", "photos_scene"))
    detail, scene = encoded.queries["photos_detail"], encoded.queries["photos_scene"]
    assert len(detail.product) == 3 and detail.candidates is None
    np.testing.assert_array_equal(scene.candidates.product, scene.product)
    assert encoded.truncated(5).queries["photos_scene"].candidates.vectors.shape == (3, 3, 5)


def test_models_without_images_or_with_fixed_vectors_have_no_changed_photos():
    sees = lambda **more: retrieval.photo_sets(type("E", (), more)())  # noqa: E731
    assert sees() == sees(sees=("i",)) == tuple(retrieval.PHOTOS)
    assert sees(sees=("t",)) == sees(fixed=True) == ()
