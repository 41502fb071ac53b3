"""sentence-transformers models."""

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


class SentenceTransformer(ByItem):
    """A sentence-transformers model of texts, or of texts and images."""

    def __init__(self, folder: Path, max_pixels: int):
        """
        Raises:
            UserError: sentence-transformers is not installed, or cannot read the folder.
        """
        try:
            import sentence_transformers
        except ImportError as error:
            need = f"needs sentence-transformers ({error}); pip install -e '.[hf]'"
            raise UserError(f"{folder}: {need}") from None
        try:
            self._model = sentence_transformers.SentenceTransformer(
                str(folder), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        self.max_pixels = max_pixels
        self.sees = ("t", "i") if self._model.supports("image") else ("t",)
        self.name = f"sentence-transformers {digest(folder)}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        given: list[Any] = []
        for number, item in enumerate(items):
            image = decode(item.images[0], self.max_pixels) if item.images else None
            if not item.text and image is None:
                raise UserError(f"item {number}: neither text nor image; give one")
            both = {"text": item.text, "image": image}
            given.append(item.text if image is None else {name: part for name, part in both.items() if part})
        return self._model.encode(given, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
