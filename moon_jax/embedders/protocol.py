"""The protocol that any model implements to be evaluated, and what models need to implement it."""

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
"""Items that a model of others embeds at once."""


class Embedder(Protocol):
    """Products in, unit vectors out: serving.Embedder is one.

    One that has `rank`, of similarity.top_k's form, may make anything of an item that `rank` then compares. `sees` says
    whether it embeds texts and images ("t", "i"), if not both; `fixed`, that a product's vectors are given, whatever
    its text now is.
    """

    name: str
    """Model and weights, in a word or two: vectors of equal names compare."""

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """f32[items,D], rows of unit length. An item has a text, an image, or both."""

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All three views of each product, f32[products,3,D] and bool[products,3]: serving.Embedder tells it."""


class ByItem:
    """The views of products from `encode` alone. What sees only text, or only images, takes those for both."""

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
        """See Embedder; of a product's images the first is seen."""
        vectors, present = None, np.zeros((len(products), len(VIEWS)), bool)
        for start in range(0, len(products), BATCH):
            numbers = range(start, min(start + BATCH, len(products)))
            items, places = [], []
            for number in numbers:
                product = products[number]
                try:
                    if alteration:
                        product = altered(product, alteration, np.random.default_rng((seed, number)), self.max_pixels)
                    found = list(self._views(product))
                except BadImage as error:
                    raise UserError(f"product {product.id}: image: {error}") from None
                items += [item for _, item in found]
                places += [(number, view) for view, _ in found]
            if items:
                encoded = self.encode(items)
                if vectors is None:
                    vectors = np.zeros((len(products), len(VIEWS), *encoded.shape[1:]), encoded.dtype)
                row, view = np.array(places).T
                vectors[row, view], present[row, view] = encoded, True
            advance(len(numbers))
        return np.zeros((len(products), len(VIEWS), 1), np.float32) if vectors is None else vectors, present

    def _views(self, product: Product) -> Any:
        """(index of the view, item) of those views that the product has and the model sees."""
        text = (product.text or "").strip() or None if "t" in self.sees else None
        images = product.images[:1] if "i" in self.sees else ()
        if text:
            yield 0, Product(text=text)
        if images:
            yield 1, Product(images=images)
        if (product.text or "").strip() and product.images:
            yield 2, Product(text=text, images=images)


def altered(product: Product, alteration: Alteration, rng: np.random.Generator, max_pixels: int) -> Product:
    """A product as a query: words left out and its first image cropped, by the draws of data.pipeline.Reader."""
    text, images = (product.text or "").strip(), product.images[:1]
    if text:
        text = keep_words(text, alteration.keep_word, alteration.least_words, rng)
    if images:
        picture = decode(images[0], max_pixels)
        left, top, right, bottom = crop_box(picture.width, picture.height, alteration.crop, rng)
        # No pixel of the box's edges is lost, and there is one at least.
        images = (picture.crop((int(left), int(top), max(int(right + 0.999), 1), max(int(bottom + 0.999), 1))),)
    return Product(text=text or None, images=images, id=product.id)
