"""Catalogues on disk → `Product`s. Parquet with image bytes, JSONL with image paths, one file or a folder of them.

Columns: `product_id`, `title`, `images` (bytes, `{bytes, path}`, or paths relative to the file), and optionally
`category` (list), `brand`, `attributes` (map). Files of queries (`queries*`): `query_id`, `product_id` of the product
that is sought, and `title` and/or `image`. A product needs a title or an image.

Files named train* and val*, valid*, dev* or test* are splits; any other file of products is a catalogue without split.
Every record is read or quarantined with a reason: nothing is lost silently.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    """A record that was left out: file, record (its number, and its id if it has one), reason and detail."""

    file: str
    record: str
    reason: str
    detail: str = ""


class BadRecord(ValueError):
    """Raised while a record is read; carries one of `REASONS` and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass
class Query:
    """A query of a catalogue that brings its own: what is asked with, and the id of the product sought."""

    product: Product
    target: str


@dataclasses.dataclass
class Catalogue:
    """What a source holds; `products` has no split of its own."""

    products: list[Product] = dataclasses.field(default_factory=list)
    train: list[Product] = dataclasses.field(default_factory=list)
    val: list[Product] = dataclasses.field(default_factory=list)
    train_queries: list[Query] = dataclasses.field(default_factory=list)
    val_queries: list[Query] = dataclasses.field(default_factory=list)
    quarantine: list[Quarantined] = dataclasses.field(default_factory=list)


def title_group(title: str) -> str:
    """Products whose titles differ in case or spacing only share a group."""
    return " ".join(title.casefold().split())


def _text(value: Any, name: str) -> str | None:
    """A stripped string, None where there is none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord("bad text", f"{name} is a {type(value).__name__}")
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
    if not isinstance(value, str):
        raise BadRecord("bad image", f"a {type(value).__name__} where bytes or a path belongs")
    path = (folder / value).resolve()
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
    category = record.get("category") or []
    attributes = record.get("attributes") or {}
    try:
        # Parquet maps arrive as pairs.
        pairs = dict(attributes)
        path = [category] if isinstance(category, str) else list(category)
    except (TypeError, ValueError):
        raise BadRecord("not readable", "category is not a list, or attributes not a map") from None
    return Product(
        text=title,
        images=tuple(images),
        id=str(identity),
        group=title_group(title) if title else "",
        category=tuple(str(part) for part in path if part is not None),
        brand=_text(record.get("brand"), "brand") or "",
        attributes={str(name): str(value) for name, value in pairs.items() if value is not None},
    )


def _records(path: Path) -> Iterator[dict[str, Any] | BadRecord]:
    """The records of a file, in order; one that cannot be parsed comes as a BadRecord."""
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    yield BadRecord("not readable", f"not JSON: {error}")
                    continue
                yield record if isinstance(record, dict) else BadRecord("not readable", "not a JSON object")


def _check_columns(path: Path, record: dict[str, Any], needed: Sequence[str]) -> None:
    """The first record must show the columns without which nothing can be read."""
    missing = " or ".join(name for name in needed if name not in record)
    if not missing and not {"title", "images", "image"} & set(record):
        missing = "title or images"
    if missing:
        raise UserError(f"{path}: no column {missing}; its columns are {', '.join(record)}")


def read(source: str | Path) -> Catalogue:
    """Reads a catalogue.

    Raises:
        UserError: nothing to read, or a column without which nothing can be read.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"--data {source}: no such file or folder")
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    files = [file for file in files if file.suffix in (".parquet", ".jsonl")]
    if not files:
        raise UserError(f"--data {source}: no .parquet or .jsonl file there")
    catalogue, seen = Catalogue(), set()
    for path in files:
        name = path.stem.lower()
        queries = name.startswith("queries")
        held_out = any(part.startswith(("val", "dev", "test")) for part in name.split("_"))
        train = any(part.startswith("train") for part in name.split("_"))
        for number, record in enumerate(_records(path)):
            if number == 0 and isinstance(record, dict):
                _check_columns(path, record, ("query_id", "product_id") if queries else ("product_id",))
            identity = ""
            try:
                if isinstance(record, BadRecord):
                    raise record
                identity = str(record.get("query_id" if queries else "product_id") or "")
                product = to_product(record, path.parent, "query_id" if queries else "product_id")
                if (queries, product.id) in seen:
                    raise BadRecord("duplicate id", "an earlier record has it")
                seen.add((queries, product.id))
                if queries:
                    query = Query(product, str(record.get("product_id")))
                    (catalogue.train_queries if train else catalogue.val_queries).append(query)
                else:
                    (catalogue.val if held_out else catalogue.train if train else catalogue.products).append(product)
            except BadRecord as bad:
                where = f"{number} {identity}".strip()
                catalogue.quarantine.append(Quarantined(path.name, where, bad.reason, bad.detail))
    if not (catalogue.products or catalogue.train or catalogue.val):
        reasons = sorted({entry.reason for entry in catalogue.quarantine})
        raise UserError(f"--data {source}: no usable product; quarantined for: {', '.join(reasons) or 'no records'}")
    return catalogue
