"""transformers' Qwen3-VL as the reference: random models, in folders with the layout of published checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer

from moon_jax import config as config_lib
from moon_jax.data import text
from moon_jax.data.images import Patches, ResizeRule, patchify
from moon_jax.data.rows import Segment
from moon_jax.hub import folder as folder_lib
from moon_jax.hub import weights
from moon_jax.serving.embedder import abstract_params
from moon_jax.training.checkpoints import on_one_device

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[hf]'")


def _import_torchvision() -> None:
    """Imports torchvision. Its wheel fails to import beside a torch without its operators, and so does transformers.

    No test calls these operators, so declaring them is enough.
    """
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


_KEPT: list[object] = []  # a library's operators disappear when it is collected
_import_torchvision()
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")

# Qwen's: a word may include one character before it, digits are single, line ends close a piece.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer(vocab: int = 300) -> text.Tokenizer:
    """A byte-level BPE that splits like Qwen's, with the special tokens of a chat."""
    base = BaseTokenizer(models.BPE())
    base.normalizer = normalizers.NFC()
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    base.decoder = decoders.ByteLevel()
    special = [*text.SPECIAL, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(special), initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    base.train_from_iterator(
        ["red canvas sneaker", "blue mug", "Represent the user's input.", "assistant"] * 9, trainer
    )
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return text.Tokenizer.of(base, "the tests' tokenizer")


def reference_config(config: config_lib.Config, tokenizer: text.Tokenizer, tied: bool = True):
    """The transformers config that corresponds to one of ours, written out in full."""
    c, v = config.language, config.vision
    language = dict(
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
        temporal_patch_size=config_lib.FRAMES,
        spatial_merge_size=v.merge,
        out_hidden_size=c.width,
        num_position_embeddings=v.positions,
        deepstack_visual_indexes=list(v.deepstack),
    )
    kind = transformers.Qwen3VLConfig
    if config.experts.count:
        kind = transformers.Qwen3VLMoeConfig
        language |= dict(
            num_experts=config.experts.count,
            num_experts_per_tok=config.experts.per_token,
            moe_intermediate_size=config.experts.width,
            norm_topk_prob=True,
            decoder_sparse_step=config.experts.every,
            mlp_only_layers=list(config.experts.dense_layers),
        )
    return kind(
        text_config=language,
        vision_config=vision,
        image_token_id=tokenizer.image_pad,
        video_token_id=tokenizer.video_pad,
        vision_start_token_id=tokenizer.vision_start,
        vision_end_token_id=tokenizer.vision_end,
        tie_word_embeddings=tied,
    )


def reference_model(config: config_lib.Config, tokenizer: text.Tokenizer, tied: bool = True, seed: int = 0):
    """A transformers model with its head and random weights, the router's included (it would start at zero)."""
    moe = bool(config.experts.count)
    kind = transformers.Qwen3VLMoeForConditionalGeneration if moe else transformers.Qwen3VLForConditionalGeneration
    model = kind(reference_config(config, tokenizer, tied)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Larger than the usual initial values, so that norms, biases and routing matter.
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model


def published_weights(model, tied: bool) -> dict[str, np.ndarray]:
    """Its weights under the names and in the layout of published checkpoints."""
    found = {}
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = parameter.detach().numpy()
        # transformers stores experts transposed; published checkpoints do not.
        found[name] = np.ascontiguousarray(array.transpose(0, 2, 1) if ".experts." in name else array)
    return found


def published(
    folder: Path, config: config_lib.Config, tokenizer: text.Tokenizer, tied: bool = True, dtype: str = "float32"
):
    """Writes a folder like the published ones, with its weights in two files. Returns the transformers model."""
    model = reference_model(config, tokenizer, tied)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: array.astype(dtype) for name, array in published_weights(model, tied).items()}
    names = sorted(held)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in files.items():
        save_file({name: held[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, chosen in files.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    written = reference_config(config, tokenizer, tied).to_dict()
    # The older spelling, which published folders have.
    language = written["text_config"]
    rope = language.pop("rope_parameters")
    language |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if config.experts.count:
        language["num_experts"] = language.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(written))
    rule = ResizeRule.of(config)
    pixels = dict(
        size={"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        patch_size=rule.patch,
        merge_size=rule.merge,
        temporal_patch_size=config_lib.FRAMES,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_processor_type="Qwen2VLImageProcessorFast",
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    tokenizer.save(folder / "tokenizer.json")
    return model


def our_params(folder: Path, config: config_lib.Config, tokenizer: text.Tokenizer):
    """The encoder's parameters, read by the hub."""
    like = jax.tree.map(on_one_device, abstract_params(config, tokenizer)["encoder"])
    folder_lib.check(config, folder)
    return weights.load(folder, config, like)


def pictures(config: config_lib.Config, sizes: list[tuple[int, int]], seed: int) -> list[Patches]:
    """Noise images of the given (height, width), resized by Qwen's own rule."""
    rng = np.random.default_rng(seed)
    rule = ResizeRule.of(config, within_budget=False)
    return [patchify(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), rule) for h, w in sizes]


def torch_inputs(segment: Segment, config: config_lib.Config) -> dict:
    """The inputs of transformers' model for one segment alone."""
    inputs = {"input_ids": torch.tensor(segment.tokens[None].astype(np.int64))}
    if segment.images:
        pixels = np.concatenate([image.pixels for image in segment.images]).astype(np.float32) / 127.5 - 1
        side = config.vision.patch
        pixels = np.repeat(pixels.reshape(len(pixels), 3, 1, side, side), config_lib.FRAMES, axis=2)
        inputs["pixel_values"] = torch.tensor(pixels.reshape(len(pixels), -1))
        inputs["image_grid_thw"] = torch.tensor([[1, *image.hw] for image in segment.images])
        inputs["mm_token_type_ids"] = torch.tensor(segment.is_visual[None].astype(np.int32))
    return inputs
