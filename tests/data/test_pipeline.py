"""Batch = f(seed, step), independent of earlier reads and of the number of threads."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from moon_jax.data import pipeline, records, rows
from moon_jax.errors import UserError
from moon_jax.ingest import prepare
from moon_jax.types import VIEWS, Product, Triplet
from tests.conftest import prepared_from, tiny


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_a_batch_depends_only_on_seed_and_step(prepared, tokenizer, catalogue):
    reader = pipeline.Reader(tiny(data__path=str(catalogue)), tokenizer)
    dataset = pipeline.batches(prepared, reader)
    straight = [batch for batch, _ in zip(pipeline.from_step(dataset, 0, 1), range(20), strict=False)]
    for step in (17, 3, 0):  # random access, also beyond the end of the epoch
        assert equal(dataset[step], straight[step])
    resumed = pipeline.from_step(pipeline.batches(prepared, reader), 12, 4)
    assert all(equal(next(resumed), batch) for batch in straight[12:20])
    assert not equal(straight[0], straight[1])
    other = pipeline.batches(prepared, pipeline.Reader(tiny(data__path=str(catalogue), seed=1), tokenizer))
    assert not equal(other[0], straight[0])


def test_an_epoch_sees_every_triplet_once_and_the_next_differs(prepared, tokenizer):
    count = len(prepared.triplets)
    dataset = pipeline.batches(prepared, pipeline.Reader(tiny(data__batch=1), tokenizer))
    epochs = [[int(dataset[step].triplet[0]) for step in range(e * count, (e + 1) * count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    assert epochs[0] != epochs[1]


def test_rows_hold_queries_then_positives_then_negatives(prepared, tokenizer):
    config = tiny()
    batch = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))[0]
    size = config.data.batch
    for b in range(size):
        triplet = prepared.triplets[batch.triplet[b]]
        assert [batch.product[role * size + b] for role in range(3)] == list(triplet[:3])
        for role in range(3):
            row, product = role * size + b, prepared.products[triplet[role]]
            has = [bool(product.text), bool(product.images), bool(product.text and product.images)]
            assert (batch.rows.view[row] > 0).tolist() == has
            assert batch.group[row] == prepared.group[triplet[role]]
    assert batch.rows.patches.dtype == np.uint8


def test_a_template_surrounds_every_view_of_a_batch(prepared, tokenizer):
    config = tiny(data__template="<|image_pad|>{}<|vision_end|>")
    batch = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))[0]
    packed, ends = batch.rows, (tokenizer.image_pad, tokenizer.vision_end)
    for r, slot in zip(*np.nonzero(packed.view), strict=True):
        first, stop = packed.span[r, slot]
        assert (packed.tokens[r, first], packed.tokens[r, stop - 1]) == ends
        assert packed.visual[r, first] == -1
    assert (packed.view > 0).sum() > 3 * config.data.batch


def test_queries_are_altered_and_products_are_not(prepared, tokenizer):
    config = tiny()
    batch = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))[0]
    size = config.data.batch
    reader = pipeline.Reader(config, tokenizer)
    changed = 0
    for b in range(size):
        product = prepared.products[batch.product[size + b]]
        text = tokenizer.encode([product.text], config.data.text_tokens)[0] if product.text else np.zeros(0)
        start, stop = batch.rows.span[size + b, 0]
        np.testing.assert_array_equal(batch.rows.tokens[size + b, start:stop], text)
        if product.images:
            plain = reader.image(product.images[0], None, None).pixels
            np.testing.assert_array_equal(batch.rows.patches[size + b, : len(plain)], plain)
        changed += not np.array_equal(batch.rows.patches[b], batch.rows.patches[size + b])
    assert changed > size // 2
    shorter = (batch.rows.tokens[:size] != tokenizer.pad).sum() < (
        batch.rows.tokens[size : 2 * size] != tokenizer.pad
    ).sum()
    assert shorter  # words were dropped


def test_queries_of_people_are_left_as_they_are(prepared, tokenizer):
    """In a batch where half of the queries are products and half were written or photographed for one."""
    product = next(t.positive for t in prepared.triplets if prepared.products[t.positive].text)
    asked = next(prepared.products[n] for n in prepared.train if n != product and len(prepared.products[n].images) == 1)
    query = len(prepared.products)  # a record after all products
    prepared = dataclasses.replace(
        prepared, products=[*prepared.products, asked], group=np.append(prepared.group, np.int32(-1))
    )
    both = [Triplet(query, product, None), Triplet(product, product, None)]
    config = tiny(data__batch=8, data__keep_word=0.1, data__crop=(0.3, 0.5), data__flip=1.0)
    reader = pipeline.Reader(config, tokenizer)
    batch = pipeline.batches(dataclasses.replace(prepared, triplets=both), reader)[0]
    plain = rows.pack([[reader.read(prepared.products[query], VIEWS)]], rows.Layout.of(config), tokenizer.pad)
    own = batch.product[:8] == query
    assert own.sum() == 4
    for row in range(8):
        same = np.array_equal(batch.rows.tokens[row], plain.tokens[0])
        same &= np.array_equal(batch.rows.patches[row], plain.patches[0])
        assert same == own[row]


def test_a_product_as_a_query_is_altered_whatever_was_bought_for_it(prepared, tokenizer):
    """Otherwise a model would know the corrupted purchases of the ablation by their whole titles."""
    query = next(n for n in prepared.train if prepared.products[n].images and " " in prepared.products[n].text)
    wrong = [Triplet(query, n, None) for n in prepared.train if n != query]
    config = tiny(data__batch=8, data__keep_word=0.1, data__crop=(0.3, 0.5), data__flip=1.0)
    reader = pipeline.Reader(config, tokenizer)
    batch = pipeline.batches(dataclasses.replace(prepared, triplets=wrong), reader)[0]
    plain = rows.pack([[reader.read(prepared.products[query], VIEWS)]], rows.Layout.of(config), tokenizer.pad)
    assert (batch.product[:8] == query).all()
    for row in range(8):
        assert not np.array_equal(batch.rows.tokens[row], plain.tokens[0])
        assert not np.array_equal(batch.rows.patches[row], plain.patches[0])


def test_known_positives_of_a_query_are_listed(prepared, tokenizer):
    """By title, without those that the own positive masks anyway."""
    titled = [n for n in prepared.train if prepared.group[n] >= 0]
    a, b, c, d = [titled[n] for n in np.unique(prepared.group[titled], return_index=True)[1]][:4]
    wanted = [Triplet(a, b, d), Triplet(a, c, d), Triplet(d, c, a), Triplet(d, b, None)]
    data = dataclasses.replace(prepared, triplets=wanted)
    size = 8
    batch = pipeline.batches(data, pipeline.Reader(tiny(data__batch=size), tokenizer))[0]
    items = batch.product[size:]
    for row in range(size):
        query, own = batch.product[row], items[row]
        further = {a: {b, c}, d: {b, c}}[query] - {own}
        expected = [n for n, item in enumerate(items) if item in further]
        bits = np.unpackbits(batch.known[row], bitorder="little")
        assert expected and np.flatnonzero(bits).tolist() == expected
    none = pipeline.batches(prepared, pipeline.Reader(tiny(), tokenizer))[0]
    assert not none.known.any()  # each product is the query of itself alone


def test_all_known_positives_of_a_query_are_listed(prepared, tokenizer):
    """Also if one query wants everything: a bounded list had left most of a batch as its negatives."""
    titled = [n for n in prepared.train if prepared.group[n] >= 0]
    wanted = [Triplet(titled[0], n, None) for n in titled]
    data = dataclasses.replace(prepared, triplets=wanted)
    size = len(wanted)
    batch = pipeline.batches(data, pipeline.Reader(tiny(data__batch=size), tokenizer))[0]
    group = batch.group[size : 2 * size]
    bits = np.unpackbits(batch.known, axis=1, count=2 * size, bitorder="little")
    np.testing.assert_array_equal(bits[:, :size], group[:, None] != group[None])
    assert not bits[:, size:].any() and size > 33


def test_rows_are_fitted_to_what_the_catalogue_needs(prepared, tokenizer):
    """To 98% of the texts, counted by hand, and to the largest image; never above the config's limits."""
    config = tiny(data__text_tokens=40, data__visual_tokens=30)
    reader = pipeline.Reader(config, tokenizer)
    found = pipeline.fitted(config, prepared, reader)
    members = {index for triplet in prepared.triplets for index in triplet[:3] if index is not None}
    products = [prepared.products[index] for index in sorted(members)]
    lengths = sorted([1, *(len(tokenizer.encode([p.text], 40)[0]) for p in products if p.text)])
    assert sum(length <= found.data.text_tokens for length in lengths) >= 0.98 * len(lengths)
    assert sum(length <= found.data.text_tokens - 1 for length in lengths) < len(lengths)
    merged = config.vision.merge**2
    sizes = [len(reader.image(p.images[0], None, None).pixels) // merged for p in products if p.images]
    assert found.data.visual_tokens == max(sizes) < 30
    # The same pixels as by the limits, in shorter rows.
    whole, short = (pipeline.batches(prepared, pipeline.Reader(c, tokenizer))[0] for c in (config, found))
    assert short.rows.tokens.shape[1] < whole.rows.tokens.shape[1]
    for row in range(config.data.batch, 3 * config.data.batch):
        count = (short.rows.patch_image[row] >= 0).sum()
        assert count == (whole.rows.patch_image[row] >= 0).sum()
        np.testing.assert_array_equal(short.rows.patches[row, :count], whole.rows.patches[row, :count])
    limited = tiny(data__text_tokens=2, data__visual_tokens=config.data.min_visual_tokens)
    assert pipeline.fitted(limited, prepared, pipeline.Reader(limited, tokenizer)) == limited


@pytest.mark.parametrize("augmented", ["drawn", "all"])
def test_fitted_rows_hold_98_percent_of_the_texts(prepared, tokenizer, augmented):
    """Titles of 1 to 100 words; with `all`, each beside its enriched title."""
    products = [Product(text=" ".join(["red"] * n), enriched_texts=("blue " * n,), id=str(n)) for n in range(1, 101)]
    data = dataclasses.replace(
        prepared,
        products=products,
        group=np.arange(100, dtype=np.int32),
        triplets=[Triplet(n, n, None) for n in range(100)],
        train=range(100),
        val=range(100),
    )
    config = tiny(data__text_tokens=1000, data__augmented=augmented)
    reader = pipeline.Reader(config, tokenizer)
    length = lambda text: len(tokenizer.encode([text], 1000)[0])  # noqa: E731
    texts = [text for p in products for text in (p.text, *p.enriched_texts)]
    if augmented == "all":
        texts = [f"{p.text} {p.enriched_texts[0]}" for p in products]
    lengths = sorted(map(length, texts))
    found = pipeline.fitted(config, data, reader).data.text_tokens
    assert lengths[round(0.97 * len(lengths))] <= found <= lengths[round(0.98 * len(lengths))] < lengths[-1]


def test_some_backgrounds_of_queries_are_replaced(prepared, tokenizer):
    """A quarter of them; products keep theirs."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[8:24, 8:24] = 30
    lone = dataclasses.replace(
        prepared,
        products=[Product(text="a b c", images=(Image.fromarray(pixels),), id="x")],
        group=np.array([0]),
        triplets=[Triplet(0, 0, None)],
    )
    config = tiny(data__batch=256, data__flip=0.0, data__background=0.25, data__crop=(1.0, 1.0))
    batch = pipeline.batches(lone, pipeline.Reader(config, tokenizer))[0]
    white = batch.rows.patches[:, 0].mean(1) > 250
    assert white[256:512].all() and 0.14 < 1 - white[:256].mean() < 0.36


def test_further_negatives_follow_the_first(prepared, tokenizer):
    more = np.arange(2 * len(prepared.triplets), dtype=np.int32).reshape(-1, 2) % len(prepared.train)
    more[::3, 1] = -1
    config = tiny(data__negatives=3)
    size = config.data.batch
    data = dataclasses.replace(prepared, negatives=more)
    batch = pipeline.batches(data, pipeline.Reader(config, tokenizer))[0]
    assert batch.rows.view.shape[0] == len(batch.product) == 5 * size
    for b in range(size):
        found = batch.product[b::size].tolist()
        first = prepared.triplets[batch.triplet[b]].negative
        assert found[2:] == [first, *more[batch.triplet[b]].tolist()]
        assert (batch.rows.view[b::size].any(1) == (np.array(found) >= 0)).all()
    for lacking, count in ((data, 4), (prepared, 2)):
        with pytest.raises(UserError, match=rf"data.negatives: {count}, but the data have {count - 1} per triplet"):
            pipeline.batches(lacking, pipeline.Reader(tiny(data__negatives=count), tokenizer))


def test_flipping_image_sampling_and_weights(prepared, tokenizer):
    """Each of a product's three images is drawn, half of the query images are flipped, and weights reach the batch."""
    picture = np.zeros((32, 32, 3), np.uint8)  # a size that is not resized
    picture[:, :16] = 255  # bright on the left
    images = tuple(Image.fromarray(picture // dim) for dim in (1, 2, 4))
    lone = dataclasses.replace(
        prepared,
        products=[Product(text="a b c", images=images, id="x")],
        group=np.array([0]),
        triplets=[Triplet(0, 0, None, 0.25)],
    )
    config = tiny(data__batch=64, data__flip=0.5, data__background=0.0)
    batch = pipeline.batches(lone, pipeline.Reader(config, tokenizer))[0]
    np.testing.assert_array_equal(batch.weight, np.full(64, 0.25))
    brightest = batch.rows.patches[64:128].reshape(64, -1).max(1)
    assert set(brightest.tolist()) == {255, 127, 63}
    # The first patch is at the upper left: dark if the image was flipped.
    flipped = (batch.rows.patches[:64, 0].mean(1) < 20).sum()
    assert 16 < flipped < 48 and (batch.rows.patches[64:128, 0].mean(1) > 20).all()


def test_a_missing_negative_is_an_empty_row(prepared, tokenizer):
    lonely = dataclasses.replace(prepared, triplets=[t._replace(negative=None) for t in prepared.triplets])
    batch = pipeline.batches(lonely, pipeline.Reader(tiny(), tokenizer))[0]
    assert (batch.rows.view[16:] == 0).all() and (batch.product[16:] == -1).all() and (batch.group[16:] == -1).all()
    assert (batch.rows.segment[16:] == 0).all()


def test_records_are_read_in_batches_in_any_order(catalogue, tmp_path, monkeypatch):
    """From several shards, with repetitions, negative indices, and an empty list."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 5_000)
    found = prepared_from(catalogue, tmp_path / "p").products
    assert len(found.shards) > 5
    indices = [41, 3, 3, 0, len(found) - 1, 17, -1, 3]
    assert [product.id for product in found.read_many(indices)] == [found[index].id for index in indices]
    assert found.read_many([]) == [] and records.read_many(list(found), indices) == found.read_many(indices)
    for wrong in (len(found), -len(found) - 1):
        with pytest.raises(IndexError):
            found.read_many([0, wrong])
    path = tmp_path / "p" / found.shards[3].file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{path.name}: damaged"):
        type(found)(found.folder, found.shards).read_many(range(len(found)))


def test_a_mixture_draws_one_view_per_query(prepared, tokenizer):
    """It is drawn from the query's views by their weights and depends only on the step; products keep all views."""
    config = tiny(data__mixture=(3.0, 12.0, 2.0))
    dataset = pipeline.batches(prepared, pipeline.Reader(config, tokenizer))
    whole = pipeline.batches(prepared, pipeline.Reader(tiny(), tokenizer))
    size, drawn = config.data.batch, []
    for step in range(40):
        mixed, joint = dataset[step].rows.view > 0, whole[step].rows.view > 0
        np.testing.assert_array_equal(mixed[size:], joint[size:])
        assert (mixed[:size].sum(1) == joint[:size].any(1)).all() and not (mixed & ~joint).any()
        drawn.append(mixed[:size][joint[:size].all(1)])
    shares = np.concatenate(drawn).mean(0)
    np.testing.assert_allclose(shares, np.array([3, 12, 2]) / 17, atol=0.08)
    assert equal(dataset[3], pipeline.batches(prepared, pipeline.Reader(config, tokenizer))[3])


def test_a_mixture_gives_no_view_if_the_query_has_none_of_them():
    rng = np.random.default_rng(0)
    assert pipeline.draw_view(False, True, (1.0, 0.0, 0.0), rng) == ()
    assert pipeline.draw_view(False, True, (1.0, 1.0, 1.0), rng) == ("i",)
