"""Where a model looks: attention over an item's image patches and title tokens, by layer and head.

A view's embedding is pooled over its tokens, so what counts is what these attend to. Under causal attention a token is
seen by itself and by those behind it; its heat is the mean of the attention that they give it (with pooling "last",
that of the last token alone):

    heat_j = 1/(S − j) Σ_{i ≥ j} A_ij

The paper shows such maps without saying how they are made: this reading is ours. Of a query and an item the share of
each token in their similarity is told as well, which is exact where vectors are pooled by the mean:

    r_q · r_p = Σ_j share_j,   share_j = h_j · r_q / |Σ_k h_k|
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from moon_jax.data.images import decode
from moon_jax.errors import UserError, printable
from moon_jax.evaluation import pictures
from moon_jax.model import attention
from moon_jax.serving.embedder import Embedder
from moon_jax.types import Product

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no letter, or none yet."""


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a model sees in one item. S counts the item's tokens, without padding."""

    attention: np.ndarray  # f32[L,H,S,S]: row i says how much token i attends to each
    heat: np.ndarray  # f32[L,H,S]
    hidden: np.ndarray  # f32[S,D], last hidden states
    embedding: np.ndarray  # f32[D], unit
    pieces: tuple[str, ...]  # text of each token; empty where it is none of the title's
    grid: np.ndarray  # i32[S,3]: image, row and column of a merged visual token; -1 where it is none
    last: bool  # whether the last token alone is pooled

    def mean(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """f32[S], the heat of a layer and a head, or the mean over all of them.

        Raises:
            UserError: there is no such layer or head.
        """
        heat = self.heat
        for name, number, axis in (("layer", layer, 0), ("head", head, 1)):
            if number is not None:
                count = heat.shape[axis]
                if not 0 <= number < count:
                    raise UserError(f"--{name} {number}: the model has {count}, counted from 0")
                heat = np.take(heat, [number], axis=axis)
        return heat.mean(axis=(0, 1))

    def shares(self, other: np.ndarray) -> np.ndarray:
        """f32[S], what each token adds to the dot product with the unit vector f32[D]; they add up to it."""
        if self.last:
            shares = np.zeros(len(self.hidden), np.float32)
            shares[-1] = self.embedding @ other
            return shares
        return self.hidden @ other / np.linalg.norm(self.hidden.sum(axis=0))


def look(embedder: Embedder, item: Any) -> Looked:
    """What a model of ours sees in an item, embedded by all it has.

    Args:
        item: what embedder.encode takes.

    Raises:
        UserError: as embedder.encode.
    """
    rows, states = embedder.states(item)
    config = embedder.config
    length = int((rows.segment[0] > 0).sum())
    periods = states["decoder"]["periods"]
    # [periods, R, S, H, d] of each layer of a period, which the layers follow one another in.
    pairs = [periods[name]["attention"]["query_key"][0] for name in sorted(periods, key=lambda n: int(n.split("_")[1]))]
    weights = jax.jit(attention.weights, static_argnums=3)
    found = []
    for period in range(config.language.layers // len(pairs)):
        for query, key in pairs:
            given = weights(jnp.asarray(query[period]), jnp.asarray(key[period]), jnp.asarray(rows.segment), True)
            found.append(np.asarray(given)[0].reshape(config.language.heads, *given.shape[3:])[:, :length, :length])
    whole = np.stack(found)
    last = config.language.pooling == "last"
    heat = whole[:, :, -1] if last else whole.sum(axis=2) / np.arange(length, 0, -1, dtype=np.float32)
    hidden = np.asarray(states["hidden"][0][0, :length], np.float32)
    pooled = hidden[-1] if last else hidden.sum(axis=0)
    pieces, grid = _tokens(embedder, rows, length)
    return Looked(whole, heat, hidden, pooled / np.linalg.norm(pooled), pieces, grid, last)


def _tokens(embedder: Embedder, rows: Any, length: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The text of each token, and the places of visual ones."""
    tokenizer, merge = embedder.reader.tokenizer, embedder.config.vision.merge
    frames = {tokenizer.vision_start, tokenizer.vision_end, tokenizer.image_pad}
    before, after = len(embedder.reader.template.prefix), len(embedder.reader.template.suffix)
    grid, pieces = np.full((length, 3), -1, np.int32), []
    title: list[int] = []
    written = ""
    for place in range(length):
        visual, token = int(rows.visual[0, place]), int(rows.tokens[0, place])
        if visual >= 0:
            patch = visual * merge**2  # the first of the patches that are merged into it
            grid[place] = rows.patch_image[0, patch], *(rows.patch_yx[0, patch] // merge)
        piece = ""
        if visual < 0 and token not in frames and before <= place < length - after:
            title.append(token)
            now = tokenizer.base.decode(title, skip_special_tokens=False)
            # A letter of several tokens is written at the last of them.
            if not now.endswith(UNFINISHED) or place == length - after - 1:
                piece, written = now[len(written) :], now
        pieces.append(piece)
    return tuple(pieces), grid


def seen(
    embedder: Embedder, items: dict[str, Any], layer: int | None, head: int | None, shares: bool
) -> list[tuple[str, Any, Looked, np.ndarray]]:
    """What `draw` wants of a model: of each item a title, the item, what was seen, and f32[S], its tokens' values.

    Args:
        items: by name; with `shares` a query and an item.
        layer, head: as in Looked.mean.
        shares: what each token adds to the similarity of the two, in the place of attention.

    Raises:
        UserError: as `look` and Looked.mean.
    """
    looked = {name: look(embedder, item) for name, item in items.items()}
    if not shares:
        return [(name, items[name], one, one.mean(layer, head)) for name, one in looked.items()]
    names, (first, second) = list(items), looked.values()
    if first.last:
        raise UserError("--shares: the model's vectors are its last token's alone, which is all of the cosine")
    told = [f"{name}: shares in the similarity {first.embedding @ second.embedding:.2f}" for name in names]
    values = first.shares(second.embedding), second.shares(first.embedding)
    return list(zip(told, items.values(), looked.values(), values, strict=True))


def image(looked: Looked, values: np.ndarray, number: int = 0) -> np.ndarray:
    """f32[rows,columns] of the values f32[S] at the visual tokens of an image; empty where it has none."""
    own = looked.grid[:, 0] == number
    if not own.any():
        return np.zeros((0, 0), np.float32)
    place = looked.grid[own, 1:]
    picture = np.zeros(place.max(axis=0) + 1, np.float32)
    picture[tuple(place.T)] = values[own]
    return picture


def draw(
    path: Path,
    columns: Sequence[tuple[str, Sequence[tuple[str, Product, Looked, np.ndarray]]]],
    max_pixels: int,
    footer: str,
    shares: bool = False,
) -> None:
    """Items below one another, models side by side: values over the picture, and behind the title's tokens.

    Args:
        columns: of each model its name, and of each item its name, the item, what was seen, and values f32[S] of its
            tokens. Colours span those of one item that are drawn, of picture and title alike.
        shares: whether the values are those of Looked.shares, which may be negative.
    """
    items = len(columns[0][1])
    parts = []  # inches of each item's picture and title
    for number, (_, item, _, _) in enumerate(columns[0][1]):
        lines = [_places(shown[number][2])[-1:] for _, shown in columns]
        parts += [3.6 if item.images else 0.1, 0.3 * max((1 + last[0][2] for last in lines if last), default=0) + 0.1]
    size = (4.8 * len(columns) + 0.4, sum(parts) + 0.4 * items + 1.1)
    title = "What makes the two alike" if shares else "Where the model looks"
    with pictures.sheet(path, title, footer, size) as figure:
        halves = figure.subfigures(1, len(columns), squeeze=False)[0]
        for half, (model, shown) in zip(halves, columns, strict=True):
            half.suptitle(model, x=0.02, ha="left", fontsize=9)
            cells = half.subplots(2 * items, 1, squeeze=False, height_ratios=parts)[:, 0]
            for axes in cells:
                axes.axis("off")
            for number, (name, item, looked, values) in enumerate(shown):
                over, below = cells[2 * number : 2 * number + 2]
                over.set_title(name, fontsize=9)
                heat, places = image(looked, values), _places(looked)
                words = values[[place for place, _, _ in places]]
                most = float(max(np.abs(heat).max(initial=0.0), np.abs(words).max(initial=0.0))) or 1.0
                scale = Normalize(-most, most) if shares else Normalize(0, most)
                colours = ScalarMappable(scale, "PuOr_r" if shares else "YlOrRd")
                if heat.size:
                    photo = decode(item.images[0], max_pixels)
                    extent = (0, photo.width, photo.height, 0)
                    over.imshow(np.asarray(photo.convert("L")), cmap="gray", extent=extent)
                    over.imshow(colours.to_rgba(heat), alpha=0.6, extent=extent, interpolation="nearest")
                    bar = half.colorbar(colours, ax=over, shrink=0.8, format="%.2g", alpha=0.6)
                    bar.outline.set_visible(False)
                    bar.ax.tick_params(labelsize=8)
                    bar.set_label("share of the cosine" if shares else "attention", fontsize=8)
                _title(below, looked, places, colours.to_rgba(words, alpha=0.6))


LINE, MOST = 64, 80
"""Characters of a line of the title, and tokens of it that are shown."""


def _places(looked: Looked) -> list[tuple[int, float, int]]:
    """Of each token of the title that is shown its place, the character where it begins, and its line."""
    found, across, line = [], 0.0, 0
    for place in [place for place, piece in enumerate(looked.pieces) if piece.strip()][:MOST]:
        piece = looked.pieces[place]
        across += 1.0 if piece[0].isspace() and across else 0.3 if across else 0.0
        if across + len(piece.strip()) > LINE:
            across, line = 0.0, line + 1
        found.append((place, across, line))
        across += len(piece.strip())
    return found


def _title(axes: Axes, looked: Looked, places: Sequence[tuple[int, float, int]], colours: np.ndarray) -> None:
    """The title's tokens in their order, each on its colour."""
    axes.set_xlim(0, LINE)
    axes.set_ylim(places[-1][2] + 1 if places else 1, 0)
    for (place, across, line), colour in zip(places, colours, strict=True):
        axes.text(across, line + 0.5, printable(looked.pieces[place].strip()), fontsize=8, va="center",
                  family="monospace", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0})  # fmt: skip


def save(path: Path, shown: dict[str, tuple[str, Any, Looked, np.ndarray]]) -> None:
    """All arrays as an .npz: of each item, by its name, attention, heat, grid and pieces, and the values drawn."""
    arrays = {}
    for name, (_, _, looked, values) in shown.items():
        arrays |= {f"{name}/{part}": getattr(looked, part) for part in ("attention", "heat", "grid")}
        arrays |= {f"{name}/pieces": np.array(looked.pieces), f"{name}/drawn": values}
    np.savez_compressed(path, **arrays)
