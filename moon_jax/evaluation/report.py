"""A trained model judged on prepared data: numbers, embeddings and pictures into the workdir, and the last screen."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from moon_jax import config as config_lib
from moon_jax.config import UserError, printable
from moon_jax.data.prepared import Prepared
from moon_jax.data.shards import whole as whole_file
from moon_jax.evaluation import harness, labels, pictures, retrieval
from moon_jax.evaluation import metrics as measures_lib
from moon_jax.evaluation.metrics import RANKS
from moon_jax.serving.catalogue import write_vectors
from moon_jax.training.watch import Watch
from moon_jax.types import OBJECTIVES, VIEWS


def evaluate(
    embedder: harness.Embedder,
    prepared: Prepared,
    workdir: str | Path,
    report: Watch | None = None,
    *,
    known: int = 0,
    prompts: Sequence[str] = labels.PROMPTS,
    judgements: measures_lib.Judgements | None = None,
) -> dict[str, Any]:
    """Judges `embedder` on the products to be found.

    Writes into `workdir`: metrics.json, queries.parquet, embeddings/val.parquet, and pictures/ (those of the training
    need its metrics.jsonl there).

    Args:
        known: products to train on, at most, whose labels neighbours and a linear probe know; 0 leaves these out.
        prompts: texts with {} in them, by which a label is put to the model.
        judgements: of one's own queries (evaluation/judged.py); then these alone are asked, no label is told, and no
            vector is written.

    Returns:
        What metrics.json holds; docs/workdir.md tells it.
    """
    workdir = Path(workdir)
    report = report or Watch(workdir)
    for old in (METRICS, QUERIES, EMBEDDINGS, *(f"pictures/{name}.png" for name in ("directions", "gallery"))):
        (workdir / old).unlink(missing_ok=True)
    lessons = labels.known(prepared, known) if judgements is None else []
    tasks = labels.tasks(prepared, lessons)
    # What is compared otherwise than by the dot product knows no label.
    asked = [] if hasattr(embedder, "rank") or judgements is not None else tasks
    lessons = lessons if asked else []
    with report.progress("embedding", retrieval.count(prepared, judgements) + labels.count(asked, lessons)) as advance:
        encoded = retrieval.encode(embedder, prepared, advance, judgements)
        answers = labels.encode(embedder, prepared, encoded, asked, lessons, prompts, advance)
    covered = int(encoded.present.any(axis=1).sum())
    if not covered:
        first = prepared.products[prepared.val[0]].id if len(prepared.val) else ""
        raise UserError(f"{embedder.name}: no vector of any product, such as {first!r}; are the ids the same?")
    if covered < len(prepared.val):
        left = len(prepared.val) - covered
        report.line(f"{left:,} of {len(prepared.val):,} products have no vector, and are neither sought nor found")
    seconds = getattr(embedder, "seconds", None)
    if seconds and sum(seconds.values()):
        share = 100 * seconds["device"] / sum(seconds.values())
        report.line(f"of the time of embedding: device {share:.1f}%, waiting for data {100 - share:.1f}%")
    config = getattr(embedder, "config", config_lib.Config())
    dimension = encoded.candidates.shape[-1]
    widths = (dimension, *reversed(config.objective.matryoshka))
    size = len(retrieval.DIRECTIONS) * len(encoded.queries) + len(answers)
    category = _category(tasks, prepared)
    with report.progress("evaluating", len(widths) * size) as advance:
        judged: dict[int, dict[str, Any]] = {}
        for width in widths:
            scores: dict[str, Any] = {name: {} for name in encoded.queries}
            categories: dict[str, Any] = {name: {} for name in encoded.queries}
            of_queries = []
            for name, direction, task, measures in retrieval.directions(
                encoded.truncated(width) if width < dimension else encoded
            ):
                scores[name][direction] = retrieval.summary(task, measures)
                if width == dimension:
                    categories[name][direction] = retrieval.by_category(task, measures, category)
                    of_queries.append((name, direction, task, measures))
                advance()
            told = {}
            for part in answers:
                told[part.task.name] = labels.measure(part.truncated(width))
                advance()
            judged[width] = {"retrieval": {name: found for name, found in scores.items() if found}, "labels": told}
            if width == dimension:
                judged[width]["categories"] = {name: found for name, found in categories.items() if category and found}
                write_queries(workdir / QUERIES, prepared, of_queries, _name(embedder))
    whole = judged.pop(dimension)
    metrics = {
        "step": getattr(embedder, "step", None),
        "model": _name(embedder),
        "synthetic": prepared.synthetic,
        "data": prepared.fingerprint,
        **whole,
        "widths": {str(width): found for width, found in judged.items()},
    }
    ids = [prepared.products[index].id for index in prepared.val]
    if encoded.candidates.dtype == np.float32 and judgements is None:
        write_vectors(
            workdir / EMBEDDINGS, ids, encoded.candidates, encoded.present, metrics["model"], prepared.synthetic
        )
    with report.progress("drawing", 5) as advance, warnings.catch_warnings(record=True) as caught:
        for _ in draw(workdir, config, prepared, encoded, metrics):
            advance()
    lacking = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking:
        report.line("some titles hold characters that no font here has: install Noto Sans, for Chinese Noto Sans CJK")
    # Last: a first metrics.json says that the rest is whole.
    whole_file(workdir / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


METRICS, QUERIES, EMBEDDINGS = "metrics.json", "queries.parquet", "embeddings/val.parquet"


def _name(embedder: harness.Embedder) -> str:
    return getattr(embedder, "fingerprint", embedder.name)


def _category(tasks: Sequence[labels.Task], prepared: Prepared) -> dict[int, str]:
    """The category of each product to be found that has one, by its index."""
    found = next((task for task in tasks if task.name == "category"), None)
    if found is None:
        return {}
    return {
        index: found.labels[label]
        for index, label in zip(prepared.val, found.truth.tolist(), strict=True)
        if label >= 0
    }


def write_queries(
    path: Path,
    prepared: Prepared,
    judged: Sequence[tuple[str, str, retrieval.Search, dict[str, np.ndarray]]],
    model: str,
) -> None:
    """The measures of every query: set, direction, query (the number of its record, and its id), and a column each.

    The file's metadata say of which `model`.
    """
    ids: dict[int, str] = {}
    for _, _, task, _ in judged:
        for index in set(task.query_product.tolist()) - set(ids):
            ids[index] = f"{index} {prepared.products[index].id}"
    tables = [
        pa.table(
            {
                "set": [name] * len(task.query_product),
                "direction": [direction] * len(task.query_product),
                "query": [ids[index] for index in task.query_product.tolist()],
                **measures,
            }
        )
        for name, direction, task, measures in judged
    ]
    names = pa.table({name: pa.array([], pa.string()) for name in ("set", "direction", "query")})
    table = pa.concat_tables(tables) if tables else names
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"model": model})
    pq.write_table(table, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def is_judged(folder: Path) -> bool:
    """Whether it is the output of an evaluation, and no model's workdir, which holds one too."""
    return all((folder / name).is_file() for name in (METRICS, QUERIES)) and not (folder / "checkpoints").exists()


