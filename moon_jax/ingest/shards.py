"""The third pass of prepare: copies the records of units into shards, in index order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from moon_jax import outputs
from moon_jax.data import records
from moon_jax.errors import UserError

LOCATION = np.dtype([("unit", "<i4"), ("row", "<i4")])
"""The location of a record: its unit and its row in that unit."""


def write_shard(path: Path, locations: np.ndarray, work: Path) -> dict[str, Any]:
    """Copies the records of units at `locations`, LOCATION[n], into the shard `path`; returns as `write` does."""
    return write(path, _records(locations, work), work)


def write(path: Path, encoded: Iterator[bytes], work: Path) -> dict[str, Any]:
    """Writes records into the shard `path`, unless it exists already, and a note about it into `work`.

    Returns:
        The fields of records.Shard, and `content`, a digest of the records only.

    Raises:
        UserError: the disk is full.
    """
    done = note(path.name, work)
    if done.is_file() and path.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content, count = hashlib.blake2b(digest_size=16), 0
    try:
        writer = ArrayRecordWriter(str(temporary), records.SHARD_OPTIONS)
        for record in encoded:
            count += 1
            content.update(len(record).to_bytes(8, "little") + record)
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # raised by the library if the disk is full
        raise UserError(
            f"{path}: {str(error).split(';')[0]}; free disk space, then run the same command to resume"
        ) from None
    fields = {
        "file": path.name,
        "records": count,
        "bytes": temporary.stat().st_size,
        "checksum": outputs.checksum(temporary),
        "content": content.hexdigest(),
    }
    temporary.replace(path)
    outputs.write_atomic(done, json.dumps(fields))
    return fields


def note(shard: str, work: Path) -> Path:
    """The file in `work` that marks a shard as complete and holds its fields."""
    return work / "shards" / f"{shard}.json"


def _records(locations: np.ndarray, work: Path) -> Iterator[bytes]:
    """Yields the records; holds one row group of one unit at a time."""
    held, file, bounds, group, column = -1, None, None, -1, None
    for unit, row in locations.tolist():
        if unit != held:
            names = (work / "units" / f"{kind}-{unit:08}.parquet" for kind in ("read", "event"))
            file = pq.ParquetFile(next(name for name in names if name.exists()))
            counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            held, bounds, group = unit, np.cumsum([0, *counts]), -1
        wanted = int(np.searchsorted(bounds, row, side="right")) - 1
        if wanted != group:
            group, column = wanted, file.read_row_group(wanted, columns=["record"]).column(0)
        yield column[row - int(bounds[group])].as_py()
