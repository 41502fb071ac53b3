"""The encoder against transformers' Qwen3-VL and Qwen3-VL-MoE on random weights, in float32.

Values of every view's hidden states, and gradients of the whole. torch and transformers are the reference only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax.data import rows as rows_lib
from moon_jax.data.images import ResizeRule, patchify
from moon_jax.hub import keys
from moon_jax.model.encoder import Encoder
from tests.conftest import tiny

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[hf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")

VOCAB, PAD_ID, IMAGE, START, END = 300, 0, 3, 1, 2


class Ids:
    """What packing needs of a tokenizer."""

    pad, image_pad, vision_start, vision_end = PAD_ID, IMAGE, START, END


CASES = {
    "dense": tiny(experts__count=0),
    "experts in all layers": tiny(language__layers=3, vision__depth=3, vision__deepstack=(0, 2)),
    "experts in every second layer": tiny(
        language__layers=4, experts__every=2, vision__depth=3, vision__deepstack=(0, 1, 2)
    ),
    "one kv head, wide heads, no deepstack": tiny(
        language__kv_heads=1, language__head_dim=24, language__rope_sections=(6, 3, 3), vision__deepstack=()
    ),
    "all kv heads, K = 1": tiny(language__kv_heads=4, experts__per_token=1),
}


def reference(config, seed=0):
    """A transformers model of the config with random weights (the router's too: it would start at zero)."""
    import transformers
    from transformers.models.qwen3_vl import modeling_qwen3_vl
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

    c, v = config.language, config.vision
    text = dict(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_parameters=dict(
            rope_type="default", rope_theta=c.rope_theta, mrope_section=list(c.rope_sections), mrope_interleaved=True
        ),
    )
    vision = dict(
        depth=v.depth,
        hidden_size=v.width,
        intermediate_size=v.mlp_width,
        num_heads=v.heads,
        patch_size=v.patch,
        temporal_patch_size=v.temporal,
        spatial_merge_size=v.merge,
        out_hidden_size=c.width,
        num_position_embeddings=v.positions,
        deepstack_visual_indexes=list(v.deepstack),
    )
    tokens = dict(image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, video_token_id=299)
    if config.experts.count:
        text |= dict(
            num_experts=config.experts.count,
            num_experts_per_tok=config.experts.per_token,
            moe_intermediate_size=config.experts.width,
            norm_topk_prob=True,
            decoder_sparse_step=config.experts.every,
            mlp_only_layers=[],
        )
        kind, module = transformers.Qwen3VLMoeConfig, modeling_qwen3_vl_moe.Qwen3VLMoeModel
    else:
        kind, module = transformers.Qwen3VLConfig, modeling_qwen3_vl.Qwen3VLModel
    torch.manual_seed(seed)
    model = module(kind(text_config=text, vision_config=vision, **tokens)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Larger than the usual start, so that norms, biases and routing matter.
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model


def our_params(model, config):
    weights = {}
    for name, parameter in model.state_dict().items():
        array = parameter.detach().numpy()
        # transformers holds experts transposed; published checkpoints do not.
        weights[name] = array.transpose(0, 2, 1) if ".experts." in name else array
    params = keys.to_params(weights, config)
    back = keys.from_params(params, config)
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
    return params


def pictures(config, sizes, seed):
    from PIL import Image

    rng = np.random.default_rng(seed)
    rule = ResizeRule.of(config)
    return [patchify(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), rule) for h, w in sizes]


def torch_forward(model, segment, config):
    """Last hidden states of one segment alone, f32[n,D]."""
    inputs = {"input_ids": torch.tensor(segment.tokens[None].astype(np.int64))}
    if segment.images:
        pixels = np.concatenate([image.pixels for image in segment.images]).astype(np.float32) / 127.5 - 1
        side = config.vision.patch
        pixels = np.repeat(pixels.reshape(len(pixels), 3, 1, side, side), config.vision.temporal, axis=2)
        inputs["pixel_values"] = torch.tensor(pixels.reshape(len(pixels), -1))
        inputs["image_grid_thw"] = torch.tensor([[1, *image.hw] for image in segment.images])
        inputs["mm_token_type_ids"] = torch.tensor(segment.is_visual[None].astype(np.int32))
    return model(**inputs).last_hidden_state[0]


@pytest.mark.parametrize("name", CASES)
def test_views_and_gradients_equal_transformers(name):
    config = CASES[name]
    model = reference(config)
    params = our_params(model, config)
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(4, 299, n).astype(np.int32)  # noqa: E731
    # Landscape, portrait, square and 1:5 images, none at all, and a text of one token.
    products = [
        (text(5), pictures(config, [(20, 30)], 1)),
        (text(1), pictures(config, [(60, 40)], 2)),
        (None, pictures(config, [(32, 32)], 3)),
        (text(12), []),
        (text(3), pictures(config, [(10, 50)], 4)),
    ]
    segments = [rows_lib.segments(tokens, images, Ids, 2) for tokens, images in products]
    rows = rows_lib.pack([[parts] for parts in segments], rows_lib.Layout.of(config), PAD_ID)
    weights = rng.normal(size=(len(products), 3, config.language.width)).astype(np.float32)

    def ours(params):
        embedding = Encoder(config).apply({"params": params}, rows).embedding
        return (embedding * weights).sum(), embedding

    (_, embedding), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(jax.tree.map(jnp.asarray, params))

    total, seen = 0.0, 0
    for r, parts in enumerate(segments):
        for part in parts:
            hidden = torch_forward(model, part, config)
            for view, start, stop in part.spans:
                slot = ("t", "i", "mm").index(view)
                expected = torch.nn.functional.normalize(hidden[start:stop].mean(0), dim=0)
                np.testing.assert_allclose(embedding[r, slot], expected.detach().numpy(), atol=2e-5)
                total = total + (expected * torch.tensor(weights[r, slot])).sum()
                seen += 1
    assert seen == 3 * 3 + 1 + 1  # three whole products, one lone image, one lone text
    total.backward()
    theirs = {key: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for key, p in model.named_parameters()}
    theirs = {key: g.transpose(0, 2, 1) if ".experts." in key else g for key, g in theirs.items()}
    for key, array in keys.from_params(jax.device_get(gradient), config).items():
        expected = theirs[key]
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(array / scale, expected / scale, atol=5e-4, err_msg=key)


def test_three_images_of_different_size_in_one_product():
    config = tiny(data__images=3)
    model = reference(config)
    images = pictures(config, [(20, 30), (60, 40), (32, 32)], 7)
    (part,) = rows_lib.segments(np.arange(4, 9, dtype=np.int32), images, Ids, 2, ("i", "mm"))
    rows = rows_lib.pack([[[part]]], rows_lib.Layout.of(config), PAD_ID)
    output = jax.jit(Encoder(config).apply)({"params": our_params(model, config)}, rows)
    hidden = torch_forward(model, part, config)
    for view, start, stop in part.spans:
        expected = torch.nn.functional.normalize(hidden[start:stop].mean(0), dim=0).detach().numpy()
        np.testing.assert_allclose(output.embedding[0, ("t", "i", "mm").index(view)], expected, atol=2e-5)


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (224, 224), (30, 150), (37, 91), (5, 7), (300, 41)])
def test_pixels_equal_the_image_processor(size):
    """Resized sizes and pixel values of Qwen's own processor, wherever its rule keeps to the budget."""
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    config = tiny(data__visual_tokens=40, data__min_visual_tokens=4, vision__patch=16)
    rule = ResizeRule.of(config)
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
    for frame in range(2):
        found = ours.pixels.astype(np.float32).reshape(-1, 3, 16, 16) / 127.5 - 1
        np.testing.assert_allclose(found, frames[:, :, frame], atol=1e-6)
