"""The first pass of prepare: a chunk of a source becomes a unit, a Parquet file of its records and what is decided by.

Units are written whole or not at all and depend on nothing but their chunk and the rules, so they are made by any
number of processes, in any order, and those that stand already are not made again.
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
"""Of an image that is made smaller; one that is not is kept byte by byte."""

AGAIN = ".again"
"""The suffix of such a mark."""

LONGEST_DETAIL = 300
"""Characters of an id or a detail in the quarantine."""

_U64 = pa.uint64()
READ = [
    ("unit", pa.int32()),
    ("row", pa.int32()),
    ("file", pa.string()),
    ("number", pa.int64()),
    ("id", pa.string()),
    ("reason", pa.string()),  # null for a record that is fine so far
    ("detail", pa.string()),
]
"""What is known of every record that was read; (unit, row) is its place."""

RECORDS = pa.schema(
    [
        *READ,
        ("part", pa.string()),  # product or query
        ("split", pa.string()),  # train, val, or empty
        ("target", pa.string()),  # the product that a query seeks
        ("title", _U64),  # number of the title group, null without a title
        ("lot", _U64),  # decides the side of the split
        ("draw", _U64),  # decides the negative
        ("content", pa.binary()),  # equal for equal images and titles
        ("categories", pa.list_(_U64)),  # number of the path to each level, the broadest first
        ("has_text", pa.bool_()),
        ("has_image", pa.bool_()),
        ("size", pa.int64()),
        ("record", pa.binary()),
    ]
)

EVENTS = pa.schema(
    [
        *READ,
        ("query", pa.string()),  # key of text and images
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
    """What a unit depends on, beside its chunk."""

    columns: columns_lib.ColumnMap
    max_pixels: int
    longest_side: int
    hosts: tuple[str, ...] = ()  # that URLs may name
    connections: int = 8  # to one host at a time; changes nothing of the unit


def number(*parts: object) -> int:
    """A number that follows from the parts alone, uniform in u64."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def write(chunk: Chunk, unit: int, rules: Rules, path: Path) -> None:
    """Makes a unit, and beside it a mark (AGAIN) if images of it could not be had, which another try may have.

    Of the images no more than readers.CHUNK_BYTES are held, and those of one record.
    """
    kind, again = chunk.file.kind, False
    waiting: collections.deque[tuple[dict[str, Any], Product | None, Any]] = collections.deque()
    for place, (count, row) in enumerate(readers.rows(chunk)):
        told = {"unit": unit, "row": place, "file": _writable(chunk.file.name), "number": count, "id": "", "part": kind}
        product = rest = None
        try:
            if isinstance(row, BadRecord):
                raise row
            record = rules.columns.apply(kind, row)
            told["id"] = _identity(record, kind)
            product, rest = _understood(record, kind, rules)
        except BadRecord as bad:
            told |= _why(bad)
        waiting.append((told, product, rest))
    images = (image for _, product, _ in waiting if product for image in product.images)
    fetched = _fetched(images, rules)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with pq.ParquetWriter(temporary, SCHEMAS[kind], compression="none", write_statistics=False) as file:
        held: list[dict[str, Any]] = []
        size = 0
        while waiting:
            told, product, rest = waiting.popleft()
            if product:
                try:
                    told |= _stored(chunk.file, product, rest, fetched, rules)
                except BadRecord as bad:
                    told |= _why(bad)
                    again |= bad.reason == "image not fetched" or isinstance(bad, parse.Missing)
            held.append(told)
            size += told.get("size", 0)
            if size >= readers.CHUNK_BYTES or not waiting:
                # A group of rows is also what the third pass holds.
                file.write_table(pa.Table.from_pylist(held, SCHEMAS[kind]))
                held, size = [], 0
    if again:
        path.with_suffix(AGAIN).touch()
    temporary.replace(path)


def _stored(
    file: File, product: Product, rest: Any, fetched: dict[str, Path | BadRecord], rules: Rules
) -> dict[str, Any]:
    """The columns of a product, query or event, with its images read and verified."""
    images = [_content(image, file.root, fetched, rules) for image in product.images]
    product = dataclasses.replace(product, images=tuple(written for written, _ in images))
    describe = _event if file.kind == "log" else _record
    return describe(file, product, rest, [digest for _, digest in images])


def _identity(record: dict[str, Any], kind: str) -> str:
    """The id as far as it can be told, for the quarantine."""
    told = record.get("query_id" if kind == "query" else "product_id")
    return "" if told is None else _writable(str(told))


def _why(bad: BadRecord) -> dict[str, str]:
    return {"reason": bad.reason, "detail": _writable(bad.detail)}


def _writable(text: str) -> str:
    """Text for a listing, whatever a record held: a lone surrogate cannot be written, and a megabyte is not read."""
    return text[:LONGEST_DETAIL].encode("utf-8", "replace").decode()


def _understood(record: dict[str, Any], kind: str, rules: Rules) -> tuple[Product, Any]:
    """A product or query, and what it seeks (a query) or tells (an event)."""
    if kind == "log":
        event = parse.to_event(record, rules.columns.events)
        return event.query, event
    if kind == "query":
        product, target = parse.to_product(record, "query_id"), parse.label(record.get("product_id"), "product_id")
        if not target:
            raise BadRecord("unknown product", "product_id, of the product that is sought, is empty")
        return product, target
    return parse.to_product(record), ""


def _fetched(images: Iterable[Any], rules: Rules) -> dict[str, Path | BadRecord]:
    urls = sorted({image for image in images if isinstance(image, str) and "://" in image})
    if not urls:
        return {}
    if not rules.hosts:
        told = BadRecord("image not fetched", "a URL; --fetch HOST lets prepare ask that host for images")
        return dict.fromkeys(urls, told)
    from moon_jax.ingest import fetch  # an extra

    return fetch.fetch(urls, rules.hosts, rules.connections)


def _content(
    image: bytes | str, folder: Path, fetched: dict[str, Path | BadRecord], rules: Rules
) -> tuple[bytes, bytes]:
    """An image as it is stored, and the digest of what was read.

    Raises:
        BadRecord: it cannot be read.
    """
    told = image if isinstance(image, str) else ""
    if image in fetched:
        image = fetched[image]
        if isinstance(image, BadRecord):
            raise image
    elif isinstance(image, str):
        image = confined(folder, image)
    content = image if isinstance(image, bytes) else parse.read_file(image, told)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        picture = decode(content, rules.max_pixels)
        check_shape(picture.height, picture.width)
    except BadImage as error:
        raise BadRecord("bad image", f"{told}: {error}" if told else str(error)) from None
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
    del file
    key = hashlib.blake2b(repr((query.text, *digests)).encode(), digest_size=16).hexdigest()
    query = dataclasses.replace(query, id=key, group=records.title_group(query.text) if query.text else "")
    record = records.encode(query)
    return _described(query, record) | {
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
