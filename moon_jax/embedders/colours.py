"""Colour histograms, the image baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moon_jax.data.images import decode
from moon_jax.embedders.protocol import ByItem
from moon_jax.errors import UserError
from moon_jax.types import Product


class Colours(ByItem):
    """Histograms of hue, saturation and value in 12 × 4 × 4 bins. A vector holds the square roots of the bins, so that
    the dot product is the Bhattacharyya coefficient.
    """

    name = "colour histogram"
    sees = ("i",)
    bins = (12, 4, 4)

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        return np.stack([self._histogram(item) for item in items])

    def _histogram(self, item: Product) -> np.ndarray:
        if not item.images:
            raise UserError("--model colours: embeds images only; give an image")
        picture = decode(item.images[0], self.max_pixels)
        picture.thumbnail((128, 128))
        pixels = np.asarray(picture.convert("HSV")).reshape(-1, 3)
        counts, _ = np.histogramdd(pixels, self.bins, [(0, 256)] * 3)
        return np.sqrt(counts.ravel() / len(pixels)).astype(np.float32)
