"""A trained model → a Hugging Face folder that transformers, sentence-transformers and servers built on them load.

The config, W* and the temperatures have no counterpart there; they go into the subfolder `moon_jax/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  bfloat16 for numpy
import numpy as np
from safetensors.numpy import save_file

from moon_jax import config as config_lib
from moon_jax.data.images import ResizeRule
from moon_jax.data.text import Tokenizer
from moon_jax.errors import UserError
from moon_jax.hub import keys
from moon_jax.hub.folder import SIDECAR

FILE_BYTES = 4_000_000_000
"""A weight file is closed once it has at least this many bytes."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        encoder: its parameters, as nested dicts of arrays.
        alignment: {"dual" f32[L,E,M] if L > 0, "log_temperature" f32[2]}, or None if there is none.
        tokenizer: path of its tokenizer.json.
        fingerprint, step: of the Embedder.
        base: the run's initial model, hf://owner/name or a path; empty for random weights.
        licence: of the base.
        data, metrics: manifest.json and metrics.json of the run; empty if there is no such file.
    """

    config: config_lib.Config
    encoder: Any
    alignment: Any
    tokenizer: Path
    fingerprint: str
    step: int
    base: str = ""
    licence: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


def export(
    trained: Trained,
    output: Path,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
) -> None:
    """Writes the folder atomically: `qwen3_vl_moe` if a layer has experts, else `qwen3_vl`.

    Args:
        output: a new or empty folder.
        track: (tensors, their number) → the same iterable, wrapped to show progress.

    Raises:
        UserError: the folder is not empty, or the model has parts that transformers does not support.
    """
    require_empty(output)
    check_expressible(trained)
    part = output.absolute().with_name(f".{output.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; give a folder that can be created") from None
    try:
        _write(trained, part, track)
        if output.exists():
            output.rmdir()
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(trained: Trained, part: Path, track: Callable[[Iterable, int], Iterable]) -> None:
    config = trained.config
    for folder in ("1_Pooling", "2_Normalize", SIDECAR):
        (part / folder).mkdir()

    shutil.copyfile(trained.tokenizer, part / "tokenizer.json")
    tokenizer = Tokenizer.load(trained.tokenizer)
    rows = list(keys.table(config))
    write_weights(part, _tensors(trained, track(rows, len(rows))))
    for name, content in _jsons(config, tokenizer).items():
        (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (part / "chat_template.jinja").write_text(chat_template(config.data.template), encoding="utf-8")
    (part / "README.md").write_text(model_card(trained), encoding="utf-8")

    # These are paths on this machine.
    shown = config_lib.replace(config, {"data.path": "", "data.tokenizer": "", "training.init": ""})
    (part / SIDECAR / "config.json").write_text(config_lib.to_json(shown), encoding="utf-8")
    about = {"fingerprint": trained.fingerprint, "step": trained.step, "base": _public(trained.base)}
    about |= {"data": trained.data, "metrics": trained.metrics}
    (part / SIDECAR / "model.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if trained.alignment is not None:
        flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in trained.alignment.items()}
        save_file(flat, part / SIDECAR / "alignment.safetensors")
    for path in part.rglob("*.safetensors"):  # save_file makes them readable by their owner only
        shutil.copymode(part / "config.json", path)


def require_empty(output: Path) -> None:
    """
    Raises:
        UserError: the output is a file, or a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; give a new or empty folder")


def check_expressible(trained: Trained) -> None:
    """
    Raises:
        UserError: a parameter has no counterpart in transformers' Qwen3-VL.
    """
    term = trained.config.experts.router_term
    if term != "none":
        raise UserError(
            f"config.experts.router_term: {term} cannot be exported: the router of transformers' Qwen3-VL sees only"
            " the token, so its term for the view would be lost; train without it, or serve with moon_jax"
        )
    names = {row.ours for row in keys.table(trained.config)}
    for path in keys.flatten(trained.encoder):
        if path not in names:
            reason = "transformers' Qwen3-VL has no such parameter"
            raise UserError(f"{path}: cannot be exported: {reason}; train without it, or serve with moon_jax")