def _judged(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """metrics.json and the table of queries.

    Raises:
        UserError: one of them is missing, damaged, or not of the other's evaluation.
    """
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        table = pq.read_table(folder / QUERIES)
        if (table.schema.metadata or {}).get(b"model", b"").decode() != metrics["model"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: nothing that moon-jax evaluate wrote whole; give a model, or such a folder"
        ) from None
    return metrics, table


def check_comparable(folder: Path, data: str) -> None:
    """
    Raises:
        UserError: nothing was judged there, or on other data.
    """
    if _judged(folder)[0]["data"] != data:
        raise UserError(f"{folder}: judged on other data than is given now; evaluate both on the same")


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """How two judged models differ, by a paired bootstrap over the queries that both were asked.

    Directions in which they had not the same number of candidates to choose from are left out.

    Args:
        ours, theirs: folders that `evaluate` wrote.

    Returns:
        {set: {direction: {measure: {"difference", "low", "high", "told"}, "queries": …}}}; see metrics.compared.

    Raises:
        UserError: one of them was not judged, or on other data.
    """
    told, whole = zip(*map(_judged, (ours, theirs)), strict=True)
    check_comparable(theirs, told[0]["data"])
    tables = [table.to_pydict() for table in whole]
    names = [name for name in tables[0] if name in tables[1] and name not in ("set", "direction", "query")]
    if not names:  # one of them was asked nothing
        return {}
    values = []
    for table in tables:
        keys = zip(table["set"], table["direction"], table["query"], strict=True)
        values.append(dict(zip(keys, zip(*(table[name] for name in names), strict=True), strict=True)))
    shared: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for key in values[0]:
        if key in values[1]:
            shared.setdefault(key[:2], []).append(key)
    found: dict[str, Any] = {}
    for (name, direction), keys in shared.items():
        pools = {metrics["retrieval"][name][direction]["candidates"] for metrics in told}
        if len(pools) > 1:
            continue
        sides = [dict(zip(names, np.array([side[key] for key in keys]).T, strict=True)) for side in values]
        found.setdefault(name, {})[direction] = measures_lib.compared(*sides) | {"queries": len(keys)}
    return found


def _lines(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if it is not there."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw(
    workdir: Path, config: config_lib.Config, prepared: Prepared, encoded: retrieval.Encoded, metrics: dict[str, Any]
) -> Iterator[None]:
    """Writes pictures/*.png, one at each step of the iteration."""
    folder = workdir / "pictures"
    source = "synthetic catalogue, rendered by moon_jax · " if prepared.synthetic else ""
    steps = "" if metrics["step"] is None else f"{metrics['step']} steps · "
    footer = f"{source}{steps}model {metrics['model']}"
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
            cells = [" / ".join(_percent(entry[f"R@{k}"]) for k in RANKS) if entry else "none" for entry in entries]
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
                f"{_percent(entry['accuracy'])} / {_percent(entry['F1'])}" if entry and "F1" in entry else "none"
                for entry in entries
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


def details(metrics: dict[str, Any]) -> Iterator[Table]:
    """What `tables` leaves out: other measures than R@k, and what is told by neighbours and the probe."""
    mark = "synthetic catalogue; " if metrics["synthetic"] else ""
    for name, scores in metrics["retrieval"].items():
        title = f"{mark}in percent, [interval of 95% by the bootstrap over queries]: {retrieval.QUERY_SETS[name]}"
        table = Table(min_width=WIDTH, title=Text(title))
        for column in ("", "R@10", "MRR", "nDCG@10", "mAP", "queries"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, entry in scores.items():
            low, high = map(_percent, entry["interval"]["R@10"])
            cells = [_percent(entry[measure]) for measure in ("MRR", "nDCG@10", "mAP")]
            table.add_row(
                direction, Text(f"{_percent(entry['R@10'])} [{low}, {high}]"), *cells, f"{entry['queries']:,}"
            )
        yield table
    taught = {name: scores for name, scores in metrics["labels"].items() if scores["known"]}
    if taught:
        title = f"{mark}accuracy in percent of neighbours / a linear probe, which know some products to train on"
        table = Table(min_width=WIDTH, title=f"{title} (*: label words struck)")
        table.add_column("")
        for column in ("i", "t*", "mm*", "known"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, scores in taught.items():
            entries = [scores.get(view, {}) for view in ("i", "t", "mm")]
            cells = [
                f"{_percent(entry['neighbours'])} / {_percent(entry['probe'])}" if "probe" in entry else "none"
                for entry in entries
            ]
            table.add_row(Text(printable(name.removeprefix("attribute "))), *cells, f"{scores['known']:,}")
        yield table


def differences(compared: dict[str, Any], ours: str, theirs: str) -> Iterator[Table]:
    """A table of `compare` for each set of queries."""
    for name, scores in compared.items():
        title = f"{ours} minus {theirs}, in percent, [interval of 95% by a paired bootstrap] (*: not 0):"
        table = Table(min_width=WIDTH, title=Text(printable(f"{title} {retrieval.QUERY_SETS[name]}")))
        for column in ("", "R@10", "MRR", "queries"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for direction, found in scores.items():
            cells = [
                f"{entry['difference']:+.1f} [{entry['low']:+.1f}, {entry['high']:+.1f}]{'*' if entry['told'] else ' '}"
                for entry in (found["R@10"], found["MRR"])
            ]
            table.add_row(direction, *map(Text, cells), f"{found['queries']:,}")
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
