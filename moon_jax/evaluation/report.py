"""A trained model judged on prepared data: numbers, embeddings and pictures into the workdir, and the last screen."""

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

    Raises:
        UserError: no product has a vector, one is not finite, or of given vectors nothing can be asked; the older
            scores there stay.
    """
    workdir = Path(workdir)
    terminal = terminal or Terminal(workdir)
    lessons = labels.known(prepared, known) if judgements is None else []
    tasks = labels.tasks(prepared, lessons)
    # What is compared otherwise than by the dot product knows no label.
    asked = [] if hasattr(embedder, "rank") or judgements is not None else tasks
    lessons = lessons if asked else []
    with terminal.progress(
        "embedding", retrieval.count(prepared, judgements) + labels.count(asked, lessons)
    ) as advance:
        encoded = retrieval.encode(embedder, prepared, advance, judgements)
        answers = labels.encode(embedder, prepared, encoded, asked, lessons, prompts, advance)
    covered = int(encoded.present.any(axis=1).sum())
    if not covered:
        first = prepared.products[prepared.val[0]].id if len(prepared.val) else ""
        raise UserError(f"{embedder.name}: no vector of any product, such as {first!r}; are the ids the same?")
    if covered < len(prepared.val):
        left = len(prepared.val) - covered
        terminal.line(f"{left:,} of {len(prepared.val):,} products have no vector, and are neither sought nor found")
    seconds = getattr(embedder, "seconds", None)
    if seconds and sum(seconds.values()):
        share = 100 * seconds["device"] / sum(seconds.values())
        terminal.line(f"of the time of embedding: device {share:.1f}%, waiting for data {100 - share:.1f}%")
    config = getattr(embedder, "config", config_lib.Config())
    dimension = encoded.candidates.shape[-1]
    widths = (dimension, *reversed(config.objective.matryoshka))
    asked_in = len(retrieval.DIRECTIONS) * len(encoded.queries)
    category = _category(tasks, prepared)
    with terminal.progress("evaluating", len(widths) * (asked_in + len(answers))) as advance:
        judged: dict[int, dict[str, Any]] = {}
        of_queries = []  # of all dimensions
        for width in widths:
            scores: dict[str, Any] = {name: {} for name in encoded.queries}
            categories: dict[str, Any] = {name: {} for name in encoded.queries}
            for name, direction, task, measures in retrieval.directions(
                encoded.truncated(width) if width < dimension else encoded
            ):
                scores[name][direction] = retrieval.summary(task, measures)
                if width == dimension:
                    categories[name][direction] = retrieval.by_category(task, measures, category)
                    of_queries.append((name, direction, task, measures))
                advance()
            advance(asked_in - sum(map(len, scores.values())))  # directions in which nothing could be asked
            told = {}
            for part in answers:
                told[part.task.name] = labels.measure(part.truncated(width))
                advance()
            judged[width] = {"retrieval": {name: found for name, found in scores.items() if found}, "labels": told}
            if width == dimension:
                judged[width]["categories"] = {name: found for name, found in categories.items() if category and found}
    whole = judged.pop(dimension)
    answered = bool(whole["retrieval"]) or any(map(_answered, whole["labels"].values()))
    if getattr(embedder, "fixed", False) and not answered:
        views = ", ".join(view for view, there in zip(VIEWS, encoded.present.any(axis=0), strict=True) if there)
        why = f"vectors of {views} alone; t→i and i→t want both t and i (moon-jax embed --views t,i,mm)"
        if judgements is not None:
            why = "no query has a vector, under its query_id, that some product of its answers has as well"
        raise UserError(f"{embedder.name}: nothing to be asked: {why}")
    for name, asked_with in encoded.queries.items():
        spoke = {index for part, _, task, _ in of_queries if part == name for index in task.query_product.tolist()}
        silent = len(asked_with.product) - len(spoke)
        if silent:
            which = retrieval.QUERY_SETS[name].partition(",")[0]
            told = "the model sees none of their views, or nothing that answers them"
            terminal.line(f"{silent:,} of {len(asked_with.product):,} ({which}) are asked in no direction: {told}")
    for old in (METRICS, QUERIES, EMBEDDINGS, COMPARED, "pictures/directions.png", "pictures/gallery.png"):
        (workdir / old).unlink(missing_ok=True)
    write_queries(workdir / QUERIES, prepared, of_queries, _name(embedder))
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
    drawn = draw(workdir, config, prepared, encoded, metrics)
    with terminal.progress("drawing", len(drawn)) as advance, warnings.catch_warnings(record=True) as caught:
        for picture in drawn:
            picture()
            advance()
    lacking = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking:
        terminal.line("some titles hold characters that no font here has: install Noto Sans, for Chinese Noto Sans CJK")
    # Last: a first metrics.json says that the rest is whole.
    write_atomic(workdir / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    return metrics


METRICS, QUERIES, EMBEDDINGS = "metrics.json", "queries.parquet", "embeddings/val.parquet"
COMPARED = "compared.json"


def _answered(scores: dict[str, Any]) -> bool:
    return any("accuracy" in scores.get(view, ()) or "probe" in scores.get(view, ()) for view in VIEWS)


def check_output(folder: Path) -> bool:
    """Whether an evaluation wrote there before.

    Raises:
        UserError: it cannot be made, or holds what no evaluation wrote.
    """
    if folder.is_file():
        raise UserError(f"--output {folder}: is a file; give a folder")
    own = {"data", PARTIAL, "run.log", METRICS, QUERIES, "embeddings", "pictures", "compared", COMPARED}
    try:
        if not folder.exists():  # it is made where something is written
            folder.mkdir(parents=True)
            folder.rmdir()
            return False
        names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; give a folder that can be made") from None
    if names - own:
        raise UserError(f"--output {folder}: holds other things ({min(names - own)}); give a new folder")
    return METRICS in names


def _name(embedder: protocol.Embedder) -> str:
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


def is_evaluated(folder: Path) -> bool:
    """Whether it is the output of an evaluation, and no model's workdir, which holds one too."""
    return all((folder / name).is_file() for name in (METRICS, QUERIES)) and not (folder / "checkpoints").exists()


