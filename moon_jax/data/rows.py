"""Packing: products become segments, segments become static rows of arrays.

A product is at most two segments, [text] and [images then text]. Its three views are spans of them: `t` is all of the
first, `mm` all of the second, `i` the second's image prefix (attention is causal, so the text behind cannot change it).
A view's tokens, in this order: for each image `<|vision_start|>`, its `<|image_pad|>` tokens, `<|vision_end|>`; then
the text's tokens. A product without text (or images) lacks `t` and `mm` (or `i` and `mm`).

A template puts tokens before and behind a view's own, and they belong to its span. Where some stand behind, or the
router asks which view a token is of (`experts.router_term`), view `i` is no prefix of `mm`, and gets a segment of its
own; its images still go through the vision tower once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from moon_jax import config as config_lib
from moon_jax.data.images import Patches
from moon_jax.data.text import BARE, Template, Tokenizer
from moon_jax.types import VIEWS, Rows


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens that attend to one another, with their images and the views pooled from them."""

    tokens: np.ndarray  # i32[n]
    position: np.ndarray  # i32[n,3]: M-RoPE time, row, column
    is_visual: np.ndarray  # bool[n]
    images: tuple[Patches, ...]
    spans: tuple[tuple[str, int, int], ...]  # view, first token, last + 1


def prefix_is_view(template: Template, router_term: str) -> bool:
    """Whether images before a text are computed as they would be alone, so that one segment gives both views."""
    return not len(template.suffix) and router_term == "none"


