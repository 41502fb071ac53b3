"""Pictures of a run, for the workdir, a README or a notebook, in one style.

They are readable with any colour vision: the palette is Okabe and Ito's, the colour maps are `cividis`, `YlOrRd` and
`PuOr`, and text, line style or frame repeats whatever a colour shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure

from moon_jax.data.images import decode
from moon_jax.data.prepared import Prepared
from moon_jax.embedders.protocol import altered
from moon_jax.evaluation.retrieval import (
    ALTERATION,
    DIRECTIONS,
    PHOTOS,
    QUERY_SETS,
    SEED,
    Encoded,
    search,
    shares_modality,
)
from moon_jax.types import OBJECTIVES, VIEWS, Product

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
"""One per objective."""

DASHES = ("-", "-", "-", "--", "--")
"""Inter-product objectives are solid, intra-product ones dashed."""

INK, FAINT, HIT, MISS = "#222222", "#9A9A9A", "#009E73", "#D55E00"

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei",
         "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Arial Unicode MS")  # fmt: skip
"""Titles come in any script: each character is drawn in the first installed font that has it."""


@contextlib.contextmanager
def sheet(path: Path, title: str, footer: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the common style; written to `path` as PNG on exit."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    style = {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,  # a dollar sign in a title is a dollar sign
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.grid": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        figure.supxlabel(footer, x=0.01, ha="left", fontsize=8, color="#666666")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        figure.savefig(temporary, format="png")
        temporary.replace(path)


def _objective_lines(axes: Axes, lines: Sequence[dict[str, Any]], key: str) -> None:
    """One curve per objective, labelled at its end; labels are moved apart if curves end close together."""
    steps = [line["step"] for line in lines]
    ends = []
    for name, colour, dash in zip(OBJECTIVES, COLOURS, DASHES, strict=True):
        values = [np.nan if line[key][name] is None else line[key][name] for line in lines]
        axes.plot(steps, values, dash, color=colour, marker="o" if len(lines) < 6 else None)
        ends.append((values[-1], name, colour))
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), high)
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    gap, heights = 0.062 * (high - min(0.0, low)), []
    for value, _, _ in ends:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    shift = np.mean([height - value for height, (value, _, _) in zip(heights, ends, strict=True)]) if ends else 0.0
    for height, (value, name, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            name,
            (steps[-1], value),
            (8, height - shift),
            xycoords="data",
            textcoords=("offset points", "data"),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    axes.set_xlabel("step")


def training(path: Path, lines: Sequence[dict[str, Any]], footer: str) -> None:
    """The loss and the weight ω of each objective, by training step."""
    with sheet(path, "Training: loss and weight of each objective", footer, (11, 4.2)) as figure:
        left, right = figure.subplots(1, 2)
        _objective_lines(left, lines, "loss")
        left.set_title("loss of each objective (dashed: intra-product)")
        _objective_lines(right, lines, "omega")
        right.axhline(1 / len(OBJECTIVES), color=FAINT, linestyle=":", linewidth=1)
        right.set_title(f"weight ω of each objective (dotted: uniform, 1/{len(OBJECTIVES)})")


def phi(path: Path, lines: Sequence[dict[str, Any]], threshold: float, footer: str) -> None:
    """The distribution of φ over the triplets, by training step and at the last one."""
    known = [line for line in lines if line["phi_histogram"]]
    if not known:
        return
    counts = np.array([line["phi_histogram"] for line in known], np.float64)
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    bins = counts.shape[1]
    with sheet(path, "Triplet filtering: distribution of the confidence φ", footer, (11, 4.2)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        steps = np.array([line["step"] for line in known], np.float64)
        edges = np.concatenate([[0.0], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
        root = PowerNorm(0.5, vmin=0, vmax=100)  # most φ are near 1; the root scale shows the few triplets below
        drawn = left.pcolormesh(edges, np.linspace(0, 1, bins + 1), shares.T, cmap="cividis", norm=root)
        figure.colorbar(drawn, ax=left, label="share of triplets, % (root scale)", pad=0.02)
        left.set_title("by training step")
        left.set_xlabel("step")
        left.set_ylabel("φ")
        right.barh((np.arange(bins) + 0.5) / bins, shares[-1], height=0.9 / bins, color=COLOURS[0])
        right.set_title(f"at step {known[-1]['step']}")
        right.set_xlabel("share of triplets, %")
        for axes in (left, right):
            axes.axhline(threshold, color="#D55E00", linestyle="--", linewidth=1.5)
        right.text(right.get_xlim()[1], threshold - 0.01, f"below {threshold:g}: down-weighted ", ha="right", va="top",
                   color="#B04A00", fontsize=9)  # fmt: skip


def _matrix(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], **colours: Any) -> Any:
    """A heatmap with labelled ticks."""
    drawn = axes.imshow(values, aspect="auto", **colours)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return drawn


def experts(path: Path, lines: Sequence[dict[str, Any]], footer: str) -> None:
    """Which experts text tokens and image tokens use in each layer at the last of `lines`, and by training step the
    mutual information of a token's modality and its expert.
    """
    line = lines[-1]
    if not line["experts"]:
        return
    shares = 100 * np.array([[[e["text"] or 0, e["image"] or 0] for e in layer] for layer in line["experts"]])
    layers, count, _ = shares.shape
    even = 100 / count
    reach = max(np.abs(shares - even).max(), 1.0)
    norm = TwoSlopeNorm(even, even - reach, even + reach)
    high = 2.4 + 0.42 * layers
    with sheet(path, "Which experts handle text and images", footer, (14, max(high, 3.6))) as figure:
        *panels, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
        for panel, modality, values in zip(panels, ("text", "image"), np.moveaxis(shares, -1, 0), strict=True):
            names = [f"layer {n}" for n in range(layers)], [str(n) for n in range(count)]
            drawn = _matrix(panel, values, *names, cmap="PuOr", norm=norm)
            panel.set_title(f"{modality} tokens, step {line['step']} (white: equal share, {even:.0f}%)")
            panel.set_xlabel("expert")
            if layers * count <= 128:
                for (layer, expert), value in np.ndenumerate(values):
                    ink = "white" if abs(value - even) > 0.65 * reach else INK
                    panel.text(expert, layer, f"{value:.0f}", ha="center", va="center", color=ink)
        panels[1].set_yticklabels([])
        figure.colorbar(drawn, ax=panels, label="share of routing weight, %", pad=0.02)
        told = [one for one in lines if one.get("modality_information")]  # older runs lack it
        steps, bits = [one["step"] for one in told], [one["modality_information"] for one in told]
        for layer, values in enumerate(zip(*bits, strict=True)):
            colour = colormaps["viridis"](0.85 * layer / max(layers - 1, 1))
            named = f"layer {layer}" if layer in (0, layers - 1) else None
            right.plot(steps, values, color=colour, marker="o" if len(told) < 6 else None, label=named)
        if told:
            right.legend(frameon=False)
        right.set_ylim(0, 1)
        right.set_title("mutual information of modality and expert")
        right.set_ylabel("bits")
        right.set_xlabel("step")


def directions(path: Path, results: dict[str, dict[str, dict[str, float]]], footer: str) -> None:
    """R@10 of every direction, one matrix per set of queries. Changed photos have rows and columns of images only."""
    across = min(len(results), 3)
    down = -(-len(results) // across)
    with sheet(path, "What finds what: R@10 by direction", footer, (4.9 * across + 0.6, 4.2 * down + 0.4)) as figure:
        panels = figure.subplots(down, across, squeeze=False)
        for panel in panels.ravel()[len(results) :]:
            panel.axis("off")
        for panel, (name, scores) in zip(panels.ravel(), results.items(), strict=False):
            views = [view for view in VIEWS if name not in PHOTOS or view != "t"]
            values = np.array([[scores.get(f"{q}→{c}", {}).get("R@10", np.nan) for c in views] for q in views])
            drawn = _matrix(panel, values, views, [f"→ {view}" for view in views], cmap="cividis", vmin=0, vmax=100)
            sizes = max(entry["candidates"] for entry in scores.values())
            panel.set_title(_fold(f"{QUERY_SETS[name]}; {sizes:,} candidates", 56, 2))
            panel.set_ylabel("query")
            for (row, column), value in np.ndenumerate(values):
                entry = scores.get(f"{views[row]}→{views[column]}")
                ink = "white" if entry and value < 55 else INK
                panel.text(column, row - 0.08, f"{value:.0f}" if entry else "none", ha="center", va="center",
                           fontsize=17 if entry else 10, color=ink)  # fmt: skip
                if entry:
                    small = f"R@1 {entry['R@1']:.0f} · chance {entry['chance@10']:.1f}"
                    panel.text(column, row + 0.27, small, ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(drawn, ax=panels, label="R@10, %", pad=0.02)


FOUND, SHOWN = 5, 10
"""Results shown for each query, and total number of queries."""

VIEW_NAMES = {"t": "text", "i": "image", "mm": "text + image"}


def gallery(path: Path, encoded: Encoded, prepared: Prepared, max_pixels: int, seed: int, footer: str) -> None:
    """SHOWN queries from two directions with their top FOUND results; hits are framed. `seed` draws the queries.

    Directions without altered queries come first: t→i, then the catalogue's own image queries, if any, or i→t. An
    altered query is shown as it was altered.
    """
    first = next(iter(encoded.queries))
    wanted = [(first, "t", "i")]
    wanted += [
        (name, view, "mm") for name in encoded.queries if name in ("queries", "qrels") for view in ("i", "mm", "t")
    ]
    wanted += [(first, "i", "t"), *((first, view, view) for view in reversed(VIEWS))]
    wanted += [(name, query, candidate) for name in encoded.queries for query, candidate in DIRECTIONS]
    wanted = list(dict.fromkeys(wanted))
    tasks = [(name, q, c, search(encoded, name, q, c)) for name, q, c in wanted]
    tasks = [task for task in tasks if len(task[-1].queries)][:2]
    shown = SHOWN // len(tasks)
    rng = np.random.default_rng(seed)
    drawn = [min(shown, len(task[-1].queries)) for task in tasks]
    size = (7.6 * len(tasks), 1.75 * max(drawn) + 1.0)
    footer += " · faint captions: text that the view does not include"
    title = f"{sum(drawn)} random queries and their top-{FOUND} results"
    with sheet(path, title, footer, size) as figure:
        halves = figure.subfigures(1, len(tasks), squeeze=False, wspace=0.03)[0]
        for half, (name, query, candidate, task) in zip(halves, tasks, strict=True):
            title = f"{query} → {candidate}: {VIEW_NAMES[query]} to {VIEW_NAMES[candidate]}"
            framed = {"qrels": "relevant by your qrels", "queries": "wanted by the query"}.get(name, "same title")
            title += f" (framed ✓: {framed}; {len(task.candidates):,} candidates"
            title += "; seen in training)" if name == "products_trained_on" else ")"
            half.suptitle(title, x=0.01, ha="left", fontsize=11)
            chosen = np.sort(rng.permutation(len(task.queries))[:shown])
            cells = half.subplots(max(drawn), 1 + FOUND, squeeze=False, width_ratios=(1.15, *[1] * FOUND))
            for axes in cells.ravel():
                axes.axis("off")
            excluded = task.excluded and task.excluded.take(chosen)
            best = dataclasses.replace(task, queries=task.queries[chosen], excluded=excluded).found(FOUND)
            hits = task.relevance.take(chosen).gains(best) > 0
            for row, number, ranked, relevant in zip(cells, chosen, best, hits, strict=False):
                index = int(task.query_product[number])
                asked, label = prepared.products[index], "query"
                if shares_modality(query, candidate) and name.startswith("products"):
                    position = int(np.flatnonzero(encoded.product == index)[0])
                    asked = altered(asked, ALTERATION, np.random.default_rng((SEED, position)), max_pixels)
                    label = "query, altered"
                _cell(row[0], asked, query, max_pixels, label, shows_picture=query != "t")
                for rank, (index, hit) in enumerate(zip(ranked, relevant.tolist(), strict=True), start=1):
                    product = prepared.products[task.candidate_product[index]]
                    _cell(row[rank], product, candidate, max_pixels, f"{rank} ✓" if hit else str(rank), hit)


def _cell(
    axes: Axes,
    product: Product,
    view: str,
    max_pixels: int,
    label: str,
    hit: bool = False,
    shows_picture: bool = True,
) -> None:
    """A product's image with its title below (faint if `view` excludes the text), or its title alone."""
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    text = product.text or ""
    if product.images and shows_picture:
        picture = decode(product.images[0], max_pixels)
        picture.thumbnail((224, 224))
        axes.imshow(np.asarray(picture))
        axes.set_xlabel(_fold(text, 20, 2), fontsize=7, labelpad=3, color=FAINT if view == "i" else INK)
    else:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_box_aspect(1)
        axes.text(0.5, 0.5, _fold(text, 13, 6), ha="center", va="center", fontsize=9)
    axes.set_title(label, fontsize=9, color=HIT if hit else INK, fontweight="bold" if hit else "normal", pad=3)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(HIT if hit else INK if label.startswith("query") else "#DDDDDD")
    axes.spines[:].set_linewidth(3.5 if hit else 1.0)


