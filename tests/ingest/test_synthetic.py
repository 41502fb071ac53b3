import io
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moon_jax.ingest import synthetic
from tests.conftest import prepared_from

COUNT = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "catalogue" / "synthetic.parquet"
    synthetic.write(path, COUNT, seed=0)
    return path


def facts(record):
    return {"kind": record["category"][-1]} | dict(record["attributes"])


def names(text, value):
    """Whether a title contains `value` or a synonym of it."""
    return any(word in text for word in (value, *synthetic.SYNONYMS.get(value, ())))


def test_a_product_depends_only_on_the_seed_and_its_number(made, tmp_path):
    again = tmp_path / "s.parquet"
    synthetic.write(again, 20, seed=0, threads=1)
    stored = pq.read_table(made).to_pylist()
    assert pq.read_table(again).to_pylist() == stored[:20]
    assert synthetic.make(1, 3) != synthetic.make(0, 3)
    assert len({record["product_id"] for record in stored}) == COUNT


def test_all_products_are_written(tmp_path):
    """More products than one batch of the writer."""
    path = tmp_path / "s.parquet"
    synthetic.write(path, 520, seed=0)
    found = pq.read_table(path, columns=["product_id"])["product_id"].to_pylist()
    assert found == [f"synthetic-{number:05}" for number in range(520)]
    assert [file.name for file in tmp_path.iterdir()] == ["s.parquet"]


def test_a_file_with_another_seed_or_count_is_not_reused(made, tmp_path):
    assert synthetic.is_complete(made, COUNT, 0)
    assert not synthetic.is_complete(made, COUNT + 1, 0) and not synthetic.is_complete(made, COUNT, 1)
    assert not synthetic.is_complete(tmp_path / "nowhere", COUNT, 0)


def test_the_catalogue_is_marked_as_synthetic(made, tmp_path):
    found = prepared_from(made, tmp_path / "p")
    assert found.synthetic and not found.quarantined and len(found.products) == COUNT
    assert '"synthetic": true' in (tmp_path / "p" / "manifest.json").read_text()
    assert all(product.id.startswith("synthetic-") for product in found.products)


def test_every_value_of_every_attribute_occurs(made):
    seen = [facts(record) for record in pq.read_table(made).to_pylist()]
    assert {fact["kind"] for fact in seen} == set(synthetic.KINDS)
    assert {fact["colour"] for fact in seen} == set(synthetic.COLOURS)
    assert {fact["pattern"] for fact in seen} == set(synthetic.PATTERNS)
    assert {fact["material"] for fact in seen} == set(synthetic.GLOSS)
    assert {fact["background"] for fact in seen} == set(synthetic.BACKGROUNDS)


@pytest.mark.parametrize("style", list(synthetic.TITLE_STYLES))
def test_titles_are_terse_full_redundant_or_partly_wrong(style):
    rng = np.random.default_rng(0)
    lengths, wrong = [], Counter()
    for _ in range(300):
        fact = synthetic.Facts("mug", "navy", "dotted", "steel", "marble", "Tavi")
        text = synthetic.title(fact, style, rng)
        assert names(text, "mug") and "marble" not in text
        named = {value: names(text, value) for value in ("navy", "dotted", "steel")}
        wrong[sum(not present for present in named.values())] += 1
        lengths.append(len(text.split()))
    if style == synthetic.TERSE:
        assert max(lengths) <= 3 and wrong == {2: 300}  # only the colour and the kind
    elif style == synthetic.WRONG:
        assert wrong == {1: 300}
    else:
        assert wrong == {0: 300}
        assert (min(lengths) > 7) == (style == synthetic.REDUNDANT)


def test_title_styles_have_the_right_frequencies(made):
    redundant = sum(
        sum(words in record["title"] for words in synthetic.EMPTY_WORDS) == 3
        for record in pq.read_table(made).to_pylist()
    )
    assert redundant / COUNT == pytest.approx(synthetic.TITLE_STYLES[synthetic.REDUNDANT], abs=0.08)


def render(**changes):
    fact = synthetic.Facts("plate", "red", "plain", "ceramic", "studio", "Tavi")
    fact = fact.__class__(**(vars(fact) | changes))
    return np.asarray(synthetic.render(fact, np.random.default_rng(5)), np.float64)


def test_a_picture_shows_its_facts():
    plain = render()
    assert plain.shape == (synthetic.PIXELS, synthetic.PIXELS, 3)
    middle = slice(synthetic.PIXELS * 3 // 8, synthetic.PIXELS * 5 // 8)
    # In the middle of the plate, the colour is that of the product, apart from shading.
    for name, rgb in synthetic.COLOURS.items():
        seen = render(colour=name)[middle, middle].mean((0, 1))
        others = {other: np.abs(seen - value).sum() for other, value in synthetic.COLOURS.items()}
        assert others[name] < 90 and np.abs(seen - rgb).max() < 60
    # Every other attribute changes the picture: pattern and material the product, the background its surroundings.
    for pattern in synthetic.PATTERNS[1:]:
        assert np.abs(render(pattern=pattern) - plain)[middle, middle].mean() > 4, pattern
    corner = slice(0, synthetic.PIXELS * 3 // 40)
    for background in synthetic.BACKGROUNDS[1:]:
        other = render(background=background)
        assert np.abs(other - plain)[corner, corner].mean() > 4, background
    for material in ("steel", "glass", "wood"):
        assert np.abs(render(material=material) - plain)[middle, middle].mean() > 4, material


@pytest.mark.parametrize("kind", list(synthetic.KINDS))
def test_the_whole_product_is_visible(kind):
    """It covers a reasonable part of the picture and keeps away from the border."""
    with_it = render(kind=kind, colour="black")
    shape = np.abs(with_it - render(kind=kind, colour="yellow")).sum(-1) > 60
    assert 0.06 < shape.mean() < 0.75
    assert shape[0].mean() < 0.1 and shape[-1].mean() < 0.1 and shape[:, 0].mean() < 0.1


def test_pictures_are_jpeg(made):
    record = pq.read_table(made).slice(0, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(record["images"][0]["bytes"]))
    assert image.format == "JPEG" and image.size == (synthetic.PIXELS, synthetic.PIXELS)