def _tensors(trained: Trained, rows: Iterable[keys.Row]) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, array), one array at a time on the host."""
    leaves = keys.flatten(trained.encoder)
    for row in rows:
        leaf = leaves[row.ours]
        array = np.asarray(jax.device_get(leaf if row.stack_index is None else leaf[row.stack_index]))
        yield f"model.{row.theirs}", np.ascontiguousarray(keys.to_theirs(array, row.transform))


def write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], file_bytes: int = FILE_BYTES) -> None:
    """Writes safetensors files, with an index if there are several, as in published checkpoints."""
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def close() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(sorted(held))
        held.clear()

    for name, array in tensors:
        held[name] = array
        total += array.nbytes
        if sum(part.nbytes for part in held.values()) >= file_bytes:
            close()
    if held:
        close()
    index = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (folder / f"part-{number}").rename(folder / final)
        index |= dict.fromkeys(names, final)
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_config(config: config_lib.Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json. Rotary settings are given in both spellings: transformers 4 and servers read the older one."""
    language, vision, experts = config.language, config.vision, config.experts
    sparse = config_lib.sparse_layers(config)
    kind, name = ("qwen3_vl_moe", "Qwen3VLMoe") if any(sparse) else ("qwen3_vl", "Qwen3VL")
    rope = {"rope_type": "default", "mrope_section": list(language.rope_sections), "mrope_interleaved": True}
    text = {
        "model_type": f"{kind}_text",
        "vocab_size": language.vocab,
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": language.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope | {"rope_theta": language.rope_theta},
        "rope_scaling": rope,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": True,
        "dtype": config.training.param_dtype,
    }
    if any(sparse):
        text |= {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, has_experts in enumerate(sparse) if not has_experts],
        }
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "dtype": config.training.param_dtype,
        "image_token_id": tokenizer.image_pad,
        "video_token_id": tokenizer.video_pad,
        "vision_start_token_id": tokenizer.vision_start,
        "vision_end_token_id": tokenizer.vision_end,
        # An embedder has no language-model head. A tied one needs no weight in the file.
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": {
            "model_type": f"{kind}_vision",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": vision.mlp_width,
            "num_heads": vision.heads,
            "in_channels": 3,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "temporal_patch_size": config_lib.FRAMES,
            "out_hidden_size": language.width,
            "num_position_embeddings": vision.positions,
            "deepstack_visual_indexes": list(vision.deepstack),
            "dtype": config.training.param_dtype,
        },
    }


