"""Reads a model's settings from a Hugging Face folder: sizes, pooling, template, pixel budget, licence.

They come from config.json, preprocessor_config.json, sentence-transformers' files and, if moon_jax exported the
folder, `moon_jax/config.json`. No code of the folder is run, and only hf://… uses the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from moon_jax import config as config_lib
from moon_jax import storage
from moon_jax.errors import UserError

HUB = "hf://"
SIDECAR = "moon_jax"
"""The subfolder of an exported model for everything that Hugging Face's files have no fields for."""

FETCHED = ("*.json", "*.jinja", "README.md", "LICENSE", "model*.safetensors", f"{SIDECAR}/*.safetensors")
"""The files to download from a repository: no code, no pickles, and no second copy of the weights."""

KINDS = ("qwen3_vl", "qwen3_vl_moe")

INSTRUCTION = "Represent the user's input."
"""The default instruction in Qwen3-VL-Embedding's own code."""

CARRIED = (
    "language.pooling",
    "data.template",
    "data.images",
    "data.text_tokens",
    "data.visual_tokens",
    "data.min_visual_tokens",
)
"""Options that are taken from an exported folder's sidecar."""


def is_folder(path: Path) -> bool:
    """Whether this is a Hugging Face folder and not one of our workdirs, which have a config.json as well."""
    return not (path / "checkpoints").is_dir() and (
        "model_type" in _json_or_nothing(path / "config.json") or any(path.glob("*.safetensors"))
    )


OF_RUN = ("config.json", "tokenizer.json", "base.json", "metrics.json", "data/manifest.json")
"""The files of a workdir that describe its model, besides the checkpoints."""


def run_at(model: str | Path) -> storage.Store | None:
    """The workdir of a moon_jax run, with OF_RUN available locally; None for anything else.

    Raises:
        UserError: `model` is an address in a bucket, and there is no run there.
    """
    if storage.is_address(model) and not storage.is_remote(model):
        return None
    store = storage.Store(model)
    store.pull(OF_RUN)
    if (store.files / "config.json").is_file() and store.checkpoints.is_dir():
        return store
    if store.remote:
        raise UserError(f"{store}: contains no run; mount a Hugging Face folder, or copy it to this machine")
    return None


def of_run(path: Path) -> dict[str, Any]:
    """The options, by dotted name, that a new run must take from the config.json of the run it starts from."""
    held = config_lib.leaves(config_lib.read_json(path))
    groups = ("vision.", "language.", "experts.")
    return {name: value for name, value in held.items() if name.startswith(groups) or name in CARRIED}


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def locate(model: str | Path) -> Path:
    """The folder of a model: the path itself, or for hf://owner/name[@revision] its snapshot in Hugging Face's cache.

    Raises:
        UserError: there is no such folder, or it cannot be downloaded.
    """
    model = str(model)
    if not model.startswith(HUB):
        if not Path(model).is_dir():
            raise UserError(f"{model}: {missing_model(model)}")
        return Path(model)
    name, _, revision = model.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{model}: not a model's name; give {HUB}owner/name, or {HUB}owner/name@revision")
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{model}: cannot be downloaded ({why}); without a network, give a folder") from None


def missing_model(model: str) -> str:
    """Why a model that is not a folder cannot be opened, with a suggestion."""
    if Path(model).is_file():
        return f"a file; give its folder, {Path(model).parent}"
    name = re.fullmatch(r"(?:https?:/+huggingface\.co/)?([\w.-]+/[\w.-]+)/?", model)
    return "no such folder" + (f"; for a model of the Hugging Face hub, give {HUB}{name[1]}" if name else "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        UserError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        value.items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from None
    return value


def settings(folder: Path) -> dict[str, Any]:
    """The options that the folder determines, by dotted name, for `config.replace`.

    Raises:
        UserError: the model is not a Qwen3-VL, or has a setting that moon_jax does not support.
    """
    path = folder / "config.json"
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: a workdir; moon-jax export turns it into a Hugging Face folder")
    held = read_json(path)
    if held.get("model_type") not in KINDS:
        raise UserError(f"{path}: model_type {held.get('model_type')!r} is not supported; give {' or '.join(KINDS)}")
    try:
        return _settings(folder, held)
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing; every {held['model_type']} has it") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its JSON files are not those of a {held['model_type']} ({error})") from None


