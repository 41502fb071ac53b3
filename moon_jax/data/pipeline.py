"""Batch = f(seed, step): a Grain dataset with random access, in which element `step` is the batch of that step.

The pipeline has no state, so resuming needs only the step, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moon_jax import config as config_lib
from moon_jax.data import editing, records
from moon_jax.data import known as known_lib
from moon_jax.data import rows as rows_lib
from moon_jax.data.images import BadImage, Patches, ResizeRule, check_shape, crop_box, decode, patchify
from moon_jax.data.prepared import Prepared
from moon_jax.data.text import Tokenizer, keep_words
from moon_jax.errors import UserError
from moon_jax.types import VIEWS, Batch, Product


@dataclasses.dataclass(frozen=True)
class Alteration:
    """How a query is derived from its target product."""

    keep_word: float  # probability of keeping each word
    least_words: int  # words that are kept in any case
    crop: tuple[float, float]  # range of a crop's share of the image's area
    flip: float  # probability of flipping an image horizontally
    background: float = 0.0  # probability of replacing a plain background


class Reader:
    """Turns products into segments: tokenizes, decodes and resizes; alters text and images on request."""

    def __init__(self, config: config_lib.Config, tokenizer: Tokenizer, within_budget: bool = True):
        """`within_budget` limits elongated images to `data.visual_tokens`, which Qwen's own rule may exceed."""
        self.config = config
        self.tokenizer = tokenizer
        self.template = tokenizer.template(config.data.template)
        self.rule = ResizeRule.of(config, within_budget)

    def image(self, source: Any, alteration: Alteration | None, rng: np.random.Generator | None) -> Patches:
        """Decodes an image, alters it if requested, and cuts it into patches.

        Raises:
            BadImage: it cannot be used.
        """
        picture = decode(source, self.config.data.max_pixels)
        check_shape(picture.height, picture.width)
        if alteration is None:
            return patchify(picture, self.rule)
        box = crop_box(picture.width, picture.height, alteration.crop, rng)
        flipped, replaced = rng.random() < alteration.flip, rng.random() < alteration.background

        def edit(pixels: np.ndarray) -> np.ndarray:
            pixels = editing.replace_background(pixels, rng) if replaced else pixels
            return pixels[:, ::-1] if flipped else pixels

        return patchify(picture, self.rule, box, edit)

    def read(
        self,
        product: Product,
        views: Sequence[str],
        alteration: Alteration | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[rows_lib.Segment]:
        """The segments of a product's `views`, from its own title and first images, without augmented content.

        Args:
            alteration: how text and images are altered; None for no change.
            rng: required with `alteration`.
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
        """Like `read`, for given titles (concatenated) and images."""
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
    """A product's own title as a list of one, or an empty list."""
    return [product.text.strip()] if product.text and product.text.strip() else []


def draw_content(
    product: Product, augmented: str, images: int, rng: np.random.Generator | None
) -> tuple[list[str], list[Any]]:
    """The titles and images of a product that a training step reads, drawn at random if there are more than fit.

    Args:
        augmented: which content is read (`config.data.augmented`). drawn: one title and up to `images` images from
            original and augmented content together; half: the same from only one of the two, each half of the time;
            original: only original content; augmented: only augmented content, or original content if there is none;
            all: the original title followed by an augmented one, and images of both.
        images: maximum number of images.
        rng: required if `needs_rng` is true.
    """

    def sample(items: Sequence[Any], most: int) -> list[Any]:
        if len(items) <= most:
            return list(items)
        return [items[index] for index in sorted(rng.choice(len(items), most, replace=False))]

    def either(first: Sequence[Any], second: Sequence[Any]) -> Sequence[Any]:
        return first if not second or (first and rng.random() < 0.5) else second

    own, added = titles_of(product), product.enriched_texts
    pictures = product.images + product.expanded_images
    if augmented == "original":
        return own, sample(product.images, images)
    if augmented == "augmented":
        return sample(added or own, 1), sample(product.expanded_images or product.images, images)
    if augmented == "half":
        return sample(either(own, added), 1), sample(either(product.images, product.expanded_images), images)
    return own + sample(added, 1) if augmented == "all" else sample([*own, *added], 1), sample(pictures, images)


def needs_rng(product: Product, augmented: str, images: int) -> bool:
    """Whether `draw_content` may need random numbers."""
    if augmented == "original":
        return len(product.images) > images
    drawn = bool(product.enriched_texts) or (augmented == "half" and bool(product.expanded_images))
    return drawn or len(product.images) + len(product.expanded_images) > images


def draw_view(text: bool, image: bool, mixture: Sequence[float], rng: np.random.Generator) -> tuple[str, ...]:
    """One view of a query with text, image or both, drawn by the `mixture` weights of t, i and mm among those it has.

    Empty if the available views have no weight.
    """
    shares = np.array(mixture) * (text, image, text and image)
    return (VIEWS[rng.choice(3, p=shares / shares.sum())],) if shares.any() else ()


SAMPLE = 1000
"""Triplets that `fitted` measures."""

FITTING = 0.98
"""Share of the texts that fit into fitted rows without being cut."""


def fitted(config: config_lib.Config, prepared: Prepared, reader: Reader) -> config_lib.Config:
    """`config` with `data.text_tokens` and `data.visual_tokens` lowered to what the catalogue needs.

    Most titles are far shorter than the limit, and most images of a catalogue have one shape: rows for the limits would
    be half padding. Depends on data and config alone, so a resumed run gets the same. Images that need more than any in
    the sample are downscaled; the trained model keeps the limits of `config`.
    """
    data, area = config.data, (config.vision.patch * config.vision.merge) ** 2
    chosen = np.unique(np.linspace(0, len(prepared.triplets) - 1, SAMPLE).astype(int)).tolist()
    members = prepared.members(chosen, 1)
    lengths, tokens = [1], [data.min_visual_tokens]
    for product in records.read_many(prepared.products, np.unique(members[members >= 0]).tolist()):
        texts = [*titles_of(product), *product.enriched_texts]
        if data.augmented == "all":  # reads two titles
            texts = [" ".join([*titles_of(product), text]) for text in product.enriched_texts] or texts
        lengths += [len(ids) for ids in reader.tokenizer.encode(texts, data.text_tokens)]
        for image in (*product.images, *product.expanded_images):
            try:
                picture = decode(image, data.max_pixels)
            except BadImage:
                continue
            high, wide = reader.rule.size(picture.height, picture.width)
            tokens.append(high * wide // area)
    text = min(data.text_tokens, int(np.ceil(np.quantile(lengths, FITTING))))
    visual = min(data.visual_tokens, max(tokens))
    return config_lib.replace(config, {"data.text_tokens": text, "data.visual_tokens": visual})


STEPS = 2**40
"""Length of the dataset in steps, practically infinite."""


def batches(prepared: Prepared, reader: Reader, share: Sequence[int] | None = None) -> grain.MapDataset[Batch]:
    """The endless dataset of training batches, as numpy arrays; element `step` is the batch of that step.

    Args:
        share: ascending indices of the rows that this process reads into `Batch.rows`; all rows by default. The other
            fields of a Batch are cheap and always complete. A row does not depend on the process that reads it.

    Raises:
        UserError: the data have fewer negatives per triplet than `data.negatives`; or an image cannot be decoded,
            raised when the element is read.
    """
    config = reader.config
    there = 1 + (0 if prepared.negatives is None else prepared.negatives.shape[1])
    if config.data.negatives > there:
        raise UserError(
            f"config.data.negatives: {config.data.negatives}, but the data have {there} per triplet; mine more with"
            " moon-jax prepare --negatives, or lower it"
        )
    layout = rows_lib.Layout.of(config, reader.template)
    data, count = config.data, config_lib.batch_rows(config)
    share = range(count) if share is None else share
    query_alteration = Alteration(data.keep_word, data.least_words, data.crop, data.flip, data.background)
    known = known_lib.Known(prepared.triplets, prepared.group)
    order = grain.MapDataset.range(len(prepared.triplets)).seed(config.seed).shuffle().repeat()

    def read(
        product: Product, role: int, alteration: Alteration | None, rng: np.random.Generator | None
    ) -> list[rows_lib.Segment]:
        try:
            # Shoppers do not write enriched titles, so queries are not augmented.
            titles, images = draw_content(product, data.augmented if role else "original", data.images, rng)
            views = VIEWS if role or not data.mixture else draw_view(bool(titles), bool(images), data.mixture, rng)
            return reader.segments(titles, images, views, alteration, rng)
        except BadImage as error:
            raise UserError(
                f"product {product.id}: image: {error}; it was readable when the data were prepared"
            ) from None

    # A row's number determines its random numbers. They cost as much as packing, so only rows that need them use them.
    held: dict[int, tuple[Product, int, Alteration | None]] = {}
    random_rows = grain.MapDataset.range(STEPS * count).seed(config.seed)
    random_rows = random_rows.random_map(lambda number, rng: read(*held.pop(number), rng))

    def row(number: int, product: Product | None, made: bool) -> list[rows_lib.Segment]:
        """`made`: the query is a product. Queries that people wrote or photographed stay as they are."""
        if product is None:
            return []
        role = number % count // data.batch
        alteration = query_alteration if made and not role else None
        content = data.augmented if role else "original"
        if alteration is None and not (data.mixture and not role) and not needs_rng(product, content, data.images):
            return read(product, role, None, None)
        held[number] = product, role, alteration
        return random_rows[number]

    def batch(step: int) -> Batch:
        indices = [int(order[step * data.batch + offset]) for offset in range(data.batch)]
        chosen = [prepared.triplets[index] for index in indices]
        members = prepared.members(indices, data.negatives)
        made = members[: data.batch] < prepared.product_count
        candidates = known_lib.keys(prepared.group, members[data.batch :])
        needed = np.unique([members[r] for r in share if members[r] >= 0]).tolist()
        products = dict(zip(needed, records.read_many(prepared.products, needed), strict=True))
        segments = [row(step * count + r, products.get(int(members[r])), r < data.batch and made[r]) for r in share]
        return Batch(
            rows=rows_lib.pack([[parts] for parts in segments], layout, reader.tokenizer.pad),
            product=members,
            group=np.where(members >= 0, prepared.group[members], -1).astype(np.int32),
            weight=np.array([triplet.weight for triplet in chosen], np.float32),
            triplet=np.array(indices, np.int32),
            known=known.among(members[: data.batch], candidates[: data.batch], candidates),
        )

    return grain.MapDataset.range(STEPS).map(batch)


def from_step(dataset: grain.MapDataset[Batch], step: int, threads: int) -> Iterator[Batch]:
    """Iterates over the batches from `step` on; `threads` threads read ahead."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset[step:].to_iter_dataset(options))
