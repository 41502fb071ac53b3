"""A synthetic catalogue of rendered household goods, for users without data.

A product has a kind, a colour, a pattern, a material and a background, and a title in the style of a seller: terse
("navy mug"), full, redundant (padded with empty words), or partly wrong (one fact has a wrong value). The title never
names the background, and the picture never shows the brand. Product `n` depends only on (seed, n).

Everything is drawn in numpy on coordinates x (right) and y (up) in [-1, 1]; `f` is the signed distance to an outline,
positive inside, so that edges are smooth at any resolution.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moon_jax.interrupt import thread_pool

PIXELS = 96
"""Side length of a picture, in pixels: nine visual tokens of the quickstart, so that it trains quickly."""

SCHEMA = pa.schema(
    [
        ("product_id", pa.string()),
        ("title", pa.string()),
        ("category", pa.list_(pa.string())),
        ("brand", pa.string()),
        ("attributes", pa.map_(pa.string(), pa.string())),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)

COLOURS = {
    "red": (196, 44, 48),
    "orange": (232, 126, 40),
    "yellow": (238, 200, 66),
    "green": (72, 142, 74),
    "teal": (34, 142, 142),
    "sky blue": (112, 176, 222),
    "navy": (36, 58, 116),
    "purple": (124, 72, 152),
    "pink": (230, 142, 168),
    "brown": (126, 82, 52),
    "grey": (140, 144, 148),
    "black": (46, 46, 50),
    "white": (238, 236, 230),
}
SYNONYMS = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine",),
    "green": ("forest green",),
    "teal": ("petrol",),
    "sky blue": ("light blue",),
    "navy": ("dark blue",),
    "purple": ("violet",),
    "brown": ("chestnut",),
    "grey": ("gray",),
    "white": ("ivory",),
    "striped": ("stripes",),
    "chequered": ("checked",),
    "dotted": ("polka dot",),
    "zigzag": ("chevron",),
    "mug": ("cup",),
    "cushion": ("pillow",),
    "lamp": ("table light",),
    "tote bag": ("shopper",),
    "steel": ("stainless steel", "metal"),
    "wood": ("wooden",),
    "ceramic": ("porcelain",),
}
PATTERNS = ("plain", "striped", "chequered", "dotted", "zigzag", "floral")
BRANDS = ("Aldera", "Brightnook", "Casavo", "Dunmere", "Elmfold", "Fjordly", "Kestrel & Co", "Lumora", "Morrow", "Tavi")
EMPTY_WORDS = (
    "high quality", "best gift", "new arrival", "hot sale", "free shipping", "premium", "for home", "2024 trend",
    "must have", "limited edition", "top rated", "elegant design",
)  # fmt: skip
BACKGROUNDS = ("studio", "pastel", "table", "planks", "marble", "dusk")

TERSE, FULL, REDUNDANT, WRONG = "terse", "full", "redundant", "partly wrong"
TITLE_STYLES = {TERSE: 0.2, FULL: 0.45, REDUNDANT: 0.25, WRONG: 0.1}

HARD, SOFT, MIXED = ("ceramic", "steel", "glass"), ("linen", "leather"), ("wood", "steel", "leather")


@dataclasses.dataclass(frozen=True)
class Facts:
    """The attributes of a product."""

    kind: str
    colour: str
    pattern: str
    material: str
    background: str
    brand: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a product. Pieces are painted in order. `stuff` is `body`, `trim` (plain and darker) or `hollow` (an
    opening).
    """

    f: np.ndarray
    nx: np.ndarray  # surface normal, left to right
    ny: np.ndarray  # surface normal, upwards
    u: np.ndarray  # pattern coordinates
    v: np.ndarray
    stuff: str = "body"


# --- outlines -------------------------------------------------------------------------------------------------------


