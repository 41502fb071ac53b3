"""The encoder against transformers' Qwen3-VL and Qwen3-VL-MoE on random weights, layer by layer, in float32.

The weights pass through a folder in the published layout and our loader. torch and transformers are used only as the
reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import config as config_lib
from moon_jax.data import rows as rows_lib
from moon_jax.data.images import ResizeRule, patchify
from moon_jax.hub import keys
from moon_jax.model import router
from moon_jax.model.encoder import Encoder
from tests.conftest import but_slow, tiny
from tests.reference import our_params, pictures, published, qwen_tokenizer, torch, torch_inputs

ATOL = 1e-5


def small(**differences):
    return tiny(**{"data__visual_tokens": 24, "data__images": 3, **differences})


# name → (our config, whether the published model ties its embeddings)
CASES = {
    "dense, tied, two query heads per key head": (small(experts__count=0), True),
    "dense, untied, a key head per query head, DeepStack at three depths": (
        small(
            experts__count=0,
            language__kv_heads=4,
            language__layers=4,
            vision__depth=4,
            vision__deepstack=(0, 2, 3),
        ),
        False,
    ),
    "four query heads per key head, heads wider than D/H, no DeepStack, uneven sections": (
        small(
            experts__count=0,
            language__kv_heads=1,
            language__head_dim=24,
            language__rope_sections=(6, 4, 2),
            vision__deepstack=(),
        ),
        True,
    ),
    "experts in every layer": (small(language__layers=3, vision__depth=3, vision__deepstack=(0, 2)), True),
    "experts in every second layer": (
        small(language__layers=4, experts__every=2, vision__depth=3, vision__deepstack=(0, 1, 2)),
        False,
    ),
    "mlp_only_layers": (small(language__layers=3, experts__dense_layers=(1,), experts__per_token=1), True),
    "mlp_only_layers, every second": (
        small(language__layers=4, experts__every=2, experts__dense_layers=(1,), experts__per_token=4),
        True,
    ),
}

# (text tokens, image sizes (height, width)) of the products: square, 3:4, 1:5, 80×60, three different sizes, no image.
PRODUCTS = [
    (5, [(32, 32)]),
    (1, [(40, 30)]),
    (3, [(20, 100)]),
    (7, [(80, 60)]),
    (4, [(100, 20), (32, 32), (37, 61)]),
    (12, []),
]


@pytest.fixture(scope="module")
def tokenizer():
    return qwen_tokenizer()


@pytest.fixture(scope="module")
def case(request, tmp_path_factory, tokenizer):
    """The config, transformers' model, our parameters read from its folder, and segments of products."""
    config, tied = CASES[request.param]
    folder = tmp_path_factory.mktemp("published")
    model = published(folder, config, tokenizer, tied)
    rng = np.random.default_rng(0)
    products = []
    for number, (length, sizes) in enumerate(PRODUCTS):
        tokens = rng.integers(0, 280, length).astype(np.int32)
        images = pictures(config, sizes, number)
        products.append(rows_lib.segments(tokens, images, tokenizer, config.vision.merge))
    return config, model.model, our_params(folder, config, tokenizer), products


def recorded(model, segment, config):
    """Every intermediate of transformers' model for one segment, by name."""
    found, handles = {}, []

    def keep(name):
        def hook(module, inputs, output):
            del module, inputs
            found[name] = output

        return hook

    for name, module in model.named_modules():
        wanted = name.rsplit(".", 1)[-1].isdigit() or name.endswith((".merger", ".gate", "language_model.norm"))
        if wanted:
            handles.append(module.register_forward_hook(keep(name)))

    def positions(module, args, kwargs):
        del module, args
        found["positions"] = kwargs["position_ids"]

    handles.append(model.language_model.register_forward_pre_hook(positions, with_kwargs=True))
    with torch.no_grad():
        found["last"] = model(**torch_inputs(segment, config)).last_hidden_state
    for handle in handles:
        handle.remove()
    return found