def _fold(text: str, width: int, most: int) -> str:
    """Wraps the text into at most `most` lines of `width` characters."""
    lines = textwrap.wrap(" ".join(text.split())[:400], width, max_lines=most, placeholder=" …")
    return "\n".join(lines)


def additions(
    path: Path,
    shown: Sequence[tuple[Product, Sequence[tuple[str, bytes, bool]], Sequence[tuple[str, bool]]]],
    max_pixels: int,
    footer: str,
) -> None:
    """Products with their co-augmented images and titles; those that were left out are crossed out.

    Args:
        shown: (product, its images (label, bytes, whether added), its titles (text, whether added)) for each product.
    """
    columns = 1 + max((len(images) for _, images, _ in shown), default=0)
    rows, title = -(-len(shown) // 2), "Co-augmentation: random products with their new images and titles"
    with sheet(path, title, footer, (max(8.0, 3.0 * columns + 0.6), 2.3 * rows + 0.8)) as figure:
        for part, (product, images, titles) in zip(
            figure.subfigures(rows, 2, squeeze=False).ravel(), shown, strict=False
        ):
            captions = [_fold(product.text or "no title", 26 * columns, 2)]
            captions += [f"{'+' if added else '✗'} {_fold(made, 26 * columns, 3)}" for made, added in titles]
            part.supxlabel("\n".join(captions), x=0.02, ha="left", fontsize=7)
            cells = part.subplots(1, columns, squeeze=False)[0]
            for axes in cells[1 + len(images) :]:
                axes.axis("off")
            for axes, (label, image, added) in zip(
                cells, [("product", product.images[0], True), *images], strict=False
            ):
                axes.set_xticks([])
                axes.set_yticks([])
                picture = decode(image, max_pixels)
                picture.thumbnail((224, 224))
                axes.imshow(np.asarray(picture))
                axes.set_title(label, fontsize=8, color=INK if added else FAINT, pad=3)
                axes.spines[:].set_visible(True)
                axes.spines[:].set_color(INK if label == "product" else "#DDDDDD")
                if not added:
                    axes.plot([0, 1], [0, 1], transform=axes.transAxes, color=MISS, linewidth=2.5)