def _jsons(config: config_lib.Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The folder's JSON files."""
    rule = ResizeRule.of(config)
    pixels = {
        "size": {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels},
        "patch_size": rule.patch,
        "merge_size": rule.merge,
        "temporal_patch_size": config_lib.FRAMES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }
    processor = {"processor_class": "Qwen3VLProcessor"}
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    # Without this list sentence-transformers assumes that the model reads text only.
    modalities = {"text": method, "image": method, "message": method | {"format": "structured"}}
    module = "sentence_transformers.models"
    return {
        "config.json": model_config(config, tokenizer),
        "tokenizer_config.json": {
            # The generic class uses tokenizer.json as it is; Qwen's own class would rebuild it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": tokenizer.base.id_to_token(tokenizer.pad),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 262144,
            **processor,
        },
        "preprocessor_config.json": pixels | {"image_processor_type": "Qwen2VLImageProcessor"} | processor,
        "video_preprocessor_config.json": pixels | {"video_processor_type": "Qwen3VLVideoProcessor"} | processor,
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{module}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{module}.Normalize"},
        ],
        "1_Pooling/config.json": {
            "embedding_dimension": config.language.width,
            "pooling_mode": {"mean": "mean", "last": "lasttoken"}[config.language.pooling],
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def chat_template(template: str) -> str:
    """A Jinja template that renders a product exactly as in training: images first, then the text, in `template`."""
    prefix, suffix = (
        json.dumps(part, ensure_ascii=False) for part in config_lib.TEMPLATES.get(template, template).split("{}")
    )
    return (
        "{#- One product in one user message. moon_jax trained on exactly these tokens. -#}\n"
        f"{{{{- {prefix} -}}}}\n"
        """{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- raise_exception('this model was trained without further instructions: give user messages only') -}}
  {%- endif -%}
  {%- if message.content is not string -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.content is string -%}
    {{- message.content | trim -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if 'text' in part -%}
        {{- part.text | trim -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""
        f"{{{{- {suffix} -}}}}\n"
    )


def _public(base: str) -> str:
    """The name of the base model to publish: its name on the hub, or the last part of a local path."""
    return re.sub(r"[^\w.@/:-]", "_", base if base.startswith("hf://") else Path(base).resolve().name if base else "")


def model_card(trained: Trained) -> str:
    """README.md: licence, base, data, metrics and usage."""
    config, data = trained.config, trained.data
    base = _public(trained.base)
    front = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    front += [f"license: {trained.licence}"] if trained.licence else []
    front += [f"base_model: {base.removeprefix('hf://').partition('@')[0]}"] if base.startswith("hf://") else []
    front += ["tags:", "- moon_jax", "- multimodal", "- e-commerce"]
    experts = config.experts
    kind = f"{experts.count} experts, {experts.per_token} per token" if experts.count else "dense"
    lines = [
        "---",
        *front,
        "---",
        "",
        "# A product embedder",
        "",
        f"Embeds a product's text, its images or both into one space of {config.language.width} dimensions"
        f" (Qwen3-VL, {kind}), with the method of MOON2.0 (arXiv 2511.12449) in moon_jax.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        'model = SentenceTransformer("this folder")',
        'vectors = model.encode([{"image": "shoe.jpg", "text": "red canvas sneaker"}, "red shoe"])',
        "```",
        "",
        f"* **Base**: {base}; its licence: {trained.licence or 'not stated'}."
        if base
        else "* **Base**: none, random weights.",
        f"* **Training**: {trained.step:,} steps of {config.data.batch} triplets."
        if trained.step
        else "* **Training**: none by moon_jax.",
    ]
    if data:
        origin = "synthetic, rendered products" if data["synthetic"] else "a private catalogue"
        train, val = data["splits"]["train"], data["splits"]["val"] or data["splits"]["train"]
        lines.append(
            f"* **Data**: {origin}: {train:,} products and {data['triplets']:,} triplets for training,"
            f" {val:,} products for evaluation; fingerprint `{data['fingerprint']}`."
        )
    else:
        lines.append("* **Data**: not recorded.")
    lines += [
        f"* **Input**: images first, then the text, in the template `{config.data.template}`;"
        f" {config.language.pooling} pooling. Trained with at most {config.data.images} image(s) of"
        f" {config.data.visual_tokens} visual tokens, and {config.data.text_tokens} text tokens: moon_jax truncates"
        " longer texts, servers do not.",
        "* **Left out**: the language-model head. This model does not generate text.",
        f"* **Space**: `{trained.fingerprint}`; vectors are comparable only within one space.",
        "",
    ]
    retrieval = trained.metrics.get("retrieval", {})
    for queries, directions in retrieval.items():
        lines += [
            f"## Retrieval, {queries.replace('_', ' ')}",
            "",
            "In percent. Queries that share a modality with their targets are altered.",
            "",
            "| direction | R@1 | R@5 | R@10 | R@10 by chance | queries | candidates |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {direction} | {row['R@1']:.1f} | {row['R@5']:.1f} | {row['R@10']:.1f} | {row['chance@10']:.1f}"
            f" | {row['queries']:,} | {row['candidates']:,} |"
            for direction, row in directions.items()
        ]
        lines.append("")
    if not retrieval:
        lines += ["Not evaluated.", ""]
    return "\n".join(lines)
