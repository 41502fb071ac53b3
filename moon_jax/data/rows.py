"""Packing: turns products into segments, and segments into rows of static shape.

A product has at most two segments, [text] and [images then text]. Its three views are spans of them: `t` is the whole
first segment, `mm` the whole second, and `i` the image prefix of the second (attention is causal, so the text after it
cannot change it). The tokens of a view are, in order: for each image `<|vision_start|>`, its `<|image_pad|>` tokens and
`<|vision_end|>`; then the text tokens. A product without text lacks `t` and `mm`; without images it lacks `i` and `mm`.

A template adds tokens before and after those of a view, and they belong to its span. If it adds tokens after, or if the
router depends on the view of a token (`experts.router_term`), view `i` is not a prefix of `mm` and has its own segment;
its images still pass through the vision tower only once.
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
    """Tokens that attend to each other, with their images and the views pooled from them."""

    tokens: np.ndarray  # i32[n]
    position: np.ndarray  # i32[n,3]: M-RoPE time, row, column
    is_visual: np.ndarray  # bool[n]
    images: tuple[Patches, ...]
    spans: tuple[tuple[str, int, int], ...]  # view, first token, last + 1


def prefix_is_view(template: Template, router_term: str) -> bool:
    """Whether view `i` is a prefix of `mm`, so that one segment gives both views."""
    return not len(template.suffix) and router_term not in ("learned", "hard")


def row_text(config: config_lib.Config) -> int:
    """Maximum text tokens of a product in a training row: its own title, plus an enriched one if both are read."""
    return config.data.text_tokens * (2 if config.data.augmented == "all" else 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a row."""

    length: int  # S
    patches: int  # P
    images: int  # N
    products: int  # products in the row; G = 3 · products
    patch_width: int  # 3 · patch²
    merge: int

    @classmethod
    def of(
        cls, config: config_lib.Config, template: Template = BARE, with_images: bool = True, all_views: bool = True
    ) -> Layout:
        """The layout for one product: with all its segments, or only with the one that holds all its content."""
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
        """This layout, doubled until each of the products fits."""
        length = max((sum(len(part.tokens) for part in parts) for parts in products), default=0)
        patches = max((sum(len(image.pixels) for image in _images(parts)) for parts in products), default=0)
        layout = self
        while layout.length < length or layout.patches < patches:
            layout = dataclasses.replace(layout, length=2 * layout.length, patches=2 * layout.patches)
        return layout


def _images(segments: Iterable[Segment]) -> list[Patches]:
    """The distinct images of a product's segments."""
    return list({id(image): image for segment in segments for image in segment.images}.values())


def _assemble(
    text: np.ndarray | None, images: Sequence[Patches], tokenizer: Tokenizer, merge: int, template: Template
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens i32[n], positions i32[n,3] and the visual mask bool[n] of one segment; positions follow Qwen3-VL."""
    grids = tuple((image.hw[0] // merge, image.hw[1] // merge) for image in images)
    words = 0 if text is None else len(text)
    position, visual = _positions(len(template.prefix), grids, words + len(template.suffix))
    frames = [_frame(rows * columns, tokenizer) for rows, columns in grids]
    parts = [template.prefix, *frames, *(() if text is None else (text,)), template.suffix]
    return np.concatenate(parts).astype(np.int32, copy=False), position, visual


@functools.lru_cache(maxsize=256)
def _frame(count: int, tokenizer: Tokenizer) -> np.ndarray:
    """i32[count+2]: the tokens of an image. Read-only, because it is cached."""
    tokens = np.full(count + 2, tokenizer.image_pad, np.int32)
    tokens[0], tokens[-1] = tokenizer.vision_start, tokenizer.vision_end
    tokens.flags.writeable = False
    return tokens


@functools.lru_cache(maxsize=4096)
def _positions(before: int, grids: tuple[tuple[int, int], ...], after: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions i32[n,3] and the visual mask bool[n] of `before` text tokens, images with these merged grids, and
    `after` text tokens. Read-only, because they are cached.

    An image advances the next position by the longer side of its grid.
    """
    positions, visual, start = [], [], 0

    def add_text(count: int) -> None:
        nonlocal start
        positions.append(np.repeat(np.arange(start, start + count)[:, None], 3, axis=1))
        visual.append(np.zeros(count, bool))
        start += count

    add_text(before)
    for rows, columns in grids:
        count = rows * columns
        position, mask = np.zeros((count + 2, 3), int), np.ones(count + 2, bool)
        position[1:-1, 1], position[1:-1, 2] = np.divmod(np.arange(count), columns)
        position[1:-1] += 1
        position[-1] = 1 + max(rows, columns)
        mask[0] = mask[-1] = False
        positions.append(position + start)
        visual.append(mask)
        start += 2 + max(rows, columns)
    add_text(after)
    arrays = np.concatenate(positions).astype(np.int32), np.concatenate(visual)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def segments(
    text: np.ndarray | None,
    images: Sequence[Patches],
    tokenizer: Tokenizer,
    merge: int,
    views: Sequence[str] = VIEWS,
    template: Template = BARE,
    router_term: str = "none",
) -> list[Segment]:
    """The segments for the requested views of a product; views that it lacks are omitted.

    Args:
        text: token ids i32[n], or None. Empty text counts as none.
        images: may be empty.
        views: any of `VIEWS`.
        router_term: `config.experts.router_term`.
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
    """Packs segments into numpy Rows.

    The views of a row's j-th product use slots 3j to 3j + 2; `owner` numbers the products in the given order.

    Args:
        rows: for each row its products, for each product its segments.
        pad: the padding token id.

    Raises:
        ValueError: a row does not fit the layout.
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
            raise ValueError(f"row {r} holds {len(products)} products; its layout allows {layout.products}")
        for j, parts in enumerate(products):
            merged: dict[int, np.ndarray] = {}  # id of an image → indices of its visual tokens, shared by its segments
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
                    visual = np.concatenate([merged[id(image)] for image in part.images])
                    packed.visual[r, at:end][part.is_visual] = visual
                for view, start, stop in part.spans:
                    slot = len(VIEWS) * j + VIEWS.index(view)
                    packed.span[r, slot] = at + start, at + stop
                    packed.view[r, slot] = VIEWS.index(view) + 1
                    packed.owner[r, slot] = owner
                at = end
            owner += 1
    return packed
