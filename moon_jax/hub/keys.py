"""One table that maps the weights of Hugging Face's `qwen3_vl` and `qwen3_vl_moe` to our parameters, both ways.

A row is (their name, our path, index in our stack, transform of the array). Our arrays stack the layers; in the
decoder, those at the same position of a period (`config.period`). Checkpoints prefix `visual.` and `language_model.`
with `model.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moon_jax import config as config_lib

# Transforms from their array to ours.
KEEP = "keep"
TRANSPOSE = "transpose"
PATCH = "patch"  # [Dv,3,frames,h,w] → [frames,3·h·w,Dv]
PAIR = "pair"  # [E,D,2F], gate and up side by side → [E,2,D,F]


class Row(NamedTuple):
    theirs: str  # their name, without `model.`
    ours: str  # path in the encoder's parameters
    stack_index: int | None  # index in our stack of layers; None if not stacked
    transform: str


def _norm(theirs: str, ours: str, bias: bool) -> list[tuple[str, str, str]]:
    rows = [(f"{theirs}.weight", f"{ours}/scale", KEEP)]
    return [*rows, (f"{theirs}.bias", f"{ours}/bias", KEEP)] if bias else rows


def _dense(theirs: str, ours: str, bias: bool) -> list[tuple[str, str, str]]:
    rows = [(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSE)]
    return [*rows, (f"{theirs}.bias", f"{ours}/bias", KEEP)] if bias else rows


VISION_LAYER = [
    *_norm("norm1", "norm1", True),
    *_norm("norm2", "norm2", True),
    *_dense("attn.qkv", "qkv", True),
    *_dense("attn.proj", "proj", True),
    *_dense("mlp.linear_fc1", "fc1", True),
    *_dense("mlp.linear_fc2", "fc2", True),
]
MERGER = [
    *_norm("norm", "norm", True),
    *_dense("linear_fc1", "fc1", True),
    *_dense("linear_fc2", "fc2", True),
]
DECODER_LAYER = [
    *_norm("input_layernorm", "input_norm", False),
    *_norm("post_attention_layernorm", "post_attention_norm", False),
    *_norm("self_attn.q_norm", "attention/q_norm", False),
    *_norm("self_attn.k_norm", "attention/k_norm", False),
    *(
        row
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for row in _dense(f"self_attn.{name}", f"attention/{name}", False)
    ),
]
DENSE_MLP = [
    row for name in ("gate_proj", "up_proj", "down_proj") for row in _dense(f"mlp.{name}", f"mlp/{name}", False)
]
EXPERTS = [
    ("mlp.gate.weight", "experts/router", TRANSPOSE),
    # In the layout of published checkpoints; transformers' save_pretrained swaps the last two axes (weights.py).
    ("mlp.experts.gate_up_proj", "experts/gate_up", PAIR),
    ("mlp.experts.down_proj", "experts/down", KEEP),
]


def table(config: config_lib.Config) -> Iterator[Row]:
    """One row per weight of the backbone."""
    yield Row("visual.patch_embed.proj.weight", "vision/patch_kernel", None, PATCH)
    yield Row("visual.patch_embed.proj.bias", "vision/patch_bias", None, KEEP)
    yield Row("visual.pos_embed.weight", "vision/positions", None, KEEP)
    for layer in range(config.vision.depth):
        for theirs, ours, transform in VISION_LAYER:
            yield Row(f"visual.blocks.{layer}.{theirs}", f"vision/layers/block/{ours}", layer, transform)
    mergers = {"merger": "merger"} | {
        f"deepstack_merger_list.{slot}": f"deepstack_{slot}" for slot in range(len(config.vision.deepstack))
    }
    for merger, name in mergers.items():
        for theirs, ours, transform in MERGER:
            yield Row(f"visual.{merger}.{theirs}", f"vision/{name}/{ours}", None, transform)
    yield Row("language_model.embed_tokens.weight", "token_embedding", None, KEEP)
    period = config_lib.period(config)
    for layer, sparse in enumerate(config_lib.sparse_layers(config)):
        number, position = divmod(layer, period)
        for theirs, ours, transform in DECODER_LAYER + (EXPERTS if sparse else DENSE_MLP):
            path = f"decoder/periods/layer_{position}/{ours}"
            yield Row(f"language_model.layers.{layer}.{theirs}", path, number, transform)
    yield Row("language_model.norm.weight", "decoder/norm/scale", None, KEEP)


def flatten(params: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts → {path: leaf}, with paths as in the table."""
    flat = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        into = params
        for parent in parents:
            into = into.setdefault(parent, {})
        into[name] = leaf
    return params


def to_theirs(array: np.ndarray, transform: str) -> np.ndarray:
    """One of our arrays, taken from its stack, in the layout of a checkpoint."""
    if transform == TRANSPOSE:
        return array.T
    if transform == PAIR:
        return np.concatenate([array[:, 0], array[:, 1]], axis=-1)
    if transform == PATCH:
        frames, pixels, width = array.shape
        side = round((pixels // 3) ** 0.5)
        return array.reshape(frames, 3, side, side, width).transpose(4, 1, 0, 2, 3)
    return array
