"""Where catalogues and logs come from: files → chunks of records, in order, whatever their format.

Parquet and Arrow (as Hugging Face's datasets keep it) with images as bytes; JSONL, CSV and TSV with images as paths or
URLs; tar shards of webdataset; a data set of the Hugging Face hub; a builder of TensorFlow Datasets. A column map
(columns.py) says which column is what.

A file whose name has the word train is for training; val, valid, validation, dev or test: for evaluation, all of them
together. Any other file of products is a catalogue without split. Names that begin with `queries` hold queries, those
whose first word is `log` or `logs` logs. Words end at `-`, `_` and `.`.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax.config import UserError
from moon_jax.data.columns import ColumnMap
from moon_jax.data.parse import BadRecord

HUB, TFDS = "hf://datasets/", "tfds://"

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tar": "tar",
    ".arrow": "arrow",
}

CHUNK_RECORDS, CHUNK_BYTES = 1000, 32 << 20
"""A chunk ends at the first of them that is reached; one record may be larger."""

LONGEST_LINE = 64 << 20
"""Bytes; a longer line, field or member of a tar is left out, and never held."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source, and what it holds."""

    path: Path
    name: str  # relative to the source, as the quarantine tells it
    kind: str  # product, query or log
    split: str  # train, val, or empty
    format: str
    root: Path  # to which paths of images are relative

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, as they stand there: whoever works on them parses them."""

    file: File
    start: int  # number of the first one: line of a JSONL file, else row, counted from 1
    payload: list[bytes] | list[dict[str, Any] | BadRecord] | pa.RecordBatch
    labels: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # column → names of its numbers
    size: int = 0  # bytes of the source read since the last chunk, about

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
        """The records with their numbers; one that cannot be parsed comes as a BadRecord."""
        if isinstance(self.payload, pa.RecordBatch):
            rows = _rows(self.payload, self.labels)
        else:
            rows = [_parsed(row) if isinstance(row, bytes) else row for row in self.payload]
        # Empty lines of a JSONL file are no records, but count.
        return ((number, row) for number, row in enumerate(rows, self.start) if row is not None)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source whose files are known."""

    name: str  # as it was given
    files: list[File]
    chunks: Callable[[], Iterator[Chunk]]
    synthetic: bool = False  # a file says that it was rendered

    def signature(self) -> list[tuple[str, int, int]]:
        """Equal signatures: with all likelihood, equal files."""
        return [(file.name, file.size, file.path.stat().st_mtime_ns) for file in self.files]


def open_source(source: str | Path, columns: ColumnMap) -> Opened:
    """Finds the files of a source; hf://datasets/owner/name is fetched, or found in Hugging Face's cache.

    Raises:
        UserError: there is nothing to read, or a column is missing without which nothing can be read.
    """
    source = str(source)
    if source.startswith(TFDS) or (Path(source) / "features.json").is_file():
        from moon_jax.data import tfds  # an extra

        return tfds.open_source(source, columns)
    hub = source.startswith(HUB)
    root = _snapshot(source) if hub else Path(source)
    files = _files(root, source, columns, hub)
    for file in files:
        if file.format in ("parquet", "arrow"):
            columns.check(file.kind, _schema(file).names, str(file.path))
    synthetic = any(file.format == "parquet" and b"synthetic" in (_schema(file).metadata or {}) for file in files)
    return Opened(
        source, files, lambda: itertools.chain.from_iterable(_chunks(file, columns) for file in files), synthetic
    )


def _snapshot(source: str) -> Path:
    """The folder of a data set of the Hugging Face hub, in its cache."""
    import huggingface_hub

    name, _, revision = source.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(f"--data {source}: a data set of the hub is written {HUB}owner/name[@revision]")
    patterns = [f"*{suffix}{zipped}" for suffix in SUFFIXES for zipped in ("", ".gz")]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, allow_patterns=patterns
            )
        )
    except Exception as error:  # of the network, the hub or its cache; all say what is wrong
        raise UserError(f"--data {source}: {str(error).splitlines()[0] or type(error).__name__}") from None


