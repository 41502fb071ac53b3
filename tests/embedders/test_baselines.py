"""BM25 and colour histograms compared with their formulas; precomputed vectors; views and altered queries."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moon_jax.data import records
from moon_jax.data.images import crop_box
from moon_jax.data.text import keep_words
from moon_jax.embedders import protocol, registry
from moon_jax.embedders.bm25 import BM25
from moon_jax.embedders.colours import Colours
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.evaluation import retrieval
from moon_jax.types import VIEWS, Product
from tests.conftest import jpeg

RED, BLUE = jpeg((200, 30, 30), (40, 30), 0), jpeg((20, 30, 200), (24, 60), 1)
PRODUCTS = [
    Product(text="red shirt", images=(RED,), id="a"),
    Product(text="Blue shirt, blue!", id="b"),
    Product(images=(BLUE,), id="c"),
    Product(text="mug", images=(BLUE, RED), id="d"),
    Product(id="e"),
]


def oracle(query, titles, k1=1.5, b=0.75):
    """Lucene's BM25 by its formula."""
    documents = [re.findall(r"\w+", title.casefold()) for title in titles]
    mean, found = np.mean([len(document) for document in documents]), []
    for document in documents:
        score = 0.0
        for word in re.findall(r"\w+", query.casefold()):
            having = sum(word in other for other in documents)
            count = document.count(word)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean)) if having else 0.0
        found.append(score)
    return found


def test_bm25_equals_its_formula_and_ties_go_to_the_first():
    titles = ["red canvas shirt", "blue shirt, blue!", "a mug", "another mug of the shop", "red red mug", "shirt"]
    model = BM25(10**6)
    queries = ["red shirt", "BLUE", "nothing there", "mug mug"]
    scores, found = model.rank(queries, titles, 6)
    for query, ranked, values in zip(queries, found, scores, strict=True):
        expected = oracle(query, titles)
        order = sorted(range(6), key=lambda n: (-np.float32(expected[n]), n))
        assert ranked.tolist() == order
        np.testing.assert_allclose(values, [expected[n] for n in order], rtol=1e-5)
    assert found[2].tolist() == list(range(6))


def test_bm25_splits_scripts_without_spaces_into_characters():
    _, found = BM25(10**6).rank(["红鞋"], ["蓝色上衣", "红色帆布鞋"], 2)
    assert found.tolist() == [[1, 0]]


def test_views_of_text_only_and_image_only_models():
    vectors, present = BM25(10**6).encode_views(PRODUCTS)
    assert present.tolist() == [
        [True, False, True],
        [True, False, False],
        [False] * 3,
        [True, False, True],
        [False] * 3,
    ]
    assert vectors[0, 0] == vectors[0, 2] == "red shirt"
    vectors, present = Colours(10**6).encode_views(PRODUCTS)
    assert present.tolist() == [
        [False, True, True],
        [False] * 3,
        [False, True, False],
        [False, True, True],
        [False] * 3,
    ]
    np.testing.assert_array_equal(vectors[3, 1], vectors[2, 1])  # the first image
    np.testing.assert_array_equal(vectors[3, 1], vectors[3, 2])
    assert vectors[0, 1] @ vectors[3, 1] < 0.5 and not vectors[1].any()


def test_colours_are_the_square_roots_of_a_histogram():
    half = np.zeros((10, 10, 3), np.uint8)
    half[:, :5] = (255, 0, 0)  # hue 0, saturated; the rest is black
    vector = Colours(10**6).encode([Product(images=(Image.fromarray(half),))])[0].reshape(12, 4, 4)
    assert vector[0, 3, 3] == pytest.approx(math.sqrt(0.5)) and vector[0, 0, 0] == pytest.approx(math.sqrt(0.5))
    assert (vector**2).sum() == pytest.approx(1)


class Seen(protocol.ByItem):
    """Records the items that it embeds."""

    name, max_pixels = "seen", 10**6

    def __init__(self):
        self.items = []

    def encode(self, items):
        self.items += items
        return np.ones((len(items), 2), np.float32)


def test_queries_are_altered_with_the_random_draws_of_our_reader():
    seen, done = Seen(), []
    products = records.Subset(PRODUCTS, [3, 0])
    seen.encode_views(products, retrieval.ALTERATION, 5, done.append)
    assert done == [2] and len(seen.items) == 6
    for number, product in enumerate(products):
        rng = np.random.default_rng((5, number))
        text = keep_words(product.text, 0.5, 1, rng)
        with Image.open(__import__("io").BytesIO(product.images[0])) as picture:
            left, top, right, bottom = crop_box(*picture.size, (0.6, 0.9), rng)
        words, image, both = seen.items[3 * number : 3 * number + 3]
        assert words.text == both.text == text and words.images == ()
        assert image.text is None and image.images[0].size == both.images[0].size
        wide, high = image.images[0].size
        assert right - left <= wide < right - left + 2 and bottom - top <= high < bottom - top + 2


def written(folder, rows):
    folder.mkdir()
    columns = dict(zip(("id", "view", "vector"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), folder / "part.parquet")
    return folder


def test_precomputed_vectors_are_found_by_id_and_view(tmp_path):
    rows = [("a", "t", [3.0, 4.0]), ("a", "mm", [0.0, 2.0]), ("d", "i", [1.0, 0.0]), ("other", "i", [1.0, 1.0])]
    vectors = Vectors(written(tmp_path / "v", rows))
    found, present = vectors.encode_views(PRODUCTS)
    np.testing.assert_allclose(found[0], [[0.6, 0.8], [0, 0], [0, 1]])
    assert present.sum() == 3 and present[3, VIEWS.index("i")]
    assert not vectors.encode_views(PRODUCTS, retrieval.ALTERATION)[1].any()  # there are none of altered products
    assert Vectors(written(tmp_path / "w", rows)).name == vectors.name
    assert Vectors(written(tmp_path / "x", rows[:2])).name != vectors.name


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "t", [1.0]), ("a", "t", [1.0])], "view t of 'a' is repeated"),
        ([("a", "text", [1.0])], "view 'text': must be t, i or mm"),
        ([("a", "t", [0.0, 0.0])], "some vectors are zero or not finite"),
        ([("a", "t", [float("nan")])], "some vectors are zero or not finite"),
        ([("a", "t", "no")], "needs id, view and vector"),
    ],
)
def test_invalid_vectors_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        Vectors(written(tmp_path / "v", rows))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no .parquet file"):
        Vectors(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Vectors(tmp_path / "nowhere")


def test_baselines_open_by_name(tmp_path):
    assert registry.open_embedder("bm25", 10**6).name == "BM25"
    assert registry.open_embedder("colours", 10**6).name == "colour histogram"


def test_precomputed_vectors_may_have_any_length(tmp_path):
    rows = [("a", "t", [3e25, 4e25]), ("b", "t", [-3e-25, 4e-25])]
    vectors = Vectors(written(tmp_path / "v", rows))
    found, _ = vectors.encode_views([Product(id="a"), Product(id="b")])
    np.testing.assert_allclose(found[:, 0], [[0.6, 0.8], [-0.6, 0.8]], atol=1e-6)
