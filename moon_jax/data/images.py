"""Images on the host: bounded decoding, Qwen's resize rule, crops, and patches in the order of the vision tower."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moon_jax import config as config_lib

LONGEST_TO_SHORTEST = 200
"""Qwen rejects images with a larger aspect ratio."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are decoded. Pillow supports more, but some of them start other programs."""


class BadImage(ValueError):
    """An unusable image; the message is the reason, without the file name."""


def check_shape(height: int, width: int) -> None:
    """Checks the aspect ratio against Qwen's limit. Crops of a checked image need no check.

    Raises:
        BadImage: the image is too elongated.
    """
    if max(height, width) > LONGEST_TO_SHORTEST * min(height, width):
        raise BadImage(f"{width} x {height} pixels: more elongated than {LONGEST_TO_SHORTEST}:1")


@dataclasses.dataclass(frozen=True)
class ResizeRule:
    """The pixel budget of an image and the grid that its size must fit, in pixels."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    within_budget: bool  # whether max_pixels is a hard limit

    @classmethod
    def of(cls, config: config_lib.Config, within_budget: bool = True) -> ResizeRule:
        """The config's rule; with `within_budget=False` exactly Qwen's rule."""
        area = (config.vision.patch * config.vision.merge) ** 2
        return cls(
            patch=config.vision.patch,
            merge=config.vision.merge,
            min_pixels=config.data.min_visual_tokens * area,
            max_pixels=config.data.visual_tokens * area,
            within_budget=within_budget,
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing by Qwen's rule (`smart_resize`): multiples of patch · merge.

        Qwen's rule rounds up, so elongated images can exceed a small budget (never one of 200 visual tokens or more).
        Training rows have a fixed size, so `within_budget` then shortens the longer side.
        """
        factor = self.patch * self.merge
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            beta = math.sqrt(height * width / self.max_pixels)
            high = max(factor, math.floor(height / beta / factor) * factor)
            wide = max(factor, math.floor(width / beta / factor) * factor)
        elif high * wide < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * beta / factor) * factor
            wide = math.ceil(width * beta / factor) * factor
        if self.within_budget and high * wide > self.max_pixels:
            longest = self.max_pixels // min(high, wide) // factor * factor
            high, wide = (high, longest) if wide > high else (longest, wide)
            if min(high, wide) == 0:
                high = wide = math.isqrt(self.max_pixels) // factor * factor
        return high, wide


@dataclasses.dataclass(frozen=True)
class Patches:
    """One image as input of the tower: patches in merge-block order, in which merge² neighbours are consecutive."""

    pixels: np.ndarray  # u8[P,3·patch²]: channel, row, column
    yx: np.ndarray  # i32[P,2]
    hw: tuple[int, int]  # height and width of the grid, in patches


def decode(source: Any, max_pixels: int) -> Image.Image:
    """Decodes encoded bytes, a path, or a `PIL.Image.Image` to an RGB image.

    Applies orientation tags. Grey, palette and CMYK images become RGB; transparent pixels become white, as in
    transformers' image processors.

    Raises:
        BadImage: missing, empty, truncated, in an unknown format, or larger than `max_pixels` pixels.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes | bytearray | memoryview):
            if not len(source):
                raise BadImage("the image is empty")
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        elif isinstance(source, str | os.PathLike):
            image = Image.open(io.BytesIO(Path(source).read_bytes()), formats=FORMATS)
        else:
            raise BadImage(f"of type {type(source).__name__}, not an image; give bytes, a path or a PIL image")
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels, above data.max_pixels = {max_pixels}")
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image, or not one of {', '.join(FORMATS)}") from None
    except OSError as error:
        raise BadImage(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
    except Exception as error:
        # Pillow's decoders raise nearly any type on broken files: SyntaxError, RuntimeError, struct.error, …
        raise BadImage(str(error) or type(error).__name__) from None


def crop_box(width: int, height: int, area: tuple[float, float], rng: np.random.Generator) -> tuple[float, ...]:
    """A random crop (left, top, right, bottom) in pixels, with the image's aspect ratio and a uniform position. Its
    share of the image's area is uniform in `area`.
    """
    scale = math.sqrt(rng.uniform(*area))
    left, top = rng.uniform(0, width * (1 - scale)), rng.uniform(0, height * (1 - scale))
    return left, top, left + width * scale, top + height * scale


def patchify(
    image: Image.Image,
    rule: ResizeRule,
    box: tuple[float, ...] | None = None,
    edit: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
) -> Patches:
    """Resizes the image, or the part in `box` (left, top, right, bottom), bicubically and cuts it into patches.

    Args:
        edit: changes the resized pixels, u8[height,width,3], without changing their size.
    """
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    high, wide = rule.size(max(1, round(bottom - top)), max(1, round(right - left)))
    pixels = edit(np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC, box=box)))
    merge, patch = rule.merge, rule.patch
    rows, columns = high // patch, wide // patch
    # (block row, merge, pixel row, block column, merge, pixel column, channel)
    pixels = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3 * patch * patch)
    return Patches(np.ascontiguousarray(pixels), _grid(rows, columns, merge), (rows, columns))


@functools.lru_cache(maxsize=1024)
def _grid(rows: int, columns: int, merge: int) -> np.ndarray:
    """i32[P,2]: row and column of each patch, in merge-block order. Read-only, because it is cached."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).astype(np.int32)
    grid = grid.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    grid.flags.writeable = False
    return grid
