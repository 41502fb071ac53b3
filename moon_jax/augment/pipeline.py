"""Offline co-augmentation (MOON2.0, arXiv 2511.12449): copies prepared data and adds enriched titles and images.

Three passes. The first writes the candidates of each unit of products (candidates.py). In the second an embedder scores
how well each candidate agrees with its origin: an expanded image with the title, an enriched title with the image. The
third drops the candidates that agree least and writes the rest into the records; augmented.parquet lists where each
came from. Only training products change; triplets, split and all evaluation data stay identical byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import outputs
from moon_jax.augment import candidates, chat, editor, text
from moon_jax.augment.engines import Engine
from moon_jax.augment.options import Options
from moon_jax.data import prepared as prepared_lib
from moon_jax.data import records
from moon_jax.data.prepared import Prepared
from moon_jax.embedders import protocol, registry
from moon_jax.errors import UserError
from moon_jax.evaluation import pictures
from moon_jax.ingest import prepare
from moon_jax.ingest import shards as shards_lib
from moon_jax.progress import Progress, silent
from moon_jax.types import Product

PARTS = ("units", "scores", "shards", "answers")
"""The folders within outputs.WORK."""

RESULTS = "augmented.parquet"
"""File of the output: candidates.PROVENANCE and the score of every result."""

PICTURE, SHOWN = "augmented.png", 8
"""File of the output that shows products with their results, and how many products it shows."""

DISAGREES = "disagrees"
"""The reason given for results that the filter drops."""

SCORED = pa.schema([*candidates.PROVENANCE, ("score", pa.float32())])

ROWS = 1 << 14
"""Minimum rows of a row group of RESULTS; the last may have fewer."""


def augment(
    data: str | Path,
    output: str | Path,
    options: Options,
    max_pixels: int,
    engine: Engine,
    connections: int,
    progress: Progress = silent,
) -> Prepared:
    """Augments prepared data into the folder `output`, or resumes there. Opens the result.

    Args:
        max_pixels: larger images are refused.
        connections: concurrent requests to a server, per worker.

    Raises:
        UserError: `data` is not prepared data, an option is invalid, or the output holds something else.
        Unavailable: a server does not answer; finished work is kept.
        KeyboardInterrupt: a stop was requested; finished work is kept.
    """
    data, output = Path(data).resolve(), Path(output).resolve()
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    if not prepared_lib.is_prepared(data):
        raise UserError(f"--data {data}: not prepared data; run moon-jax prepare on your catalogue first")
    if output.is_relative_to(data):
        raise UserError(f"--output {output}: inside --data; give another folder")
    prepared = prepared_lib.open_prepared(data)
    if prepared.manifest.get("augmented"):
        raise UserError(f"--data {data}: already augmented; give the prepared data that it was made from")
    candidates.check(options)
    embedder = registry.open_embedder(options.model, max_pixels) if options.model else None
    if embedder:
        EMBEDDERS.clear()
        EMBEDDERS[embedder.name] = embedder
    server = options.uses_server and chat.PROMPT_VERSION
    editing = options.uses_pipeline and [editor.PROMPT_VERSION, editor.Editor(options.images).signature()]
    source = json.dumps(
        {
            "data": prepared.fingerprint,
            "options": dataclasses.asdict(options),
            "embedder": embedder and embedder.name,
            "backends": [server, editing],
            "unit": candidates.UNIT,
        },
        sort_keys=True,
    )
    if prepared_lib.is_prepared(output):
        if not outputs.is_from(output, source):
            raise outputs.conflict(output)
        shutil.rmtree(output / outputs.WORK, ignore_errors=True)
        return prepared_lib.open_prepared(output)
    with outputs.claim(output, source, PARTS) as work:
        if options.uses_server:
            _note_brands(prepared, work, progress)
        units = range(-(-len(prepared.train) // candidates.UNIT))
        engine(
            "augmenting (units)",
            candidates.Generate(data, prepared.fingerprint, work, options, max_pixels, candidates.UNIT, connections),
            units,
            progress,
        )
        if embedder:
            engine(
                "scoring (units)",
                Score(data, prepared.fingerprint, work, options.model, embedder.name, max_pixels),
                units,
                progress,
                alone=True,
            )
        thresholds = _thresholds(work, units, options.quantile)
        writing = Write(data, prepared.fingerprint, work, output, candidates.UNIT, tuple(sorted(thresholds.items())))
        engine("writing shards", writing, range(len(prepared.manifest["shards"])), progress)
        counts = _write_results(work, units, output / RESULTS, thresholds)
        _draw(prepared, work, output / PICTURE, thresholds, max_pixels)
        manifest = _manifest(prepared, output, work, options, embedder.name if embedder else "", thresholds, counts)
        outputs.write_atomic(output / outputs.SOURCE, source)
        # The manifest is written last: if it exists, everything else is complete.
        outputs.write_atomic(output / prepared_lib.MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(work)
    return prepared_lib.open_prepared(output)


def _note_brands(prepared: Prepared, work: Path, progress: Progress) -> None:
    """Writes the catalogue's brands to a file: an enriched title must not name another product's brand."""
    path = work / candidates.BRANDS
    if path.is_file():
        return
    found = set()
    with progress("reading brands", len(prepared.train)) as advance:
        for index in prepared.train:
            found.add(text.brand_key(prepared.products[index].brand))
            advance()
    outputs.write_atomic(path, json.dumps(sorted(found - {""})))


EMBEDDERS: dict[str, protocol.Embedder] = {}
"""The embedder that this process scores with, under its name."""

_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Score:
    """Writes the cosine similarity of each candidate of a unit to its origin: f32[rows], NaN if it has none.

    An image is compared with the title, a title with the first image: across modalities, as filters by CLIP score do.
    """

    data: Path
    fingerprint: str  # of the data
    work: Path
    model: str
    name: str  # the embedder's
    max_pixels: int

    def path(self, unit: int) -> Path:
        return self.work / "scores" / f"{unit:08}.npy"

    def done(self, unit: int) -> bool:
        return self.path(unit).is_file()

    def __call__(self, unit: int) -> None:
        prepared = candidates.opened(self.data, self.fingerprint)
        rows = pq.read_table(candidates.unit_path(self.work, unit)).to_pylist()
        items: list[Product] = []
        positions: dict[Any, int] = {}

        def position(key: Any, item: Product) -> int:
            if key not in positions:
                positions[key] = len(items)
                items.append(item)
            return positions[key]

        pairs = np.full((len(rows), 2), -1)
        for number, row in enumerate(rows):
            product = prepared.products[row["product"]]
            if row["reason"]:
                continue
            if row["kind"] == "image" and product.text and product.text.strip():
                origin = position((row["product"], "title"), Product(text=product.text))
                pairs[number] = origin, position(number, Product(images=(row["image"],)))
            elif row["kind"] == "text" and product.images:
                origin = position((row["product"], "image"), Product(images=product.images[:1]))
                pairs[number] = origin, position(number, Product(text=row["text"]))
        scores = np.full(len(rows), np.nan, np.float32)
        chosen = pairs[:, 0] >= 0
        if items:
            vectors = self._encode(items)
            scores[chosen] = np.einsum("nd,nd->n", vectors[pairs[chosen, 0]], vectors[pairs[chosen, 1]])
            if not np.isfinite(scores[chosen]).all():
                raise UserError(f"--model {self.model}: produces vectors that are not finite; give another model")
        temporary = self.path(unit).with_name(f"{unit:08}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, scores)
        temporary.replace(self.path(unit))

    def _encode(self, items: list[Product]) -> np.ndarray:
        with _ONE_AT_A_TIME:
            if self.name not in EMBEDDERS:
                found = registry.open_embedder(self.model, self.max_pixels)
                if found.name != self.name:
                    raise UserError(f"--model {self.model}: changed since the start; remove the output to start again")
                EMBEDDERS[self.name] = found
            return EMBEDDERS[self.name].encode(items)


def _scores(work: Path, unit: int, rows: int) -> np.ndarray:
    """f32[rows]; NaN for rows without a score."""
    path = work / "scores" / f"{unit:08}.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else np.full(rows, np.nan, np.float32)


def _thresholds(work: Path, units: range, quantile: float) -> dict[str, float]:
    """By kind, the score below which results are dropped: number ⌊quantile · n⌋ + 1 of n. Ties at it are kept."""
    scores: dict[str, list[np.ndarray]] = {"text": [], "image": []}
    for unit in units:
        kinds = (
            pq.read_table(candidates.unit_path(work, unit), columns=["kind"])
            .column("kind")
            .to_numpy(zero_copy_only=False)
        )
        of_unit = _scores(work, unit, len(kinds))
        for kind, parts in scores.items():
            parts.append(of_unit[(kinds == kind) & ~np.isnan(of_unit)])
    found = {}
    for kind, parts in scores.items():
        all_scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if len(all_scores):
            rank = int(quantile * len(all_scores) + 1e-9)
            found[kind] = float(np.partition(all_scores, rank)[rank])
    return found


def _filtered(work: Path, unit: int, thresholds: dict[str, float], columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a unit with their scores. Rows that the filter drops have DISAGREES as their reason."""
    rows = pq.read_table(candidates.unit_path(work, unit), columns=columns).to_pylist()
    for row, score in zip(rows, _scores(work, unit, len(rows)).tolist(), strict=True):
        scored = score == score
        if scored and score < thresholds[row["kind"]]:
            row["reason"] = DISAGREES
        yield row | {"score": score if scored else None}


