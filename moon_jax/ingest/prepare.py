"""From a source to what training and evaluation read: records, triplets as indices, a split, a manifest, a quarantine.

Three passes. Chunks of the source become units (units.py), by any number of workers. Tables of what is known of every
record decide which stay, and where (tables.py, triplets.py). The records that stay are copied into shards, in their
order. A pass begins where the last try ended, and the result does not depend on who worked on it or how often it was
killed. Whatever is filtered is filtered here, so that the training batch stays a function of (seed, step).
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
"""The folders of the output's WORK."""

PLAN = "plan.npy"
"""In WORK: where each record lies, in the order of the indices."""

SHARD_BYTES = 256 << 20
"""Records of a shard, about."""

MEGABYTE = 1 << 20

Pool = Callable[[], contextlib.AbstractContextManager[Executor]]
"""Makes an executor. It is not kept while the tables are worked on: its memory is theirs meanwhile."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the result depends on, beside the source."""

    columns: columns_lib.ColumnMap
    val_fraction: float
    max_pixels: int
    longest_side: int
    hosts: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: config_lib.Config, columns: str = "own", hosts: Sequence[str] = ()) -> Options:
        asked = config.prepare
        return cls(
            columns_lib.load(columns), asked.val_fraction, config.data.max_pixels, asked.longest_side, tuple(hosts)
        )


