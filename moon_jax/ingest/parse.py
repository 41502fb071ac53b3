"""Turns the records of a source into products, queries and events; checks every field and gives a reason for errors."""

from __future__ import annotations

import dataclasses
import datetime
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moon_jax.data.records import title_group
from moon_jax.types import Product

LONGEST_TEXT = 65_536
"""Characters; a longer title is an error in the catalogue."""

MOST_IMAGES, MOST_ATTRIBUTES, MOST_CATEGORIES = 256, 1024, 64
"""Limits of one product."""

MOST_EVENTS = 10**12
"""The largest `count` in a row of a log."""

LARGEST_IMAGE = 256 << 20
"""Limit of an encoded image, in bytes."""

REASONS = (
    "not readable",
    "no id",
    "duplicate id",
    "duplicate product",
    "bad text",
    "text too long",
    "bad image",
    "image not fetched",
    "no text and no image",
    "unknown product",
    "bad event",
)
"""The complete list of reasons for quarantine."""


class BadRecord(ValueError):
    """An unusable record: one of REASONS and a detail. Either raised, or passed on in place of the record."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Event:
    """A row of a log."""

    query: Product  # text, images or both
    product: str  # id
    weight: float  # the event's weight times its count; 0 for an impression
    time: float | None  # seconds
    position: int | None
    session: str


def _text(value: Any, name: str) -> str | None:
    """A stripped string, or None if it is missing or empty."""
    if value is None or value != value:  # NaN is pandas' missing value
        return None
    if not isinstance(value, str):
        raise BadRecord("bad text", f"{name} is of type {type(value).__name__}, not text")
    if len(value) > LONGEST_TEXT:
        raise BadRecord("text too long", f"{name} has {len(value)} characters; the limit is {LONGEST_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord("bad text", f"{name} is not valid Unicode") from None
    return value.strip() or None


def label(value: Any, name: str) -> str:
    """An id, a brand, a category or an attribute as text. Numbers and dates are converted; 7.0 becomes 7, as pandas
    turns integers into floats if values are missing.

    Raises:
        BadRecord: it has another type, or is not valid text.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not isinstance(value, str | int | float | datetime.date):
        raise BadRecord("bad text", f"{name} is of type {type(value).__name__}, not text")
    return _text(str(value), name) or ""


def _identity(record: Mapping[str, Any], field: str) -> str:
    identity = label(record.get(field), field)
    if not identity:
        raise BadRecord("no id", f"{field} is empty")
    return identity


def _images(value: Any) -> tuple[Any, ...]:
    """The images of a record, each as bytes, or as a path or URL."""
    found = []
    for image in value if isinstance(value, list) else [value]:
        if isinstance(image, dict):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if image is None or image != image:
            continue
        if not isinstance(image, str | bytes):
            raise BadRecord("bad image", f"an image is of type {type(image).__name__}, not bytes or a path")
        found.append(image)
    if len(found) > MOST_IMAGES:
        raise BadRecord("bad image", f"{len(found)} images; the limit is {MOST_IMAGES}")
    return tuple(found)


def to_product(record: Mapping[str, Any], id_field: str = "product_id") -> Product:
    """A record with our field names (columns.FIELDS) as a Product; its images are bytes, or paths or URLs as text.

    Raises:
        BadRecord: with the reason for quarantine.
    """
    identity = _identity(record, id_field)
    title, images = _text(record.get("title"), "title"), _images(record.get("images"))
    if title is None and not images:
        raise BadRecord("no text and no image")
    category, attributes = (
        value if value and value == value else empty
        for value, empty in ((record.get("category"), []), (record.get("attributes"), {}))
    )
    if not isinstance(category, list | str):
        raise BadRecord("bad text", f"category is of type {type(category).__name__}, not a list")
    # Parquet maps arrive as pairs.
    pairs = list(attributes.items()) if isinstance(attributes, dict) else attributes
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise BadRecord("bad text", "attributes is not a map")
    for count, most, name in (
        (len(category) if isinstance(category, list) else 1, MOST_CATEGORIES, "category"),
        (len(pairs), MOST_ATTRIBUTES, "attributes"),
    ):
        if count > most:
            raise BadRecord("text too long", f"{name} has {count} entries; the limit is {most}")
    path = [label(part, "category") for part in ([category] if isinstance(category, str) else category)]
    return Product(
        text=title,
        images=images,
        id=identity,
        group=title_group(title) if title else "",
        category=tuple(part for part in path if part),
        brand=label(record.get("brand"), "brand"),
        attributes={
            label(name, "attributes"): label(value, "attributes") for name, value in pairs if value is not None
        },
        description=_text(record.get("description"), "description") or "",
    )


def to_event(record: Mapping[str, Any], weights: Mapping[str, float]) -> Event:
    """A record of a log as an Event.

    Args:
        weights: the weight of each event type. A record without an event type has weight 1.

    Raises:
        BadRecord: with the reason for quarantine.
    """
    text, images = _text(record.get("query"), "query"), _images(record.get("query_image"))
    if text is None and not images:
        raise BadRecord("no text and no image")
    product, event = _identity(record, "product_id"), record.get("event")
    if event is not None and (not isinstance(event, str) or event not in weights):
        raise BadRecord("bad event", f"event {str(event)[:80]!r} is not one of {', '.join(weights)}")
    count = _number(record.get("count"), "count", 1.0)
    if not 0 <= count <= MOST_EVENTS:
        raise BadRecord("bad event", f"count {count} is not between 0 and {MOST_EVENTS}")
    position = record.get("position")
    position = None if position is None or position != position else _number(position, "position", 0.0)
    return Event(
        query=Product(text=text, images=images),
        product=product,
        weight=(1.0 if event is None else weights[event]) * count,
        time=_time(record.get("time")),
        position=None if position is None else round(min(max(position, -(2**31)), 2**31 - 1)),
        session=label(record.get("session"), "session"),
    )


def _number(value: Any, name: str, default: float) -> float:
    """A finite number, or text of one (CSV)."""
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise BadRecord("bad event", f"{name} {str(value)[:80]!r} is not a number")
    return number


def _time(value: Any) -> float | None:
    """Seconds, from a number, a date, or ISO 8601. A time without a zone is UTC."""
    if value is None or value != value:
        return None
    try:
        if isinstance(value, str) and not _is_number(value):
            value = datetime.datetime.fromisoformat(value.strip())
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        if isinstance(value, datetime.datetime):
            zone = value.tzinfo or datetime.UTC
            return value.replace(tzinfo=zone).timestamp()
    except (ValueError, OverflowError):
        raise BadRecord("bad event", f"time {str(value)[:80]!r} is neither an ISO 8601 time nor a number") from None
    return _number(value, "time", 0.0)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Missing(BadRecord):
    """An image file that is missing or unreadable; a later attempt may succeed."""


def read_file(path: Path, name: str) -> bytes:
    """The bytes of an image file; `name` is its path in messages.

    Raises:
        BadRecord: it is missing, unreadable, not a regular file, or too large.
    """
    try:
        # Checked before opening: opening a named pipe blocks until a writer opens it.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("bad image", f"{name}: not a regular file")
        if status.st_size > LARGEST_IMAGE:
            raise BadRecord("bad image", f"{name}: {status.st_size} bytes; the limit is {LARGEST_IMAGE}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Missing("bad image", f"{name}: {reason}") from None
