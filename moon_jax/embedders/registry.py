"""Opens an embedder by its name or folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moon_jax.embedders import contrastive
from moon_jax.embedders.bm25 import BM25
from moon_jax.embedders.colours import Colours
from moon_jax.embedders.protocol import ByItem, Embedder
from moon_jax.embedders.sentence_transformers import SentenceTransformer
from moon_jax.errors import UserError
from moon_jax.hub import folder as folder_lib

BASELINES: dict[str, Callable[[int], ByItem]] = {"bm25": BM25, "colours": Colours}
"""Baselines by the name that --model accepts."""


def open_embedder(model: str, max_pixels: int, flag: str = "--model") -> Embedder:
    """Opens a workdir, a Hugging Face folder, hf://owner/name, or one of BASELINES.

    Supported models: ours, Qwen3-VL, Qwen3-VL-Embedding, CLIP, SigLIP, SigLIP 2 and sentence-transformers.

    Args:
        flag: the command-line flag of `model`, for error messages.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    try:
        return _open(model, max_pixels)
    except UserError as error:
        raise type(error)(f"{flag} {error}") from None


def _open(model: str, max_pixels: int) -> Embedder:
    if model in BASELINES and not Path(model).exists():
        return BASELINES[model](max_pixels)
    if (
        model.startswith(folder_lib.HUB)
        or folder_lib.is_folder(Path(model))
        or (Path(model) / "modules.json").is_file()
    ):
        folder = folder_lib.locate(model)
        kind = folder_lib.read_json(folder / "config.json").get("model_type", "")
        if kind in contrastive.MODEL_TYPES:
            return contrastive.Contrastive(folder, max_pixels)
        if (folder / "modules.json").is_file() and not kind.startswith("qwen3_vl"):
            return SentenceTransformer(folder, max_pixels)
    from moon_jax.serving import embedder  # imports JAX

    return embedder.load(model)
