"""One table between the names of Hugging Face's `qwen3_vl` and `qwen3_vl_moe` weights and our parameters, both ways.

A row is (their name, our path, how the array is turned). `{i}` in a name runs over layers; our arrays stack them, by
period of `experts.every` layers in the decoder. `visual.` and `language_model.` stand behind `model.` in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moon_jax import config as config_lib
from moon_jax.types import Array

# Turnings from their layout to ours; each is undone by its inverse in `_UNTURN`.
KEEP, TRANSPOSE, PATCH = "keep", "transpose", "patch"


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
    # Published checkpoints hold experts as [E, D, 2F] and [E, F, D], which is ours.
    ("mlp.experts.gate_up_proj", "experts/gate_up", KEEP),
    ("mlp.experts.down_proj", "experts/down", KEEP),
]


def table(config: config_lib.Config) -> Iterator[tuple[str, str, int | None, str]]:
    """Rows (their name, our path in the encoder's parameters, index in our stack or None, turning)."""
    yield "visual.patch_embed.proj.weight", "vision/patch_kernel", None, PATCH
    yield "visual.patch_embed.proj.bias", "vision/patch_bias", None, KEEP
    yield "visual.pos_embed.weight", "vision/positions", None, KEEP
    for layer in range(config.vision.depth):
        for theirs, ours, turning in VISION_LAYER:
            yield f"visual.blocks.{layer}.{theirs}", f"vision/layers/block/{ours}", layer, turning
    mergers = {"merger": "merger"} | {
        f"deepstack_merger_list.{slot}": f"deepstack_{slot}" for slot in range(len(config.vision.deepstack))
    }
    for merger, name in mergers.items():
        for theirs, ours, turning in MERGER:
            yield f"visual.{merger}.{theirs}", f"vision/{name}/{ours}", None, turning
    yield "language_model.embed_tokens.weight", "token_embedding", None, KEEP
    every = config.experts.every if config.experts.count else 1
    for layer in range(config.language.layers):
        period, place = divmod(layer, every)
        sparse = config.experts.count and place == every - 1
        for theirs, ours, turning in DECODER_LAYER + (EXPERTS if sparse else DENSE_MLP):
            path = f"decoder/periods/layer_{place}/{ours}"
            yield f"language_model.layers.{layer}.{theirs}", path, period, turning
    yield "language_model.norm.weight", "decoder/norm/scale", None, KEEP


def _turn(array: np.ndarray, turning: str) -> np.ndarray:
    if turning == TRANSPOSE:
        return array.T
    if turning == PATCH:  # [Dv, 3, frames, h, w] → [frames, 3·h·w, Dv]
        width, _, frames = array.shape[:3]
        return array.transpose(2, 1, 3, 4, 0).reshape(frames, -1, width)
    return array


def _unturn(array: np.ndarray, turning: str) -> np.ndarray:
    if turning == TRANSPOSE:
        return array.T
    if turning == PATCH:
        frames, pixels, width = array.shape
        side = round((pixels // 3) ** 0.5)
        return array.reshape(frames, 3, side, side, width).transpose(4, 1, 0, 2, 3)
    return array


def to_params(weights: Mapping[str, Array], config: config_lib.Config) -> dict[str, Any]:
    """Encoder parameters from their weights (names as in `table`, without `model.`).

    Raises:
        KeyError: a weight is missing; names it.
    """
    params: dict[str, Any] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for theirs, ours, index, turning in table(config):
        array = _turn(np.asarray(weights[theirs]), turning)
        if index is not None:
            stacks.setdefault(ours, []).append(array)
        else:
            _put(params, ours, array)
    for ours, arrays in stacks.items():
        _put(params, ours, np.stack(arrays))
    return params


def from_params(params: Mapping[str, Any], config: config_lib.Config) -> dict[str, np.ndarray]:
    """The inverse of `to_params`."""
    weights = {}
    for theirs, ours, index, turning in table(config):
        array: Any = params
        for key in ours.split("/"):
            array = array[key]
        array = np.asarray(array if index is None else array[index])
        weights[theirs] = np.ascontiguousarray(_unturn(array, turning))
    return weights


def _put(params: dict[str, Any], path: str, array: np.ndarray) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = array
