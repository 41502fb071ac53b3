"""Catalogues on disk → `Product`s. Parquet with image bytes, JSONL with image paths, one file or a folder of them.

Columns: `product_id`, `title`, `images` (bytes, `{bytes, path}`, or paths relative to the file), and optionally
`category` (list), `brand`, `attributes` (map). Files of queries (`queries*`): `query_id`, `product_id` of the product
that is sought, and `title` and/or `image`. A product needs a title or an image.

A file whose name has the word train is for training; val, valid, validation, dev or test: for evaluation, all of them
together. Any other file of products is a catalogue without split. Words end at `-`, `_` and `.`.
Every record is read or quarantined with a reason: nothing is lost silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import interrupt
from moon_jax.config import UserError
from moon_jax.types import Product

LONGEST_TEXT = 65_536
"""Characters; a longer title is a mistake in the catalogue, not a title."""

REASONS = (
    "not readable",
    "no id",
    "duplicate id",
    "bad text",
    "text too long",
    "bad image",
    "no text and no image",
    "unknown product",
)
"""The closed list of reasons for quarantine."""


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """A record that was left out, and why: one of `REASONS`, and a detail.

    `number` is its line in a JSONL file, its row in a Parquet file, counted from 1; `id` is empty where it has none.
    """

    file: str
    number: int
    id: str
    reason: str
    detail: str = ""


def summary(quarantine: Sequence[Quarantined]) -> str:
    """How many were left out for each reason, and one example; empty if none was."""
    if not quarantine:
        return ""
    counts = Counter(entry.reason for entry in quarantine).most_common()
    first = quarantine[0]
    return (
        f"{len(quarantine):,} left out ({', '.join(f'{count:,} {reason}' for reason, count in counts)}),"
        f" such as {first.file} {first.number}: {first.detail or first.reason}"
    )


class BadRecord(ValueError):
    """Raised while a record is read; carries one of `REASONS` and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Record:
    """A product or a query as it was read, and where it stands (see `Quarantined`). A query names the id it seeks."""

    product: Product
    file: str
    number: int
    target: str = ""


@dataclasses.dataclass
class Catalogue:
    """What a source holds; `products` has no split of its own. `synthetic`: a file says that it was rendered."""

    products: list[Record] = dataclasses.field(default_factory=list)
    train: list[Record] = dataclasses.field(default_factory=list)
    val: list[Record] = dataclasses.field(default_factory=list)
    train_queries: list[Record] = dataclasses.field(default_factory=list)
    val_queries: list[Record] = dataclasses.field(default_factory=list)
    quarantine: list[Quarantined] = dataclasses.field(default_factory=list)
    synthetic: bool = False


def title_group(title: str) -> str:
    """Products whose titles differ in case, spacing or Unicode form only share a group."""
    return " ".join(unicodedata.normalize("NFC", title).casefold().split())


def _text(value: Any, name: str) -> str | None:
    """A stripped string, None where there is none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord("bad text", f"{name} is of type {type(value).__name__}, not text")
    if len(value) > LONGEST_TEXT:
        raise BadRecord("text too long", f"{name} has {len(value)} characters, at most {LONGEST_TEXT} are read")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord("bad text", f"{name} is not valid Unicode") from None
    return value.strip() or None


def _image(value: Any, folder: Path) -> Any:
    """Bytes, or a path confined to `folder`; None where there is none."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str) and "://" in value:
        raise BadRecord("bad image", f"{value}: URLs are not fetched; download it and give its path")
    if not isinstance(value, str):
        raise BadRecord("bad image", f"a {type(value).__name__} where bytes or a path belongs")
    try:
        path = (folder / value).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRecord("bad image", f"{value!r} is no path ({error})") from None
    if not path.is_relative_to(folder.resolve()):
        raise BadRecord("bad image", f"{value} lies outside the catalogue's folder")
    return path


def to_product(record: dict[str, Any], folder: Path, id_column: str = "product_id") -> Product:
    """A record as a Product.

    Raises:
        BadRecord: with the reason for quarantine.
    """
    identity = record.get(id_column)
    if identity is None or not str(identity).strip():
        raise BadRecord("no id", f"{id_column} is empty")
    title = _text(record.get("title"), "title")
    images = record.get("images")
    if images is None:
        images = record.get("image")
    images = images if isinstance(images, list) else [images]
    images = [image for image in (_image(image, folder) for image in images) if image is not None]
    if title is None and not images:
        raise BadRecord("no text and no image")
    category, attributes = record.get("category") or [], record.get("attributes") or {}
    if not isinstance(category, list | str):
        raise BadRecord("bad text", f"category is of type {type(category).__name__}, not a list")
    # Parquet maps arrive as pairs.
    pairs = list(attributes.items()) if isinstance(attributes, dict) else attributes
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise BadRecord("bad text", "attributes is not a map")
    return Product(
        text=title,
        images=tuple(images),
        id=_label(identity, id_column),
        group=title_group(title) if title else "",
        category=tuple(
            _label(part, "category")
            for part in ([category] if isinstance(category, str) else category)
            if part is not None
        ),
        brand=_label(record.get("brand") or "", "brand"),
        attributes={
            _label(name, "attributes"): _label(value, "attributes") for name, value in pairs if value is not None
        },
    )


