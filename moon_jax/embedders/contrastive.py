"""CLIP, SigLIP and SigLIP 2, run by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from moon_jax.data.images import decode
from moon_jax.embedders.protocol import BATCH, ByItem
from moon_jax.errors import UserError
from moon_jax.hub.folder import digest
from moon_jax.types import Product

MODEL_TYPES = ("clip", "siglip", "siglip2")
"""transformers model types with a text tower and an image tower."""


class Contrastive(ByItem):
    """CLIP, SigLIP or SigLIP 2. The vector of an item with text and image is the mean of the two, of unit length."""

    def __init__(self, folder: Path, max_pixels: int):
        """
        Raises:
            UserError: transformers is not installed, or cannot read the folder.
        """
        try:
            import torch
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(f"{folder}: needs transformers ({error}); pip install -e '.[hf]'") from None
        try:
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # These models were trained with Pillow's resizing.
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        self._torch, self.max_pixels = torch, max_pixels
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device)
        kind = self._model.config.model_type
        # SigLIP was trained on texts padded to full length; CLIP masks padding.
        self._padding = "longest" if kind == "clip" else "max_length"
        self.name = f"{kind} {digest(folder)}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        found = []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            sums: list[Any] = [0.0] * len(batch)
            for has, features in ((lambda item: item.text, self._texts), (lambda item: item.images, self._images)):
                chosen = [index for index, item in enumerate(batch) if has(item)]
                for index, vector in zip(chosen, features([batch[n] for n in chosen]) if chosen else (), strict=True):
                    sums[index] = sums[index] + vector
            for index, vector in enumerate(sums):
                if isinstance(vector, float):
                    raise UserError(f"item {start + index}: neither text nor image; give one")
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
        pictures = [decode(item.images[0], self.max_pixels) for item in items]
        return self._unit(self._model.get_image_features, self._processor(images=pictures, return_tensors="pt"))

    def _unit(self, features: Any, inputs: Any) -> np.ndarray:
        with self._torch.inference_mode():
            vectors = features(**inputs.to(self._device)).pooler_output.float().cpu().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
