"""The first pass of prepare: turns a chunk of a source into a unit, a Parquet file of its records and their metadata.

The metadata are what the second pass decides by. Units are written atomically and depend only on their chunk and the
rules, so any number of processes can write them in any order, and existing units are reused.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moon_jax.data import records
from moon_jax.data.images import BadImage, check_shape, decode
from moon_jax.ingest import columns as columns_lib
from moon_jax.ingest import parse, readers
from moon_jax.ingest.files import Chunk, File, confined
from moon_jax.ingest.parse import BadRecord
from moon_jax.types import Product

JPEG_QUALITY = 95
"""Quality of a downscaled image; other images are stored unchanged, byte by byte."""

RETRY = ".again"
"""Suffix of the marker file of a unit with images that a retry may obtain."""

LONGEST_DETAIL = 300
"""Limit of an id or a detail in the quarantine, in characters."""

_U64 = pa.uint64()
READ = [
    ("unit", pa.int32()),
    ("row", pa.int32()),
    ("file", pa.string()),
    ("number", pa.int64()),
    ("id", pa.string()),
    ("reason", pa.string()),  # null if the record is valid so far
    ("detail", pa.string()),
]
"""Columns of every record that was read; (unit, row) identifies it."""

RECORDS = pa.schema(
    [
        *READ,
        ("part", pa.string()),  # product or query
        ("split", pa.string()),  # train, val, or empty
        ("target", pa.string()),  # a query's product id
        ("title", _U64),  # hash of the title group, null without a title
        ("lot", _U64),  # hash that decides the split
        ("draw", _U64),  # hash that decides the negative
        ("content", pa.binary()),  # digest, equal for equal images and title groups
        ("categories", pa.list_(_U64)),  # hash of the path to each level, the broadest first
        ("has_text", pa.bool_()),
        ("has_image", pa.bool_()),
        ("size", pa.int64()),
        ("record", pa.binary()),
    ]
)

EVENTS = pa.schema(
    [
        *READ,
        ("split", pa.string()),  # train, val, or empty
        ("query", pa.string()),  # digest of text and images
        ("product", pa.string()),
        ("weight", pa.float64()),
        ("time", pa.float64()),
        ("position", pa.int32()),
        ("session", pa.string()),
        ("title", _U64),  # title group of the query
        ("draw", _U64),
        ("has_text", pa.bool_()),
        ("has_image", pa.bool_()),
        ("size", pa.int64()),
        ("record", pa.binary()),
    ]
)

SCHEMAS = {"product": RECORDS, "query": RECORDS, "log": EVENTS}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Everything besides its chunk that a unit depends on."""

    columns: columns_lib.ColumnMap
    max_pixels: int
    longest_side: int
    hosts: tuple[str, ...] = ()  # allowed in URLs
    connections: int = 8  # simultaneous ones per host; does not affect the unit


def number(*parts: object) -> int:
    """A hash of the parts, uniform in u64."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def write(chunk: Chunk, unit: int, rules: Rules, path: Path) -> None:
    """Writes a unit, and a marker file (RETRY) beside it if it lacks images that a retry may obtain.

    Holds at most readers.CHUNK_BYTES of images, plus those of one record.
    """
    kind, retry = chunk.file.kind, False
    waiting: collections.deque[tuple[dict[str, Any], Product | None, Any]] = collections.deque()
    for position, (count, row) in enumerate(readers.rows(chunk)):
        name = _writable(chunk.file.name)
        fields = {"unit": unit, "row": position, "file": name, "number": count, "id": "", "part": kind}
        product = rest = None
        try:
            if isinstance(row, BadRecord):
                raise row
            record = rules.columns.apply(kind, row)
            fields["id"] = _identity(record, kind)
            product, rest = _parsed(record, kind, rules)
        except BadRecord as bad:
            fields |= _reason(bad)
        waiting.append((fields, product, rest))
    images = (image for _, product, _ in waiting if product for image in product.images)
    fetched = _fetched(images, rules)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with pq.ParquetWriter(temporary, SCHEMAS[kind], compression="none", write_statistics=False) as file:
        held: list[dict[str, Any]] = []
        size = 0
        while waiting:
            fields, product, rest = waiting.popleft()
            if product:
                try:
                    fields |= _stored(chunk.file, product, rest, fetched, rules)
                except BadRecord as bad:
                    fields |= _reason(bad)
                    retry |= bad.reason == "image not fetched" or isinstance(bad, parse.Missing)
            held.append(fields)
            size += fields.get("size", 0)
            if size >= readers.CHUNK_BYTES or not waiting:
                # The third pass holds one row group in memory.
                file.write_table(pa.Table.from_pylist(held, SCHEMAS[kind]))
                held, size = [], 0
    if retry:
        path.with_suffix(RETRY).touch()
    temporary.replace(path)


def _stored(
    file: File, product: Product, rest: Any, fetched: dict[str, Path | BadRecord], rules: Rules
) -> dict[str, Any]:
    """Reads and verifies the images; returns the columns of the product, query or event."""
    images = [_content(image, file.root, fetched, rules) for image in product.images]
    product = dataclasses.replace(product, images=tuple(written for written, _ in images))
    describe = _event if file.kind == "log" else _record
    return describe(file, product, rest, [digest for _, digest in images])


def _identity(record: dict[str, Any], kind: str) -> str:
    """The id as it was read, for the quarantine; empty if it is missing."""
    identity = record.get("query_id" if kind == "query" else "product_id")
    return "" if identity is None else _writable(str(identity))


def _reason(bad: BadRecord) -> dict[str, str]:
    return {"reason": bad.reason, "detail": _writable(bad.detail)}


def _writable(text: str) -> str:
    """Text for the quarantine: shortened, and without lone surrogates, which cannot be written."""
    return text[:LONGEST_DETAIL].encode("utf-8", "replace").decode()


def _parsed(record: dict[str, Any], kind: str, rules: Rules) -> tuple[Product, Any]:
    """A record's Product, and a query's target id, a log row's Event, or "" for a product."""
    if kind == "log":
        event = parse.to_event(record, rules.columns.events)
        return event.query, event
    if kind == "query":
        product, target = parse.to_product(record, "query_id"), parse.label(record.get("product_id"), "product_id")
        if not target:
            raise BadRecord("unknown product", "the product_id of the query's product is empty")
        return product, target
    return parse.to_product(record), ""


