"""The protocol that a model implements to be evaluated, and helpers to implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from moon_jax.data.images import BadImage, crop_box, decode
from moon_jax.data.pipeline import Alteration
from moon_jax.data.text import keep_words
from moon_jax.errors import UserError
from moon_jax.types import VIEWS, Product

BATCH = 64
"""Batch size of third-party models, in items."""


class Embedder(Protocol):
    """Products in, unit vectors out. serving.Embedder is one.

    Optional attributes: `rank`, with the signature of similarity.top_k, replaces the dot product; `encode` may then
    return anything that `rank` can compare. `sees` is the tuple of modalities that the model embeds, "t" and "i"; both
    by default. `fixed` means that vectors are precomputed per product and do not follow its text.
    """

    name: str
    """Model and weights, in a word or two. Vectors are comparable if the names are equal."""

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """f32[items,D], rows of unit length. Each item has text, an image, or both."""

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The three views of each product, f32[products,3,D] and bool[products,3]; see serving.Embedder."""


class ByItem:
    """Implements `encode_views` with `encode`. A text-only or image-only model embeds mm from that modality alone."""

    sees: tuple[str, ...] = ("t", "i")
    max_pixels: int

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """See Embedder."""
        raise NotImplementedError

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Embedder. Only a product's first image is used."""
        vectors, present = None, np.zeros((len(products), len(VIEWS)), bool)
        for start in range(0, len(products), BATCH):
            numbers = range(start, min(start + BATCH, len(products)))
            items, positions = [], []
            for number in numbers:
                product = products[number]
                try:
                    if alteration:
                        product = altered(product, alteration, np.random.default_rng((seed, number)), self.max_pixels)
                    found = list(self._views(product))
                except BadImage as error:
                    raise UserError(f"product {product.id}: image: {error}") from None
                items += [item for _, item in found]
                positions += [(number, view) for view, _ in found]
            if items:
                encoded = self.encode(items)
                if vectors is None:
                    vectors = np.zeros((len(products), len(VIEWS), *encoded.shape[1:]), encoded.dtype)
                row, view = np.array(positions).T
                vectors[row, view], present[row, view] = encoded, True
            advance(len(numbers))
        return np.zeros((len(products), len(VIEWS), 1), np.float32) if vectors is None else vectors, present

    def _views(self, product: Product) -> Any:
        """Yields (view index, item) for the views that the product has and the model embeds."""
        text = (product.text or "").strip() or None if "t" in self.sees else None
        images = product.images[:1] if "i" in self.sees else ()
        if text:
            yield 0, Product(text=text)
        if images:
            yield 1, Product(images=images)
        if (product.text or "").strip() and product.images:
            yield 2, Product(text=text, images=images)


def altered(product: Product, alteration: Alteration, rng: np.random.Generator, max_pixels: int) -> Product:
    """A product as a query: words dropped and the first image cropped, with the same random draws as
    data.pipeline.Reader.
    """
    text, images = (product.text or "").strip(), product.images[:1]
    if text:
        text = keep_words(text, alteration.keep_word, alteration.least_words, rng)
    if images:
        picture = decode(images[0], max_pixels)
        left, top, right, bottom = crop_box(picture.width, picture.height, alteration.crop, rng)
        # Rounded outwards: keeps the pixels at the edges of the box, and at least one.
        images = (picture.crop((int(left), int(top), max(int(right + 0.999), 1), max(int(bottom + 0.999), 1))),)
    return Product(text=text or None, images=images, id=product.id)