def _settings(folder: Path, held: dict[str, Any]) -> dict[str, Any]:
    """`settings` without error handling: malformed files raise nearly any exception."""
    path = folder / "config.json"
    text, vision = (held.get(name) or {} for name in ("text_config", "vision_config"))
    found = _vision(vision) | _language(text) | (_experts(text) if held["model_type"] == "qwen3_vl_moe" else {})
    for name, (value, expected) in _same(held, text, vision).items():
        if value != expected:
            raise UserError(f"{path}: {name} is {value!r}; moon_jax supports {expected!r} only")
    sidecar = folder / SIDECAR / "config.json"
    if not sidecar.is_file():
        return found | _pixels(folder, vision) | _pooling(folder)
    ours = config_lib.leaves(config_lib.read_json(sidecar))
    # Two settings can describe the same expert layers; loading checks them against the weights.
    for name, value in found.items():
        if ours[name] != value and name not in ("experts.every", "experts.dense_layers"):
            raise UserError(f"{sidecar}: {name} is {ours[name]!r}, but {path} gives {value!r}; export the model again")
    return found | {name: ours[name] for name in CARRIED}


def config(folder: Path, options: dict[str, Any]) -> config_lib.Config:
    """The config for using the folder's model unchanged, except for `options`."""
    sidecar = folder / SIDECAR / "config.json"
    base = config_lib.read_json(sidecar) if sidecar.is_file() else config_lib.Config()
    return config_lib.replace(base, {"experts.count": 0} | settings(folder) | options)


def tokenizer(folder: Path) -> Path:
    """The folder's tokenizer.json.

    Raises:
        UserError: there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json; slow tokenizers are not supported")
    return folder / "tokenizer.json"


def _vision(vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision.depth": vision["depth"],
        "vision.width": vision["hidden_size"],
        "vision.mlp_width": vision["intermediate_size"],
        "vision.heads": vision["num_heads"],
        "vision.patch": vision["patch_size"],
        "vision.merge": vision["spatial_merge_size"],
        "vision.positions": vision["num_position_embeddings"],
        "vision.deepstack": tuple(vision["deepstack_visual_indexes"]),
    }


def _language(text: dict[str, Any]) -> dict[str, Any]:
    rope = _rope(text)
    return {
        "language.vocab": text["vocab_size"],
        "language.width": text["hidden_size"],
        "language.layers": text["num_hidden_layers"],
        "language.heads": text["num_attention_heads"],
        "language.kv_heads": text.get("num_key_value_heads") or text["num_attention_heads"],
        "language.head_dim": text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        "language.mlp_width": text["intermediate_size"],
        "language.rope_theta": float(rope["rope_theta"]),
        "language.rope_sections": tuple(rope["mrope_section"]),
        "language.norm_eps": float(text["rms_norm_eps"]),
    }


def _experts(text: dict[str, Any]) -> dict[str, Any]:
    return {
        # transformers 5 saves the first under the second name
        "experts.count": text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        "experts.per_token": text["num_experts_per_tok"],
        "experts.width": text["moe_intermediate_size"],
        "experts.every": text.get("decoder_sparse_step", 1),
        "experts.dense_layers": tuple(sorted(text.get("mlp_only_layers") or ())),
    }


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, from either spelling: `rope_parameters`, or `rope_scaling` and `rope_theta`."""
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    return rope if "rope_theta" in rope else rope | {"rope_theta": text["rope_theta"]}