def prepare(
    source: str | Path | Source,
    output: str | Path,
    options: Options,
    pool: Pool,
    workers: int,
    progress: Progress = silent,
) -> prepared_lib.Prepared:
    """Prepares a source into the folder `output`, or goes on with that; opens it.

    Args:
        source: a file, a folder, hf://datasets/owner/name or tfds://name (sources.py); opened already, or not.
        pool: makes what works on the first and the third pass, of threads or of processes.
        workers: so many of them.

    Raises:
        UserError: nothing to read, or nothing left to train on or to find; the output holds something else.
        KeyboardInterrupt: a stop was asked for; what is done stays.
    """
    output = Path(output)
    opened = source if isinstance(source, Source) else sources.open_source(source, options.columns)
    if prepared_lib.is_prepared(output):
        if not is_of(output, opened, options):
            raise outputs.conflict(output)
        shutil.rmtree(output / outputs.WORK, ignore_errors=True)
        return prepared_lib.open_prepared(output)
    with outputs.claim(output, _told(opened, options), PARTS) as work:
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
    """The three passes."""
    _forget(output, work)
    with pool() as executor:
        names = _read(opened, options, work, executor, workers, progress)
    pa.default_memory_pool().release_unused()
    try:
        with contextlib.closing(Tables(work, names, workers)) as tables:
            with progress("deciding", 1) as advance:
                _decide(tables, options, opened.name)
                advance()
            plan = _plan(tables, work)
            described = _describe(tables, output)
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:  # of the disk, most likely
        raise UserError(
            f"--output {output}: {str(error).splitlines()[0]}; make room; the same command goes on"
        ) from None
    with pool() as executor:
        shards = _write(plan, work, output, executor, workers, progress)
    if opened.sign() != opened.signature:
        raise UserError(f"--data {opened.name}: changed while it was read; remove {output}, and prepare it again")
    manifest = manifest_of(output, {"synthetic": opened.synthetic} | described, shards)
    outputs.write_atomic(output / outputs.SOURCE, _told(opened, options))
    # The manifest comes last: where it stands, the rest is whole.
    outputs.write_atomic(output / prepared_lib.MANIFEST, json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(work)
    return prepared_lib.open_prepared(output)


def _told(opened: Source, options: Options) -> str:
    return json.dumps({"files": opened.signature, "options": dataclasses.asdict(options)}, sort_keys=True)


def is_of(folder: Path, opened: Source, options: Options) -> bool:
    """Whether a folder, or what is half done in its WORK, was made from these very files with these options."""
    return outputs.is_from(folder, _told(opened, options))


def _forget(output: Path, work: Path) -> None:
    """Removes what another try may do better."""
    # What could not be had may be there now: then other records stay, and the shards are others.
    marks = list(work.glob(f"units/*{units.AGAIN}"))
    stale = [*work.glob("shards/*.json"), *output.glob(f"{records.NAME}-*.array_record-*")] if marks else []
    for old in (*stale, *(mark.with_suffix(".parquet") for mark in marks), *marks):
        old.unlink(missing_ok=True)


def _read(
    opened: Source, options: Options, work: Path, pool: Executor, workers: int, progress: Progress
) -> dict[str, list[Path]]:
    """The first pass. Returns the units, of records ("read") and of events."""
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
                # What the first chunk of a file lacks, the others will.
                checked.add(chunk.file.name)
                seen = {column for _, row in readers.rows(chunk) if isinstance(row, dict) for column in row}
                if seen:
                    options.columns.check(chunk.file.kind, seen, str(chunk.file.path))
            if path.exists():
                yield _done
            else:
                yield lambda chunk=chunk, unit=unit, path=path: pool.submit(units.write, chunk, unit, rules, path)

    size = told = 0
    with progress("reading (MB)", total) as advance:
        for _ in workers_lib.bounded(submitted(), 2 * workers):
            size += queue.popleft()
            done = min(size // MEGABYTE, total)
            if done > told:
                advance(done - told)
                told = done
    return names


def _done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def _decide(tables: Tables, options: Options, source: str) -> None:
    """The second pass."""
    tables.keep_one_each()
    tables.split(options.val_fraction)
    train, val = tables.sides()
    tables.place_queries()
    logged = tables.one("SELECT count(*) FROM event")
    if logged:
        triplets.from_log(tables, options.val_fraction)
    else:
        triplets.from_catalogue(tables)
    asked = tables.one("SELECT count(*) FROM val_pair")
    given = "SELECT count(*) FROM read WHERE part = $part AND split = 'val'"
    left = tables.one("SELECT count(*) FROM unlike WHERE copy = 1 AND split = 'val'")
    for part, found, name in (("product", left, "products"), ("query", asked, "queries")):
        if not found and tables.one(given, part=part):
            raise UserError(
                f"--data {source}: its files hold {name} for evaluation, of which none is left; {_left_out(tables)}"
            )
    side = "evaluate" if train else "train"
    if not train or not (val or asked or logged or tables.one("SELECT count(*) FROM query")):
        raise UserError(
            f"--data {source}: no product left to {side} on; at least two different titles"
            f" are needed; {_left_out(tables)}"
        )
    if not tables.one("SELECT count(*) FROM product WHERE side = 0 AND has_text AND has_image"):
        raise UserError(f"--data {source}: no product to train on has both a title and an image; {_left_out(tables)}")
    if not tables.one("SELECT count(*) FROM triplet"):
        raise UserError(f"--data {source}: no triplet to train on; {_left_out(tables)}")
    tables.number_titles()


def _left_out(tables: Tables) -> str:
    """For an error: how many were left out, why, and an example."""
    counts, first = _quarantined(tables, None)
    if not first:
        return "nothing was left out"
    told = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    return (
        f"{sum(counts.values()):,} left out ({told}), such as {first['file']} {first['number']}:"
        f" {first['detail'] or first['reason']}"
    )


def _quarantined(tables: Tables, path: Path | None) -> tuple[Counter[str], dict[str, Any] | None]:
    """Counts by reason, and the first; lists all of them in the file `path`."""
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
    """Writes where each record lies, in the order of the indices; returns the file, start and end of each shard."""
    tables.run(f"""
        CREATE TABLE plan AS
        SELECT index, side, unit, row,
            dense_rank() OVER (PARTITION BY side ORDER BY pile) - 1 AS shard
        FROM (
            SELECT *, (sum(size) OVER (PARTITION BY side ORDER BY index) - size) // {SHARD_BYTES} AS pile
            FROM {tables.everything()}
        )
    """)
    _array(tables, "SELECT unit, row FROM plan ORDER BY index", work / PLAN, shards_lib.PLACE)
    counts = tables.rows("SELECT side, shard, count(*) FROM plan GROUP BY side, shard ORDER BY side, shard")
    of_side, plan, start = Counter(side for side, _, _ in counts), [], 0
    for side, shard, count in counts:
        plan.append((records.shard_name(SPLITS[side], shard, of_side[side]), start, start + count))
        start += count
    return plan


def _write(
    plan: list[tuple[str, int, int]], work: Path, output: Path, pool: Executor, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """The third pass. Returns the shards as `shards.write_shard` tells them, in order."""
    places = np.load(work / PLAN, mmap_mode="r", allow_pickle=False)
    calls = (
        functools.partial(pool.submit, shards_lib.write_shard, output / name, np.array(places[start:end]), work)
        for name, start, end in plan
    )
    written = []
    with progress("writing shards", len(plan)) as advance:
        for told in workers_lib.bounded(calls, 2 * workers):
            written.append(told)
            advance()
    return written


def _array(tables: Tables, sql: str, path: Path, dtype: np.dtype) -> int:
    """Writes the rows of an answer as an array; returns their number."""
    count = tables.one(f"SELECT count(*) FROM ({sql})")
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        )
        for batch in tables.batches(sql):
            rows = np.empty(batch.num_rows, dtype)
            for place, name in enumerate(dtype.names or ("",)):
                column = batch.column(place).to_numpy(zero_copy_only=False)
                if name:
                    rows[name] = column
                else:
                    rows[:] = column
            file.write(rows.tobytes())
    temporary.replace(path)
    return count


def _describe(tables: Tables, output: Path) -> dict[str, Any]:
    """Writes what lies beside the shards; returns what the manifest tells of it."""
    lib = prepared_lib
    train, val = tables.sides()
    _array(
        tables,
        f"SELECT coalesce(number, -1) FROM {tables.everything()} LEFT JOIN title_number USING (title) ORDER BY index",
        output / lib.GROUPS,
        np.dtype("<i4"),
    )
    made = _array(
        tables,
        "SELECT query, positive, coalesce(negative, -1), weight FROM triplet ORDER BY place, positive",
        output / lib.TRIPLETS,
        records.TRIPLET,
    )
    asked = _array(
        tables, "SELECT query, positive FROM val_pair ORDER BY query, positive", output / lib.VAL_QUERIES, records.PAIR
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
        # Records by kind: what was read is what was kept and what is in the quarantine.
        "read": {"product": read.get("product", 0), "query": read.get("query", 0), "log": logged},
        "kept": kept,
        "quarantined": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "first_quarantined": first,
        "splits": {name: sizes.get(side, 0) for side, name in enumerate(SPLITS)},
        "products": train + val,
        "without_text": without[0],
        "without_image": without[1],
        "triplets": made,
        "triplets_without_negative": tables.one("SELECT count(*) FROM triplet WHERE negative IS NULL"),
        "negatives_skipped_above": tables.one("SELECT count(*) FROM skipped"),
        "val_queries": asked,
    }


def manifest_of(
    output: Path, described: dict[str, Any], shards: list[dict[str, Any]], others: Sequence[str] = ()
) -> dict[str, Any]:
    """The manifest of a folder. Also writes what TensorFlow Datasets wants to know.

    Args:
        described: what the manifest tells beside files and fingerprint.
        shards: in order, as `shards.write` tells them.
        others: more files that lie there.
    """
    lib = prepared_lib
    tfds.write(output, {name: [shard for shard in shards if f"-{name}." in shard["file"]] for name in SPLITS})
    beside = (lib.GROUPS, lib.TRIPLETS, lib.VAL_QUERIES, lib.QUARANTINE, *tfds.FILES, *others)
    files = {
        name: {"bytes": (output / name).stat().st_size, "checksum": outputs.checksum(output / name)} for name in beside
    }
    files |= {shard["file"]: {name: shard[name] for name in ("bytes", "checksum")} for shard in shards}
    fingerprint = hashlib.blake2b(digest_size=16)
    # Of what is trained on and judged by, not of how a library writes it.
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
