"""Label tasks, removal of label words, and the scores of predictions."""

import dataclasses

import numpy as np
import pytest

from moon_jax.data import words
from moon_jax.data.prepared import Prepared
from moon_jax.evaluation import labels, retrieval
from moon_jax.types import VIEWS, Product


def oracle(truth, predicted):
    """Accuracy and macro-averaged precision, recall and F1 in float64, counted in loops."""
    seen = sorted({*truth, *predicted})
    precision, recall, f1 = [], [], []
    for label in seen:
        tp = sum(t == p == label for t, p in zip(truth, predicted, strict=True))
        fp = sum(p == label != t for t, p in zip(truth, predicted, strict=True))
        fn = sum(t == label != p for t, p in zip(truth, predicted, strict=True))
        precision.append(tp / (tp + fp) if tp + fp else 0.0)
        recall.append(tp / (tp + fn) if tp + fn else 0.0)
        both = precision[-1] + recall[-1]
        f1.append(2 * precision[-1] * recall[-1] / both if both else 0.0)
    accuracy = sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)
    mean = lambda values: 100 * sum(values) / len(values)  # noqa: E731
    return {"accuracy": 100 * accuracy, "precision": mean(precision), "recall": mean(recall), "F1": mean(f1)}


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 7, 60), rng.integers(2, 9, 60)
    predicted = np.where(rng.random(60) < 0.4, truth, predicted)  # 0 and 1 are never predicted, 7 and 8 always wrongly
    found = labels.scores(truth, predicted)
    assert found == {name: pytest.approx(value, abs=1e-3) for name, value in oracle(truth, predicted).items()}
    assert len({round(value) for value in found.values()}) > 2


def test_label_words_are_removed_with_plurals_and_hyphens():
    forbidden = set().union(*map(words.words, ("Tshirts", "Navy Blue", "Watches", "Dress")))
    remove = lambda text: words.remove(text, forbidden)  # noqa: E731
    assert remove("Nike Men navy-blue T-Shirt size 4") == "Nike Men size 4"
    assert remove("A watch, two watches; dresses & DRESS!") == "A two &"
    assert remove("Bluetooth dressing table") == "Bluetooth dressing table"  # words, not parts of words
    assert remove("blue") == ""
    assert remove("T Shirt, navy_blue, water watch") == "water"
    forbidden = set().union(*map(words.words, ("Flip Flops", "Accessories", "32GB", "Café")))
    assert remove("black flipflops accessory 32 GB cafe\u0301 x") == "black x"


@pytest.mark.parametrize(
    ("label", "text", "rest"),
    [
        ("Tomato", "Fresh Tomatoes 1kg", "Fresh 1kg"),
        ("Lens", "two camera lenses", "two camera"),
        ("Lenses", "a lens", "a"),
        ("Scarf", "silk scarves", "silk"),
        ("Knife", "knives", ""),
        ("Gas", "gases and gas", "and"),
        ("Quiz", "quizzes", ""),
        ("Axes", "an axe", "an"),
        ("Women", "a woman's hat", "a hat"),
        ("Women's", "Levi's jeans for women, size S", "Levi's jeans for size S"),
        ("Café", "cafe CAFÉ cafe\u0301", ""),
        ("Accessories", "accessory", ""),
        ("Toy", "toys", ""),
        ("Dress", "Dr. Who's dresses", "Dr. Who's"),
        ("Red", "reduced predator", "reduced predator"),
        # Here vowels are combining marks, not separate words.
        ("लाल", "नीला सूती कलम लंबा थैला", "नीला सूती कलम लंबा थैला"),
        ("लाल", "लाल सूती थैला", "सूती थैला"),
        ("אָדֹם", "תיק אָדֹם", "תיק"),
    ],
)
def test_plurals_accents_and_possessives_are_removed_and_count_as_leaks(label, text, rest):
    assert words.remove(text, words.words(label)) == rest
    assert words.holds(text, label) == (rest != text)
    assert "" not in words.words(label)


@pytest.mark.parametrize(
    ("text", "label", "held"),
    [("a red shirt", "Red Shirts", True), ("flipflops", "Flip Flops", True), ("shirt", "Red Shirts", False),
     ("anything", "★", False), ("新款红色", "红色", True), ("新款红", "红色", False)],
)  # fmt: skip
def test_what_counts_as_a_leak(text, label, held):
    assert words.holds(text, label) == held