def _lathe(x: np.ndarray, y: np.ndarray, profile: Iterable[tuple[float, float]], stuff: str = "body") -> Part:
    """A body of revolution, seen slightly from above; `profile` lists (height, radius) from the bottom up."""
    heights, radii = map(np.array, zip(*profile, strict=True))
    fine = np.linspace(heights[0], heights[-1], 65)
    # A moving average rounds the corners of the profile.
    smooth = np.convolve(np.pad(np.interp(fine, heights, radii), 3, mode="edge"), np.ones(7) / 7, mode="valid")
    level = y - 0.14 * x**2
    radius = np.interp(level, fine, smooth)
    f = np.minimum(radius - np.abs(x), np.minimum(level - heights[0], heights[-1] - level))
    turn = np.clip(x / np.maximum(radius, 1e-3), -1, 1)
    slope = np.interp(level, fine, np.gradient(smooth, fine))
    return Part(f, turn, np.clip(-0.5 * slope, -0.5, 0.5), np.arcsin(turn) * radii.max(), level, stuff)


def _flat(x: np.ndarray, y: np.ndarray, f: np.ndarray, bevel: float = 0.08, stuff: str = "body") -> Part:
    """A flat shape with a rounded edge of width `bevel`."""
    edge = np.clip(1 - f / bevel, 0, 1)
    gy, gx = np.gradient(f)
    length = np.maximum(np.hypot(gx, gy), 1e-6)
    return Part(f, -0.85 * edge * gx / length, 0.85 * edge * gy / length, x, y, stuff)


def _ellipse(x: np.ndarray, y: np.ndarray, wide: float, high: float) -> np.ndarray:
    return (1 - np.hypot(x / wide, y / high)) * min(wide, high)


def _ring(x: np.ndarray, y: np.ndarray, wide: float, high: float, thick: float) -> np.ndarray:
    return thick - np.abs(_ellipse(x, y, wide, high))


def _box(x: np.ndarray, y: np.ndarray, wide: float, high: float, rounding: float = 0.08) -> np.ndarray:
    dx, dy = np.abs(x) - wide + rounding, np.abs(y) - high + rounding
    return rounding - np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) - np.minimum(np.maximum(dx, dy), 0)


def _opening(x: np.ndarray, y: np.ndarray, height: float, radius: float) -> Part:
    return _flat(x, y, _ellipse(x, y - height, radius, 0.16 * radius + 0.02), 0.03, "hollow")


def _mug(x, y):
    handle = _flat(x, y, _ring(x - 0.48, y + 0.02, 0.27, 0.3, 0.055), 0.06)
    return [handle, _lathe(x, y, [(-0.6, 0.42), (-0.5, 0.48), (0.56, 0.5)]), _opening(x, y, 0.59, 0.47)]


def _vase(x, y):
    profile = [(-0.82, 0.26), (-0.5, 0.48), (-0.1, 0.5), (0.35, 0.2), (0.6, 0.17), (0.78, 0.27)]
    return [_lathe(x, y, profile), _opening(x, y, 0.79, 0.24)]


def _bottle(x, y):
    body = [(-0.85, 0.3), (-0.78, 0.32), (0.2, 0.32), (0.45, 0.12), (0.72, 0.11)]
    return [_lathe(x, y, body), _lathe(x, y, [(0.7, 0.13), (0.88, 0.13)], "trim")]


def _bowl(x, y):
    return [
        _lathe(x, y, [(-0.5, 0.24), (-0.42, 0.28), (-0.3, 0.45), (0.0, 0.66), (0.28, 0.76)]),
        _opening(x, y, 0.36, 0.72),
    ]


def _lamp(x, y):
    foot = _lathe(x, y, [(-0.85, 0.32), (-0.76, 0.3), (-0.7, 0.06), (0.1, 0.05)], "trim")
    return [foot, _lathe(x, y, [(0.0, 0.58), (0.78, 0.3)])]


def _teapot(x, y):
    spout = _flat(x, y, np.minimum(_box(x - 0.62 - 0.4 * y, y - 0.05, 0.09, 0.32), 0.4 - np.abs(y)), 0.08)
    handle = _flat(x, y, _ring(x + 0.55, y - 0.05, 0.28, 0.28, 0.05), 0.06)
    body = _lathe(x, y, [(-0.5, 0.3), (-0.4, 0.45), (-0.1, 0.58), (0.2, 0.5), (0.4, 0.28), (0.46, 0.14)])
    return [spout, handle, body, _flat(x, y, _ellipse(x, y - 0.53, 0.1, 0.1), 0.1, "trim")]


