"""Packing: products become segments, segments become static rows of arrays.

A product is at most two segments, [text] and [images then text]. Its three views are spans of them: `t` is all of the
first, `mm` all of the second, `i` the second's image prefix (attention is causal, so the text behind cannot change it).
A view's tokens, in this order: for each image `<|vision_start|>`, its `<|image_pad|>` tokens, `<|vision_end|>`; then
the text's tokens. A product without text (or images) lacks `t` and `mm` (or `i` and `mm`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moon_jax import config as config_lib
from moon_jax.data.images import Patches
from moon_jax.data.text import Tokenizer
from moon_jax.types import VIEWS, Rows


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens that attend to one another, with their images and the views pooled from them."""

    tokens: np.ndarray  # i32[n]
    position: np.ndarray  # i32[n,3]: M-RoPE time, row, column
    is_visual: np.ndarray  # bool[n]
    images: tuple[Patches, ...]
    spans: tuple[tuple[str, int, int], ...]  # view, first token, last + 1


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
    def of(cls, config: config_lib.Config, with_images: bool = True, both_segments: bool = True) -> Layout:
        """A row of one product: two segments, or only the one that holds all it has."""
        data, merge = config.data, config.vision.merge
        images = data.images if with_images else 0
        visual = images * data.visual_tokens
        texts = 2 if both_segments and images else 1
        return cls(
            length=texts * data.text_tokens + visual + 2 * images,
            patches=visual * merge**2,
            images=images,
            products=1,
            patch_width=3 * config.vision.patch**2,
            merge=merge,
        )


def _assemble(
    text: np.ndarray | None, images: Sequence[Patches], tokenizer: Tokenizer, merge: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and the visual mask of one segment, positions as Qwen3-VL counts them."""
    tokens, positions, visual = [], [], []
    start = 0  # the next position; an image advances it by the longer side of its merged grid
    for image in images:
        rows, columns = image.hw[0] // merge, image.hw[1] // merge
        count = rows * columns
        grid = np.zeros((count, 3), np.int32)
        grid[:, 1], grid[:, 2] = np.divmod(np.arange(count), columns)
        after = start + 1 + max(rows, columns)
        tokens.append(np.array([tokenizer.vision_start, *[tokenizer.image_pad] * count, tokenizer.vision_end]))
        positions += [np.full((1, 3), start), grid + start + 1, np.full((1, 3), after)]
        visual.append(np.array([False, *[True] * count, False]))
        start = after + 1
    if text is not None:
        tokens.append(text)
        positions.append(np.repeat(np.arange(start, start + len(text))[:, None], 3, axis=1))
        visual.append(np.zeros(len(text), bool))
    return (
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(visual),
    )


def segments(
    text: np.ndarray | None,
    images: Sequence[Patches],
    tokenizer: Tokenizer,
    merge: int,
    views: Sequence[str] = VIEWS,
) -> list[Segment]:
    """The segments that give the wanted views of a product, as far as it has them.

    Args:
        text: token ids i32[n], or None. An empty text counts as none.
        images: may be empty.
        views: any of `VIEWS`.
    """
    text = None if text is None or not len(text) else text
    made = []
    if text is not None and "t" in views:
        tokens, position, visual = _assemble(text, (), tokenizer, merge)
        made.append(Segment(tokens, position, visual, (), (("t", 0, len(tokens)),)))
    both = text is not None and "mm" in views
    if images and (both or "i" in views):
        tokens, position, visual = _assemble(text if both else None, images, tokenizer, merge)
        prefix = sum(2 + image.hw[0] * image.hw[1] // merge**2 for image in images)
        spans = [("i", 0, prefix)] if "i" in views else []
        spans += [("mm", 0, len(tokens))] if both else []
        made.append(Segment(tokens, position, visual, tuple(images), tuple(spans)))
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
            for part in parts:
                number += 1
                end = at + len(part.tokens)
                patch_end = patch + sum(len(image.pixels) for image in part.images)
                if end > length or patch_end > layout.patches or image_index + len(part.images) > layout.images:
                    raise ValueError(f"row {r}: {end} tokens and {patch_end} patches do not fit {layout}")
                packed.tokens[r, at:end] = part.tokens
                packed.segment[r, at:end] = number
                packed.position[r, at:end] = part.position
                first = patch // layout.merge**2
                packed.visual[r, at:end][part.is_visual] = first + np.arange(part.is_visual.sum())
                for image in part.images:
                    stop = patch + len(image.pixels)
                    packed.patches[r, patch:stop] = image.pixels
                    packed.patch_image[r, patch:stop] = image_index
                    packed.patch_yx[r, patch:stop] = image.yx
                    packed.image_hw[r, image_index] = image.hw
                    patch, image_index = stop, image_index + 1
                for view, start, stop in part.spans:
                    slot = len(VIEWS) * j + VIEWS.index(view)
                    packed.span[r, slot] = at + start, at + stop
                    packed.view[r, slot] = VIEWS.index(view) + 1
                    packed.owner[r, slot] = owner
                at = end
            owner += 1
    return packed