def _files(root: Path, source: str, columns: ColumnMap, deep: bool) -> list[File]:
    try:
        if not root.exists():
            raise UserError(f"--data {source}: no such file or folder")
        if root.is_file():
            found = [(root, root.name)]
        elif (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = [(path, str(path.relative_to(root))) for path in sorted(root.rglob("*.arrow"))]
        else:
            patterns = columns.files or (("**/*",) if deep else ("*",))
            paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
            found = [(path, str(path.relative_to(root))) for path in sorted(paths)]
    except PermissionError as error:
        raise UserError(f"--data {source}: {error.filename} may not be read; ask its owner for permission") from None
    files = []
    for path, name in found:
        bare = path.with_suffix("") if path.suffix == ".gz" else path
        format = columns.format or SUFFIXES.get(bare.suffix)
        if format and not path.name.startswith("."):
            files.append(describe(path, name, format, root if root.is_dir() else root.parent))
    if not files:
        known = ", ".join(SUFFIXES)
        what = f"none of {known}" if root.is_file() else f"no {' or '.join(columns.files)}" if columns.files else ""
        raise UserError(
            f"--data {source}: {what or f'no file there that ends with one of {known}'}; subfolders are not searched;"
            " docs/data.md says what a file holds"
        )
    return files


def describe(path: Path, name: str, format: str, root: Path) -> File:
    """What a file holds, by its name; by that of its folder or split where a library keeps them."""
    told = name.lower() if format in ("arrow", "tfds") else path.name.lower()
    words = re.split(r"[-_./]", told)
    kind = "query" if words[0].startswith("queries") else "log" if words[0] in ("log", "logs") else "product"
    held_out = bool(set(words) & {"val", "valid", "validation", "dev", "test"})
    train = bool(set(words) & {"train", "training"})
    split = "val" if held_out else "train" if train else "val" if kind == "query" else ""
    return File(path, name, kind, split, format, root)


def _schema(file: File) -> pa.Schema:
    try:
        if file.format == "parquet":
            return pq.read_schema(file.path)
        with pa.OSFile(str(file.path)) as stream:
            return pa.ipc.open_stream(stream).schema
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: File, error: Exception, after: int | None = None) -> UserError:
    where = "" if after is None else f" after record {after}"
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file.path}: not a readable {file.format} file{where} ({told})")


