"""Turns a source into prepared data: records, triplets as indices, a split, a manifest and a quarantine.

Prepare makes three passes. First, any number of workers turn chunks of the source into units (units.py). Second, SQL
over tables with metadata of all records decides which records are kept, and in which split and order (tables.py,
triplets.py). Third, the kept records are copied into shards in that order. An interrupted pass resumes, and the result
depends neither on the number of workers nor on interruptions. All filtering happens here, so that a training batch is
a function of (seed, step).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from moon_jax import config as config_lib
from moon_jax import outputs
from moon_jax.data import prepared as prepared_lib
from moon_jax.data import records
from moon_jax.errors import UserError
from moon_jax.ingest import columns as columns_lib
from moon_jax.ingest import readers, sources, tfds, triplets, units
from moon_jax.ingest import shards as shards_lib
from moon_jax.ingest import workers as workers_lib
from moon_jax.ingest.files import Source
from moon_jax.ingest.tables import SPLITS, Tables
from moon_jax.progress import Progress, silent

PARTS = ("units", "shards")
"""Subfolders of WORK in the output folder."""

PLAN = "plan.npy"
"""File in WORK with the unit and row of each record, in index order."""

SHARD_BYTES = 256 << 20
"""Approximate bytes of records in a shard."""

MEGABYTE = 1 << 20

Pool = Callable[[], contextlib.AbstractContextManager[Executor]]
"""Creates an executor. It is closed while SQL runs, so that the tables can use its memory."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything besides the source that the result depends on."""

    columns: columns_lib.ColumnMap
    val_fraction: float
    max_pixels: int
    longest_side: int
    hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: config_lib.Config, columns: str = "own", hosts: Sequence[str] = ()) -> Options:
        settings = config.prepare
        return cls(
            columns_lib.load(columns),
            settings.val_fraction,
            config.data.max_pixels,
            settings.longest_side,
            tuple(hosts),
        )


def prepare(
    source: str | Path | Source,
    output: str | Path,
    options: Options,
    pool: Pool,
    workers: int,
    progress: Progress = silent,
) -> prepared_lib.Prepared:
    """Prepares a source into the folder `output`, resuming if it is partly done, and opens the result.

    Args:
        source: a file, a folder, hf://datasets/owner/name or tfds://name (sources.py), or an opened Source.
        pool: creates the executor of threads or processes for the first and third passes.
        workers: the number of its threads or processes.

    Raises:
        UserError: there is nothing to read, no usable training or held-out products, or `output` holds something else.
        KeyboardInterrupt: a stop was requested; finished work is kept.
    """
    output = Path(output)
    opened = source if isinstance(source, Source) else sources.open_source(source, options.columns)
    if prepared_lib.is_prepared(output):
        if not is_of(output, opened, options):
            raise outputs.conflict(output)
        shutil.rmtree(output / outputs.WORK, ignore_errors=True)
        return prepared_lib.open_prepared(output)
    with outputs.claim(output, _provenance(opened, options), PARTS) as work:
        return _prepared(opened, output, work, options, pool, workers, progress)


def _prepared(
    opened: Source,
    output: Path,
    work: Path,
    options: Options,
    pool: Pool,
    workers: int,
    progress: Progress,
) -> prepared_lib.Prepared:
    """Runs the three passes."""
    _discard_retryable(output, work)
    with pool() as executor:
        names = _read(opened, options, work, executor, workers, progress)
    pa.default_memory_pool().release_unused()
    try:
        with contextlib.closing(Tables(work, names, workers)) as tables:
            with progress("building triplets", 1) as advance:
                _decide(tables, options, opened.name)
                advance()
            plan = _plan(tables, work)
            described = _describe(tables, output)
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:  # usually a full disk
        raise UserError(
            f"--output {output}: {str(error).splitlines()[0]}; free disk space, then run the same command to resume"
        ) from None
    with pool() as executor:
        shards = _write(plan, work, output, executor, workers, progress)
    if opened.sign() != opened.signature:
        raise UserError(f"--data {opened.name}: changed during prepare; remove {output} and prepare it again")
    manifest = manifest_of(output, {"synthetic": opened.synthetic} | described, shards)
    outputs.write_atomic(output / outputs.SOURCE, _provenance(opened, options))
    # The manifest is written last: if it exists, everything else is complete.
    write_manifest(output, manifest)
    shutil.rmtree(work)
    return prepared_lib.open_prepared(output)


