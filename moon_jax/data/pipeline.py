"""Batch = f(seed, step): a randomly addressable Grain dataset whose element number `step` is the batch of that step.

Nothing is consumed and nothing is remembered, so resuming needs the step and nothing else, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moon_jax import config as config_lib
from moon_jax.data import records
from moon_jax.data import rows as rows_lib
from moon_jax.data.images import BadImage, Patches, ResizeRule, check_shape, crop_box, decode, patchify
from moon_jax.data.prepared import Prepared
from moon_jax.data.text import Tokenizer, keep_words
from moon_jax.errors import UserError
from moon_jax.types import VIEWS, Batch, Product


@dataclasses.dataclass(frozen=True)
class Alteration:
    """How a query is made from the product that it seeks."""

    keep_word: float
    least_words: int
    crop: tuple[float, float]
    flip: float


class Reader:
    """Products → segments: tokenizes, decodes, resizes; alters on demand."""

    def __init__(self, config: config_lib.Config, tokenizer: Tokenizer, within_budget: bool = True):
        """`within_budget` keeps elongated images to `data.visual_tokens`, which Qwen's own rule may overrun."""
        self.config = config
        self.tokenizer = tokenizer
        self.template = tokenizer.template(config.data.template)
        self.rule = ResizeRule.of(config, within_budget)

    def image(self, source: Any, alteration: Alteration | None, rng: np.random.Generator | None) -> Patches:
        picture = decode(source, self.config.data.max_pixels)
        check_shape(picture.height, picture.width)
        if alteration is None:
            return patchify(picture, self.rule)
        box = crop_box(picture.width, picture.height, alteration.crop, rng)
        return patchify(picture, self.rule, box, flipped=rng.random() < alteration.flip)

    def read(
        self,
        product: Product,
        views: Sequence[str],
        alteration: Alteration | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[rows_lib.Segment]:
        """The segments of a product's `views`, of its own title and its first images: what was added to it is left out.

        Args:
            alteration: how text and images are altered; None leaves them alone.
            rng: needed by `alteration`.
        """
        return self.segments(titles_of(product), product.images[: self.config.data.images], views, alteration, rng)

    def segments(
        self,
        titles: Sequence[str],
        images: Sequence[Any],
        views: Sequence[str],
        alteration: Alteration | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[rows_lib.Segment]:
        """The segments of titles, one behind the other, and images, as `read` has them."""
        parts = []
        if set(views) & {"t", "mm"}:
            if alteration:
                titles = [keep_words(title, alteration.keep_word, alteration.least_words, rng) for title in titles]
            parts = [self.tokenizer.encode([title], self.config.data.text_tokens)[0] for title in titles]
        tokens = np.concatenate(parts) if parts else None
        patches = [self.image(image, alteration, rng) for image in images] if set(views) & {"i", "mm"} else ()
        merge, term = self.config.vision.merge, self.config.experts.router_term
        return rows_lib.segments(tokens, patches, self.tokenizer, merge, views, self.template, term)


def titles_of(product: Product) -> list[str]:
    """A product's own title, if it has one."""
    return [product.text.strip()] if product.text and product.text.strip() else []


def drawn(
    product: Product, augmented: str, images: int, rng: np.random.Generator | None
) -> tuple[list[str], list[Any]]:
    """The titles and images by which a training step reads a product; of more than fit, some are drawn.

    Args:
        augmented: what of it, and of what was added to it, is read (`config.data.augmented`). drawn: one title, and so
            many images, of both; original: of its own; augmented: of what was added, where there is any; all: an
            added title behind its own, and images of both.
        images: at most so many.
        rng: needed where `draws` says so.
    """

    def some(items: Sequence[Any], most: int) -> list[Any]:
        if len(items) <= most:
            return list(items)
        return [items[index] for index in sorted(rng.choice(len(items), most, replace=False))]

    own, added = titles_of(product), product.enriched_texts
    pictures = product.images + product.expanded_images
    if augmented == "original":
        return own, some(product.images, images)
    if augmented == "augmented":
        return some(added or own, 1), some(product.expanded_images or product.images, images)
    return own + some(added, 1) if augmented == "all" else some([*own, *added], 1), some(pictures, images)


def draws(product: Product, augmented: str, images: int) -> bool:
    """Whether `drawn` may need random numbers."""
    if augmented == "original":
        return len(product.images) > images
    return bool(product.enriched_texts) or len(product.images) + len(product.expanded_images) > images


def mixed(text: bool, image: bool, mixture: Sequence[float], rng: np.random.Generator) -> tuple[str, ...]:
    """The one view of a query that has text, image or both, drawn by the shares of t, i and mm among those it has."""
    shares = np.array(mixture) * (text, image, text and image)
    return (VIEWS[rng.choice(3, p=shares / shares.sum())],) if shares.any() else ()


STEPS = 2**40
"""Length of a dataset that nobody reads to its end."""


def batches(prepared: Prepared, reader: Reader, share: Sequence[int] | None = None) -> grain.MapDataset[Batch]:
    """The endless dataset whose element `step` is that step's batch, as numpy arrays.

    Args:
        share: the rows of the batch, rising, that this process reads, its `rows`; the rest of a Batch, which costs
            nothing, is whole. All rows by default. What a row holds does not depend on who reads it.
    """
    config = reader.config
    layout = rows_lib.Layout.of(config, reader.template)
    data, count = config.data, 3 * config.data.batch
    share = range(count) if share is None else share
    query_alteration = Alteration(data.keep_word, 2, data.crop, data.flip)
    order = grain.MapDataset.range(len(prepared.triplets)).seed(config.seed).shuffle().repeat()

    def read(product: Product, role: int, rng: np.random.Generator | None) -> list[rows_lib.Segment]:
        try:
            # Shoppers write no enriched titles: a query is what it was.
            titles, images = drawn(product, data.augmented if role else "original", data.images, rng)
            views = VIEWS if role or not data.mixture else mixed(bool(titles), bool(images), data.mixture, rng)
            return reader.segments(titles, images, views, None if role else query_alteration, rng)
        except BadImage as error:
            raise UserError(f"product {product.id}: image: {error}; it could be read when the run began") from None

    # Random numbers follow from the row's number, and cost as much as its packing: only who draws asks for them.
    held: dict[int, tuple[Product, int]] = {}
    random_rows = grain.MapDataset.range(STEPS * count).seed(config.seed)
    random_rows = random_rows.random_map(lambda number, rng: read(*held.pop(number), rng))

    def row(number: int, product: Product | None) -> list[rows_lib.Segment]:
        if product is None:
            return []
        role = number % count // data.batch
        if role and not draws(product, data.augmented, data.images):
            return read(product, role, None)
        held[number] = product, role
        return random_rows[number]

    def batch(step: int) -> Batch:
        indices = [int(order[step * data.batch + place]) for place in range(data.batch)]
        chosen = [prepared.triplets[index] for index in indices]
        members = np.array(
            [-1 if triplet[role] is None else triplet[role] for role in range(3) for triplet in chosen], np.int32
        )
        asked = np.unique([members[place] for place in share if members[place] >= 0]).tolist()
        products = dict(zip(asked, records.several(prepared.products, asked), strict=True))
        segments = [row(step * count + place, products.get(int(members[place]))) for place in share]
        return Batch(
            rows=rows_lib.pack([[parts] for parts in segments], layout, reader.tokenizer.pad),
            product=members,
            group=np.where(members >= 0, prepared.group[members], -1).astype(np.int32),
            weight=np.array([triplet.weight for triplet in chosen], np.float32),
            triplet=np.array(indices, np.int32),
        )

    return grain.MapDataset.range(STEPS).map(batch)


def from_step(dataset: grain.MapDataset[Batch], step: int, threads: int) -> Iterator[Batch]:
    """The batches of `step`, `step` + 1, …, read ahead by `threads` threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset[step:].to_iter_dataset(options))