def row_text(config: config_lib.Config) -> int:
    """Text tokens of a training row's product: its own title, and an enriched one where both are read."""
    return config.data.text_tokens * (2 if config.data.augmented == "all" else 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a row."""

    length: int  # S
    patches: int  # P
    images: int  # N
    products: int  # whose views the row holds; G = 3 · products
    patch_width: int  # 3 · patch²
    merge: int

    @classmethod
    def of(
        cls, config: config_lib.Config, template: Template = BARE, with_images: bool = True, all_views: bool = True
    ) -> Layout:
        """A row of one product: all its segments, or only the one that holds all it has."""
        data, merge = config.data, config.vision.merge
        images = data.images if with_images else 0
        visual = images * data.visual_tokens
        text = row_text(config) if all_views else data.text_tokens
        text_only, image_only = text + template.length, visual + 2 * images + template.length
        length = image_only + text
        if all_views and images:
            length += text_only + (0 if prefix_is_view(template, config.experts.router_term) else image_only)
        return cls(
            length=length,
            patches=visual * merge**2,
            images=images,
            products=1,
            patch_width=3 * config.vision.patch**2,
            merge=merge,
        )

    def holding(self, products: Sequence[Sequence[Segment]]) -> Layout:
        """This layout, or the first of its doublings that each of the products fits."""
        length = max((sum(len(part.tokens) for part in parts) for parts in products), default=0)
        patches = max((sum(len(image.pixels) for image in _images(parts)) for parts in products), default=0)
        layout = self
        while layout.length < length or layout.patches < patches:
            layout = dataclasses.replace(layout, length=2 * layout.length, patches=2 * layout.patches)
        return layout


def _images(segments: Iterable[Segment]) -> list[Patches]:
    """The images of a product's segments, each once."""
    return list({id(image): image for segment in segments for image in segment.images}.values())


def _assemble(
    text: np.ndarray | None, images: Sequence[Patches], tokenizer: Tokenizer, merge: int, template: Template
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and the visual mask of one segment, positions as Qwen3-VL counts them."""
    grids = tuple((image.hw[0] // merge, image.hw[1] // merge) for image in images)
    words = 0 if text is None else len(text)
    position, visual = _places(len(template.prefix), grids, words + len(template.suffix))
    frames = [_frame(rows * columns, tokenizer) for rows, columns in grids]
    parts = [template.prefix, *frames, *(() if text is None else (text,)), template.suffix]
    return np.concatenate(parts).astype(np.int32, copy=False), position, visual


@functools.lru_cache(maxsize=256)
def _frame(count: int, tokenizer: Tokenizer) -> np.ndarray:
    """i32[count+2]: the tokens of an image; shared, so it may not be written."""
    tokens = np.full(count + 2, tokenizer.image_pad, np.int32)
    tokens[0], tokens[-1] = tokenizer.vision_start, tokenizer.vision_end
    tokens.flags.writeable = False
    return tokens


@functools.lru_cache(maxsize=4096)
def _places(before: int, grids: tuple[tuple[int, int], ...], behind: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions i32[n,3] and the visual mask bool[n] of words, images of these merged grids, and words; shared.

    An image advances the next position by the longer side of its grid.
    """
    positions, visual, start = [], [], 0

    def add_words(count: int) -> None:
        nonlocal start
        positions.append(np.repeat(np.arange(start, start + count)[:, None], 3, axis=1))
        visual.append(np.zeros(count, bool))
        start += count

    add_words(before)
    for rows, columns in grids:
        count = rows * columns
        place, seen = np.zeros((count + 2, 3), int), np.ones(count + 2, bool)
        place[1:-1, 1], place[1:-1, 2] = np.divmod(np.arange(count), columns)
        place[1:-1] += 1
        place[-1] = 1 + max(rows, columns)
        seen[0] = seen[-1] = False
        positions.append(place + start)
        visual.append(seen)
        start += 2 + max(rows, columns)
    add_words(behind)
    found = np.concatenate(positions).astype(np.int32), np.concatenate(visual)
    for array in found:
        array.flags.writeable = False
    return found


def segments(
    text: np.ndarray | None,
    images: Sequence[Patches],
    tokenizer: Tokenizer,
    merge: int,
    views: Sequence[str] = VIEWS,
    template: Template = BARE,
    router_term: str = "none",
) -> list[Segment]:
    """The segments that give the wanted views of a product, as far as it has them.

    Args:
        text: token ids i32[n], or None. An empty text counts as none.
        images: may be empty.
        views: any of `VIEWS`.
        router_term: that of the config.
    """
    text = None if text is None or not len(text) else text
    made = []

    def add(words: np.ndarray | None, pictures: Sequence[Patches], *ends: tuple[str, int | None]) -> None:
        tokens, position, visual = _assemble(words, pictures, tokenizer, merge, template)
        spans = tuple((view, 0, end or len(tokens)) for view, end in ends)
        made.append(Segment(tokens, position, visual, tuple(pictures), spans))

    if text is not None and "t" in views:
        add(text, (), ("t", None))
    alone = bool(images) and "i" in views
    both = bool(images) and text is not None and "mm" in views
    if alone and both and prefix_is_view(template, router_term):
        prefix = len(template.prefix) + sum(2 + image.hw[0] * image.hw[1] // merge**2 for image in images)
        add(text, images, ("i", prefix), ("mm", None))
    else:
        if alone:
            add(None, images, ("i", None))
        if both:
            add(text, images, ("mm", None))
    return made


def pack(rows: Sequence[Sequence[Sequence[Segment]]], layout: Layout, pad: int) -> Rows:
    """Numpy rows: for each row its products, for each product its segments.

    Views of the row's j-th product take slots 3j to 3j + 2; `owner` counts products in the order given.

    Raises:
        ValueError: a row that does not fit the layout.
    """
    count, length = len(rows), layout.length
    slots = layout.products * len(VIEWS)
    packed = Rows(
        tokens=np.full((count, length), pad, np.int32),
        segment=np.zeros((count, length), np.int32),
        position=np.zeros((count, length, 3), np.int32),
        visual=np.full((count, length), -1, np.int32),
        patches=np.zeros((count, layout.patches, layout.patch_width), np.uint8),
        patch_image=np.full((count, layout.patches), -1, np.int32),
        patch_yx=np.zeros((count, layout.patches, 2), np.int32),
        image_hw=np.zeros((count, layout.images, 2), np.int32),
        span=np.zeros((count, slots, 2), np.int32),
        view=np.zeros((count, slots), np.int8),
        owner=np.full((count, slots), -1, np.int32),
    )
    owner = 0
    for r, products in enumerate(rows):
        at = patch = image_index = number = 0
        if len(products) > layout.products:
            raise ValueError(f"row {r} holds {len(products)} products, its layout {layout.products}")
        for j, parts in enumerate(products):
            merged: dict[int, np.ndarray] = {}  # an image's visual tokens, whichever of the segments show it
            for image in _images(parts):
                stop = patch + len(image.pixels)
                if stop > layout.patches or image_index == layout.images:
                    raise ValueError(f"row {r}: {image_index + 1} images of {stop} patches do not fit {layout}")
                packed.patches[r, patch:stop] = image.pixels
                packed.patch_image[r, patch:stop] = image_index
                packed.patch_yx[r, patch:stop] = image.yx
                packed.image_hw[r, image_index] = image.hw
                merged[id(image)] = np.arange(patch // layout.merge**2, stop // layout.merge**2)
                patch, image_index = stop, image_index + 1
            for part in parts:
                number += 1
                end = at + len(part.tokens)
                if end > length:
                    raise ValueError(f"row {r}: {end} tokens do not fit {layout}")
                packed.tokens[r, at:end] = part.tokens
                packed.segment[r, at:end] = number
                packed.position[r, at:end] = part.position
                if part.images:
                    shown = np.concatenate([merged[id(image)] for image in part.images])
                    packed.visual[r, at:end][part.is_visual] = shown
                for view, start, stop in part.spans:
                    slot = len(VIEWS) * j + VIEWS.index(view)
                    packed.span[r, slot] = at + start, at + stop
                    packed.view[r, slot] = VIEWS.index(view) + 1
                    packed.owner[r, slot] = owner
                at = end
            owner += 1
    return packed
