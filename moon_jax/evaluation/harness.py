"""Anyone's model behind one small protocol: what embeds texts and images is all that is asked of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError

from moon_jax.config import UserError
from moon_jax.data.images import decode
from moon_jax.hub import folder as folder_lib
from moon_jax.types import Product

CONTRASTIVE = ("clip", "siglip", "siglip2")
"""Models of transformers that have a tower for texts and one for images."""

BATCH = 64
"""Items that such a model embeds at once."""


class Embedder(Protocol):
    """Products in, unit vectors out."""

    name: str
    """Model and weights, in a word or two: vectors of equal names compare."""

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """f32[items,D], rows of unit length. An item has a text, an image, or both."""


class Ours:
    """A model of moon_jax: a workdir, or a Hugging Face folder that it reads."""

    def __init__(self, model: str):
        from moon_jax.serving import embedder  # imports JAX

        self._model = embedder.load(model)
        self.name = f"moon_jax {self._model.fingerprint}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        return self._model.encode(items)


class Contrastive:
    """CLIP, SigLIP or SigLIP 2 by transformers. An item with both text and image gets the mean of the two vectors."""

    def __init__(self, folder: Path, max_pixels: int):
        """
        Raises:
            UserError: transformers is not installed, or cannot read the folder.
        """
        try:
            import torch
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(f"--model {folder}: wants transformers ({error}); pip install -e '.[hf]'") from None
        try:
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # Pillow's resizing is the one that such models were trained with.
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--model {folder}: {' '.join(str(error).split())[:300]}") from None
        self._torch, self._max_pixels = torch, max_pixels
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device)
        kind = self._model.config.model_type
        # SigLIP was trained on texts that are filled up; CLIP masks what fills them.
        self._padding = "longest" if kind == "clip" else "max_length"
        digest = hashlib.blake2b(digest_size=8)
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.name = f"{kind} {digest.hexdigest()}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        found = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            sums: list[Any] = [0.0] * len(batch)
            for has, features in ((lambda item: item.text, self._texts), (lambda item: item.images, self._images)):
                chosen = [place for place, item in enumerate(batch) if has(item)]
                for place, vector in zip(chosen, features([batch[p] for p in chosen]) if chosen else (), strict=True):
                    sums[place] = sums[place] + vector
            for place, vector in enumerate(sums):
                if isinstance(vector, float):
                    raise UserError(f"item {start + place}: neither text nor image; nothing to embed")
                found.append(vector / np.linalg.norm(vector))
        return np.array(found, np.float32)

    def _texts(self, items: Sequence[Product]) -> np.ndarray:
        longest = self._model.config.text_config.max_position_embeddings
        inputs = self._tokenizer(
            [item.text for item in items],
            padding=self._padding,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return self._unit(self._model.get_text_features, inputs)

    def _images(self, items: Sequence[Product]) -> np.ndarray:
        pictures = [decode(item.images[0], self._max_pixels) for item in items]
        return self._unit(self._model.get_image_features, self._processor(images=pictures, return_tensors="pt"))

    def _unit(self, features: Any, inputs: Any) -> np.ndarray:
        with self._torch.inference_mode():
            given = features(**inputs.to(self._device)).pooler_output.float().cpu().numpy()
        return given / np.linalg.norm(given, axis=1, keepdims=True)


def open_embedder(model: str, max_pixels: int) -> Embedder:
    """The embedder of a workdir, or of a Hugging Face folder (or hf://owner/name) of ours, CLIP, SigLIP or SigLIP 2.

    Raises:
        UserError: there is no model, or one that cannot be read.
    """
    if model.startswith(folder_lib.HUB) or folder_lib.is_folder(Path(model)):
        folder = folder_lib.locate(model)
        if folder_lib.read_json(folder / "config.json").get("model_type") in CONTRASTIVE:
            return Contrastive(folder, max_pixels)
    return Ours(model)