def compare(config, model, params, products, tokenizer):
    """Asserts that all intermediates of all segments equal transformers' to 1e-5, and embeddings to a cosine of 1e-6.

    Returns the names of the compared intermediates.
    """
    layout = rows_lib.Layout.of(config).holding(products)
    rows = rows_lib.pack([[parts] for parts in products], layout, tokenizer.pad)
    run = jax.jit(
        lambda p: Encoder(config).apply({"params": p}, rows, capture_intermediates=True, mutable="intermediates")
    )
    output, state = run(params)
    ours = jax.tree.map(np.asarray, state["intermediates"])
    vision, periods = ours["vision"], ours["decoder"]["periods"]
    flat = keys.flatten(jax.tree.map(np.asarray, params))
    period, sparse = config_lib.period(config), config_lib.sparse_layers(config)
    compared = set()

    def close(found, expected, name):
        np.testing.assert_allclose(
            found, expected.detach().numpy().reshape(found.shape), atol=ATOL, rtol=0, err_msg=name
        )
        compared.add(name)

    for r, parts in enumerate(products):
        at = 0
        for part in parts:
            theirs = recorded(model, part, config)
            here = slice(at, at + len(part.tokens))
            at += len(part.tokens)
            if part.images:
                patches = sum(len(image.pixels) for image in part.images)
                tokens = patches // config.vision.merge**2
                for layer in range(config.vision.depth):
                    block = vision["layers"]["block"]["__call__"][0][layer, r, :patches]
                    close(block, theirs[f"visual.blocks.{layer}"], f"vision layer {layer}")
                close(vision["merger"]["__call__"][0][r, :tokens], theirs["visual.merger"], "merger")
                for slot in range(len(config.vision.deepstack)):
                    feature = vision[f"deepstack_{slot}"]["__call__"][0][r, :tokens]
                    close(feature, theirs[f"visual.deepstack_merger_list.{slot}"], f"DeepStack {slot}")
                # Text positions are equal on all three axes; transformers leaves them to its default.
                positions = theirs["positions"][-3:, 0].numpy().T
                np.testing.assert_array_equal(rows.position[r, here], positions)
                compared.add("positions")
            for layer, has_experts in enumerate(sparse):
                number, position = divmod(layer, period)
                found = periods[f"layer_{position}"]
                close(
                    found["__call__"][0][0][number, r, here],
                    theirs[f"language_model.layers.{layer}"],
                    f"decoder layer {layer}",
                )
                if has_experts:
                    kernel = flat[f"decoder/periods/layer_{position}/experts/router"][number]
                    hidden = found["post_attention_norm"]["__call__"][0][number, r, here]
                    routing = router.route(jnp.asarray(hidden), jnp.asarray(kernel), config.experts.per_token)
                    _, gates, chosen = theirs[f"language_model.layers.{layer}.mlp.gate"]
                    np.testing.assert_array_equal(np.sort(routing.index, -1), np.sort(chosen.numpy(), -1))
                    close(np.take_along_axis(np.asarray(routing.gate), chosen.numpy(), 1), gates, f"router {layer}")
            close(ours["decoder"]["norm"]["__call__"][0][r, here], theirs["last"], "last hidden states")
            for view, start, stop in part.spans:
                pooled = theirs["last"][0, start:stop].mean(0)
                slot = ("t", "i", "mm").index(view)
                mean = torch.nn.functional.normalize(pooled, dim=0)
                close(np.asarray(output.embedding[r, slot]), mean, f"embedding {view}")
                cosine = torch.nn.functional.cosine_similarity(
                    torch.tensor(np.asarray(output.embedding[r, slot])), pooled, 0
                )
                assert cosine >= 1 - 1e-6
    return compared


@pytest.mark.parametrize("case", but_slow(CASES, ["experts in every layer"]), indirect=True)
def test_every_layer_equals_transformers(case, tokenizer):
    config = case[0]
    compared = compare(*case, tokenizer)
    expected = {f"vision layer {layer}" for layer in range(config.vision.depth)}
    expected |= {f"DeepStack {slot}" for slot in range(len(config.vision.deepstack))}
    expected |= {f"decoder layer {layer}" for layer in range(config.language.layers)}
    expected |= {f"router {layer}" for layer, sparse in enumerate(config_lib.sparse_layers(config)) if sparse}
    expected |= {"merger", "positions", "last hidden states", "embedding t", "embedding i", "embedding mm"}
    assert compared == expected


def wrong_sections(config, params, products):
    first, second, third = config.language.rope_sections
    return config_lib.replace(config, {"language.rope_sections": (first + 1, second - 1, third)}), params, products


def dropped_deepstack(config, params, products):
    params["vision"]["deepstack_1"]["fc2"] = jax.tree.map(jnp.zeros_like, params["vision"]["deepstack_1"]["fc2"])
    return config, params, products


def swapped_halves(config, params, products):
    experts = params["decoder"]["periods"]["layer_0"]["experts"]
    experts["gate_up"] = jnp.flip(experts["gate_up"], axis=-3)
    return config, params, products


def shifted_patches(config, params, products):
    def shift(part):
        images = tuple(rows_lib.Patches(np.roll(image.pixels, 1, axis=0), image.yx, image.hw) for image in part.images)
        return rows_lib.Segment(part.tokens, part.position, part.is_visual, images, part.spans)

    # transformers gets the patches in order, we get them shifted.
    return config, params, [[shift(part) for part in parts] for parts in products]


