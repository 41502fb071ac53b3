"""Attention heatmaps: attention over an item's image patches and title tokens, by layer and head.

A view's embedding is pooled over its tokens, so the heat of a token measures how much the pooled tokens attend to it.
Under causal attention, only the token itself and later tokens attend to it. With mean pooling, its heat is the mean of
their attention; with pooling "last", it is the attention of the last token alone:

    heat_j = 1/(S − j) Σ_{i ≥ j} A_ij

The paper shows such maps without defining them; this definition is ours. For a query and an item, the contribution of
each token to their similarity is available too. It is exact if vectors are mean-pooled:

    r_q · r_p = Σ_j contribution_j,   contribution_j = h_j · r_q / |Σ_k h_k|
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
"""What a tokenizer decodes incomplete or invalid UTF-8 bytes to."""


@dataclasses.dataclass(frozen=True)
class Attended:
    """A model's attention within one item. S counts the item's tokens, without padding."""

    attention: np.ndarray  # f32[L,H,S,S]: row i is the attention of token i to each token
    heat: np.ndarray  # f32[L,H,S]
    hidden: np.ndarray  # f32[S,D], last hidden states
    embedding: np.ndarray  # f32[D], unit length
    pieces: tuple[str, ...]  # text of each title token; empty for other tokens
    grid: np.ndarray  # i32[S,3]: image, row and column of a merged visual token; -1 for other tokens
    last: bool  # whether pooling is "last": only the last token

    def mean(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """f32[S], the heat in one layer and head, or the mean over all of them.

        Raises:
            UserError: no such layer or head.
        """
        heat = self.heat
        for name, number, axis in (("layer", layer, 0), ("head", head, 1)):
            if number is not None:
                count = heat.shape[axis]
                if not 0 <= number < count:
                    raise UserError(f"--{name} {number}: the model has {count}, counted from 0")
                heat = np.take(heat, [number], axis=axis)
        return heat.mean(axis=(0, 1))

    def contributions(self, other: np.ndarray) -> np.ndarray:
        """f32[S], what each token adds to the dot product with the unit vector `other` f32[D]; they sum to it."""
        if self.last:
            contributions = np.zeros(len(self.hidden), np.float32)
            contributions[-1] = self.embedding @ other
            return contributions
        return self.hidden @ other / np.linalg.norm(self.hidden.sum(axis=0))


def attend(embedder: Embedder, item: Any) -> Attended:
    """The attention of one of our models within an item, embedded from its text and images.

    Args:
        item: one item, as embedder.encode accepts it.

    Raises:
        UserError: see embedder.encode.
    """
    rows, states = embedder.states(item)
    config = embedder.config
    length = int((rows.segment[0] > 0).sum())
    periods = states["decoder"]["periods"]
    # A period is a block of consecutive layers; each of its layers has [periods, R, S, H, d].
    pairs = [periods[name]["attention"]["query_key"][0] for name in sorted(periods, key=lambda n: int(n.split("_")[1]))]
    weights = jax.jit(attention.weights, static_argnums=3)
    found = []
    for period in range(config.language.layers // len(pairs)):
        for query, key in pairs:
            scores = weights(jnp.asarray(query[period]), jnp.asarray(key[period]), jnp.asarray(rows.segment), True)
            found.append(np.asarray(scores)[0].reshape(config.language.heads, *scores.shape[3:])[:, :length, :length])
    whole = np.stack(found)
    last = config.language.pooling == "last"
    heat = whole[:, :, -1] if last else whole.sum(axis=2) / np.arange(length, 0, -1, dtype=np.float32)
    hidden = np.asarray(states["hidden"][0][0, :length], np.float32)
    pooled = hidden[-1] if last else hidden.sum(axis=0)
    pieces, grid = _tokens(embedder, rows, length)
    return Attended(whole, heat, hidden, pooled / np.linalg.norm(pooled), pieces, grid, last)


def _tokens(embedder: Embedder, rows: Any, length: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The text of each token and the grid positions of visual tokens; see Attended."""
    tokenizer, merge = embedder.reader.tokenizer, embedder.config.vision.merge
    frames = {tokenizer.vision_start, tokenizer.vision_end, tokenizer.image_pad}
    before, after = len(embedder.reader.template.prefix), len(embedder.reader.template.suffix)
    grid, pieces = np.full((length, 3), -1, np.int32), []
    title: list[int] = []
    written = ""
    for index in range(length):
        visual, token = int(rows.visual[0, index]), int(rows.tokens[0, index])
        if visual >= 0:
            patch = visual * merge**2  # the first of the patches merged into it
            grid[index] = rows.patch_image[0, patch], *(rows.patch_yx[0, patch] // merge)
        piece = ""
        if visual < 0 and token not in frames and before <= index < length - after:
            title.append(token)
            now = tokenizer.base.decode(title, skip_special_tokens=False)
            # A character of several tokens is assigned to the last of them.
            if not now.endswith(UNFINISHED) or index == length - after - 1:
                piece, written = now[len(written) :], now
        pieces.append(piece)
    return tuple(pieces), grid


def maps(
    embedder: Embedder, items: dict[str, Any], layer: int | None, head: int | None, contributions: bool
) -> list[tuple[str, Any, Attended, np.ndarray]]:
    """One model's column for `draw`: for each item its title, the item, its attention, and its tokens' values f32[S].

    Args:
        items: by name; with `contributions`, a query and an item.
        layer, head: see Attended.mean.
        contributions: use each token's contribution to the similarity of the two items, instead of attention.

    Raises:
        UserError: see `attend` and Attended.mean; or contributions of a model with pooling "last".
    """
    attended = {name: attend(embedder, item) for name, item in items.items()}
    if not contributions:
        return [(name, items[name], one, one.mean(layer, head)) for name, one in attended.items()]
    names, (first, second) = list(items), attended.values()
    if first.last:
        raise UserError("--contributions: the model pools the last token only, which contributes the whole similarity")
    titles = [f"{name}: contributions to the similarity {first.embedding @ second.embedding:.2f}" for name in names]
    values = first.contributions(second.embedding), second.contributions(first.embedding)
    return list(zip(titles, items.values(), attended.values(), values, strict=True))


def image(attended: Attended, values: np.ndarray, number: int = 0) -> np.ndarray:
    """f32[rows,columns], the values f32[S] at the visual tokens of image `number`; empty if there is no such image."""
    own = attended.grid[:, 0] == number
    if not own.any():
        return np.zeros((0, 0), np.float32)
    cells = attended.grid[own, 1:]
    picture = np.zeros(cells.max(axis=0) + 1, np.float32)
    picture[tuple(cells.T)] = values[own]
    return picture


def draw(
    path: Path,
    columns: Sequence[tuple[str, Sequence[tuple[str, Product, Attended, np.ndarray]]]],
    max_pixels: int,
    footer: str,
    contributions: bool = False,
) -> None:
    """Draws one row per item and one column per model: values over the image and behind the title's tokens.

    Args:
        columns: for each model its name and, for each item: its title, the item, its attention, and the values f32[S]
            of its tokens. Image and title of one item share a colour scale, which spans the values drawn.
        contributions: whether the values are from Attended.contributions, which may be negative.
    """
    items = len(columns[0][1])
    parts = []  # height in inches of each item's image and title
    for number, (_, item, _, _) in enumerate(columns[0][1]):
        lines = [_layout(shown[number][2])[-1:] for _, shown in columns]
        parts += [3.6 if item.images else 0.1, 0.3 * max((1 + last[0][2] for last in lines if last), default=0) + 0.1]
    size = (4.8 * len(columns) + 0.4, sum(parts) + 0.4 * items + 1.1)
    title = "What makes the two similar" if contributions else "Where the model looks"
    with pictures.sheet(path, title, footer, size) as figure:
        halves = figure.subfigures(1, len(columns), squeeze=False)[0]
        for half, (model, shown) in zip(halves, columns, strict=True):
            half.suptitle(model, x=0.02, ha="left", fontsize=9)
            cells = half.subplots(2 * items, 1, squeeze=False, height_ratios=parts)[:, 0]
            for axes in cells:
                axes.axis("off")
            for number, (name, item, attended, values) in enumerate(shown):
                over, below = cells[2 * number : 2 * number + 2]
                over.set_title(name, fontsize=9)
                heat, layout = image(attended, values), _layout(attended)
                words = values[[index for index, _, _ in layout]]
                most = float(max(np.abs(heat).max(initial=0.0), np.abs(words).max(initial=0.0))) or 1.0
                scale = Normalize(-most, most) if contributions else Normalize(0, most)
                colours = ScalarMappable(scale, "PuOr_r" if contributions else "YlOrRd")
                if heat.size:
                    photo = decode(item.images[0], max_pixels)
                    extent = (0, photo.width, photo.height, 0)
                    over.imshow(np.asarray(photo.convert("L")), cmap="gray", extent=extent)
                    over.imshow(colours.to_rgba(heat), alpha=0.6, extent=extent, interpolation="nearest")
                    bar = half.colorbar(colours, ax=over, shrink=0.8, format="%.2g", alpha=0.6)
                    bar.outline.set_visible(False)
                    bar.ax.tick_params(labelsize=8)
                    bar.set_label("contribution to the cosine" if contributions else "attention", fontsize=8)
                _title(below, attended, layout, colours.to_rgba(words, alpha=0.6))


LINE, MOST = 64, 80
"""Characters per line of the title, and maximum number of title tokens shown."""


def _layout(attended: Attended) -> list[tuple[int, float, int]]:
    """(index, first column in characters, line) of each title token that is shown."""
    found, across, line = [], 0.0, 0
    for index in [index for index, piece in enumerate(attended.pieces) if piece.strip()][:MOST]:
        piece = attended.pieces[index]
        across += 1.0 if piece[0].isspace() and across else 0.3 if across else 0.0
        if across + len(piece.strip()) > LINE:
            across, line = 0.0, line + 1
        found.append((index, across, line))
        across += len(piece.strip())
    return found


def _title(axes: Axes, attended: Attended, layout: Sequence[tuple[int, float, int]], colours: np.ndarray) -> None:
    """Writes the title's tokens in order, each on its colour."""
    axes.set_xlim(0, LINE)
    axes.set_ylim(layout[-1][2] + 1 if layout else 1, 0)
    for (index, across, line), colour in zip(layout, colours, strict=True):
        axes.text(across, line + 0.5, printable(attended.pieces[index].strip()), fontsize=8, va="center",
                  family="monospace", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0})  # fmt: skip


def save(path: Path, shown: dict[str, tuple[str, Any, Attended, np.ndarray]]) -> None:
    """Writes an .npz with attention, heat, grid, pieces and the values drawn for each item, under NAME/."""
    arrays = {}
    for name, (_, _, attended, values) in shown.items():
        arrays |= {f"{name}/{part}": getattr(attended, part) for part in ("attention", "heat", "grid")}
        arrays |= {f"{name}/pieces": np.array(attended.pieces), f"{name}/drawn": values}
    np.savez_compressed(path, **arrays)