def _chunks(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    readers = {"parquet": _tables, "arrow": _tables, "jsonl": _lines, "csv": _separated, "tsv": _separated, "tar": _tar}
    return readers[file.format](file, columns)


def _tables(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    schema = _schema(file)
    asked = columns.columns(file.kind)
    names = [name for name in schema.names if name in asked]
    labels = _label_names(schema)
    start = 1
    try:
        if file.format == "parquet":
            # Streamed: a row group may hold gigabytes of images.
            with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as opened:
                total = max(opened.metadata.num_rows, 1)
                for batch in opened.iter_batches(batch_size=CHUNK_RECORDS, columns=names):
                    for part in _slices(batch):
                        yield Chunk(file, start, part, labels, file.size * part.num_rows // total)
                        start += part.num_rows
        else:
            with pa.memory_map(str(file.path)) as stream, pa.ipc.open_stream(stream) as opened:
                for batch in opened:
                    for part in _slices(batch.select(names)):
                        yield Chunk(file, start, part, labels, part.nbytes)
                        start += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error, start - 1) from None


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of a batch that are chunks."""
    count = max(1, min(CHUNK_RECORDS, batch.num_rows * CHUNK_BYTES // max(batch.nbytes, 1)))
    for start in range(0, batch.num_rows, count):
        part = batch.slice(start, count)
        # A slice is pickled with all of what it is a slice of; a copy is not.
        yield part if part.num_rows == batch.num_rows else pa.ipc.read_record_batch(part.serialize(), part.schema)


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the numbers of ClassLabel columns, as Hugging Face's datasets note them in a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: said["names"] for name, said in features.items() if said.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


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


def _opened(file: File) -> BinaryIO:
    return gzip.open(file.path) if file.path.suffix == ".gz" else file.path.open("rb")


def _lines(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    del columns
    start, held, size = 1, [], 0
    with _opened(file) as stream:
        try:
            while line := stream.readline(LONGEST_LINE):
                size += len(line)
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    line = BadRecord("not readable", f"a line of more than {LONGEST_LINE} bytes")
                    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        size += len(rest)
                held.append(line)
                if len(held) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                    yield Chunk(file, start, held, size=size)
                    start, held, size = start + len(held), [], 0
        except (OSError, EOFError) as error:
            raise _damaged(file, error, start + len(held) - 1) from None
    if held:
        yield Chunk(file, start, held, size=size)


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


def _separated(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """CSV and TSV; bytes that are not UTF-8 become surrogates, which no text may hold."""
    csv.field_size_limit(LONGEST_LINE)
    start, held, size = 1, [], 0
    with _opened(file) as raw:
        text = (line.decode("utf-8", "surrogateescape") for line in _bounded(raw))
        # Tabs separate, and quotes are letters: what is written as TSV is seldom written by a library.
        layout = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.format == "tsv" else {}
        reader = csv.reader(text, **layout)
        try:
            header = list(columns.header) or [name.lstrip("\ufeff") for name in next(reader, [])]
            columns.check(file.kind, header, str(file.path))
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    fields = None
                    row: dict[str, Any] | BadRecord = BadRecord("not readable", str(error))
                if fields == []:
                    continue
                if fields is not None:
                    size += sum(map(len, fields)) + len(fields)
                    row = {name: value for name, value in zip(header, fields, strict=False) if value}
                    if len(fields) != len(header):
                        row = BadRecord("not readable", f"{len(fields)} fields, of {len(header)} columns")
                held.append(row)
                if len(held) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                    yield Chunk(file, start, held, size=size)
                    start, held, size = start + len(held), [], 0
        except (OSError, EOFError) as error:
            raise _damaged(file, error, start + len(held) - 1) from None
    if held:
        yield Chunk(file, start, held, size=size)


def _bounded(stream: BinaryIO) -> Iterator[bytes]:
    """Lines; one that is too long comes in pieces, of which each is a record that cannot be read."""
    while line := stream.readline(LONGEST_LINE):
        yield line


IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}


def _tar(file: File, columns: ColumnMap) -> Iterator[Chunk]:
    """webdataset: files of one key are a record. `json` holds columns, `txt` is the title, pictures are the images; the
    key is the id where the JSON has none.
    """
    del columns
    start, held, size = 1, [], 0
    try:
        with _opened(file) as raw, tarfile.open(fileobj=raw, mode="r|") as opened:
            if file.path.suffix != ".gz" and not _ends(file.path):
                raise EOFError("it does not end as a tar file does")  # tarfile takes a cut before a member for the end
            for _, members in itertools.groupby(_members(opened), key=lambda member: member[0]):
                record = _joined(list(members))
                size += sum(len(part) for part in record.get("images", ())) if isinstance(record, dict) else 0
                held.append(record)
                if len(held) == CHUNK_RECORDS or size >= CHUNK_BYTES:
                    yield Chunk(file, start, held, size=size)
                    start, held, size = start + len(held), [], 0
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(file, error, start + len(held) - 1) from None
    if held:
        yield Chunk(file, start, held, size=size)


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
        last = extension.rpartition(".")[2]
        if extension == "json":
            held = _parsed(content)
            if not isinstance(held, dict):
                return held or BadRecord("not readable", "an empty JSON file")
            record |= held
        elif extension == "txt":
            try:
                record.setdefault("title", content.decode())
            except UnicodeDecodeError:
                return BadRecord("not readable", "text that is not UTF-8")
        elif last in IMAGES:
            record.setdefault("images", [])
            if isinstance(record["images"], list):
                record["images"].append(content)
    record.setdefault("product_id", record["__key__"])
    return record


def confined(folder: Path, path: str) -> Path:
    """A path of a record, below `folder`, wherever its links lead.

    Raises:
        BadRecord: it is none, or leads elsewhere.
    """
    try:
        resolved = Path(os.path.realpath(folder / path))
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRecord("bad image", f"{path!r} is no path ({error})") from None
    if not resolved.is_relative_to(os.path.realpath(folder)):
        raise BadRecord("bad image", f"{path} lies outside the catalogue's folder")
    return resolved
