"""Pictures: unusual input does not break them, and galleries frame the hits."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from moon_jax.data.prepared import Prepared
from moon_jax.evaluation import metrics, pictures, retrieval
from moon_jax.types import OBJECTIVES, Product
from tests.conftest import jpeg

PHOTO = jpeg((200, 30, 30), (24, 24), 0)


def line(step, bins=20, **changes):
    found = {
        "step": step,
        "loss": dict.fromkeys(OBJECTIVES, 1.0 / step),
        "omega": dict.fromkeys(OBJECTIVES, 0.2),
        "phi_histogram": [1] * bins,
        "experts": [[{"text": 0.5, "image": 0.25}] * 3] * 2,
    }
    return found | changes


def size(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_lines_with_missing_numbers(tmp_path):
    lines = [line(1), line(2, loss=dict.fromkeys(OBJECTIVES), phi_histogram=None), line(3)]
    pictures.training(tmp_path / "t.png", lines, "")
    pictures.training(tmp_path / "one.png", lines[1:2], "")
    pictures.phi(tmp_path / "p.png", lines, 0.6, "")
    many = line(1, experts=[[{"text": None, "image": 1.0}] * 64] * 28, modality_information=[0.5] * 28)
    pictures.experts(tmp_path / "e.png", [many | {"step": 0}, many], "")
    pictures.experts(tmp_path / "old.png", [line(1)], "")  # from before the information was logged
    for name in ("t", "one", "p", "e", "old"):
        assert min(size(tmp_path / f"{name}.png")) > 300
    # Nothing to draw: no φ at all, no experts.
    pictures.phi(tmp_path / "none.png", [line(1, phi_histogram=None)], 0.6, "")
    pictures.experts(tmp_path / "none.png", [line(1, experts=[])], "")
    assert not (tmp_path / "none.png").exists()


def test_directions_without_queries(tmp_path):
    entry = {"R@1": 1.0, "R@5": 2.0, "R@10": 3.0, "chance@10": 1.0, "queries": 4, "candidates": 5}
    pictures.directions(tmp_path / "d.png", {"products": {"t→i": entry}, "queries": {"i→mm": entry}}, "")
    assert size(tmp_path / "d.png")[0] > 1000


def encoded(products, own_queries=()):
    """Each product has its own axis, in all views, so that every query finds its product."""
    count = len(products)

    def views(indices):
        present = np.array([[bool(products[i].text), bool(products[i].images), False] for i in indices])
        present[:, 2] = present[:, 0] & present[:, 1]
        return np.eye(count, dtype=np.float32)[indices][:, None] * present[..., None], present

    index = np.arange(count - len(own_queries))
    vectors, present = views(index)
    queries = {
        "products": retrieval.Queries(index, index, vectors, vectors, present, present, metrics.Keys(index, index))
    }
    if own_queries:
        own = np.arange(count - len(own_queries), count)
        vectors_own, present_own = views(own)
        target, pair = np.array(own_queries), (present_own, present_own)
        queries["queries"] = retrieval.Queries(
            own, target, vectors_own, vectors_own, *pair, metrics.Keys(target, index)
        )
    return retrieval.Encoded(index, vectors, present, queries)


def prepared_of(products):
    nothing = np.full(len(products), -1)
    return Prepared(list(products), nothing, [], [], list(range(len(products))), [], {})


def framed(path):
    """Whether the picture contains the colour of a hit's frame."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    hit = [int(pictures.HIT[start : start + 2], 16) for start in (1, 3, 5)]
    return (np.abs(pixels - hit).sum(-1) < 12).sum() > 500


@pytest.mark.filterwarnings("ignore:Glyph")  # scripts without an installed font are drawn as boxes
@pytest.mark.parametrize(
    "products",
    [
        [Product(text="$5 mug, 50% off_now\n" * 9, images=(PHOTO,), id=str(n)) for n in range(12)],
        [Product(text=text, images=(PHOTO,)) for text in ("红色帆布鞋", "赤いマグ", "كوب", "{x}^2 \\frac", "🙂 mug")],
        [Product(text="a", images=(jpeg((9, 9, 9), (300, 4), 0),)), Product(text="b", images=(PHOTO,))],
        [Product(text="only text"), Product(text="more text")],
        [Product(images=(PHOTO,)), Product(images=(PHOTO,))],
    ],
    ids=["signs", "scripts", "shapes", "texts", "images"],
)
def test_galleries_of_unusual_products(tmp_path, products):
    path = tmp_path / "g.png"
    pictures.gallery(path, encoded(products), prepared_of(products), 10**6, 0, "footer")
    assert min(size(path)) > 300 and framed(path)


def test_a_gallery_shows_queries_and_results(tmp_path, monkeypatch):
    """Each product finds itself first: the query is its text alone, the result its image with its title below."""
    shown = []
    monkeypatch.setattr(pictures, "_cell", lambda axes, product, view, pixels, label, *more, **other: shown.append(
        (product.text, view, label)))  # fmt: skip
    products = [Product(text=f"mug {n}", images=(PHOTO,), id=str(n)) for n in range(12)]
    pictures.gallery(tmp_path / "g.png", encoded(products), prepared_of(products), 10**6, 0, "")
    rows = [shown[start : start + 6] for start in range(0, len(shown), 6)]
    assert len(rows) == 10 and [row[0][1:] for row in rows] == [("t", "query")] * 5 + [("i", "query")] * 5
    for query, first, *others in rows:
        assert first[0] == query[0] and first[2] == "1 ✓"
        assert [label for _, _, label in others] == ["2", "3", "4", "5"]
        assert query[0] not in [text for text, _, _ in others]


def test_a_gallery_of_misses_frames_nothing(tmp_path):
    products = [Product(text=f"mug {n}", images=(PHOTO,), id=str(n)) for n in range(8)]
    found = encoded(products)
    queries = found.queries["products"]
    far = np.roll(queries.plain, 1, axis=0)
    # Every query points at its neighbour, and the others are tied: the right product must not be in the top five.
    far = far - 0.01 * queries.plain
    found.queries["products"] = dataclasses.replace(queries, altered=far, plain=far)
    pictures.gallery(tmp_path / "g.png", found, prepared_of(products), 10**6, 0, "")
    assert not framed(tmp_path / "g.png")


def test_the_catalogues_own_queries_are_shown(tmp_path):
    products = [Product(text=f"mug {n}", images=(PHOTO,), id=str(n)) for n in range(6)]
    products.append(Product(images=(PHOTO,), id="q"))
    pictures.gallery(tmp_path / "g.png", encoded(products, own_queries=(2,)), prepared_of(products), 10**6, 0, "")
    assert size(tmp_path / "g.png")[0] > 1500  # two directions side by side


def test_messages_tell_the_sets_of_queries_apart():
    named = [retrieval.brief(name) for name in ("products", "queries", *retrieval.PHOTOS)]
    assert len(set(named)) == len(named) and named[0] == "products as queries"
