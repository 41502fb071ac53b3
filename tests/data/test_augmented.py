"""Which enriched titles and expanded images training reads, by `data.augmented`; evaluation reads none."""

import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from moon_jax import progress
from moon_jax.data import pipeline
from moon_jax.errors import UserError
from moon_jax.evaluation import report
from moon_jax.serving import embedder as serving
from moon_jax.types import VIEWS, Product, Triplet
from tests.conftest import random_params, tiny


def plain(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


ITEM = Product(
    text="plain red shirt",
    images=(plain(10),),
    id="x",
    enriched_texts=("blue bag",),
    expanded_images=(plain(100), plain(200)),
)


def read(prepared, tokenizer, item=ITEM, **differences):
    """Reads one product as 64 positives; returns their texts, the brightness of their images, and the batch."""
    config = tiny(data__batch=64, **differences)
    lone = dataclasses.replace(prepared, products=[item], group=np.array([0]), triplets=[Triplet(0, 0, 0)])
    batch = pipeline.batches(lone, pipeline.Reader(config, tokenizer))[0]
    texts, pictures = [], []
    for row in range(64, 128):
        first, stop = batch.rows.span[row, VIEWS.index("t")]
        texts.append(tokenizer.base.decode(batch.rows.tokens[row, first:stop]).strip())
        shown = batch.rows.patch_image[row]
        pictures.append(
            tuple(int(batch.rows.patches[row][shown == n].mean()) for n in range(shown.max() + 1) if (shown == n).any())
        )
    return texts, pictures, batch


def test_drawn_reads_one_title_and_one_image_from_all(prepared, tokenizer):
    texts, pictures, batch = read(prepared, tokenizer)
    counted = Counter(texts)
    assert set(counted) == {"plain red shirt", "blue bag"} and 20 < counted["blue bag"] < 44
    shown = Counter(pictures)
    assert set(shown) == {(10,), (100,), (200,)} and min(shown.values()) > 10
    # Negatives are drawn in the same way, but independently.
    assert not np.array_equal(batch.rows.tokens[64:128], batch.rows.tokens[128:])


def test_half_reads_the_own_content_half_of_the_time(prepared, tokenizer):
    texts, pictures, _ = read(prepared, tokenizer, data__augmented="half")
    titles, shown = Counter(texts), Counter(pictures)
    assert set(titles) == {"plain red shirt", "blue bag"} and 20 < titles["blue bag"] < 44
    assert set(shown) == {(10,), (100,), (200,)} and 20 < shown[10,] < 44
    assert len(set(zip(texts, pictures, strict=True))) == 6  # title and photo are drawn independently
    few = dataclasses.replace(ITEM, text=None, images=())
    texts, pictures, _ = read(prepared, tokenizer, few, data__augmented="half")
    assert set(texts) == {"blue bag"} and set(pictures) == {(100,), (200,)}


def test_original_and_augmented_read_one_of_the_two(prepared, tokenizer):
    texts, pictures, _ = read(prepared, tokenizer, data__augmented="original")
    assert set(texts) == {"plain red shirt"} and set(pictures) == {(10,)}
    texts, pictures, _ = read(prepared, tokenizer, data__augmented="augmented")
    assert set(texts) == {"blue bag"} and set(pictures) == {(100,), (200,)}
    bare = dataclasses.replace(ITEM, enriched_texts=(), expanded_images=())
    texts, pictures, _ = read(prepared, tokenizer, bare, data__augmented="augmented")
    assert set(texts) == {"plain red shirt"} and set(pictures) == {(10,)}


def test_all_holds_both_titles_and_all_images_in_one_row(prepared, tokenizer):
    texts, pictures, batch = read(prepared, tokenizer, data__augmented="all", data__images=3)
    assert set(texts) == {"plain red shirt blue bag"} and set(pictures) == {(10, 100, 200)}
    longest = tiny().data.text_tokens
    long = dataclasses.replace(ITEM, text="red shirt " * 30, enriched_texts=("blue bag " * 30,))
    texts, _, wide = read(prepared, tokenizer, long, data__augmented="all", data__images=3)
    first, stop = wide.rows.span[64, VIEWS.index("t")]
    assert stop - first == 2 * longest and "shirt" in texts[0] and "blue" in texts[0]
    assert wide.rows.tokens.shape == batch.rows.tokens.shape
    # If there are more images than fit, each is drawn at some time.
    _, pictures, _ = read(prepared, tokenizer, data__augmented="all", data__images=2)
    assert {len(one) for one in pictures} == {2} and len(set(pictures)) == 3


def test_queries_are_never_augmented(prepared, tokenizer):
    for mode in ("drawn", "augmented", "all"):
        config = tiny(data__batch=64, data__augmented=mode, data__keep_word=1.0)
        lone = dataclasses.replace(prepared, products=[ITEM], group=np.array([0]), triplets=[Triplet(0, 0, 0)])
        rows = pipeline.batches(lone, pipeline.Reader(config, tokenizer))[0].rows
        for row in range(64):
            first, stop = rows.span[row, 0]
            assert tokenizer.base.decode(rows.tokens[row, first:stop]).strip() == "plain red shirt"
            assert rows.patches[row][rows.patch_image[row] >= 0].max() == 10


def test_products_without_augmentation_are_read_as_before(prepared, tokenizer):
    """They use no random numbers, so a run on data without augmentation does not depend on the option."""
    first, other = (
        pipeline.batches(prepared, pipeline.Reader(tiny(data__augmented=mode), tokenizer))[3].rows
        for mode in ("drawn", "original")
    )
    np.testing.assert_array_equal(first.tokens, other.tokens)
    np.testing.assert_array_equal(first.patches, other.patches)


@pytest.mark.parametrize("mode", ["drawn", "half", "original", "augmented", "all"])
@pytest.mark.parametrize("titles", [0, 1, 2])
@pytest.mark.parametrize("own", [0, 1, 3])
@pytest.mark.parametrize("added", [0, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_products_that_need_no_random_numbers_use_none(mode, titles, own, added, images):
    item = Product(text="a", images=(b"i",) * own, enriched_texts=("t",) * titles, expanded_images=(b"e",) * added)
    if not pipeline.needs_rng(item, mode, images):
        first = pipeline.draw_content(item, mode, images, None)
        assert first == pipeline.draw_content(item, mode, images, np.random.default_rng(0))


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"data\.augmented must be drawn, half, original, augmented or all"):
        tiny(data__augmented="both")


@pytest.mark.parametrize("mode", [pytest.param("drawn", marks=pytest.mark.slow), "all"])
def test_evaluation_reads_no_augmented_content(prepared, tokenizer, tmp_path, mode):
    """Every product gets an enriched title that would change its vector and an unreadable expanded image. All scores
    and vectors equal those of the original data."""
    config = tiny(data__augmented=mode)
    embedder = serving.Embedder(config, random_params(config, tokenizer), tokenizer, "f", 1)
    poisoned = dataclasses.replace(
        prepared,
        products=[
            dataclasses.replace(product, enriched_texts=("watch watch watch",), expanded_images=(b"not an image",))
            for product in prepared.products
        ],
    )
    found = []
    for number, data in enumerate((prepared, poisoned)):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        metrics = report.evaluate(embedder, data, workdir, progress.Terminal())
        found.append((metrics, (workdir / "embeddings" / "val.parquet").read_bytes()))
    assert found[0][0]["retrieval"] == found[1][0]["retrieval"] and found[0][0]["labels"] == found[1][0]["labels"]
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(embedder.encode(prepared.products[:9]), embedder.encode(poisoned.products[:9]))
