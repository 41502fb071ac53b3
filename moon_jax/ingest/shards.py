"""The third pass of prepare: records of units are copied into shards, in their order."""

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

PLACE = np.dtype([("unit", "<i4"), ("row", "<i4")])
"""Where a record lies."""


def write_shard(path: Path, places: np.ndarray, work: Path) -> dict[str, Any]:
    """Copies records of units into the shard `path`: those at the `places`, PLACE[n]."""
    return write(path, _records(places, work), work)


def write(path: Path, given: Iterator[bytes], work: Path) -> dict[str, Any]:
    """Writes records into the shard `path`, unless it stands already, and a note of it into `work`.

    Returns:
        The fields of records.Shard, and `content`, a digest of the records alone.

    Raises:
        UserError: the disk is full.
    """
    told = note(path.name, work)
    if told.is_file() and path.is_file():
        return json.loads(told.read_text(encoding="utf-8"))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content, count = hashlib.blake2b(digest_size=16), 0
    try:
        writer = ArrayRecordWriter(str(temporary), records.SHARD_OPTIONS)
        for record in given:
            count += 1
            content.update(len(record).to_bytes(8, "little") + record)
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # what the library makes of a full disk
        raise UserError(f"{path}: {str(error).split(';')[0]}; make room, then the same command goes on") from None
    fields = {
        "file": path.name,
        "records": count,
        "bytes": temporary.stat().st_size,
        "checksum": outputs.checksum(temporary),
        "content": content.hexdigest(),
    }
    temporary.replace(path)
    outputs.write_atomic(told, json.dumps(fields))
    return fields


def note(shard: str, work: Path) -> Path:
    """The file that says that a shard is whole, and tells of it."""
    return work / "shards" / f"{shard}.json"


def _records(places: np.ndarray, work: Path) -> Iterator[bytes]:
    """The records, each unit's a group of rows at a time."""
    held, file, bounds, group, column = -1, None, None, -1, None
    for unit, row in places.tolist():
        if unit != held:
            names = (work / "units" / f"{kind}-{unit:08}.parquet" for kind in ("read", "event"))
            file = pq.ParquetFile(next(name for name in names if name.exists()))
            counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            held, bounds, group = unit, np.cumsum([0, *counts]), -1
        wanted = int(np.searchsorted(bounds, row, side="right")) - 1
        if wanted != group:
            group, column = wanted, file.read_row_group(wanted, columns=["record"]).column(0)
        yield column[row - int(bounds[group])].as_py()
