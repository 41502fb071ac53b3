"""The user's own queries and qrels: reads the files and attaches them to a catalogue.

Like a catalogue, queries are Parquet, JSONL, CSV or TSV, with the columns query_id and title or image. Qrels have the
columns query_id, product_id and grade, or are in TREC format. A column map renames the columns of both
(ingest/columns.py).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moon_jax.data.images import BadImage, decode
from moon_jax.data.prepared import Prepared
from moon_jax.errors import UserError, printable
from moon_jax.evaluation.metrics import Qrels
from moon_jax.ingest import parse, readers
from moon_jax.ingest.columns import ColumnMap
from moon_jax.ingest.files import SUFFIXES, File, confined
from moon_jax.ingest.parse import BadRecord
from moon_jax.types import Product


@dataclasses.dataclass(frozen=True)
class Collection:
    """A catalogue with the user's queries and qrels."""

    prepared: Prepared  # val: the whole catalogue; val_queries: the queries, each with its best product
    qrels: Qrels  # indices into prepared.val_queries and prepared.val
    left_out: str  # queries and qrels that could not be used, in words; empty if none
    shared: str  # an id that a query and a product share; empty if there is none


@dataclasses.dataclass(frozen=True)
class _Concatenated(collections.abc.Sequence):
    """A catalogue's products followed by the queries."""

    products: Sequence[Product]
    queries: Sequence[Product]

    def __len__(self) -> int:
        return len(self.products) + len(self.queries)

    def __getitem__(self, index: int) -> Product:
        count = len(self.products)
        return self.products[index] if index < count else self.queries[index - count]


@dataclasses.dataclass(frozen=True)
class Log:
    """The contents of both files."""

    queries: dict[str, Product]  # by query id
    grades: dict[tuple[str, str], float]  # by query id and product id


def read(queries: str | Path, qrels: str | Path, columns: ColumnMap, max_pixels: int) -> Log:
    """Reads the files of queries and qrels.

    Args:
        columns: maps columns to fields.
        max_pixels: limit for the size of an image.

    Raises:
        UserError: a file cannot be read or is empty; a line is invalid; an id is repeated; a pair has two grades.
    """
    products = {query.id: query for query in _queries(Path(queries), columns, max_pixels)}
    grades = _grades(Path(qrels), columns)
    for flag, path, what, found in (("--queries", queries, "queries", products), ("--qrels", qrels, "qrels", grades)):
        if not found:
            raise UserError(f"{flag} {path}: contains no {what}")
    return Log(products, grades)


def collection(log: Log, prepared: Prepared) -> Collection:
    """Attaches the log's queries to the catalogue; all its products become candidates.

    Qrels of unknown products or unknown queries are left out, and so are queries without a relevant product.

    Raises:
        UserError: no query is left.
    """
    queries, grades = log.queries, log.grades
    count = len(prepared.train) + (len(prepared.val) if prepared.val != prepared.train else 0)
    wanted = {product for _, product in grades}
    positions, shared = {}, ""
    for position in range(count):
        identity = prepared.products[position].id
        if identity in wanted:
            positions[identity] = position
        if identity in queries:
            shared = shared or identity
    known: dict[str, dict[int, float]] = {}
    absent, unknown = set(), set()
    for (query, product), grade in grades.items():
        if query not in queries:
            unknown.add(query)
        elif product not in positions:
            absent.add(product)
        else:
            known.setdefault(query, {})[positions[product]] = grade
    answered = [query for query in queries if any(grade > 0 for grade in known.get(query, {}).values())]
    if not answered:
        raise UserError(
            "--qrels: no query has a product of this catalogue with a grade above 0; check that queries, qrels and"
            " catalogue use the same ids"
        )
    best = [max(known[query].items(), key=lambda pair: (pair[1], -pair[0]))[0] for query in answered]
    total = len(prepared.products)
    digest = hashlib.blake2b(repr([(queries[q], sorted(known[q].items())) for q in answered]).encode(), digest_size=8)
    reasons = (
        (len(queries) - len(answered), "query", "queries", "without a relevant product"),
        (len(unknown), "query", "queries", "of the qrels not in the queries file"),
        (len(absent), "product", "products", "of the qrels not in the catalogue"),
    )
    return Collection(
        dataclasses.replace(
            prepared,
            products=_Concatenated(prepared.products, [queries[query] for query in answered]),
            val=range(count),
            val_queries=[(total + number, product, 1.0) for number, product in enumerate(best)],
            manifest={**prepared.manifest, "fingerprint": f"{prepared.fingerprint} {digest.hexdigest()}"},
        ),
        Qrels.of(
            {(n, position): grade for n, query in enumerate(answered) for position, grade in known[query].items()},
            len(answered),
            count,
        ),
        ", ".join(f"{number:,} {one if number == 1 else many} {why}" for number, one, many, why in reasons if number),
        shared,
    )