def _same(held: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings with a single supported value: name → (the folder's value, the supported one)."""
    rope = _rope(text)
    return {
        "quantization_config": (held.get("quantization_config"), None),
        "text_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "text_config.attention_bias": (text.get("attention_bias", False), False),
        "text_config.norm_topk_prob": (text.get("norm_topk_prob", True), True),
        "text_config.rope_scaling.rope_type": (rope.get("rope_type", "default"), "default"),
        "text_config.rope_scaling.mrope_interleaved": (rope.get("mrope_interleaved", True), True),
        "vision_config.hidden_act": (vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
        "vision_config.temporal_patch_size": (vision.get("temporal_patch_size", 2), config_lib.FRAMES),
        "vision_config.in_channels": (vision.get("in_channels", 3), 3),
        "vision_config.out_hidden_size": (vision["out_hidden_size"], text["hidden_size"]),
    }


def _pixels(folder: Path, vision: dict[str, Any]) -> dict[str, Any]:
    """The pixel budget, at most our default: Qwen's own is 16,384 visual tokens per image."""
    held = read_json(folder / "preprocessor_config.json")
    held = held or read_json(folder / "processor_config.json").get("image_processor", {})
    half = [0.5, 0.5, 0.5]
    expected = {
        "image_mean": half,
        "image_std": half,
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "resample": 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    for name, value in expected.items():
        if held.get(name, value) != value:
            raise UserError(
                f"{folder}: its images are prepared with {name} {held[name]!r}; moon_jax supports {value!r} only"
            )
    size = held.get("size") or {}
    area = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    default = config_lib.Data()
    most = held.get("max_pixels") or size.get("longest_edge") or default.visual_tokens * area
    least = held.get("min_pixels") or size.get("shortest_edge") or default.min_visual_tokens * area
    if min(most, least) < 1:
        raise UserError(f"{folder}: its pixel budget is {least} to {most}; it must be positive")
    tokens = max(1, min(most // area, default.visual_tokens))
    return {"data.visual_tokens": tokens, "data.min_visual_tokens": max(1, min(least // area, tokens))}


def _pooling(folder: Path) -> dict[str, Any]:
    """Pooling and template, from sentence-transformers' files; empty if the model is not an embedding model.

    Qwen3-VL-Embedding pools the last token of a chat whose system message is an instruction.
    """
    jinja = folder / "chat_template.jinja"
    chat = jinja.read_text(encoding="utf-8") if jinja.is_file() else ""
    for name in ("chat_template.json", "tokenizer_config.json"):
        chat = chat or str(read_json(folder / name).get("chat_template") or "")
    path = folder / _pooling_module(folder) / "config.json"
    held = read_json(path)
    if not held:
        # Without sentence-transformers' files, the instruction in the chat template identifies the model.
        return {"language.pooling": "last", "data.template": "qwen3_vl_embedding"} if INSTRUCTION in chat else {}
    mode = held.get("pooling_mode") or [
        name.removeprefix("pooling_mode_")
        for name, value in held.items()
        if name.startswith("pooling_mode_") and value is True
    ]
    modes = {"mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
    pooling = modes.get(mode if isinstance(mode, str) else "+".join(mode))
    if pooling is None:
        raise UserError(f"{path}: pools by {mode}; moon_jax supports mean and last-token pooling")
    if "<|im_start|>" not in chat:
        raise UserError(
            f"{folder}: its chat template is not Qwen's, so it cannot be read as an embedding model; if moon_jax"
            f" exported it, its folder {SIDECAR}/ is missing"
        )
    prompts = read_json(folder / "config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"))
    chat_options = (read_json(folder / "sentence_bert_config.json").get("processing_kwargs") or {}).get("chat_template")
    generation = (chat_options or {}).get("add_generation_prompt", pooling == "last")
    if pooling == "last" and not prompt:
        prompt = INSTRUCTION
    system = f"<|im_start|>system\n{prompt}<|im_end|>\n" if prompt else ""
    template = f"{system}<|im_start|>user\n{{}}<|im_end|>\n" + ("<|im_start|>assistant\n" if generation else "")
    named = next((name for name, text in config_lib.TEMPLATES.items() if text == template), template)
    return {"language.pooling": pooling, "data.template": named}


def _pooling_module(folder: Path) -> str:
    """The folder of sentence-transformers' pooling module."""
    path = folder / "modules.json"
    if path.is_file():
        for module in json.loads(path.read_text(encoding="utf-8")):
            if module["type"].endswith("Pooling"):
                if Path(module["path"]).name != module["path"]:
                    raise UserError(f"{path}: names {module['path']!r}, which is not a subfolder")
                return module["path"]
    return "1_Pooling"


def licence(folder: Path) -> str:
    """The licence in the folder's model card; empty if it states none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", found[1], re.MULTILINE) if found else None
    return line[1] if line else ""


def check(wanted: config_lib.Config, folder: Path) -> None:
    """Checks that a run of this config can start from the folder's weights.

    Raises:
        UserError: a size differs; names the first one.
    """
    theirs = config(folder, {})
    # A dense folder can be upcycled to any experts; a folder with experts must match the config.
    experts = ("experts.count", "experts.per_token", "experts.width") if theirs.experts.count else ()
    held = config_lib.leaves(theirs)
    for name, value in config_lib.leaves(wanted).items():
        sized = name.startswith(("vision.", "language.")) and name != "language.pooling"
        if (sized or name in experts) and value != held[name]:
            raise UserError(
                f"config.{name}: {value!r}, but {folder} has {held[name]!r}; give a config that fits, or leave the size"
                " out: --init takes it from the folder"
            )
    if experts and config_lib.sparse_layers(wanted) != config_lib.sparse_layers(theirs):
        raise UserError(
            f"config.experts.every and dense_layers: in {folder} other layers hold experts; give"
            f" {theirs.experts.every} and {theirs.experts.dense_layers}"
        )


def digest(folder: Path) -> str:
    """The hexadecimal digest of a folder's weights and settings (*.safetensors, *.json)."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
