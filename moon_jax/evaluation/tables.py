"""Scores on the terminal: tables, one-line results, and the summary at the end of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from moon_jax.data.prepared import Prepared
from moon_jax.errors import printable
from moon_jax.evaluation import metrics as measures_lib
from moon_jax.evaluation import pictures, report, retrieval
from moon_jax.evaluation.metrics import RANKS
from moon_jax.types import OBJECTIVES, VIEWS

WIDTH = 78
"""Minimum width of a table in characters; the title of a narrower table would wrap after every word."""


def _percent(value: float) -> str:
    return f"{value:.1f}".replace("100.0", "100")


NONE = "none"


def _filled(table: Table, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Adds the rows, without columns that contain only NONE; numbers are right-aligned."""
    kept = [index for index in range(len(columns)) if any(row[index] != NONE for row in rows)]
    for index in kept:
        table.add_column(columns[index], justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table


def _commonest(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of the view that most products have."""
    return max((entry for entry in entries if entry), key=lambda entry: entry["products"])


def scores(metrics: dict[str, Any]) -> Iterator[Table]:
    """Retrieval and label scores as tables."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        sizes = {entry["candidates"] for entry in scores.values()}
        count = f"{max(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        table = Table(
            min_width=WIDTH,
            title=f"{mark}R@1 / R@5 / R@10 in percent: {retrieval.QUERY_SETS[name]}; {count} candidates",
        )
        rows = []
        for query in VIEWS:
            entries = [scores.get(f"{query}→{candidate}") for candidate in VIEWS]
            cells = [" / ".join(_percent(entry[f"R@{k}"]) for k in RANKS) if entry else NONE for entry in entries]
            rows += [(query, *cells)] if any(entries) else []
        yield _filled(table, ("query", *(f"→ {view}" for view in VIEWS)), rows)
    if metrics["labels"]:
        title = (
            "accuracy / macro F1 in percent, nearest label text (*: label words removed; leak: % of titles that contain"
            " their own label)"
        )
        seen = "; products seen in training" if "products_trained_on" in metrics["retrieval"] else ""
        table = Table(min_width=WIDTH, title=mark + title + seen)
        rows = []
        for name, scores in metrics["labels"].items():
            entries = [scores.get(view, {}) for view in ("i", "t", "mm")]
            if not any("F1" in entry for entry in entries):
                continue
            cells = [
                f"{_percent(entry['accuracy'])} / {_percent(entry['F1'])}" if "F1" in entry else NONE
                for entry in entries
            ]
            task = Text(printable(f"{name.removeprefix('attribute ')} ({scores['labels']})"))
            rows.append((task, *cells, _percent(_commonest(entries)["majority"]), _percent(scores["leak"])))
        if rows:
            yield _filled(table, ("task (labels)", "i", "t*", "mm*", "majority", "leak"), rows)
    for width, found in metrics["widths"].items():
        for name, scores in found["retrieval"].items():
            cells = ", ".join(f"{direction} {_percent(entry['R@10'])}" for direction, entry in scores.items())
            title = f"{mark}R@10 in percent at width {width}: {retrieval.QUERY_SETS[name]}"
            table = Table(min_width=WIDTH, title=title, show_header=False)
            table.add_row(cells)
            yield table


def details(metrics: dict[str, Any]) -> Iterator[Table]:
    """What `scores` leaves out: measures other than R@k, and labels predicted by nearest neighbours and the probe."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        title = f"{mark}percent, [95% bootstrap interval over queries]: {retrieval.QUERY_SETS[name]}"
        table = Table(min_width=WIDTH, title=Text(title))
        for column in ("", "R@10", "MRR", "nDCG@10", "mAP", "queries", "candidates"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, entry in scores.items():
            low, high = map(_percent, entry["interval"]["R@10"])
            interval = f"[{low}, {high}]" if entry["queries"] >= measures_lib.FEWEST else "[too few]"
            cells = [_percent(entry[measure]) for measure in ("MRR", "nDCG@10", "mAP")]
            counts = f"{entry['queries']:,}", f"{entry['candidates']:,}"
            table.add_row(direction, Text(f"{_percent(entry['R@10'])} {interval}"), *cells, *counts)
        yield table
    fitted = {name: scores for name, scores in metrics["labels"].items() if scores["known"]}
    if fitted:
        title = f"{mark}accuracy in percent, nearest neighbours / linear probe, fitted on training products"
        table = Table(min_width=WIDTH, title=f"{title} (*: label words removed)")
        rows = []
        for name, scores in fitted.items():
            entries = [scores.get(view, {}) for view in ("i", "t", "mm")]
            cells = [
                f"{_percent(entry['neighbours'])} / {_percent(entry['probe'])}" if "probe" in entry else NONE
                for entry in entries
            ]
            if any("probe" in entry for entry in entries):
                common, task = _commonest(entries), Text(printable(name.removeprefix("attribute ")))
                counts = f"{scores['known']:,}", f"{common['products']:,}"
                rows.append((task, *cells, _percent(common["majority"]), *counts))
        if rows:
            yield _filled(table, ("", "i", "t*", "mm*", "majority", "train", "test"), rows)


def differences(compared: dict[str, Any], ours: str, theirs: str) -> Iterator[Table]:
    """The result of `report.compare`, one table per set of queries."""
    for name, scores in compared.items():
        title = f"{ours} minus {theirs}, percentage points, [95% paired bootstrap interval] (*: significant):"
        table = Table(min_width=WIDTH, title=Text(printable(f"{title} {retrieval.QUERY_SETS[name]}")))
        for column in ("", "R@10", "MRR", "queries"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, found in scores.items():
            few, cells = found["queries"] < measures_lib.FEWEST, []
            for entry in (found["R@10"], found["MRR"]):
                interval = "too few" if few else f"{entry['low']:+.1f}, {entry['high']:+.1f}"
                cells.append(f"{entry['difference']:+.1f} [{interval}]{'*' if entry['significant'] else ' '}")
            table.add_row(direction, *map(Text, cells), f"{found['queries']:,}")
        yield table


def not_compared(compared: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The directions in `metrics` that `differences` leaves out, by set of queries."""
    parts = []
    for name, scores in metrics["retrieval"].items():
        left = [direction for direction in scores if direction not in compared.get(name, {})]
        if left:
            parts.append(f"{', '.join(left)} ({retrieval.brief(name)})")
    return "; ".join(parts)


def results(metrics: dict[str, Any], workdir: str | Path) -> list[str]:
    """The main scores and the end of the training log, one line each."""
    found, lines = [], report.lines_of(Path(workdir))
    seen = "; seen in training" if "products_trained_on" in metrics["retrieval"] else ""
    for name, scores in metrics["retrieval"].items():
        if name == "queries":  # those of a log or a catalogue: what they are trained to find
            cross = [direction for direction in ("t→mm", "i→mm") if direction in scores]
        elif name in retrieval.PHOTOS:
            cross = ["i→i"] if name == "photos_background" and "i→i" in scores else []
        else:
            cross = [direction for direction in ("t→i", "i→t") if direction in scores]
        for direction in cross:
            entry = scores[direction]
            query, candidate = (pictures.VIEW_NAMES[view] for view in direction.split("→"))
            query = "photo on another background" if name in retrieval.PHOTOS else query
            kind, note = ("catalogue queries", "") if name == "queries" else ("queries", seen)
            found.append(
                f"{query} to {candidate} ({direction}): R@10 {entry['R@10']:.1f}% (chance {entry['chance@10']:.1f}%),"
                f" {entry['queries']:,} {kind}, {entry['candidates']:,} candidates{note}"
            )
    shown = {name: scores["i"] for name, scores in metrics["labels"].items() if "i" in scores}
    # Fewer than 20 products are too few to report.
    shown = {name: entry for name, entry in shown.items() if entry["products"] >= 20 and "accuracy" in entry}
    if shown:
        name, best = max(shown.items(), key=lambda item: item[1]["accuracy"] - item[1]["majority"])
        what = name.removeprefix("attribute ")
        found.append(
            f"{what} from the image alone: correct for {best['accuracy']:.1f}% of products (majority-class baseline:"
            f" {best['majority']:.1f}%){f'; the best of {len(shown)} tasks' if shown.keys() - {name} else ''}{seen}"
        )
    if lines:
        first, last = lines[0], lines[-1]
        weights = {name: last["omega"][name] for name in OBJECTIVES}
        weights = {name: weight for name, weight in weights.items() if last["count"][name]} or weights
        heavy, light = max(weights, key=weights.get), min(weights, key=weights.get)
        if len(lines) > 1 and first["total"] is not None and last["total"] is not None:
            found.append(
                f"loss: {first['total']:.2f} at step {first['step']}, {last['total']:.2f} at step {last['step']}"
            )
        extremes = f"highest {heavy} ({weights[heavy]:.2f}), lowest {light} ({weights[light]:.2f})"
        equal, absent = weights[heavy] - weights[light] < 1e-4, [name for name in OBJECTIVES if name not in weights]
        without = f"; no samples: {', '.join(absent)}" if absent else ""
        found.append(f"objective weights ω: {f'all {weights[heavy]:.2f}' if equal else extremes}{without}")
        if last["phi_below_threshold"] is not None:
            share = 100 * last["phi_below_threshold"]
            found.append(f"the filter down-weights {share:.0f}% of the triplets in the last batch")
        if last["experts"]:
            text, image = (
                np.array([[e[m] or 0 for e in layer] for layer in last["experts"]]) for m in ("text", "image")
            )
            overlap = np.minimum(text, image).sum(axis=1).mean()
            found.append(
                f"expert usage of text and image tokens overlaps by {100 * overlap:.0f}%"
                " (100%: both use the same experts)"
            )
    return found


def summary(
    metrics: dict[str, Any], workdir: Path, prepared: Prepared, again: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Headings with their lines: results, files, next steps.

    Args:
        again: the words of the command that was run, without its workdir.
    """
    mark = " (synthetic catalogue)" if prepared.synthetic else ""
    yield "Results" + mark, results(metrics, workdir)
    files = {
        "catalogue": "catalogue/synthetic.parquet" if prepared.synthetic else "",
        "quarantined": "data/quarantine.jsonl" if prepared.quarantined else "",
        "model": "checkpoints",
        "pictures": "pictures",
        "scores": "metrics.json",
        "training": "metrics.jsonl",
        "TensorBoard": "tensorboard",
        "embeddings": "embeddings/val.parquet",
        "log": "run.log",
    }
    yield "Files", [f"{what + ':':13}{workdir / path}" for what, path in files.items() if path]
    quote, lines = shlex.quote, report.lines_of(workdir)
    dense = bool(lines) and not lines[-1]["experts"]
    without_experts = shlex.join([*again, "--workdir", f"{workdir}-dense", "--config.experts.count=0"])
    commands = {
        "your catalogue": f"moon-jax quickstart --data YOUR_FOLDER --workdir {quote(str(workdir.parent / 'own'))}"
        if prepared.synthetic
        else "",
        "dense model": "" if dense else without_experts,
        "export": shlex.join(["moon-jax", "export", "--model", str(workdir), "--output", f"{workdir}-served"]),
        "Python": f"import moon_jax; moon_jax.load({str(workdir)!r}).encode('red mug')",
        "TensorBoard": f"pip install tensorboard; tensorboard --logdir {quote(str(workdir / 'tensorboard'))}",
    }
    yield "Next steps", [f"{what + ':':16}{line}" for what, line in commands.items() if line]