@dataclasses.dataclass(frozen=True)
class Write:
    """Rewrites a shard with the results added to its products."""

    data: Path
    fingerprint: str  # of the data
    work: Path
    output: Path
    size: int  # products per unit
    thresholds: tuple[tuple[str, float], ...]

    def _name(self, number: int) -> str:
        return candidates.opened(self.data, self.fingerprint).manifest["shards"][number]["file"]

    def done(self, number: int) -> bool:
        return shards_lib.note(self._name(number), self.work).is_file() and (self.output / self._name(number)).is_file()

    def __call__(self, number: int) -> None:
        shards_lib.write(self.output / self._name(number), self._records(number), self.work)

    def _records(self, number: int) -> Iterator[bytes]:
        prepared = candidates.opened(self.data, self.fingerprint)
        before = sum(shard["records"] for shard in prepared.manifest["shards"][:number])
        added: dict[int, Product] = {}
        for index in range(before, before + prepared.manifest["shards"][number]["records"]):
            if index in prepared.train and (index == before or index % self.size == 0):
                added = self._added(index // self.size)
            raw = prepared.products.raw(index)
            if index in prepared.train and index in added:
                more = added[index]
                raw = records.encode(
                    dataclasses.replace(
                        records.decode(raw), enriched_texts=more.enriched_texts, expanded_images=more.expanded_images
                    )
                )
            yield raw

    def _added(self, unit: int) -> dict[int, Product]:
        """The results to add, by product."""
        found: dict[int, Product] = {}
        columns = ["product", "kind", "reason", "text", "image"]
        for row in _filtered(self.work, unit, dict(self.thresholds), columns):
            if not row["reason"]:
                held = found.get(row["product"], Product())
                if row["kind"] == "text":
                    held = dataclasses.replace(held, enriched_texts=(*held.enriched_texts, row["text"]))
                else:
                    held = dataclasses.replace(held, expanded_images=(*held.expanded_images, row["image"]))
                found[row["product"]] = held
        return found


def _write_results(work: Path, units: range, path: Path, thresholds: dict[str, float]) -> dict[str, Any]:
    """Writes RESULTS. Returns by kind how many results were made, added, and left out by reason."""
    made: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {"text": Counter(), "image": Counter()}
    temporary = path.with_name(f"{path.name}.tmp")
    columns = [name for name, _ in candidates.PROVENANCE]
    with pq.ParquetWriter(temporary, SCORED, write_statistics=False) as file:
        held: list[dict[str, Any]] = []
        for unit in units:
            for row in _filtered(work, unit, thresholds, columns):
                made[row["kind"]] += 1
                if row["reason"]:
                    reasons[row["kind"]][row["reason"]] += 1
                held.append(row)
            if len(held) >= ROWS:
                file.write_table(pa.Table.from_pylist(held, SCORED))
                held = []
        file.write_table(pa.Table.from_pylist(held, SCORED))
    temporary.replace(path)
    return {
        kind: {
            "made": made[kind],
            "added": made[kind] - left.total(),
            "left_out": dict(sorted(left.items(), key=lambda item: (-item[1], item[0]))),
        }
        for kind, left in reasons.items()
    }


def _draw(prepared: Prepared, work: Path, path: Path, thresholds: dict[str, float], max_pixels: int) -> None:
    """Draws random products that have an image, with their results."""
    drawn = np.random.default_rng(0).permutation(min(len(prepared.train), 1 << 20))[: 8 * SHOWN]
    shown = []
    for index in (prepared.train[number] for number in drawn.tolist()):
        product = prepared.products[index]
        if not product.images or len(shown) == SHOWN:
            continue
        images, titles = [], []
        columns = ["product", "kind", "operation", "reason", "text", "image"]
        for row in _filtered(work, index // candidates.UNIT, thresholds, columns):
            if row["product"] != index:
                continue
            score = "" if row["score"] is None else f" {row['score']:.2f}"
            if row["kind"] == "image":
                images.append((f"{row['operation']}{score}", row["image"], not row["reason"]))
            else:
                titles.append((f"{row['text']}{score}", not row["reason"]))
        shown.append((product, images, titles))
    footer = "crossed out (✗): not added" + (" · numbers: cosine of image and title" if thresholds else "")
    pictures.additions(path, shown, max_pixels, footer)


def _manifest(
    prepared: Prepared,
    output: Path,
    work: Path,
    options: Options,
    embedder: str,
    thresholds: dict[str, float],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """The data's manifest plus a summary of the augmentation. Also copies the files beside the shards."""
    names = [prepared_lib.GROUPS, prepared_lib.TRIPLETS, prepared_lib.VAL_QUERIES, prepared_lib.QUARANTINE]
    for name in names if prepared.negatives is None else [*names, prepared_lib.NEGATIVES]:
        temporary = output / f"{name}.tmp"
        shutil.copyfile(prepared.folder / name, temporary)
        temporary.replace(output / name)
    shards = [
        json.loads(shards_lib.note(shard["file"], work).read_text(encoding="utf-8"))
        for shard in prepared.manifest["shards"]
    ]
    described = {
        name: value
        for name, value in prepared.manifest.items()
        if name not in ("schema", "fingerprint", "files", "shards")
    }
    described["augmented"] = {
        "of": prepared.fingerprint,
        "options": dataclasses.asdict(options),
        "embedder": embedder,
        "thresholds": thresholds,
        **counts,
    }
    manifest = prepare.manifest_of(output, described, shards, others=(RESULTS, PICTURE))
    if prepared.negatives is None:
        return manifest
    return prepare.with_negatives(output, manifest, described["mined"])