def _fetched(images: Iterable[Any], rules: Rules) -> dict[str, Path | BadRecord]:
    urls = sorted({image for image in images if isinstance(image, str) and "://" in image})
    if not urls:
        return {}
    if not rules.hosts:
        refused = BadRecord("image not fetched", "a URL; --fetch HOST allows downloads from that host")
        return dict.fromkeys(urls, refused)
    from moon_jax.ingest import fetch  # needs the extra "fetch"

    return fetch.fetch(urls, rules.hosts, rules.connections)


def _content(
    image: bytes | str, folder: Path, fetched: dict[str, Path | BadRecord], rules: Rules
) -> tuple[bytes, bytes]:
    """An image as it is stored, and the digest of the bytes that were read.

    Raises:
        BadRecord: it cannot be read.
    """
    name = image if isinstance(image, str) else ""
    if image in fetched:
        image = fetched[image]
        if isinstance(image, BadRecord):
            raise image
    elif isinstance(image, str):
        image = confined(folder, image)
    content = image if isinstance(image, bytes) else parse.read_file(image, name)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        picture = decode(content, rules.max_pixels)
        check_shape(picture.height, picture.width)
    except BadImage as error:
        raise BadRecord("bad image", f"{name}: {error}" if name else str(error)) from None
    longest = max(picture.size)
    if longest <= rules.longest_side:
        return content, digest
    size = [max(1, round(side * rules.longest_side / longest)) for side in picture.size]
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue(), digest


def _record(file: File, product: Product, target: str, digests: Sequence[bytes]) -> dict[str, Any]:
    record = records.encode(product)
    return _described(product, record) | {
        "id": product.id,
        "split": file.split,
        "target": target,
        "lot": number("lot", product.group or ("id", product.id)),
        "draw": number("draw", file.kind, product.id),
        "content": hashlib.blake2b(repr((product.group, *digests)).encode(), digest_size=16).digest(),
        "categories": [number(*product.category[: depth + 1]) for depth in range(len(product.category))],
    }


def _event(file: File, query: Product, event: parse.Event, digests: Sequence[bytes]) -> dict[str, Any]:
    key = hashlib.blake2b(repr((query.text, *digests)).encode(), digest_size=16).hexdigest()
    query = dataclasses.replace(query, id=key, group=records.title_group(query.text) if query.text else "")
    record = records.encode(query)
    return _described(query, record) | {
        "split": file.split,
        "query": key,
        "product": event.product,
        "weight": event.weight,
        "time": event.time,
        "position": event.position,
        "session": event.session,
        "draw": number("draw", key, event.product),
    }


def _described(product: Product, record: bytes) -> dict[str, Any]:
    return {
        "title": number("title", product.group) if product.group else None,
        "has_text": product.text is not None,
        "has_image": bool(product.images),
        "size": len(record),
        "record": record,
    }