def _clock(x, y):
    face = _flat(x, y, _ellipse(x, y, 0.7, 0.7), 0.12)
    dial = _flat(x, y, _ring(x, y, 0.72, 0.72, 0.05), 0.05, "trim")
    hands = np.maximum(_box(x - 0.02, y - 0.2, 0.03, 0.24, 0.02), _box(x - 0.16, y + 0.02, 0.18, 0.035, 0.02))
    return [face, dial, _flat(x, y, hands, 0.02, "trim")]


def _cushion(x, y):
    f = np.minimum(0.72 - 0.09 * np.cos(np.pi * y) - np.abs(x), 0.72 - 0.09 * np.cos(np.pi * x) - np.abs(y))
    return [_flat(x, y, f, 0.42)]


def _box_with_lid(x, y):
    body = _flat(x, y + 0.16, _box(x, y + 0.2, 0.6, 0.46, 0.06), 0.07)
    lid = _flat(x, y, _box(x, y - 0.36, 0.66, 0.15, 0.06), 0.07)
    return [body, lid, _flat(x, y, _ellipse(x, y - 0.34, 0.09, 0.05), 0.05, "trim")]


def _stool(x, y):
    legs = np.maximum(_box(np.abs(x) - 0.36 + 0.18 * y, y + 0.35, 0.06, 0.5, 0.03), _box(x, y + 0.42, 0.4, 0.04, 0.03))
    return [_flat(x, y, legs, 0.06, "trim"), _flat(x, y, _box(x, y - 0.24, 0.66, 0.16, 0.13), 0.14)]


def _tote(x, y):
    f = _box(x / (1 - 0.12 * (y + 0.25)), y + 0.25, 0.6, 0.52, 0.07)
    strap = np.where(y > 0.1, _ring(x, y - 0.22, 0.3, 0.56, 0.045), -1.0)
    return [_flat(x, y, strap, 0.05, "trim"), _flat(x, y, f, 0.1)]


def _plate(x, y):
    rim = _flat(x, y, _ellipse(x, y, 0.8, 0.8), 0.1)
    return [rim, _flat(x, y, _ring(x, y, 0.5, 0.5, 0.018), 0.02, "trim")]


def _jug(x, y):
    handle = _flat(x, y, _ring(x - 0.42, y - 0.06, 0.26, 0.42, 0.055), 0.06)
    body = _lathe(x, y, [(-0.75, 0.34), (-0.55, 0.46), (-0.1, 0.4), (0.4, 0.26), (0.66, 0.34)])
    return [handle, body, _opening(x - 0.02, y, 0.69, 0.31)]


def _armchair(x, y):
    legs = _flat(x, y, _box(np.abs(x) - 0.5, y + 0.74, 0.06, 0.14, 0.03), 0.05, "trim")
    back = _flat(x, y, _box(x, y - 0.2, 0.5, 0.6, 0.25), 0.2)
    arms = _flat(x, y, _box(np.abs(x) - 0.6, y + 0.3, 0.15, 0.36, 0.14), 0.15)
    return [legs, back, _flat(x, y, _box(x, y + 0.36, 0.52, 0.28, 0.1), 0.16), arms]


KINDS: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    "mug": (_mug, "kitchen", HARD),
    "vase": (_vase, "decoration", HARD),
    "bottle": (_bottle, "kitchen", HARD),
    "bowl": (_bowl, "kitchen", (*HARD, "wood")),
    "lamp": (_lamp, "furniture", ("linen", "glass", "steel")),
    "teapot": (_teapot, "kitchen", HARD),
    "wall clock": (_clock, "decoration", ("wood", "steel", "ceramic")),
    "cushion": (_cushion, "textiles", SOFT),
    "storage box": (_box_with_lid, "furniture", (*MIXED, "linen")),
    "stool": (_stool, "furniture", MIXED),
    "tote bag": (_tote, "textiles", SOFT),
    "plate": (_plate, "kitchen", (*HARD, "wood")),
    "jug": (_jug, "kitchen", HARD),
    "armchair": (_armchair, "furniture", SOFT),
}
"""Kind → its drawing function, its department, its possible materials."""

