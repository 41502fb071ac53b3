"""Co-augmentation (MOON2.0, arXiv 2511.12449), offline: prepared data in, the same with enriched titles and expanded
images out.

Three passes. Units of products become candidates (candidates.py). An embedder tells how well each agrees with what it
was made from: an expanded image with the title, an enriched title with the image. Those of a catalogue that agree
least are dropped, and the rest is written into the records, with where it came from beside them. Only products to
train on are touched; triplets, split and all that is evaluated stay byte by byte.
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
"""The folders of the output's WORK."""

RESULTS = "augmented.parquet"
"""In the output: candidates.PROVENANCE, and the score, of all that was made."""

PICTURE, SHOWN = "augmented.png", 8
"""In the output: so many products and what was made of them."""

DISAGREES = "disagrees"
"""The reason of what the filter drops."""

SCORED = pa.schema([*candidates.PROVENANCE, ("score", pa.float32())])

ROWS = 1 << 14
"""Of a row group of RESULTS, at least."""


def augment(
    data: str | Path,
    output: str | Path,
    options: Options,
    max_pixels: int,
    engine: Engine,
    connections: int,
    progress: Progress = silent,
) -> Prepared:
    """Augments prepared data into the folder `output`, or goes on with that; opens it.

    Args:
        max_pixels: a picture of more is refused.
        connections: requests to a server that a worker may have at a time.

    Raises:
        UserError: not prepared data, an option that cannot be, or the output holds something else.
        Unavailable: a server does not answer; what is done stays.
        KeyboardInterrupt: a stop was asked for; what is done stays.
    """
    data, output = Path(data).resolve(), Path(output).resolve()
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    if not prepared_lib.is_prepared(data):
        raise UserError(f"--data {data}: not prepared data; moon-jax prepare makes it of any catalogue")
    if output.is_relative_to(data):
        raise UserError(f"--output {output}: within --data; give another folder")
    prepared = prepared_lib.open_prepared(data)
    if prepared.manifest.get("augmented"):
        raise UserError(f"--data {data}: augmented already; give what it was made from")
    candidates.check(options)
    embedder = registry.open_embedder(options.model, max_pixels) if options.model else None
    if embedder:
        EMBEDDERS.clear()
        EMBEDDERS[embedder.name] = embedder
    server = options.asks_server and chat.PROMPT_VERSION
    editing = options.asks_pipeline and [editor.PROMPT_VERSION, editor.Editor(options.images).signature()]
    told = json.dumps(
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
        if not outputs.is_from(output, told):
            raise outputs.conflict(output)
        shutil.rmtree(output / outputs.WORK, ignore_errors=True)
        return prepared_lib.open_prepared(output)
    with outputs.claim(output, told, PARTS) as work:
        if options.asks_server:
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
        outputs.write_atomic(output / outputs.SOURCE, told)
        # The manifest comes last: where it stands, the rest is whole.
        outputs.write_atomic(output / prepared_lib.MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(work)
    return prepared_lib.open_prepared(output)


def _note_brands(prepared: Prepared, work: Path, progress: Progress) -> None:
    """Which brands the catalogue has: a title shall not name another product's."""
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
"""The one that this process judges by, by name."""

_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Score:
    """Embeds a unit's candidates and what they were made from: cosine similarities f32[rows], NaN where there is none.

    An image is held against the title, a title against the first image, across modalities as CLIP's filter does it.
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
        places: dict[Any, int] = {}

        def place(key: Any, item: Product) -> int:
            if key not in places:
                places[key] = len(items)
                items.append(item)
            return places[key]

        pairs = np.full((len(rows), 2), -1)
        for number, row in enumerate(rows):
            product = prepared.products[row["product"]]
            if row["reason"]:
                continue
            if row["kind"] == "image" and product.text and product.text.strip():
                origin = place((row["product"], "title"), Product(text=product.text))
                pairs[number] = origin, place(number, Product(images=(row["image"],)))
            elif row["kind"] == "text" and product.images:
                origin = place((row["product"], "image"), Product(images=product.images[:1]))
                pairs[number] = origin, place(number, Product(text=row["text"]))
        scores = np.full(len(rows), np.nan, np.float32)
        chosen = pairs[:, 0] >= 0
        if items:
            vectors = self._encode(items)
            scores[chosen] = np.einsum("nd,nd->n", vectors[pairs[chosen, 0]], vectors[pairs[chosen, 1]])
            if not np.isfinite(scores[chosen]).all():
                raise UserError(f"--model {self.model}: gives vectors that are not finite")
        temporary = self.path(unit).with_name(f"{unit:08}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, scores)
        temporary.replace(self.path(unit))

    def _encode(self, items: list[Product]) -> np.ndarray:
        with _ONE_AT_A_TIME:
            if self.name not in EMBEDDERS:
                found = registry.open_embedder(self.model, self.max_pixels)
                if found.name != self.name:
                    raise UserError(f"--model {self.model}: changed since this began; remove the output to begin anew")
                EMBEDDERS[self.name] = found
            return EMBEDDERS[self.name].encode(items)


def _scores(work: Path, unit: int, rows: int) -> np.ndarray:
    """f32[rows]; NaN where nothing was scored."""
    path = work / "scores" / f"{unit:08}.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else np.full(rows, np.nan, np.float32)


def _thresholds(work: Path, units: range, quantile: float) -> dict[str, float]:
    """By kind, the score below which a result is dropped: the ⌊quantile · n⌋ + 1st of n. Of equal ones, all stay."""
    scores: dict[str, list[np.ndarray]] = {"text": [], "image": []}
    for unit in units:
        kinds = (
            pq.read_table(candidates.unit_path(work, unit), columns=["kind"])
            .column("kind")
            .to_numpy(zero_copy_only=False)
        )
        told = _scores(work, unit, len(kinds))
        for kind, parts in scores.items():
            parts.append(told[(kinds == kind) & ~np.isnan(told)])
    found = {}
    for kind, parts in scores.items():
        all_scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if len(all_scores):
            place = int(quantile * len(all_scores) + 1e-9)
            found[kind] = float(np.partition(all_scores, place)[place])
    return found


def _judged(work: Path, unit: int, thresholds: dict[str, float], columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a unit with their score, and with the filter's verdict as the reason."""
    rows = pq.read_table(candidates.unit_path(work, unit), columns=columns).to_pylist()
    for row, score in zip(rows, _scores(work, unit, len(rows)).tolist(), strict=True):
        scored = score == score
        if scored and score < thresholds[row["kind"]]:
            row["reason"] = DISAGREES
        yield row | {"score": score if scored else None}


@dataclasses.dataclass(frozen=True)
class Write:
    """Writes a shard again, with what was added to its products."""

    data: Path
    fingerprint: str  # of the data
    work: Path
    output: Path
    size: int  # products of a unit
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
        """By product, what stays of what was made for it."""
        found: dict[int, Product] = {}
        columns = ["product", "kind", "reason", "text", "image"]
        for row in _judged(self.work, unit, dict(self.thresholds), columns):
            if not row["reason"]:
                held = found.get(row["product"], Product())
                if row["kind"] == "text":
                    held = dataclasses.replace(held, enriched_texts=(*held.enriched_texts, row["text"]))
                else:
                    held = dataclasses.replace(held, expanded_images=(*held.expanded_images, row["image"]))
                found[row["product"]] = held
        return found


def _write_results(work: Path, units: range, path: Path, thresholds: dict[str, float]) -> dict[str, Any]:
    """Writes RESULTS; returns, by kind, how many were made, added, and left out by reason."""
    made: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {"text": Counter(), "image": Counter()}
    temporary = path.with_name(f"{path.name}.tmp")
    columns = [name for name, _ in candidates.PROVENANCE]
    with pq.ParquetWriter(temporary, SCORED, write_statistics=False) as file:
        held: list[dict[str, Any]] = []
        for unit in units:
            for row in _judged(work, unit, thresholds, columns):
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
    """Some products that have an image, drawn at random, with what was made of them."""
    drawn = np.random.default_rng(0).permutation(min(len(prepared.train), 1 << 20))[: 8 * SHOWN]
    shown = []
    for index in (prepared.train[place] for place in drawn.tolist()):
        product = prepared.products[index]
        if not product.images or len(shown) == SHOWN:
            continue
        images, titles = [], []
        columns = ["product", "kind", "operation", "reason", "text", "image"]
        for row in _judged(work, index // candidates.UNIT, thresholds, columns):
            if row["product"] != index:
                continue
            score = "" if row["score"] is None else f" {row['score']:.2f}"
            if row["kind"] == "image":
                images.append((f"{row['operation']}{score}", row["image"], not row["reason"]))
            else:
                titles.append((f"{row['text']}{score}", not row["reason"]))
        shown.append((product, images, titles))
    footer = "crossed (✗): left out" + (" · numbers: agreement of image and title" if thresholds else "")
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
    """That of the data, with what was added; copies what lies beside the shards."""
    for name in (prepared_lib.GROUPS, prepared_lib.TRIPLETS, prepared_lib.VAL_QUERIES, prepared_lib.QUARANTINE):
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
    return prepare.manifest_of(output, described, shards, others=(RESULTS, PICTURE))
