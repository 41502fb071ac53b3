"""Evaluates a model on prepared data: writes scores, embeddings and pictures; and compares two evaluations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import config as config_lib
from moon_jax.data.prepared import Prepared
from moon_jax.embedders import protocol
from moon_jax.errors import UserError
from moon_jax.evaluation import labels, pictures, retrieval
from moon_jax.evaluation import metrics as measures_lib
from moon_jax.outputs import write_atomic
from moon_jax.progress import Terminal
from moon_jax.serving.bulk import write_vectors
from moon_jax.training.workdir import PARTIAL
from moon_jax.types import VIEWS


def evaluate(
    embedder: protocol.Embedder,
    prepared: Prepared,
    workdir: str | Path,
    terminal: Terminal | None = None,
    *,
    probe_products: int = 0,
    prompts: Sequence[str] = labels.PROMPTS,
    qrels: measures_lib.Qrels | None = None,
) -> dict[str, Any]:
    """Evaluates `embedder` on the held-out products.

    Writes metrics.json, queries.parquet, embeddings/val.parquet and pictures/ into `workdir`. The pictures of the
    training need its metrics.jsonl there.

    Args:
        probe_products: maximum number of training products on which nearest neighbours and the linear probe are
            fitted; 0 leaves both out.
        prompts: templates of a label's text; {} stands for the label.
        qrels: relevant products of the user's own queries (evaluation/qrels.py). If given, only these queries are
            evaluated, no labels, and no vectors are written.

    Returns:
        The contents of metrics.json; see docs/workdir.md.

    Raises:
        UserError: no product has a vector, a vector is not finite, or precomputed vectors allow no evaluation. Older
            scores in `workdir` are kept.
    """
    workdir = Path(workdir)
    terminal = terminal or Terminal(workdir)
    fitted_on = labels.known(prepared, probe_products) if qrels is None else []
    tasks = labels.tasks(prepared, fitted_on)
    # Labels are compared by dot product; an embedder with its own `rank` has none.
    evaluated = [] if hasattr(embedder, "rank") or qrels is not None else tasks
    fitted_on = fitted_on if evaluated else []
    photos = retrieval.photo_sets(embedder)
    with terminal.progress(
        "embedding", retrieval.count(prepared, qrels, photos) + labels.count(evaluated, fitted_on)
    ) as advance:
        encoded = retrieval.encode(embedder, prepared, advance, qrels, photos)
        answers = labels.encode(embedder, prepared, encoded, evaluated, fitted_on, prompts, advance)
    covered = int(encoded.present.any(axis=1).sum())
    if not covered:
        first = prepared.products[prepared.val[0]].id if len(prepared.val) else ""
        raise UserError(
            f"{embedder.name}: no vector for any product, such as {first!r}; check that the ids are the same"
        )
    if covered < len(prepared.val):
        missing = len(prepared.val) - covered
        terminal.line(
            f"{missing:,} of {len(prepared.val):,} products have no vector; they are left out of queries and candidates"
        )
    seconds = getattr(embedder, "seconds", None)
    if seconds and sum(seconds.values()):
        share = 100 * seconds["device"] / sum(seconds.values())
        terminal.line(f"share of embedding time: device {share:.1f}%, waiting for data {100 - share:.1f}%")
    config = getattr(embedder, "config", config_lib.Config())
    dimension = encoded.candidates.shape[-1]
    widths = (dimension, *reversed(config.objective.matryoshka))
    possible = len(retrieval.DIRECTIONS) * len(encoded.queries)
    category = _category(tasks, prepared)
    with terminal.progress("evaluating", len(widths) * (possible + len(answers))) as advance:
        by_width: dict[int, dict[str, Any]] = {}
        searches = []  # at full width
        for width in widths:
            scores: dict[str, Any] = {name: {} for name in encoded.queries}
            categories: dict[str, Any] = {name: {} for name in encoded.queries}
            for name, direction, task, measures in retrieval.directions(
                encoded.truncated(width) if width < dimension else encoded
            ):
                scores[name][direction] = retrieval.summary(task, measures)
                if width == dimension:
                    categories[name][direction] = retrieval.by_category(task, measures, category)
                    searches.append((name, direction, task, measures))
                advance()
            advance(possible - sum(map(len, scores.values())))  # directions without queries
            accuracies = {}
            for part in answers:
                accuracies[part.task.name] = labels.measure(part.truncated(width))
                advance()
            found_in = {name: found for name, found in scores.items() if found}
            by_width[width] = {"retrieval": found_in, "labels": accuracies}
            if width == dimension:
                found_in = {name: found for name, found in categories.items() if category and found}
                by_width[width]["categories"] = found_in
    whole = by_width.pop(dimension)
    answered = bool(whole["retrieval"]) or any(map(_answered, whole["labels"].values()))
    if getattr(embedder, "fixed", False) and not answered:
        views = ", ".join(view for view, there in zip(VIEWS, encoded.present.any(axis=0), strict=True) if there)
        why = f"the vectors are {views} only; t→i and i→t need t and i; create them with moon-jax embed --views t,i,mm"
        if qrels is not None:
            why = "no query and relevant product both have vectors; the id of a query's vector is its query_id"
        raise UserError(f"{embedder.name}: nothing to evaluate: {why}")
    for name, queries in encoded.queries.items():
        used = {index for part, _, task, _ in searches if part == name for index in task.query_product.tolist()}
        unused = len(queries.product) - len(used)
        if unused:
            which = retrieval.brief(name)
            why = "the model embeds none of their views, or no candidate is relevant"
            terminal.line(f"{unused:,} of {len(queries.product):,} queries ({which}) are not scored: {why}")
    for old in (METRICS, QUERIES, EMBEDDINGS, COMPARED, "pictures/directions.png", "pictures/gallery.png"):
        (workdir / old).unlink(missing_ok=True)
    write_queries(workdir / QUERIES, prepared, searches, _name(embedder))
    metrics = {
        "step": getattr(embedder, "step", None),
        "model": _name(embedder),
        "synthetic": prepared.synthetic,
        "data": prepared.fingerprint,
        **whole,
        "widths": {str(width): found for width, found in by_width.items()},
    }
    ids = [prepared.products[index].id for index in prepared.val]
    if encoded.candidates.dtype == np.float32 and qrels is None:
        write_vectors(
            workdir / EMBEDDINGS, ids, encoded.candidates, encoded.present, metrics["model"], prepared.synthetic
        )
    drawn = draw(workdir, config, prepared, encoded, metrics)
    with terminal.progress("drawing", len(drawn)) as advance, warnings.catch_warnings(record=True) as caught:
        for picture in drawn:
            picture()
            advance()
    missing_glyphs = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in missing_glyphs:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing_glyphs:
        terminal.line(
            "pictures: no installed font has some characters of the titles; install Noto Sans, or Noto Sans CJK for"
            " Chinese"
        )
    # Written last: its presence means that all other files are complete.
    write_atomic(workdir / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


METRICS, QUERIES, EMBEDDINGS = "metrics.json", "queries.parquet", "embeddings/val.parquet"
COMPARED = "compared.json"


def _answered(scores: dict[str, Any]) -> bool:
    return any("accuracy" in scores.get(view, ()) or "probe" in scores.get(view, ()) for view in VIEWS)


def check_output(folder: Path) -> bool:
    """Whether `folder` already contains an evaluation.

    Raises:
        UserError: it cannot be created, or contains files that no evaluation wrote.
    """
    if folder.is_file():
        raise UserError(f"--output {folder}: is a file; give a folder")
    own = {"data", PARTIAL, "run.log", METRICS, QUERIES, "embeddings", "pictures", "compared", COMPARED}
    try:
        if not folder.exists():  # tries to create it; the real one is created at the first write
            folder.mkdir(parents=True)
            folder.rmdir()
            return False
        names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; give a folder that can be created") from None
    if names - own:
        raise UserError(f"--output {folder}: contains other files ({min(names - own)}); give a new folder")
    return METRICS in names


def _name(embedder: protocol.Embedder) -> str:
    return getattr(embedder, "fingerprint", embedder.name)


def _category(tasks: Sequence[labels.Task], prepared: Prepared) -> dict[int, str]:
    """Product index → category, for held-out products that have one."""
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
    searches: Sequence[tuple[str, str, retrieval.Search, dict[str, np.ndarray]]],
    model: str,
) -> None:
    """Writes a Parquet file with one row per query: set, direction, query (record number and id), and the measures.

    The file's metadata contain the name of the `model`.

    Args:
        searches: what retrieval.directions yields.
    """
    ids: dict[int, str] = {}
    for _, _, task, _ in searches:
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
        for name, direction, task, measures in searches
    ]
    names = pa.table({name: pa.array([], pa.string()) for name in ("set", "direction", "query")})
    table = pa.concat_tables(tables) if tables else names
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"model": model})
    pq.write_table(table, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def is_evaluated(folder: Path) -> bool:
    """Whether `folder` is the output of an evaluation and not a workdir, which may contain an evaluation too."""
    return all((folder / name).is_file() for name in (METRICS, QUERIES)) and not (folder / "checkpoints").exists()


def read(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """The contents of metrics.json and queries.parquet.

    Raises:
        UserError: one of them is missing or damaged, or they are not from the same evaluation.
    """
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        table = pq.read_table(folder / QUERIES)
        if (table.schema.metadata or {}).get(b"model", b"").decode() != metrics["model"]:
            raise ValueError
        if not set(metrics["retrieval"]) <= set(retrieval.QUERY_SETS):
            raise ValueError  # written by an earlier version
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: not a complete output of moon-jax evaluate, or of another version; evaluate the model again"
        ) from None
    return metrics, table


def check_comparable(folder: Path, data: str) -> None:
    """Checks that `folder` is an evaluation on the data with fingerprint `data`.

    Raises:
        UserError: it is not.
    """
    if read(folder)[0]["data"] != data:
        raise UserError(f"{folder}: evaluated on other data; evaluate both models on the same data")


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The difference of two evaluations, by a paired bootstrap over the queries that both contain.

    Directions with different candidates are left out.

    Args:
        ours, theirs: folders that `evaluate` wrote.

    Returns:
        {set: {direction: {measure: {"difference", "low", "high", "significant"}, "queries": …}}}; see metrics.compared.

    Raises:
        UserError: a folder is not an evaluation, or they are on different data.
    """
    both, whole = zip(*map(read, (ours, theirs)), strict=True)
    check_comparable(theirs, both[0]["data"])
    tables = [table.to_pydict() for table in whole]
    names = [name for name in tables[0] if name in tables[1] and name not in ("set", "direction", "query")]
    if not names:  # one of them has no queries
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
        pools = {metrics["retrieval"][name][direction].get("pool") for metrics in both}
        if len(pools) > 1:
            continue
        sides = [dict(zip(names, np.array([side[key] for key in keys]).T, strict=True)) for side in values]
        found.setdefault(name, {})[direction] = measures_lib.compared(*sides) | {"queries": len(keys)}
    return found


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw(
    workdir: Path, config: config_lib.Config, prepared: Prepared, encoded: retrieval.Encoded, metrics: dict[str, Any]
) -> list[Callable[[], None]]:
    """Functions that each write one of pictures/*.png."""
    folder = workdir / "pictures"
    source = "synthetic catalogue, rendered by moon_jax · " if prepared.synthetic else ""
    steps = "" if metrics["step"] is None else f"{metrics['step']} steps · "
    footer = f"{source}{steps}model {metrics['model']}"
    lines, threshold, pixels = lines_of(workdir), config.objective.phi_threshold, config.data.max_pixels
    found: list[Callable[[], None]] = []
    if lines:
        found += [
            lambda: pictures.training(folder / "training.png", lines, footer),
            lambda: pictures.phi(folder / "phi.png", lines, threshold, footer),
            lambda: pictures.experts(folder / "experts.png", lines, footer),
        ]
    if metrics["retrieval"]:
        found += [
            lambda: pictures.directions(folder / "directions.png", metrics["retrieval"], footer),
            lambda: pictures.gallery(folder / "gallery.png", encoded, prepared, pixels, retrieval.SEED, footer),
        ]
    return found