def test_only_the_word_is_removed_in_scripts_without_spaces():
    forbidden = set().union(*map(words.words, ("红色", "T恤", "Red")))
    assert words.remove("新款红色纯棉T恤 Red", forbidden) == "新款 纯棉"
    assert words.remove("红 蓝色", forbidden) == "红 蓝色"
    products = [
        Product(text=f"夏季{colour}上衣{n}", images=(b"x",), attributes={"颜色": colour})
        for n, colour in enumerate(("红色", "蓝色") * 3)
    ]
    (colour,) = labels.tasks(prepared_of(products))
    assert colour.leak == 100.0 and colour.stripped[0] == "夏季 上衣0"


def test_the_category_is_the_deepest_level_that_products_share():
    names = [("goods", f"kind {n % 2}", f"title {n}") for n in range(8)]
    products = [Product(text="x", category=name) for name in names]
    (category,) = labels.tasks(prepared_of(products))
    assert category.labels == ("kind 0", "kind 1")


@pytest.mark.parametrize(("values", "evaluated"), [(200, True), (201, False)])
def test_too_many_labels_are_free_text(values, evaluated):
    products = [Product(text="x", attributes={"a": str(n % values)}) for n in range(2 * values)]
    assert bool(labels.tasks(prepared_of(products))) == evaluated


@pytest.mark.parametrize(("having", "evaluated"), [(5, True), (4, False)])
def test_rare_attributes_are_not_evaluated(having, evaluated):
    products = [Product(text="x", attributes={"a": str(n % 2)} if n < having else {}) for n in range(100)]
    assert bool(labels.tasks(prepared_of(products))) == evaluated


def test_only_the_commonest_attributes_are_evaluated():
    attributes = [{f"a{m:02}": str(n % 2) for m in range(20) if n < 20 - m} for n in range(20)]
    found = labels.tasks(prepared_of([Product(text="x", attributes=a) for a in attributes]))
    assert [task.name for task in found] == [f"attribute a{m:02}" for m in range(8)]


PRODUCTS = [
    Product(text="red shirt", images=(b"x",), category=("goods", "Shirts"), attributes={"colour": "Red", "sku": "1"}),
    Product(text="blue shirt", images=(b"x",), category=("goods", "Shirts"), attributes={"colour": "Blue", "sku": "2"}),
    Product(text="red", images=(b"x",), category=("goods", "Hats"), attributes={"colour": "red", "sku": "3"}),
    Product(text="fine hat", category=("goods", "Hats"), attributes={"colour": " BLUE", "sku": "4"}),
    Product(images=(b"x",), category=(), attributes={"colour": "Green", "sku": "5", "rare": "a"}),
    Product(text="more", category=("goods", "Hats"), attributes={"colour": "Green", "sku": "6", "rare": "b"}),
]


def prepared_of(products, train=()):
    nothing = np.full(len(products), -1)
    val = [index for index in range(len(products)) if index not in train]
    return Prepared(list(products), nothing, [], list(train), val, [], {})


def test_tasks_are_labels_that_products_share():
    category, colour = labels.tasks(prepared_of(PRODUCTS, train=(5,)))
    assert (category.name, category.labels) == ("category", ("Shirts", "Hats"))
    assert category.truth.tolist() == [0, 0, 1, 1, -1]
    assert category.stripped == {0: "red", 1: "blue", 3: "fine"}
    assert category.leak == 75.0  # the title "red" does not contain the category
    # Case and spaces do not make another label; "sku" is a name, and too few products have "rare".
    assert (colour.name, colour.labels) == ("attribute colour", ("Red", "Blue", "Green"))
    assert colour.truth.tolist() == [0, 1, 0, 1, 2] and colour.stripped == {0: "shirt", 1: "shirt", 2: ""}
    assert colour.leak == 75.0


class Fake:
    """The vector of a text has one axis per word stem; the vector of every image is the first axis."""

    axes = ("red", "blu", "green", "shirt", "hat")

    def text(self, text):
        found = np.array([axis in words.words(text or "") for axis in self.axes], np.float32)
        return found / max(np.linalg.norm(found), 1.0)

    def encode(self, items):
        return np.stack([self.text(item.text) for item in items])

    def encode_views(self, products, alteration=None, seed=0, advance=lambda count: None):
        image = np.eye(5, dtype=np.float32)[0]
        present = np.array([[bool(p.text), bool(p.images), bool(p.text and p.images)] for p in products])
        vectors = np.stack([[self.text(p.text), image, image] for p in products])
        advance(len(products))
        return vectors * present[..., None], present