def _provenance(opened: Source, options: Options) -> str:
    return json.dumps({"files": opened.signature, "options": dataclasses.asdict(options)}, sort_keys=True)


def is_of(folder: Path, opened: Source, options: Options) -> bool:
    """Whether a folder, finished or partly done, was made from exactly these files with these options."""
    return outputs.is_from(folder, _provenance(opened, options))


def _discard_retryable(output: Path, work: Path) -> None:
    """Removes units with images that a retry may obtain, and the shards written after them."""
    # If the retry obtains them, more records are kept and every shard may change.
    marks = list(work.glob(f"units/*{units.RETRY}"))
    stale = [*work.glob("shards/*.json"), *output.glob(f"{records.NAME}-*.array_record-*")] if marks else []
    for old in (*stale, *(mark.with_suffix(".parquet") for mark in marks), *marks):
        old.unlink(missing_ok=True)


def _read(
    opened: Source, options: Options, work: Path, pool: Executor, workers: int, progress: Progress
) -> dict[str, list[Path]]:
    """The first pass. Returns the paths of the units with records ("read") and with events ("event")."""
    rules = units.Rules(options.columns, options.max_pixels, options.longest_side, options.hosts, max(1, 16 // workers))
    names: dict[str, list[Path]] = {"read": [], "event": []}
    checked: set[str] = set()
    queue: collections.deque[int] = collections.deque()
    total = max(1, sum(file.size for file in opened.files) // MEGABYTE)

    def submitted() -> Iterator[Callable[[], Future]]:
        for unit, chunk in enumerate(opened.chunks()):
            kind = "event" if chunk.file.kind == "log" else "read"
            path = work / "units" / f"{kind}-{unit:08}.parquet"
            names[kind].append(path)
            queue.append(chunk.size)
            if chunk.file.name not in checked:
                # Columns missing from the first chunk of a file are missing from all.
                checked.add(chunk.file.name)
                seen = {column for _, row in readers.rows(chunk) if isinstance(row, dict) for column in row}
                if seen:
                    options.columns.check(chunk.file.kind, seen, str(chunk.file.path))
            if path.exists():
                yield _done
            else:
                yield lambda chunk=chunk, unit=unit, path=path: pool.submit(units.write, chunk, unit, rules, path)

    size = reported = 0
    with progress("reading (MB)", total) as advance:
        for _ in workers_lib.bounded(submitted(), 2 * workers):
            size += queue.popleft()
            done = min(size // MEGABYTE, total)
            if done > reported:
                advance(done - reported)
                reported = done
    return names


def _done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def _decide(tables: Tables, options: Options, source: str) -> None:
    """The second pass: decides which records are kept, their split and the triplets."""
    tables.deduplicate()
    tables.split(options.val_fraction)
    train, val = tables.sides()
    tables.assign_queries()
    logged = tables.one("SELECT count(*) FROM event")
    if logged:
        triplets.from_log(tables, options.val_fraction)
    else:
        triplets.from_catalogue(tables)
    queries = tables.one("SELECT count(*) FROM val_pair")
    count_read = "SELECT count(*) FROM read WHERE part = $part AND split = 'val'"
    held_out = tables.one("SELECT count(*) FROM unlike WHERE copy = 1 AND split = 'val'")
    for part, found, name in (("product", held_out, "products"), ("query", queries, "queries")):
        if not found and tables.one(count_read, part=part):
            raise UserError(f"--data {source}: it has evaluation {name}, but none is usable; {_left_out(tables)}")
    side = "held-out" if train else "training"
    if not train or not (val or queries or logged or tables.one("SELECT count(*) FROM query")):
        raise UserError(
            f"--data {source}: no usable {side} product; at least two different titles are needed; {_left_out(tables)}"
        )
    if not tables.one("SELECT count(*) FROM product WHERE side = 0 AND has_text AND has_image"):
        raise UserError(f"--data {source}: no training product has both a title and an image; {_left_out(tables)}")
    if not tables.one("SELECT count(*) FROM triplet"):
        raise UserError(f"--data {source}: no training triplet; {_left_out(tables)}")
    tables.number_titles()


def _left_out(tables: Tables) -> str:
    """How many records were left out, why, and an example; for error messages."""
    counts, first = _quarantined(tables, None)
    if not first:
        return "0 left out"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    return (
        f"{sum(counts.values()):,} left out ({reasons}), such as {first['file']} {first['number']}:"
        f" {first['detail'] or first['reason']}"
    )


def _quarantined(tables: Tables, path: Path | None) -> tuple[Counter[str], dict[str, Any] | None]:
    """Counts of left-out records by reason, and the first one; writes all of them to the file `path`."""
    counts: Counter[str] = Counter()
    first = None
    with path.open("w", encoding="utf-8") if path else contextlib.nullcontext() as file:
        for batch in tables.quarantine():
            for entry in batch.to_pylist():
                first = first or entry
                counts[entry["reason"]] += 1
                if file:
                    file.write(json.dumps(entry) + "\n")
    return counts, first


def _plan(tables: Tables, work: Path) -> list[tuple[str, int, int]]:
    """Writes PLAN; returns the file name, start and end index of each shard."""
    tables.run(f"""
        CREATE TABLE plan AS
        SELECT index, side, unit, row,
            dense_rank() OVER (PARTITION BY side ORDER BY pile) - 1 AS shard
        FROM (
            SELECT *, (sum(size) OVER (PARTITION BY side ORDER BY index) - size) // {SHARD_BYTES} AS pile
            FROM {tables.everything()}
        )
    """)
    _write_array(tables, "SELECT unit, row FROM plan ORDER BY index", work / PLAN, shards_lib.LOCATION)
    counts = tables.rows("SELECT side, shard, count(*) FROM plan GROUP BY side, shard ORDER BY side, shard")
    of_side, plan, start = Counter(side for side, _, _ in counts), [], 0
    for side, shard, count in counts:
        plan.append((records.shard_name(SPLITS[side], shard, of_side[side]), start, start + count))
        start += count
    return plan


def _write(
    plan: list[tuple[str, int, int]], work: Path, output: Path, pool: Executor, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """The third pass. Returns the results of `shards.write_shard`, in order."""
    locations = np.load(work / PLAN, mmap_mode="r", allow_pickle=False)
    calls = (
        functools.partial(pool.submit, shards_lib.write_shard, output / name, np.array(locations[start:end]), work)
        for name, start, end in plan
    )
    written = []
    with progress("writing shards", len(plan)) as advance:
        for shard in workers_lib.bounded(calls, 2 * workers):
            written.append(shard)
            advance()
    return written


def _write_array(tables: Tables, sql: str, path: Path, dtype: np.dtype) -> int:
    """Writes the rows of a query result as a .npy array; returns their number."""
    count = tables.one(f"SELECT count(*) FROM ({sql})")
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        )
        for batch in tables.batches(sql):
            rows = np.empty(batch.num_rows, dtype)
            for position, name in enumerate(dtype.names or ("",)):
                column = batch.column(position).to_numpy(zero_copy_only=False)
                if name:
                    rows[name] = column
                else:
                    rows[:] = column
            file.write(rows.tobytes())
    temporary.replace(path)
    return count


def _describe(tables: Tables, output: Path) -> dict[str, Any]:
    """Writes the files beside the shards; returns their entries in the manifest."""
    lib = prepared_lib
    train, val = tables.sides()
    _write_array(
        tables,
        f"SELECT coalesce(number, -1) FROM {tables.everything()} LEFT JOIN title_number USING (title) ORDER BY index",
        output / lib.GROUPS,
        np.dtype("<i4"),
    )
    triplet_count = _write_array(
        tables,
        "SELECT query, positive, coalesce(negative, -1), weight FROM triplet ORDER BY sort_key, positive",
        output / lib.TRIPLETS,
        records.TRIPLET,
    )
    _write_array(
        tables,
        "SELECT query, positive, weight FROM val_pair ORDER BY query, positive",
        output / lib.VAL_QUERIES,
        records.JUDGEMENT,
    )
    counts, first = _quarantined(tables, output / f"{lib.QUARANTINE}.tmp")
    (output / f"{lib.QUARANTINE}.tmp").replace(output / lib.QUARANTINE)
    sizes = dict(tables.rows(f"SELECT side, count(*) FROM {tables.everything()} GROUP BY side"))
    without = tables.one("SELECT count(*) FILTER (NOT has_text), count(*) FILTER (NOT has_image) FROM product")
    read = dict(tables.rows("SELECT part, count(*) FROM read GROUP BY part"))
    logged = tables.one("SELECT count(*) FROM event")
    kept = {
        "product": train + val,
        "query": tables.one("SELECT count(*) FROM query WHERE positive >= 0"),
        "log": tables.one("SELECT count(*) FROM shown") if logged else 0,
    }
    return {
        # Records by kind. Summed over the kinds, read = kept + quarantined.
        "read": {"product": read.get("product", 0), "query": read.get("query", 0), "log": logged},
        "kept": kept,
        "quarantined": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "first_quarantined": first,
        "splits": {name: sizes.get(side, 0) for side, name in enumerate(SPLITS)},
        "products": train + val,
        "without_text": without[0],
        "without_image": without[1],
        "triplets": triplet_count,
        "triplets_without_negative": tables.one("SELECT count(*) FROM triplet WHERE negative IS NULL"),
        "negatives_skipped_above": tables.one("SELECT count(*) FROM skipped"),
        "val_queries": tables.one("SELECT count(DISTINCT query) FROM val_pair"),
    }


def manifest_of(
    output: Path, described: dict[str, Any], shards: list[dict[str, Any]], others: Sequence[str] = ()
) -> dict[str, Any]:
    """The manifest of a folder. Also writes the metadata files of TensorFlow Datasets.

    Args:
        described: the manifest's entries besides files and fingerprint.
        shards: the results of `shards.write`, in order.
        others: names of further files in the folder.
    """
    lib = prepared_lib
    tfds.write(output, {name: [shard for shard in shards if f"-{name}." in shard["file"]] for name in SPLITS})
    beside = (lib.GROUPS, lib.TRIPLETS, lib.VAL_QUERIES, lib.QUARANTINE, *tfds.FILES, *others)
    files = {
        name: {"bytes": (output / name).stat().st_size, "checksum": outputs.checksum(output / name)} for name in beside
    }
    files |= {shard["file"]: {name: shard[name] for name in ("bytes", "checksum")} for shard in shards}
    fingerprint = hashlib.blake2b(digest_size=16)
    # Covers the content used in training and evaluation, not how a library encodes it.
    content = [shard["content"] for shard in shards] + [files[name]["checksum"] for name in beside[:3]]
    for part in (*content, *described["splits"].values()):
        fingerprint.update(repr(part).encode())
    fields = ("file", "records", "bytes", "checksum")
    return {
        "schema": lib.SCHEMA,
        "fingerprint": fingerprint.hexdigest(),
        **described,
        "files": files,
        "shards": [{name: shard[name] for name in fields} for shard in shards],
    }


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    outputs.write_atomic(output / prepared_lib.MANIFEST, json.dumps(manifest, indent=2) + "\n")


def with_negatives(output: Path, manifest: dict[str, Any], mined: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder to which negatives.npy was added; `mined` describes it. The fingerprint changes."""
    path = output / prepared_lib.NEGATIVES
    entry = {"bytes": path.stat().st_size, "checksum": outputs.checksum(path)}
    digest = hashlib.blake2b(f"{manifest['fingerprint']} {entry['checksum']}".encode(), digest_size=16)
    files = {**manifest["files"], path.name: entry}
    return manifest | {"fingerprint": digest.hexdigest(), "mined": mined, "files": files}