@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        (wrong_sections, "decoder layer 0"),
        (dropped_deepstack, "DeepStack 1"),
        (swapped_halves, "decoder layer 0"),
        (shifted_patches, "vision layer 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("case", ["experts in every layer"], indirect=True)
def test_the_comparison_detects_a_mistake(case, tokenizer, mistake, where, monkeypatch):
    """A wrong M-RoPE section, a dropped DeepStack feature, swapped gate and up, patches out of order."""
    config, model, params, products = case
    products = products[:1]
    compare(config, model, params, products, tokenizer)
    wrong_config, wrong_params, wrong_products = mistake(config, jax.tree.map(lambda leaf: leaf, params), products)
    plain = torch_inputs
    monkeypatch.setattr(
        "tests.model.test_parity.torch_inputs",
        lambda segment, c: plain(
            next(p for parts in products for p in parts if np.array_equal(p.tokens, segment.tokens)), c
        ),
    )
    with pytest.raises(AssertionError, match=where):
        compare(wrong_config, model, wrong_params, wrong_products, tokenizer)


@pytest.mark.parametrize(
    "case",
    but_slow(
        ["dense, tied, two query heads per key head", "experts in every layer", "experts in every second layer"],
        ["experts in every layer"],
    ),
    indirect=True,
)
def test_gradients_equal_transformers(case, tokenizer):
    config, model, params, products = case
    rows = rows_lib.pack([[p] for p in products], rows_lib.Layout.of(config).holding(products), tokenizer.pad)
    target = np.random.default_rng(0).normal(size=(len(products), 3, config.language.width)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda p: (Encoder(config).apply({"params": p}, rows).embedding * target).sum()))(
        params
    )

    total = 0.0
    for r, parts in enumerate(products):
        for part in parts:
            hidden = model(**torch_inputs(part, config)).last_hidden_state[0]
            for view, start, stop in part.spans:
                unit = torch.nn.functional.normalize(hidden[start:stop].mean(0), dim=0)
                total = total + (unit * torch.tensor(target[r, ("t", "i", "mm").index(view)])).sum()
    model.zero_grad()
    total.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = keys.flatten(jax.device_get(gradient))
    for row in keys.table(config):
        leaf = found[row.ours] if row.stack_index is None else found[row.ours][row.stack_index]
        array = keys.to_theirs(leaf, row.transform)
        expected = theirs[row.theirs].numpy()
        expected = expected.transpose(0, 2, 1) if ".experts." in row.theirs else expected
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(array / scale, expected / scale, atol=5e-4, err_msg=row.theirs)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("case", ["dense, tied, two query heads per key head"], indirect=True)
def test_a_template_gives_each_view_its_own_segment(case, tokenizer, pooling):
    """As in Qwen3-VL-Embedding. The images of both segments pass through the tower once."""
    config, model, params, _ = case
    config = config_lib.replace(config, {"language.pooling": pooling, "data.template": "qwen3_vl_embedding"})
    template = tokenizer.template("qwen3_vl_embedding")
    images = pictures(config, [(32, 32), (20, 100)], 3)
    words = tokenizer.encode(["red mug"], 12)[0]
    parts = rows_lib.segments(words, images, tokenizer, config.vision.merge, template=template)
    assert [[span[0] for span in part.spans] for part in parts] == [["t"], ["i"], ["mm"]]
    layout = rows_lib.Layout.of(config, template)
    rows = rows_lib.pack([[parts]], layout, tokenizer.pad)
    assert (rows.patch_image[0] >= 0).sum() == sum(len(image.pixels) for image in images)
    embedding = jax.jit(Encoder(config).apply)({"params": params}, rows).embedding
    for slot, part in enumerate(parts):
        with torch.no_grad():
            hidden = model(**torch_inputs(part, config)).last_hidden_state[0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
        expected = torch.nn.functional.normalize(pooled, dim=0)
        np.testing.assert_allclose(embedding[0, slot], expected.numpy(), atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "size", [(60, 80), (80, 60), (224, 224), (30, 150), (37, 91), (5, 7), (300, 41), (4, 700), (900, 5), (1, 200)]
)
@pytest.mark.parametrize("budget", [(2, 6), (4, 40), (4, 256)])
def test_pixels_equal_the_image_processor(size, budget):
    """Sizes and pixel values equal those of Qwen's own processor, for any aspect ratio and budget."""
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    least, most = budget
    config = tiny(data__visual_tokens=most, data__min_visual_tokens=least, vision__patch=16)
    rule = ResizeRule.of(config, within_budget=False)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor(images=[image], return_tensors="np")
    ours = patchify(image, rule)
    assert list(theirs["image_grid_thw"][0]) == [1, *ours.hw]
    frames = theirs["pixel_values"].reshape(len(ours.pixels), 3, 2, 16, 16)
    found = np.asarray(jnp.asarray(ours.pixels).astype(jnp.float32) / 127.5 - 1.0).reshape(-1, 3, 16, 16)
    for frame in range(2):
        np.testing.assert_allclose(found, frames[:, :, frame], atol=1e-6)
    if most >= 200:  # no aspect ratio exceeds such a budget, so training resizes in the same way
        assert ResizeRule.of(config).size(*size) == rule.size(*size)