# --- surfaces -------------------------------------------------------------------------------------------------------


def _wave(value: np.ndarray, sharpness: float = 12.0) -> np.ndarray:
    """Soft bands between 0 and 1, with period 1."""
    return 1 / (1 + np.exp(-sharpness * np.sin(2 * np.pi * value)))


def _pattern(name: str, u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray | float:
    """The share of the second colour, 0 to 1."""
    u, v = u * scale, v * scale
    if name == "striped":
        return _wave(v)
    if name == "chequered":
        return _wave(u / 2, 30) * (1 - _wave(v / 2, 30)) + (1 - _wave(u / 2, 30)) * _wave(v / 2, 30)
    if name == "zigzag":
        return _wave(v + np.abs((u % 1) - 0.5))
    if name in ("dotted", "floral"):
        row = np.floor(v)
        du, dv = (u + 0.5 * (row % 2)) % 1 - 0.5, v % 1 - 0.5
        reach, angle = np.hypot(du, dv), np.arctan2(dv, du)
        radius = 0.28 if name == "dotted" else 0.26 + 0.13 * np.cos(5 * angle)
        spot = np.clip((radius - reach) * 12, 0, 1)
        return spot if name == "dotted" else spot * np.clip((reach - 0.09) * 14, 0, 1)
    return 0.0


def _grain(rng: np.random.Generator, coarse: tuple[int, int], size: int = PIXELS) -> np.ndarray:
    """Smooth noise f32[size,size], mean 0 and scale about 1, from a grid of `coarse` (rows, columns)."""
    small = Image.fromarray(rng.normal(size=coarse).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


GLOSS = {"ceramic": (0.55, 30), "steel": (0.9, 14), "glass": (0.9, 50), "wood": (0.12, 8), "linen": (0, 1),
         "leather": (0.28, 10)}  # fmt: skip
"""Strength and sharpness of each material's highlight."""


def _shade(colour: np.ndarray, part: Part, material: str, rng: np.random.Generator) -> np.ndarray:
    """The shaded colour f32[y,x,3], lit from the upper left in front."""
    nz = np.sqrt(np.clip(1 - part.nx**2 - part.ny**2, 0.02, 1))
    light = np.clip(-0.5 * part.nx + 0.45 * part.ny + 0.74 * nz, 0, 1)
    strength, sharpness = GLOSS[material]
    if material == "steel":  # brushed: reflects bright and dark bands
        colour = 0.55 * colour + 0.45 * colour.mean() * 0.6 + 45
        light = light * (0.82 + 0.22 * np.cos(7 * part.nx)) + 0.04 * _grain(rng, (PIXELS // 2, 3))
    elif material == "wood":
        rings = np.sin(2 * np.pi * (2.2 * part.u + 0.5 * _grain(rng, (5, 12)) + 6 * part.u))
        colour = 0.6 * colour + 0.4 * np.array([150, 106, 66])
        light = light * (0.94 + 0.08 * rings)
    elif material == "linen":
        across, down = np.sin(np.arange(PIXELS) * 1.9), np.sin(np.arange(PIXELS) * 1.7)
        light = light * (0.95 + 0.06 * across[None] * down[:, None] + 0.03 * _grain(rng, (40, 40)))
    elif material == "leather":
        light = light * (0.88 + 0.06 * _grain(rng, (48, 48)))
    highlight = strength * np.clip(-0.42 * part.nx + 0.4 * part.ny + 0.82 * nz, 0, 1) ** sharpness
    return colour * (0.34 + 0.76 * light)[..., None] + 150 * highlight[..., None]


def _background(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The background f32[y,x,3], and the darkness of a shadow on it."""
    floor = -0.35 + 0.1 * rng.uniform(-1, 1)
    glow = np.exp(-((x - rng.uniform(-0.4, 0.4)) ** 2 + (y - 0.2) ** 2))[..., None]
    if name == "studio":
        return 218 + 32 * glow * np.ones(3), 0.3
    if name == "pastel":
        tint = 205 + 45 * rng.random(3)
        return np.where((y > floor)[..., None], tint, tint * 0.9) + 10 * glow, 0.3
    if name == "table":
        wood = np.array([172, 128, 88]) + 9 * _grain(rng, (60, 4))[..., None]
        return np.where((y > floor)[..., None], np.array([226, 220, 208]) + 14 * glow, wood), 0.4
    if name == "planks":
        gaps = 1 - 0.35 * np.exp(-(((x * 2.5 + 0.3) % 1 - 0.5) ** 2) * 900)
        return (np.array([196, 160, 120]) + 8 * _grain(rng, (5, 70))[..., None]) * gaps[..., None], 0.4
    if name == "marble":
        vein = np.abs(_grain(rng, (5, 5)) + 0.4 * _grain(rng, (16, 16)))
        return 236 - 46 * np.exp(-14 * vein)[..., None] * np.ones(3), 0.3
    sky = np.clip((y + 1) / 2, 0, 1)[..., None]
    return np.array([104, 84, 110]) * (1 - sky) + np.array([44, 50, 84]) * sky + 30 * glow, 0.45


def render(facts: Facts, rng: np.random.Generator) -> Image.Image:
    """Renders the product's photo, PIXELS × PIXELS."""
    axis = (np.arange(PIXELS, dtype=np.float32) + 0.5) / PIXELS * 2 - 1
    x0, y0 = np.meshgrid(axis, -axis)
    picture, darkness = _background(facts.background, x0, y0, rng)
    zoom, tilt = rng.uniform(0.78, 1.0), rng.normal(0, 0.05)
    x1, y1 = (x0 - rng.uniform(-0.1, 0.1)) / zoom, (y0 - rng.uniform(-0.08, 0.06)) / zoom
    x, y = np.cos(tilt) * x1 - np.sin(tilt) * y1, np.sin(tilt) * x1 + np.cos(tilt) * y1
    if rng.random() < 0.5:
        x = -x
    first = np.clip(np.array(COLOURS[facts.colour], np.float32) + rng.normal(0, 6, 3), 0, 255)
    bright = first.mean() > 150
    second = first * 0.45 if bright else 0.25 * first + 0.75 * np.array([246, 240, 226])
    scale = rng.uniform(3.6, 5.0)
    draw, _, _ = KINDS[facts.kind]
    parts = draw(x, y)
    lowest = min(y1[part.f > 0].min() for part in parts)
    shadow = np.exp(-2.2 * ((x1 - 0.12) ** 2 / 0.5 + (y1 - lowest + 0.02) ** 2 / 0.02))
    picture = picture * (1 - darkness * shadow[..., None])
    for part in parts:
        cover = np.clip(0.5 + part.f * zoom * PIXELS / 2, 0, 1)[..., None]
        if part.stuff == "hollow":
            surface = first * (0.42 + 0.2 * (part.v - part.v.mean())[..., None])
        elif part.stuff == "trim":
            surface = _shade(0.3 * first + 0.3 * np.array([90, 74, 60]), part, "wood", rng)
        else:
            amount = np.asarray(_pattern(facts.pattern, part.u, part.v, scale))[..., None]
            surface = _shade(first * (1 - amount) + second * amount, part, facts.material, rng)
            if facts.material == "glass":
                rim = np.clip(1.15 * np.abs(part.nx) ** 2 + 0.42 + 0.3 * amount[..., 0], 0, 0.95)[..., None]
                cover = cover * rim
        picture = picture * (1 - cover) + surface * cover
    picture = picture + rng.normal(0, 2.0, (PIXELS, PIXELS, 1))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


# --- titles and products --------------------------------------------------------------------------------------------


def _vary(word: str, rng: np.random.Generator) -> str:
    """The word, or a synonym with probability 0.25."""
    others = SYNONYMS.get(word, ())
    return str(rng.choice(others)) if others and rng.random() < 0.25 else word


def title(facts: Facts, style: str, rng: np.random.Generator) -> str:
    """A seller's title in the given style."""
    if style == TERSE:
        return f"{_vary(facts.colour, rng)} {_vary(facts.kind, rng)}"
    if style == WRONG:
        field, values = [
            ("colour", tuple(COLOURS)),
            ("pattern", PATTERNS),
            ("material", tuple(GLOSS)),
        ][rng.integers(3)]
        others = [value for value in values if value != getattr(facts, field)]
        facts = dataclasses.replace(facts, **{field: str(rng.choice(others))})
    pattern = "" if facts.pattern == "plain" else _vary(facts.pattern, rng)
    described = [_vary(facts.colour, rng), pattern, _vary(facts.material, rng)]
    rng.shuffle(described)
    words = [facts.brand if rng.random() < 0.6 else "", *described, _vary(facts.kind, rng)]
    if style == REDUNDANT:
        stuffing = list(rng.choice(EMPTY_WORDS, 3, replace=False))
        words = [stuffing[0], *words, stuffing[1], facts.kind, stuffing[2]]
    return " ".join(word for word in words if word)


def make(seed: int, number: int) -> dict:
    """Product `number` as a record of the catalogue (SCHEMA)."""
    rng = np.random.default_rng((seed, number))
    kind = str(rng.choice(list(KINDS)))
    _, department, materials = KINDS[kind]
    facts = Facts(
        kind=kind,
        colour=str(rng.choice(list(COLOURS))),
        pattern=str(rng.choice(PATTERNS, p=[0.3, 0.14, 0.14, 0.14, 0.14, 0.14])),
        material=str(rng.choice(materials)),
        background=str(rng.choice(BACKGROUNDS)),
        brand=str(rng.choice(BRANDS)),
    )
    style = str(rng.choice(list(TITLE_STYLES), p=list(TITLE_STYLES.values())))
    stream = io.BytesIO()
    text = title(facts, style, rng)
    render(facts, rng).save(stream, "JPEG", quality=90)
    seen = {name: getattr(facts, name) for name in ("colour", "pattern", "material", "background")}
    identity = f"synthetic-{number:05}"
    return {
        "product_id": identity,
        "title": text,
        "category": ["home", department, kind],
        "brand": facts.brand,
        "attributes": list(seen.items()),
        "images": [{"bytes": stream.getvalue(), "path": f"{identity}.jpg"}],
    }


def _label(count: int, seed: int) -> dict[str, str]:
    """The file's metadata: its content, and the number and seed that determine it."""
    return {"synthetic": f"{count} products rendered by moon_jax from seed {seed}; none of them exists"}


def is_complete(path: Path, count: int, seed: int) -> bool:
    """Whether `path` already holds what `write` would write."""
    held = pq.read_schema(path).metadata if path.exists() else None
    return bool(held) and held.get(b"synthetic") == _label(count, seed)["synthetic"].encode()


def write(
    path: Path,
    count: int,
    seed: int,
    threads: int = 2,
    track: Callable[[Iterable, int], Iterable] = lambda work, total: work,
) -> None:
    """Renders `count` products into the Parquet file `path`, which appears only when complete.

    Args:
        track: wraps the iterable of records to show progress; takes the iterable and its length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    schema = SCHEMA.with_metadata(_label(count, seed))
    with thread_pool(threads) as pool, pq.ParquetWriter(temporary, schema) as file:
        held = []
        for record in track(pool.map(lambda number: make(seed, number), range(count)), count):
            held.append(record)
            if len(held) == 512:
                file.write_table(pa.Table.from_pylist(held, schema))
                held = []
        file.write_table(pa.Table.from_pylist(held, schema))
    temporary.replace(path)
