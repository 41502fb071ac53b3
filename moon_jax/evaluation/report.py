"""A trained model judged on prepared data: numbers, embeddings and pictures into the workdir, and the last screen."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from moon_jax.config import printable
from moon_jax.data.prepared import Prepared
from moon_jax.evaluation import labels, pictures, retrieval
from moon_jax.serving.catalogue import write_vectors
from moon_jax.serving.embedder import Embedder
from moon_jax.training.watch import Watch
from moon_jax.types import OBJECTIVES, VIEWS


def evaluate(
    embedder: Embedder, prepared: Prepared, workdir: str | Path, report: Watch | None = None
) -> dict[str, Any]:
    """Judges `embedder` on the products to be found, zero-shot.

    Writes into `workdir`: metrics.json, embeddings/val.parquet, and pictures/ (those of the training need its
    metrics.jsonl there).

    Returns:
        What metrics.json holds: {"step", "model", "synthetic", "retrieval": {set of queries: {direction: scores}},
        "labels": {task: scores}, "widths": {width: {"retrieval", "labels"}}}; see retrieval.directions and
        labels.measure.
    """
    workdir = Path(workdir)
    report = report or Watch(workdir)
    asked = labels.tasks(prepared)
    with report.progress("embedding", retrieval.count(prepared) + labels.count(asked)) as advance:
        encoded = retrieval.encode(embedder, prepared, advance)
        answers = labels.encode(embedder, prepared, encoded, asked, advance)
    widths = (embedder.dimension, *reversed(embedder.config.objective.matryoshka))
    size = len(retrieval.DIRECTIONS) * len(encoded.queries) + len(answers)
    with report.progress("evaluating", len(widths) * size) as advance:
        judged = {}
        for width in widths:
            scores: dict[str, Any] = {name: {} for name in encoded.queries}
            for name, direction, found in retrieval.directions(encoded.truncated(width)):
                scores[name][direction] = found
                advance()
            told = {}
            for part in answers:
                told[part.task.name] = labels.measure(part.truncated(width))
                advance()
            judged[width] = {"retrieval": {name: found for name, found in scores.items() if found}, "labels": told}
    whole = judged.pop(embedder.dimension)
    metrics = {
        "step": embedder.step,
        "model": embedder.fingerprint,
        "synthetic": prepared.synthetic,
        **whole,
        "widths": {str(width): found for width, found in judged.items()},
    }
    ids = [prepared.products[index].id for index in prepared.val]
    path = workdir / "embeddings" / "val.parquet"
    write_vectors(path, ids, encoded.candidates, encoded.present, embedder.fingerprint, prepared.synthetic)
    with report.progress("drawing", 5) as advance, warnings.catch_warnings(record=True) as caught:
        for _ in draw(workdir, embedder, prepared, encoded, metrics):
            advance()
    lacking = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking:
        report.line("some titles hold characters that no font here has: install Noto Sans, for Chinese Noto Sans CJK")
    # Last: a first metrics.json says that the rest is whole.
    path = workdir / "metrics.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return metrics


def _lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if it is not there."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw(
    workdir: Path, embedder: Embedder, prepared: Prepared, encoded: retrieval.Encoded, metrics: dict[str, Any]
) -> Iterator[None]:
    """Writes pictures/*.png, one at each step of the iteration."""
    folder, config = workdir / "pictures", embedder.config
    source = "synthetic catalogue, rendered by moon_jax · " if prepared.synthetic else ""
    footer = f"{source}{metrics['step']} steps · model {embedder.fingerprint}"
    lines = _lines(workdir)
    if lines:
        pictures.training(folder / "training.png", lines, footer)
        yield
        pictures.phi(folder / "phi.png", lines, config.objective.phi_threshold, footer)
        yield
        pictures.experts(folder / "experts.png", lines[-1], footer)
        yield
    if metrics["retrieval"]:
        pictures.directions(folder / "directions.png", metrics["retrieval"], footer)
        yield
        seed = retrieval.SEED
        pictures.gallery(folder / "gallery.png", encoded, prepared, config.data.max_pixels, seed, footer)
        yield


WIDTH = 78
"""Least width of a table, in characters: a title above a narrow one would be folded word by word."""


def _percent(value: float) -> str:
    return f"{value:.1f}".replace("100.0", "100")


def tables(metrics: dict[str, Any]) -> Iterator[Table]:
    """The scores as tables for the terminal."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        size = max(entry["candidates"] for entry in scores.values())
        table = Table(
            min_width=WIDTH,
            title=f"{mark}R@1 / R@5 / R@10 in percent: {retrieval.QUERY_SETS[name]}; {size:,} candidates",
        )
        table.add_column("query")
        for view in VIEWS:
            table.add_column(f"→ {view}", justify="right", no_wrap=True)
        for query in VIEWS:
            entries = [scores.get(f"{query}→{candidate}") for candidate in VIEWS]
            cells = [
                " / ".join(_percent(entry[f"R@{k}"]) for k in retrieval.RANKS) if entry else "none" for entry in entries
            ]
            table.add_row(query, *cells)
        yield table
    if metrics["labels"]:
        title = "accuracy / macro F1 in percent, nearest label text (*: label words struck; leak: texts with theirs)"
        seen = "; products seen in training" if "products_trained_on" in metrics["retrieval"] else ""
        table = Table(min_width=WIDTH, title=mark + title + seen)
        table.add_column("(labels)")
        for view in ("i", "t*", "mm*"):
            table.add_column(view, justify="right", no_wrap=True)
        table.add_column("majority", justify="right")
        table.add_column("leak", justify="right")
        for name, scores in metrics["labels"].items():
            entries = [scores.get(view) for view in ("i", "t", "mm")]
            cells = [
                f"{_percent(entry['accuracy'])} / {_percent(entry['F1'])}" if entry else "none" for entry in entries
            ]
            commonest = next((entry["majority"] for entry in entries if entry), 0.0)
            table.add_row(
                Text(printable(f"{name.removeprefix('attribute ')} ({scores['labels']})")),
                *cells,
                _percent(commonest),
                _percent(scores["leak"]),
            )
        yield table
    for width, found in metrics["widths"].items():
        for name, scores in found["retrieval"].items():
            cells = ", ".join(f"{direction} {_percent(entry['R@10'])}" for direction, entry in scores.items())
            title = f"{mark}R@10 in percent at width {width}: {retrieval.QUERY_SETS[name]}"
            table = Table(min_width=WIDTH, title=title, show_header=False)
            table.add_row(cells)
            yield table


def learned(metrics: dict[str, Any], workdir: str | Path) -> list[str]:
    """What scores and training lines say about the model, in sentences."""
    said, lines = [], _lines(Path(workdir))
    seen = "; these were seen in training" if "products_trained_on" in metrics["retrieval"] else ""
    for name, scores in metrics["retrieval"].items():
        cross = [direction for direction in ("t→i", "i→t", "i→mm") if direction in scores]
        cross = cross[:2] if name != "queries" else cross[-1:]
        for direction in cross:
            entry = scores[direction]
            query, candidate = ({"t": "text", "i": "an image", "mm": "both"}[view] for view in direction.split("→"))
            said.append(
                f"{query} finds {candidate} ({direction}) among the first ten of {entry['candidates']:,} in"
                f" {entry['R@10']:.1f}% of {entry['queries']:,} {'own ' if name == 'queries' else ''}queries"
                f" (by chance {entry['chance@10']:.1f}%){seen if name == 'products_trained_on' else ''}"
            )
    shown = {name: scores["i"] for name, scores in metrics["labels"].items() if "i" in scores}
    shown = {name: entry for name, entry in shown.items() if entry["products"] >= 20}  # fewer say nothing
    if shown:
        name, best = max(shown.items(), key=lambda item: item[1]["accuracy"] - item[1]["majority"])
        what = name.removeprefix("attribute ")
        said.append(
            f"seen in the image alone, {what} is right for {best['accuracy']:.1f}% of products"
            f" (always telling the commonest: {best['majority']:.1f}%){seen}"
        )
    if lines:
        first, last = lines[0], lines[-1]
        weights = {name: last["omega"][name] for name in OBJECTIVES}
        heavy, light = max(weights, key=weights.get), min(weights, key=weights.get)
        if len(lines) > 1 and first["total"] is not None and last["total"] is not None:
            said.append(f"the loss went from {first['total']:.2f} at step {first['step']} to {last['total']:.2f}")
        weighs = (
            f"the objective that weighs most is {heavy} (ω {weights[heavy]:.2f}), least {light} ({weights[light]:.2f})"
        )
        said.append(weighs if last["experts"] else f"without experts every objective weighs ω {weights[heavy]:.2f}")
        if last["phi_below_threshold"] is not None:
            said.append(f"the filter weighs {100 * last['phi_below_threshold']:.0f}% of the last batch's triplets down")
        if last["experts"]:
            text, image = (
                np.array([[e[m] or 0 for e in layer] for layer in last["experts"]]) for m in ("text", "image")
            )
            overlap = np.minimum(text, image).sum(axis=1).mean()
            said.append(f"text and image tokens share {100 * overlap:.0f}% of their expert use")
    return said


def last_screen(
    metrics: dict[str, Any], workdir: Path, prepared: Prepared, again: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Headings with their lines: what was learned, where things are, what to try next.

    Args:
        again: the command that was given, as words, without its workdir.
    """
    mark = " (on a synthetic catalogue)" if prepared.synthetic else ""
    yield "what was learned" + mark, learned(metrics, workdir)
    places = {
        "catalogue": "catalogue/synthetic.parquet" if prepared.synthetic else "",
        "left out": "data/quarantine.jsonl" if prepared.quarantined else "",
        "model": "checkpoints",
        "pictures": "pictures",
        "scores": "metrics.json",
        "training": "metrics.jsonl",
        "TensorBoard": "tensorboard",
        "embeddings": "embeddings/val.parquet",
        "log": "run.log",
    }
    yield "where things are", [f"{what + ':':13}{workdir / place}" for what, place in places.items() if place]
    quote, lines = shlex.quote, _lines(workdir)
    dense = bool(lines) and not lines[-1]["experts"]
    without_experts = shlex.join([*again, "--workdir", f"{workdir}-dense", "--config.experts.count=0"])
    tries = {
        "your catalogue": f"moon-jax quickstart --data YOUR_FOLDER --workdir {quote(str(workdir.parent / 'own'))}"
        if prepared.synthetic
        else "",
        "no experts": "" if dense else without_experts,
        "to serve it": shlex.join(["moon-jax", "export", "--model", str(workdir), "--output", f"{workdir}-served"]),
        "in Python": f"import moon_jax; moon_jax.load({str(workdir)!r}).encode('red mug')",
        "the curves": f"pip install tensorboard; tensorboard --logdir {quote(str(workdir / 'tensorboard'))}",
    }
    yield "what to try next", [f"{what + ':':16}{line}" for what, line in tries.items() if line]