def read(folder: Path) -> tuple[dict[str, Any], pa.Table]:
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
    if read(folder)[0]["data"] != data:
        raise UserError(f"{folder}: judged on other data than is given now; evaluate both on the same")


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """How two judged models differ, by a paired bootstrap over the queries that both were asked.

    Directions in which they had not the same candidates to choose from are left out.

    Args:
        ours, theirs: folders that `evaluate` wrote.

    Returns:
        {set: {direction: {measure: {"difference", "low", "high", "told"}, "queries": …}}}; see metrics.compared.

    Raises:
        UserError: one of them was not judged, or on other data.
    """
    told, whole = zip(*map(read, (ours, theirs)), strict=True)
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
        pools = {metrics["retrieval"][name][direction].get("pool") for metrics in told}
        if len(pools) > 1:
            continue
        sides = [dict(zip(names, np.array([side[key] for key in keys]).T, strict=True)) for side in values]
        found.setdefault(name, {})[direction] = measures_lib.compared(*sides) | {"queries": len(keys)}
    return found


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if it is not there."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw(
    workdir: Path, config: config_lib.Config, prepared: Prepared, encoded: retrieval.Encoded, metrics: dict[str, Any]
) -> list[Callable[[], None]]:
    """What is to be called to write pictures/*.png, one of them each."""
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
            lambda: pictures.experts(folder / "experts.png", lines[-1], footer),
        ]
    if metrics["retrieval"]:
        found += [
            lambda: pictures.directions(folder / "directions.png", metrics["retrieval"], footer),
            lambda: pictures.gallery(folder / "gallery.png", encoded, prepared, pixels, retrieval.SEED, footer),
        ]
    return found