def test_prediction_does_not_read_the_label_in_the_text():
    prepared = prepared_of(PRODUCTS)
    encoded = retrieval.Encoded(np.arange(6), *Fake().encode_views(PRODUCTS), {})
    tasks, done = labels.tasks(prepared), []
    answers = labels.encode(Fake(), prepared, encoded, tasks, advance=done.append)
    assert sum(done) == labels.count(tasks) == 6
    colour = labels.measure(next(a for a in answers if a.task.name == "attribute colour"))
    assert colour["labels"] == 3 and colour["leak"] == 60.0 and colour["known"] == 0
    # From the image: always red, correct for two of the four products with an image and a colour.
    assert colour["i"]["accuracy"] == 50.0 and colour["i"]["majority"] == 50.0 and colour["i"]["products"] == 4
    # From the text: all colour words are removed (product 2's whole text); ties go to the first label, red.
    assert colour["t"]["products"] == 4 and colour["t"]["accuracy"] == 25.0
    assert colour["mm"]["products"] == 2 and "probe" not in colour["i"]
    unmasked = dataclasses.replace(answers[1], vectors=encoded.candidates, present=encoded.present)
    assert labels.measure(unmasked)["t"]["accuracy"] == 60.0  # with the words, it reads the label
    assert answers[0].truncated(2).vectors.shape == (6, len(VIEWS), 2)


def test_neighbours_and_probe_are_fitted_on_training_products_without_label_words():
    """Every training title contains its colour, so that a model that reads it is always correct."""
    kinds = ("red", "blue", "green")
    products = [
        Product(text=f"{kinds[n % 3]} shirt", images=(b"x",), attributes={"colour": kinds[n % 3]}) for n in range(30)
    ]
    prepared = prepared_of(products, train=range(18))
    known = labels.known(prepared, 12)
    assert len(known) == 12 and known == sorted(set(known)) and max(known) < 18
    assert known == labels.known(prepared, 12)
    (colour,) = labels.tasks(prepared, known)
    assert colour.known.tolist() == [n % 3 for n in known]
    assert colour.known_stripped == dict.fromkeys(range(12), "shirt")
    encoded = retrieval.Encoded(np.arange(12), *Fake().encode_views(products[18:]), {})
    done = []
    (answers,) = labels.encode(Fake(), prepared, encoded, [colour], known, advance=done.append)
    assert sum(done) == labels.count([colour], known) == 12 + 12 + 12
    found = labels.measure(answers)
    assert found["known"] == 12
    # The stripped texts are equal: all products get the commonest label of the known ones.
    commonest = max(range(3), key=lambda label: (colour.known.tolist().count(label), -label))
    share = 100 * float((colour.truth == commonest).mean())
    assert found["t"]["probe"] == found["t"]["neighbours"] == pytest.approx(share, abs=1e-3)
    reading = dataclasses.replace(
        answers, vectors=encoded.candidates, known=Fake().encode_views([products[n] for n in known])[0]
    )
    assert labels.measure(reading)["t"]["probe"] == labels.measure(reading)["t"]["neighbours"] == 100.0


def test_nothing_is_fitted_if_training_products_are_evaluated():
    prepared = prepared_of(PRODUCTS, train=range(6))
    assert labels.known(dataclasses.replace(prepared, val=prepared.train), 5) == []


def test_prompts_are_averaged():
    class Words:
        def encode(self, items):
            return np.stack([np.eye(3, dtype=np.float32)[len(item.text.split()) - 1] for item in items])

    found = labels.label_vectors(Words(), ["red", "navy blue"], ["{}", "a {}"])
    expected = np.array([[1, 1, 0], [0, 1, 1]]) / np.sqrt(2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_precomputed_text_vectors_are_not_evaluated_if_a_title_contains_a_label():
    """The few titles without a label are not representative."""
    titles = {"red mug": "red", "mug": "red", "cup": "blue", "jug": "blue"}
    products = [Product(text=text, images=(b"x",), attributes={"colour": titles[text]}) for text in titles]

    class Fixed:
        fixed = True

    vectors, present = np.ones((4, 3, 2), np.float32), np.ones((4, 3), bool)
    data = prepared_of(products)
    for task in labels.tasks(data):
        assert list(task.stripped) == [0]
        encoded = retrieval.Encoded(np.arange(4), vectors, present, {})
        old = encoded.candidates, encoded.present
        _, kept = labels._reembedded(Fixed(), data, list(data.val), task.stripped, *old, int)
        np.testing.assert_array_equal(kept, [[False, True, False]] * 4)
