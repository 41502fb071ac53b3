"""Files → chunks of records, in order, whatever their format."""

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
"""A chunk ends at the first of them that is reached; one record may be larger."""

LONGEST_LINE = 64 << 20
"""Bytes; a longer line, field or member of a tar is left out, and never held."""


def rows(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """The records of a chunk with their numbers; one that cannot be parsed comes as a BadRecord."""
    if isinstance(chunk.payload, pa.RecordBatch):
        found = _rows(chunk.payload, chunk.labels)
    else:
        found = [_parsed(row) if isinstance(row, bytes) else _with_json(row) for row in chunk.payload]
    # Empty lines of a JSONL file are not records, but count.
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
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file.path}: not a readable {file.format} file{where} ({told})")


def chunks(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """All records of a file.

    Raises:
        UserError: it is damaged; what was read before is whole.
    """
    readers = {"parquet": _tables, "arrow": _tables, "jsonl": _lines, "csv": _separated, "tsv": _separated, "tar": _tar}
    return readers[file.format](file, columns)


def grouped(file: File, found: Iterable[tuple[Any, int]]) -> Iterator[Chunk]:
    """Chunks of records that come one by one, each with its size in bytes, about."""
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
    asked = columns.columns(file.kind)
    names = [name for name in schema.names if name in asked]
    labels = _label_names(schema)
    start = 1
    try:
        for batch, size in (_parquet if file.format == "parquet" else _arrow)(file, names):
            count = max(1, min(CHUNK_RECORDS, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1)))
            for place in range(0, batch.num_rows, count):
                part = batch.slice(place, count)
                if part.num_rows < batch.num_rows:
                    # A slice is pickled with all of what it is a slice of; a copy is not.
                    part = pa.ipc.read_record_batch(part.serialize(), part.schema)
                yield Chunk(file, start, part, labels, size * part.num_rows // batch.num_rows)
                start += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error, start - 1) from None


def _parquet(file: File, names: list[str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches, and the bytes of the file that each took. Streamed: a row group may hold gigabytes of images."""
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
    """Names of the numbers of ClassLabel columns, as Hugging Face's datasets note them in a schema."""
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}
    labels = {
        name: said for name, said in features.items() if isinstance(said, dict) and isinstance(said.get("names"), list)
    }
    return {name: said["names"] for name, said in labels.items() if said.get("_type") == "ClassLabel"}


def _rows(batch: pa.RecordBatch, labels: dict[str, list[str]]) -> list[dict[str, Any] | BadRecord]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadRecord("not readable", "text that is not UTF-8")]
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
    """The bytes of a file, unzipped."""
    return gzip.open(file.path) if file.path.suffix.lower() == ".gz" else file.path.open("rb")


def _lines(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    del columns

    def lines() -> Iterator[tuple[bytes | BadRecord, int]]:
        with open_file(file) as stream:
            while line := stream.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield BadRecord("not readable", f"a line of more than {LONGEST_LINE} bytes"), LONGEST_LINE
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
        return BadRecord("not readable", "text that is not UTF-8")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return BadRecord("not readable", f"not JSON: {error}")
    return record if isinstance(record, dict) else BadRecord("not readable", "not a JSON object")


MOST_LINES = 1000
"""Lines of a quoted field: a quote that is never closed does not swallow a file."""


class _Text:
    """Lines of a file as text, of which some may be given back; bytes that are not UTF-8 become surrogates, which no
    field may hold.
    """

    def __init__(self, stream: BinaryIO):
        self.stream, self.back, self.taken = stream, collections.deque(), []

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        line = (
            self.back.popleft() if self.back else self.stream.readline(LONGEST_LINE).decode("utf-8", "surrogateescape")
        )
        if not line:
            raise StopIteration
        self.taken.append(line)
        if len(self.taken) > MOST_LINES:
            raise csv.Error(f"a quoted field of more than {MOST_LINES} lines")
        return line

    def give_back(self) -> None:
        """All but the first line since `taken` was emptied."""
        self.back.extendleft(reversed(self.taken[1:]))


def _separated(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """CSV and TSV. Of a record of several lines that cannot be read the first one is left out, and no other."""
    csv.field_size_limit(LONGEST_LINE)
    # Tabs separate, and quotes are letters: what is written as TSV is seldom written by a library.
    layout = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.format == "tsv" else {"strict": True}

    def rows() -> Iterator[tuple[dict[str, Any] | BadRecord, int]]:
        with open_file(file) as raw:
            text = _Text(raw)
            first = next(text, "").removeprefix("\ufeff")
            text.back.appendleft(first)
            reader = csv.reader(text, **layout)
            try:
                header = list(columns.header) or next(reader, [])
            except csv.Error as error:
                raise EOFError(f"its header: {error}") from None
            if not header:
                return
            columns.check(file.kind, header, str(file.path))
            while True:
                text.taken.clear()
                try:
                    fields = next(reader)
                    wrong = f"{len(fields)} fields, of {len(header)} columns" if len(fields) != len(header) else ""
                except StopIteration:
                    return
                except csv.Error as error:
                    fields, wrong = None, str(error)
                if fields == []:
                    continue
                if wrong:
                    text.give_back()
                    reader = csv.reader(text, **layout)
                    yield BadRecord("not readable", wrong), len(text.taken[0]) if text.taken else 0
                else:
                    row = {name: value for name, value in zip(header, fields, strict=True) if value}
                    yield row, sum(map(len, fields)) + len(fields)

    return grouped(file, rows())


IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
JSON, PICTURES = "__json__", "__pictures__"


def _tar(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """webdataset: files of one key are a record. `json` holds columns, `txt` is the title, pictures are the images,
    whatever the JSON says of images; the key is the id where the JSON has none.
    """
    del columns

    def found() -> Iterator[tuple[dict[str, Any] | BadRecord, int]]:
        if file.path.suffix.lower() != ".gz" and not _ends(file.path):
            raise EOFError("it does not end as a tar file does")  # tarfile takes a cut before a member for the end
        with open_file(file) as raw, tarfile.open(fileobj=raw, mode="r|") as opened:
            for _, members in itertools.groupby(_members(opened), key=lambda member: member[0]):
                record = _joined(list(members))
                yield record, 0 if isinstance(record, BadRecord) else sum(map(len, record.get(PICTURES, ())))
                opened.members = []  # it would remember all

    return grouped(file, found())


def _ends(path: Path) -> bool:
    """Whether a tar file ends with the two blocks of zeros that it must."""
    with path.open("rb") as raw:
        raw.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        return raw.read() == bytes(1024)


def _members(opened: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | BadRecord]]:
    """Key, extension and content of each file. Nothing is extracted, and links are not followed."""
    for member in opened:
        if member.isdir():
            continue
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        content: bytes | BadRecord
        if not member.isfile():
            content = BadRecord("not readable", f"{member.name} is no plain file")
        elif member.size > LONGEST_LINE:
            content = BadRecord("not readable", f"{member.name} has {member.size} bytes, at most {LONGEST_LINE}")
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
    """A record of a tar file with the columns of its JSON."""
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
