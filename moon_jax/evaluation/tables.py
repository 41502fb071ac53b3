"""Scores on the terminal: tables, sentences, and a run's last screen."""

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
from moon_jax.evaluation import report, retrieval
from moon_jax.evaluation.metrics import RANKS
from moon_jax.types import OBJECTIVES, VIEWS

WIDTH = 78
"""Least width of a table, in characters: a title above a narrow one would be folded word by word."""


def _percent(value: float) -> str:
    return f"{value:.1f}".replace("100.0", "100")


NONE = "none"


def _filled(table: Table, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """The rows, without the columns that hold nothing but NONE; numbers stand at the right."""
    kept = [place for place in range(len(columns)) if any(row[place] != NONE for row in rows)]
    for place in kept:
        table.add_column(columns[place], justify="right" if place else "left", no_wrap=place > 0)
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    return table


def _most(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a task's views the one that most products have."""
    return max((entry for entry in entries if entry), key=lambda entry: entry["products"])


def scores(metrics: dict[str, Any]) -> Iterator[Table]:
    """The scores as tables for the terminal."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        sizes = {entry["candidates"] for entry in scores.values()}
        among = f"{max(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
        table = Table(
            min_width=WIDTH,
            title=f"{mark}R@1 / R@5 / R@10 in percent: {retrieval.QUERY_SETS[name]}; {among} candidates",
        )
        rows = []
        for query in VIEWS:
            entries = [scores.get(f"{query}→{candidate}") for candidate in VIEWS]
            cells = [" / ".join(_percent(entry[f"R@{k}"]) for k in RANKS) if entry else NONE for entry in entries]
            rows += [(query, *cells)] if any(entries) else []
        yield _filled(table, ("query", *(f"→ {view}" for view in VIEWS)), rows)
    if metrics["labels"]:
        title = "accuracy / macro F1 in percent, nearest label text (*: label words struck; leak: texts with theirs)"
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
            rows.append((task, *cells, _percent(_most(entries)["majority"]), _percent(scores["leak"])))
        if rows:
            yield _filled(table, ("(labels)", "i", "t*", "mm*", "majority", "leak"), rows)
    for width, found in metrics["widths"].items():
        for name, scores in found["retrieval"].items():
            cells = ", ".join(f"{direction} {_percent(entry['R@10'])}" for direction, entry in scores.items())
            title = f"{mark}R@10 in percent at width {width}: {retrieval.QUERY_SETS[name]}"
            table = Table(min_width=WIDTH, title=title, show_header=False)
            table.add_row(cells)
            yield table


def details(metrics: dict[str, Any]) -> Iterator[Table]:
    """What `tables` leaves out: other measures than R@k, and what is told by neighbours and the probe."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        title = f"{mark}in percent, [interval of 95% by the bootstrap over queries]: {retrieval.QUERY_SETS[name]}"
        table = Table(min_width=WIDTH, title=Text(title))
        for column in ("", "R@10", "MRR", "nDCG@10", "mAP", "queries", "among"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, entry in scores.items():
            low, high = map(_percent, entry["interval"]["R@10"])
            interval = f"[{low}, {high}]" if entry["queries"] >= measures_lib.FEWEST else "[too few]"
            cells = [_percent(entry[measure]) for measure in ("MRR", "nDCG@10", "mAP")]
            counts = f"{entry['queries']:,}", f"{entry['candidates']:,}"
            table.add_row(direction, Text(f"{_percent(entry['R@10'])} {interval}"), *cells, *counts)
        yield table
    taught = {name: scores for name, scores in metrics["labels"].items() if scores["known"]}
    if taught:
        title = f"{mark}accuracy in percent of neighbours / a linear probe, which know some products to train on"
        table = Table(min_width=WIDTH, title=f"{title} (*: label words struck)")
        rows = []
        for name, scores in taught.items():
            entries = [scores.get(view, {}) for view in ("i", "t", "mm")]
            cells = [
                f"{_percent(entry['neighbours'])} / {_percent(entry['probe'])}" if "probe" in entry else NONE
                for entry in entries
            ]
            if any("probe" in entry for entry in entries):
                most, task = _most(entries), Text(printable(name.removeprefix("attribute ")))
                counts = f"{scores['known']:,}", f"{most['products']:,}"
                rows.append((task, *cells, _percent(most["majority"]), *counts))
        if rows:
            yield _filled(table, ("", "i", "t*", "mm*", "majority", "known", "products"), rows)


def differences(compared: dict[str, Any], ours: str, theirs: str) -> Iterator[Table]:
    """A table of `compare` for each set of queries."""
    for name, scores in compared.items():
        title = f"{ours} minus {theirs}, in percent, [interval of 95% by a paired bootstrap] (*: not 0):"
        table = Table(min_width=WIDTH, title=Text(printable(f"{title} {retrieval.QUERY_SETS[name]}")))
        for column in ("", "R@10", "MRR", "queries"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, found in scores.items():
            few, cells = found["queries"] < measures_lib.FEWEST, []
            for entry in (found["R@10"], found["MRR"]):
                interval = "too few" if few else f"{entry['low']:+.1f}, {entry['high']:+.1f}"
                cells.append(f"{entry['difference']:+.1f} [{interval}]{'*' if entry['told'] else ' '}")
            table.add_row(direction, *map(Text, cells), f"{found['queries']:,}")
        yield table


def not_compared(compared: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The directions that `differences` leaves out, of those in `metrics`, set by set."""
    told = []
    for name, scores in metrics["retrieval"].items():
        left = [direction for direction in scores if direction not in compared.get(name, {})]
        if left:
            told.append(f"{', '.join(left)} ({retrieval.QUERY_SETS[name].partition(',')[0]})")
    return "; ".join(told)


def learned(metrics: dict[str, Any], workdir: str | Path) -> list[str]:
    """What scores and training lines say about the model, in sentences."""
    said, lines = [], report.lines_of(Path(workdir))
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
    # Fewer say nothing.
    shown = {name: entry for name, entry in shown.items() if entry["products"] >= 20 and "accuracy" in entry}
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


def summary(
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
    quote, lines = shlex.quote, report.lines_of(workdir)
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
