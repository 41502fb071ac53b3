"""Reads files of any supported format as chunks of records, in order."""

from __future__ import annotations

import collections
import csv
import gzip
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax.errors import UserError
from moon_jax.ingest.columns import ColumnMap
from moon_jax.ingest.files import Chunk, File
from moon_jax.ingest.parse import BadRecord

CHUNK_RECORDS, CHUNK_BYTES = 1000, 32 << 20
"""A chunk ends when it reaches either limit; a single record may exceed the second."""

LONGEST_LINE = 64 << 20
"""Bytes; a longer line, field or tar member is left out and never held in memory."""


def rows(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Yields the records of a chunk with their numbers; a record that cannot be parsed is a BadRecord."""
    if isinstance(chunk.payload, pa.RecordBatch):
        found = _rows(chunk.payload, chunk.labels)
    else:
        found = [_parsed(row) if isinstance(row, bytes) else _with_json(row) for row in chunk.payload]
    # Empty lines of a JSONL file are not records, but are counted in the numbering.
    return ((number, row) for number, row in enumerate(found, chunk.start) if row is not None)


def schema_of(file: File) -> pa.Schema:
    try:
        if file.format == "parquet":
            return pq.read_schema(file.path)
        with pa.OSFile(str(file.path)) as stream:
            return pa.ipc.open_stream(stream).schema
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from None


def damaged(file: File, error: Exception, after: int | None = None) -> UserError:
    where = "" if after is None else f" after record {after}"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file.path}: not a readable {file.format} file{where} ({reason})")


def chunks(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """Yields all records of a file.

    Raises:
        UserError: it is damaged; the chunks yielded before are intact.
    """
    readers = {"parquet": _tables, "arrow": _tables, "jsonl": _lines, "csv": _separated, "tsv": _separated, "tar": _tar}
    return readers[file.format](file, columns)


def grouped(file: File, found: Iterable[tuple[Any, int]]) -> Iterator[Chunk]:
    """Groups single records into chunks; each record comes with its approximate size in bytes."""
    start, held, size = 1, [], 0
    try:
        for record, weight in found:
            held.append(record)
            size += weight
            if len(held) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                yield Chunk(file, start, held, size=size)
                start, held, size = start + len(held), [], 0
    except (OSError, EOFError, tarfile.TarError) as error:
        raise damaged(file, error, start + len(held) - 1) from None
    if held:
        yield Chunk(file, start, held, size=size)


def _tables(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    schema = schema_of(file)
    wanted = columns.columns(file.kind)
    names = [name for name in schema.names if name in wanted]
    labels = _label_names(schema)
    start = 1
    try:
        for batch, size in (_parquet if file.format == "parquet" else _arrow)(file, names):
            count = max(1, min(CHUNK_RECORDS, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1)))
            for offset in range(0, batch.num_rows, count):
                part = batch.slice(offset, count)
                if part.num_rows < batch.num_rows:
                    # Pickling a slice would pickle the whole batch; pickling a copy does not.
                    part = pa.ipc.read_record_batch(part.serialize(), part.schema)
                yield Chunk(file, start, part, labels, size * part.num_rows // batch.num_rows)
                start += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error, start - 1) from None


def _parquet(file: File, names: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Yields batches and the bytes of the file that each took. Streams, as a row group may hold gigabytes of images."""
    with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as opened:
        total = max(opened.metadata.num_rows, 1)
        for group in range(opened.num_row_groups):
            described = opened.metadata.row_group(group)
            each = max(described.total_byte_size // max(described.num_rows, 1), 1)
            rows = max(1, min(CHUNK_RECORDS, CHUNK_BYTES // each))
            for batch in opened.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                yield batch, file.size * batch.num_rows // total


def _arrow(file: File, names: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    with pa.memory_map(str(file.path)) as stream, pa.ipc.open_stream(stream) as opened:
        for batch in opened:
            if batch.num_rows:
                yield batch.select(names), batch.nbytes


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names of ClassLabel columns, from the schema metadata of Hugging Face's datasets."""
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}
    labels = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }
    return {name: feature["names"] for name, feature in labels.items() if feature.get("_type") == "ClassLabel"}


def _rows(batch: pa.RecordBatch, labels: dict[str, list[str]]) -> list[dict[str, Any] | BadRecord]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadRecord("not readable", "text is not UTF-8")]
        return [record for row in range(batch.num_rows) for record in _rows(batch.slice(row, 1), labels)]
    except (pa.ArrowException, ValueError, OverflowError) as error:  # such as a date of the year 99999
        if batch.num_rows == 1:
            return [BadRecord("not readable", str(error).splitlines()[0])]
        return [record for row in range(batch.num_rows) for record in _rows(batch.slice(row, 1), labels)]
    for column, names in labels.items():
        for row in rows:
            if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
    return rows


def open_file(file: File) -> BinaryIO:
    """Opens a file for reading bytes; decompresses .gz."""
    return gzip.open(file.path) if file.path.suffix.lower() == ".gz" else file.path.open("rb")


def _lines(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    del columns

    def lines() -> Iterator[tuple[bytes | BadRecord, int]]:
        with open_file(file) as stream:
            while line := stream.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield BadRecord("not readable", f"a line is longer than {LONGEST_LINE} bytes"), LONGEST_LINE
                else:
                    yield line.removeprefix(b"\xef\xbb\xbf"), len(line)

    return grouped(file, lines())


def _parsed(line: bytes) -> dict[str, Any] | BadRecord | None:
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRecord("not readable", f"not a JSON object on one line: {error.msg} at character {error.colno}")
    except UnicodeDecodeError:
        return BadRecord("not readable", "text is not UTF-8")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        return BadRecord("not readable", f"not JSON: {error}")
    return record if isinstance(record, dict) else BadRecord("not readable", "not a JSON object")


MOST_LINES = 1000
"""Limit of a quoted field: an unclosed quote must not consume the whole file."""


class _Text:
    """Iterates over a file's lines as text and can push lines back. Bytes that are not UTF-8 become surrogates, which
    parse.py rejects.
    """

    def __init__(self, stream: BinaryIO):
        self.stream, self.pushed, self.taken = stream, collections.deque(), []

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        line = (
            self.pushed.popleft()
            if self.pushed
            else self.stream.readline(LONGEST_LINE).decode("utf-8", "surrogateescape")
        )
        if not line:
            raise StopIteration
        self.taken.append(line)
        if len(self.taken) > MOST_LINES:
            raise csv.Error(f"a quoted field has more than {MOST_LINES} lines")
        return line

    def push_back(self) -> None:
        """Pushes back all lines but the first since `taken` was cleared."""
        self.pushed.extendleft(reversed(self.taken[1:]))


def _separated(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """CSV and TSV. If a record of several lines cannot be read, only its first line is left out."""
    csv.field_size_limit(LONGEST_LINE)
    # In TSV, quotes are ordinary characters: few TSV files are written by a CSV library.
    layout = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.format == "tsv" else {"strict": True}

    def rows() -> Iterator[tuple[dict[str, Any] | BadRecord, int]]:
        with open_file(file) as raw:
            text = _Text(raw)
            first = next(text, "").removeprefix("\ufeff")
            text.pushed.appendleft(first)
            reader = csv.reader(text, **layout)
            try:
                header = list(columns.header) or next(reader, [])
            except csv.Error as error:
                raise EOFError(f"header: {error}") from None
            if not header:
                return
            columns.check(file.kind, header, str(file.path))
            while True:
                text.taken.clear()
                try:
                    fields = next(reader)
                    wrong = f"{len(fields)} fields for {len(header)} columns" if len(fields) != len(header) else ""
                except StopIteration:
                    return
                except csv.Error as error:
                    fields, wrong = None, str(error)
                if fields == []:
                    continue
                if wrong:
                    text.push_back()
                    reader = csv.reader(text, **layout)
                    yield BadRecord("not readable", wrong), len(text.taken[0]) if text.taken else 0
                else:
                    row = {name: value for name, value in zip(header, fields, strict=True) if value}
                    yield row, sum(map(len, fields)) + len(fields)

    return grouped(file, rows())


IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
JSON, PICTURES = "__json__", "__pictures__"


def _tar(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """webdataset: all files with the same key form a record. `.json` holds columns, `.txt` the title, and image files
    are the images, overriding any images in the JSON. The key is the id if the JSON has none.
    """
    del columns

    def found() -> Iterator[tuple[dict[str, Any] | BadRecord, int]]:
        if file.path.suffix.lower() != ".gz" and not _ends(file.path):
            raise EOFError("its end is missing")  # tarfile takes a file cut between members for complete
        with open_file(file) as raw, tarfile.open(fileobj=raw, mode="r|") as opened:
            for _, members in itertools.groupby(_members(opened), key=lambda member: member[0]):
                record = _joined(list(members))
                yield record, 0 if isinstance(record, BadRecord) else sum(map(len, record.get(PICTURES, ())))
                opened.members = []  # tarfile would keep every member

    return grouped(file, found())


def _ends(path: Path) -> bool:
    """Whether a tar file ends with the two blocks of zeros that the format requires."""
    with path.open("rb") as raw:
        raw.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        return raw.read() == bytes(1024)


def _members(opened: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | BadRecord]]:
    """Yields key, extension and content of each file. Extracts nothing to disk and follows no links."""
    for member in opened:
        if member.isdir():
            continue
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        content: bytes | BadRecord
        if not member.isfile():
            content = BadRecord("not readable", f"{member.name} is not a regular file")
        elif member.size > LONGEST_LINE:
            content = BadRecord("not readable", f"{member.name} has {member.size} bytes; the limit is {LONGEST_LINE}")
        else:
            content = opened.extractfile(member).read()
        yield f"{folder}/{key}" if folder else key, extension.lower(), content


def _joined(members: Iterable[tuple[str, str, bytes | BadRecord]]) -> dict[str, Any] | BadRecord:
    record: dict[str, Any] = {}
    for key, extension, content in members:
        record.setdefault("__key__", key)
        if isinstance(content, BadRecord):
            return content
        if extension == "json":
            record[JSON] = content
        elif extension == "txt":
            record["title"] = content.decode("utf-8", "surrogateescape")
        elif extension.rpartition(".")[2] in IMAGES:
            record.setdefault(PICTURES, []).append(content)
    return record


def _with_json(record: Any) -> Any:
    """Merges the columns of its JSON file into a record from a tar file; returns other records unchanged."""
    if not isinstance(record, dict) or "__key__" not in record:
        return record
    held: Any = {}
    if JSON in record:
        held = _parsed(record[JSON])
        if not isinstance(held, dict):
            return held or BadRecord("not readable", "an empty JSON file")
    made = (
        {"product_id": record["__key__"]} | {key: record[key] for key in ("__key__", "title") if key in record} | held
    )
    if PICTURES in record:
        made.pop("image", None)
        made["images"] = record[PICTURES]
    return made