def _label(value: Any, name: str) -> str:
    """An id, a brand, a category or an attribute: text, or what can be written as such."""
    return _text(str(value), name) or ""


COLUMNS = ("product_id", "query_id", "title", "images", "image", "category", "brand", "attributes")
"""What is read; other columns are left alone."""


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """The records of a file, in order and numbered from 1; one that cannot be parsed comes as a BadRecord.

    Raises:
        UserError: a Parquet file without the columns that are needed, or damaged.
    """
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
            _check_columns(path, file.schema_arrow.names)
            names = [name for name in COLUMNS if name in file.schema_arrow.names]
            batches = file.iter_batches(batch_size=1024, columns=names)
            yield from enumerate(itertools.chain.from_iterable(map(_rows, batches)), start=1)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | BadRecord]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadRecord("not readable", "text that is not UTF-8")]
        return [record for row in range(batch.num_rows) for record in _rows(batch.slice(row, 1))]


def _parsed(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRecord("not readable", f"not a JSON object on one line: {error.msg} at character {error.colno}")
    except UnicodeDecodeError:
        return BadRecord("not readable", "text that is not UTF-8")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return BadRecord("not readable", f"not JSON: {error}")
    return record if isinstance(record, dict) else BadRecord("not readable", "not a JSON object")


def _says_synthetic(path: Path) -> bool:
    return path.suffix == ".parquet" and b"synthetic" in (pq.read_schema(path).metadata or {})


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    """Refuses a file none of whose records has what every record needs."""
    needed = [("product_id",), ("query_id",)] if path.stem.lower().startswith("queries") else [("product_id",)]
    for names in (*needed, ("title", "images", "image")):
        if not set(names) & set(columns):
            close = [found for name in names for found in difflib.get_close_matches(name, columns, n=1)]
            raise UserError(
                f"{path}: no column {' or '.join(names)}; its columns are {', '.join(sorted(columns))};"
                f" rename {close[0] if close else 'the one that holds it'}"
            )
    # A name that is nearly one of ours was meant to be it.
    for name in ("title", "images", "category", "brand", "attributes"):
        if name not in columns and not (name == "images" and "image" in columns):
            close = [found for found in columns if difflib.SequenceMatcher(None, name, found.casefold()).ratio() >= 0.8]
            if close:
                raise UserError(f"{path}: no column {name}, but {close[0]}; rename it to {name}, or to something else")


def read(source: str | Path) -> Catalogue:
    """Reads a catalogue.

    Raises:
        UserError: nothing to read, or a column without which nothing can be read.
    """
    source = Path(source)
    try:
        if not source.exists():
            raise UserError(f"--data {source}: no such file or folder")
        files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    except PermissionError as error:
        raise UserError(f"--data {source}: {error.filename} may not be read; ask its owner for permission") from None
    files = [file for file in files if file.suffix in (".parquet", ".jsonl")]
    if not files:
        what = "neither a .parquet nor a .jsonl file" if source.is_file() else "no .parquet or .jsonl file there"
        raise UserError(f"--data {source}: {what}; subfolders are not searched; README says what a file holds")
    catalogue, seen = Catalogue(), set()
    for path in files:
        words = set(re.split(r"[-_.]", path.stem.lower()))
        queries = path.stem.lower().startswith("queries")
        held_out = bool(words & {"val", "valid", "validation", "dev", "test"})
        train = bool(words & {"train", "training"})
        if queries:
            part = catalogue.train_queries if train else catalogue.val_queries
        else:
            part = catalogue.val if held_out else catalogue.train if train else catalogue.products
        columns: set[str] = set()
        for number, record in _records(path):
            interrupt.check()
            identity = ""
            try:
                if isinstance(record, BadRecord):
                    raise record
                columns |= set(record)
                identity = str(record.get("query_id" if queries else "product_id") or "")
                product = to_product(record, path.parent, "query_id" if queries else "product_id")
                if (queries, product.id) in seen:
                    raise BadRecord("duplicate id", "an earlier record has it")
                seen.add((queries, product.id))
                target = str(record.get("product_id")) if queries else ""
                part.append(Record(product, path.name, number, target))
            except BadRecord as bad:
                catalogue.quarantine.append(Quarantined(path.name, number, identity, bad.reason, bad.detail))
        if columns:
            _check_columns(path, columns)
        catalogue.synthetic |= _says_synthetic(path)
    if not (catalogue.products or catalogue.train or catalogue.val):
        raise UserError(f"--data {source}: no usable product; {summary(catalogue.quarantine) or 'no records there'}")
    return catalogue
