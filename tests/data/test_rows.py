"""Packing and its guarantees: packed rows give the same results as separate rows, and view i is a prefix of mm."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from moon_jax.data import rows as rows_lib
from moon_jax.data.images import ResizeRule, patchify
from moon_jax.data.text import Template
from moon_jax.model.encoder import Encoder, composition, initialize
from moon_jax.types import VIEWS
from tests.conftest import but_slow, tiny


class Ids:
    pad, image_pad, vision_start, vision_end = 0, 3, 1, 2


def example(config, seed=0):
    """Token ids and images of four products: both, text only, image only, both."""
    rng = np.random.default_rng(seed)
    rule = ResizeRule.of(config)
    images = [
        patchify(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), rule)
        for h, w in ((20, 30), (40, 20), (24, 24))
    ]
    texts = [rng.integers(4, 290, n).astype(np.int32) for n in (5, 12, 3)]
    return [(texts[0], images[:1]), (texts[1], []), (None, images[1:2]), (texts[2], images[2:])]


MODELS = {
    "dense": dict(experts__count=0),
    "experts": dict(experts__count=4),
    "a learned router term": dict(experts__count=4, experts__router_term="learned"),
    "a hard router term": dict(experts__count=4, experts__router_term="hard", experts__per_token=1),
}


def split(config, text, images):
    return rows_lib.segments(text, images, Ids, 2, router_term=config.experts.router_term)


@pytest.fixture(scope="module", params=but_slow(MODELS, ["experts"]))
def model(request):
    config = tiny(**MODELS[request.param])
    rows = rows_lib.pack([[]], rows_lib.Layout.of(config), 0)
    params = nn.unbox(jax.jit(lambda: initialize(config, jax.random.key(1), rows))())
    # Larger weights than at initialization, so that tokens differ and routing is decisive.
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    if config.experts.router_term == "learned":
        term = params["decoder"]["periods"]["layer_0"]["experts"]["router_term"]
        assert term.shape == (2, 3, 4) and not term.any()  # it has no effect at initialization
        term = np.random.default_rng(0).normal(size=term.shape).astype(np.float32)
        params["decoder"]["periods"]["layer_0"]["experts"]["router_term"] = term
    return config, lambda rows: jax.jit(Encoder(config).apply)({"params": params}, rows)


def layout(config, products, lengths=1):
    base = rows_lib.Layout.of(config)
    return rows_lib.Layout(
        length=base.length * lengths,
        patches=base.patches * products,
        images=base.images * products,
        products=products,
        patch_width=base.patch_width,
        merge=base.merge,
    )


def test_packed_rows_equal_separate_ones(model):
    config, encode = model
    parts = [split(config, text, images) for text, images in example(config)]
    alone = encode(rows_lib.pack([[p] for p in parts], layout(config, 1), 0))
    together = encode(rows_lib.pack([parts], layout(config, 4, 4), 0))
    for product in range(4):
        slots = slice(3 * product, 3 * product + 3)
        np.testing.assert_allclose(together.embedding[0, slots], alone.embedding[product], atol=1e-5)
        np.testing.assert_array_equal(together.tokens[0, slots], alone.tokens[product])
        np.testing.assert_allclose(together.gate[:, 0, slots], alone.gate[:, product], atol=1e-4)
    # The router's sums cover the same tokens in either packing.
    assert int(together.valid) == int(alone.valid) == sum(len(p.tokens) for part in parts for p in part)
    np.testing.assert_allclose(together.load, alone.load)
    np.testing.assert_allclose(together.prob, alone.prob, rtol=1e-5)
    if config.experts.count:
        np.testing.assert_allclose(alone.load.sum(1), config.experts.per_token * int(alone.valid))


def test_image_prefix_equals_an_image_only_row(model):
    config, encode = model
    text, images = example(config)[0]
    parts, image_parts = split(config, text, images), split(config, None, images)
    assert len(parts) == (2 if config.experts.router_term == "none" else 3)
    whole = encode(rows_lib.pack([[parts]], layout(config, 1), 0))
    lone = encode(rows_lib.pack([[image_parts]], layout(config, 1), 0))
    np.testing.assert_allclose(whole.embedding[0, 1], lone.embedding[0, 1], atol=1e-5)
    assert np.abs(whole.embedding[0, 1] - whole.embedding[0, 2]).max() > 1e-2
    np.testing.assert_array_equal(lone.embedding[0, [0, 2]], np.zeros((2, config.language.width)))


def test_a_router_term_depends_on_the_view(model):
    """Tokens know the view of their segment; with a hard term they are routed only to the experts of that view."""
    config, encode = model
    text, images = example(config)[0]
    rows = rows_lib.pack([[split(config, text, images)]], layout(config, 1), 0)
    seen = np.asarray(composition(rows))[0]
    spans = rows.span[0]
    if config.experts.router_term == "none":
        assert seen[spans[1][0] : spans[2][1]].tolist() == [3] * (spans[2][1] - spans[2][0])  # i is a prefix of mm
        return
    for view, (start, stop) in enumerate(spans, 1):
        assert (seen[start:stop] == view).all()
    assert (seen[spans.max() :] == 0).all()
    gate = np.asarray(encode(rows).gate)[:, 0]  # [L,G,E]
    if config.experts.router_term == "hard":
        for view in range(3):
            assert (gate[:, view] > 0)[:, np.arange(4) % 3 != view].sum() == 0 and gate[:, view].sum() > 0


def test_a_neighbour_in_the_row_has_no_effect(model):
    config, encode = model
    parts = [split(config, text, images) for text, images in example(config)]
    other = [split(config, text, images) for text, images in example(config, seed=9)]
    a = encode(rows_lib.pack([[parts[0], parts[3]]], layout(config, 2, 2), 0))
    b = encode(rows_lib.pack([[parts[0], other[3]]], layout(config, 2, 2), 0))
    np.testing.assert_allclose(a.embedding[0, :3], b.embedding[0, :3], atol=1e-5)
    assert np.abs(a.embedding[0, 3:] - b.embedding[0, 3:]).max() > 1e-2


def test_a_row_written_out():
    config = tiny()
    image = rows_lib.Patches(
        np.arange(6 * 4 * 192, dtype=np.uint8).reshape(24, 192), np.zeros((24, 2), np.int32), (4, 6)
    )
    parts = rows_lib.segments(np.array([7, 8], np.int32), [image], Ids, 2)
    rows = rows_lib.pack([[parts]], rows_lib.Layout.of(config), 0)
    # text (2), then start, 2 x 3 visual tokens, end, text (2)
    assert list(rows.tokens[0, :12]) == [7, 8, 1, 3, 3, 3, 3, 3, 3, 2, 7, 8]
    assert list(rows.segment[0, :13]) == [1, 1] + [2] * 10 + [0]
    assert list(rows.visual[0, :12]) == [-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert rows.span[0].tolist() == [[0, 2], [2, 10], [2, 12]] and rows.view[0].tolist() == [1, 2, 3]
    assert rows.owner[0].tolist() == [0, 0, 0]
    # As in Qwen3-VL: the grid starts after the start token and advances the position by its longer side (3).
    assert rows.position[0, 2:12].tolist() == [
        [0, 0, 0],
        *[[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3]],
        [4, 4, 4],
        [5, 5, 5],
        [6, 6, 6],
    ]


def test_a_template_written_out():
    """Without a suffix, i is a prefix of mm; with one, i has its own segment with the same visual tokens."""
    image = rows_lib.Patches(np.zeros((8, 192), np.uint8), np.zeros((8, 2), np.int32), (2, 4))
    text = np.array([7, 8], np.int32)
    before = Template(np.array([50, 51], np.int32), np.zeros(0, np.int32))
    around = Template(np.array([50, 51], np.int32), np.array([60], np.int32))

    rows = rows_lib.pack(
        [[rows_lib.segments(text, [image], Ids, 2, template=before)]], rows_lib.Layout.of(tiny(), before), 0
    )
    assert list(rows.tokens[0, :13]) == [50, 51, 7, 8, 50, 51, 1, 3, 3, 2, 7, 8, 0]
    assert rows.span[0].tolist() == [[0, 4], [4, 10], [4, 12]]
    assert rows.position[0, 4:12, 2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    rows = rows_lib.pack(
        [[rows_lib.segments(text, [image], Ids, 2, template=around)]], rows_lib.Layout.of(tiny(), around), 0
    )
    view_t, view_i, view_mm = [50, 51, 7, 8, 60], [50, 51, 1, 3, 3, 2, 60], [50, 51, 1, 3, 3, 2, 7, 8, 60]
    assert list(rows.tokens[0, :22]) == [*view_t, *view_i, *view_mm, 0]
    assert list(rows.segment[0, :22]) == [1] * 5 + [2] * 7 + [3] * 9 + [0]
    assert rows.span[0].tolist() == [[0, 5], [5, 12], [12, 21]]
    assert rows.visual[0, 5:21].tolist() == [-1, -1, -1, 0, 1, -1, -1, -1, -1, -1, 0, 1, -1, -1, -1, -1]
    assert (rows.patch_image[0] >= 0).sum() == 8 and rows.image_hw[0].tolist() == [[2, 4]]


@pytest.mark.parametrize("suffix", [0, 1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_the_largest_product_fits_the_layout_exactly(suffix, images):
    config = tiny(data__images=images)
    template = Template(np.full(4, 50, np.int32), np.full(suffix, 60, np.int32))
    side = (2, 2 * config.data.visual_tokens)
    image = lambda: rows_lib.Patches(np.zeros((24, 192), np.uint8), np.zeros((24, 2), np.int32), side)  # noqa: E731
    text = np.arange(config.data.text_tokens, dtype=np.int32)
    parts = rows_lib.segments(text, [image() for _ in range(images)], Ids, 2, template=template)
    layout = rows_lib.Layout.of(config, template)
    apart = tiny(data__images=images, experts__router_term="learned")
    three = rows_lib.segments(text, parts[-1].images, Ids, 2, template=template, router_term="learned")
    assert sum(len(part.tokens) for part in three) == rows_lib.Layout.of(apart, template).length
    assert sum(len(part.tokens) for part in parts) == layout.length
    rows_lib.pack([[parts]], layout, 0)
    for view in VIEWS:
        (part,) = rows_lib.segments(text, parts[-1].images, Ids, 2, (view,), template)
        assert len(part.tokens) <= rows_lib.Layout.of(config, template, all_views=False).length
        if view == "t":
            assert len(part.tokens) == rows_lib.Layout.of(config, template, with_images=False).length


def test_absent_views_are_absent():
    config = tiny()
    parts = [rows_lib.segments(text, images, Ids, 2) for text, images in example(config)]
    rows = rows_lib.pack([[p] for p in parts], rows_lib.Layout.of(config), 0)
    assert rows.view.tolist() == [[1, 2, 3], [1, 0, 0], [0, 2, 0], [1, 2, 3]]
    assert rows.owner.tolist() == [[0, 0, 0], [1, -1, -1], [-1, 2, -1], [3, 3, 3]]
    assert rows_lib.segments(np.zeros(0, np.int32), [], Ids, 2) == []


def test_rows_that_do_not_fit_are_refused():
    config = tiny()
    parts = rows_lib.segments(np.arange(4, 60, dtype=np.int32), [], Ids, 2)
    with pytest.raises(ValueError, match="row 0: 56 tokens"):
        rows_lib.pack([[parts]], rows_lib.Layout.of(config), 0)
    with pytest.raises(ValueError, match="holds 2 products"):
        rows_lib.pack([[[], []]], rows_lib.Layout.of(config), 0)