def _file(path: Path, flag: str, kind: str) -> File:
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    format = SUFFIXES.get(bare.suffix.lower(), "")
    return File(path, path.name, kind, "", format, path.parent)


def _error(where: str, bad: BadRecord) -> UserError:
    return UserError(printable(f"{where}: {': '.join(filter(None, (bad.reason, bad.detail)))}"))


def _rows(file: File, columns: ColumnMap) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each record with its location, "FILE NUMBER"."""
    checked = file.format in ("csv", "tsv")  # their reader checks the columns
    if file.format in ("parquet", "arrow"):
        columns.check(file.kind, readers.schema_of(file).names, str(file.path))
        checked = True
    for chunk in readers.chunks(file, columns):
        for number, row in readers.rows(chunk):
            where = f"{file.path} {number}"
            if isinstance(row, BadRecord):
                raise _error(where, row)
            if not checked:
                columns.check(file.kind, row, str(file.path))
                checked = True
            yield where, columns.apply(file.kind, row)


def _queries(path: Path, columns: ColumnMap, max_pixels: int) -> Iterator[Product]:
    file = _file(path, "--queries", "evaluation_query")
    if not file.format:
        raise UserError(f"--queries {path}: unknown format; give one of {', '.join(SUFFIXES)}")
    seen: set[str] = set()
    for where, record in _rows(file, columns):
        try:
            query = parse.to_product(record, "query_id")
            if query.id in seen:
                raise BadRecord("duplicate id", query.id)
            seen.add(query.id)
            yield dataclasses.replace(query, images=tuple(_image(image, file, max_pixels) for image in query.images))
        except BadRecord as bad:
            raise _error(where, bad) from None


def _image(image: bytes | str, file: File, max_pixels: int) -> bytes:
    if isinstance(image, str):
        if "://" in image:
            raise BadRecord("image not fetched", f"{image}: give a path below {file.root}")
        image = parse.read_file(confined(file.root, image), image)
    try:
        decode(image, max_pixels)
    except BadImage as error:
        raise BadRecord("bad image", str(error)) from None
    return image


def _grades(path: Path, columns: ColumnMap) -> dict[tuple[str, str], float]:
    """The grade of each pair of query id and product id."""
    file = _file(path, "--qrels", "qrel")
    found: dict[tuple[str, str], float] = {}
    for where, record in _trec(file) if _is_trec(file) else _rows(file, columns):
        try:
            pair = tuple(parse.label(record.get(name), name) for name in ("query_id", "product_id"))
            if not all(pair):
                raise BadRecord("no id")
            grade = float(record.get("grade", "none"))
            if not math.isfinite(grade):
                raise ValueError
        except BadRecord as bad:
            raise _error(where, bad) from None
        except (TypeError, ValueError, OverflowError):
            raise UserError(printable(f"{where}: grade {record.get('grade')!r} is not a finite number")) from None
        if found.setdefault(pair, grade) != grade:
            conflict = f"query {pair[0]}, product {pair[1]}: grade {grade:g}, but {found[pair]:g} earlier"
            raise UserError(printable(f"{where}: {conflict}"))
    return found


@contextlib.contextmanager
def _undamaged(file: File) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--qrels {file.path}: damaged ({error})") from None


def _is_trec(file: File) -> bool:
    """Whether the file is in TREC format: by its suffix, or, for .tsv, by a first line that is not a header."""
    if file.format != "tsv":
        return not file.format
    with _undamaged(file), readers.open_file(file) as lines:
        parts = lines.readline(10_000).split()
    try:
        return len(parts) == 4 and math.isfinite(float(parts[3]))
    except ValueError:
        return False


def _trec(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines in TREC format: query, an unused number, product and grade, separated by white space."""
    with _undamaged(file), readers.open_file(file) as lines:
        for number, line in enumerate(lines, 1):
            parts = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").split()
            if parts and len(parts) != 4:
                wrong = f"{len(parts)} fields; TREC qrels have 4: query, 0, product, grade"
                raise UserError(printable(f"{file.path} {number}: {wrong}"))
            if parts:
                record = dict(zip(("query_id", "", "product_id", "grade"), parts, strict=True))
                yield f"{file.path} {number}", record
