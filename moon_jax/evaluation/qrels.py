"""One's own queries, and judgements of what answers them: files → a catalogue with queries, and graded relevance.

Queries are in Parquet, JSONL, CSV or TSV, as a catalogue is, with the columns query_id and title or image. Judgements
have query_id, product_id and grade, or are lines of TREC's qrels. A column map renames both (data/columns.py).
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
from moon_jax.evaluation.metrics import Judgements
from moon_jax.ingest import parse, readers
from moon_jax.ingest.columns import ColumnMap
from moon_jax.ingest.files import SUFFIXES, File, confined
from moon_jax.ingest.parse import BadRecord
from moon_jax.types import Product


@dataclasses.dataclass(frozen=True)
class Judged:
    """A catalogue with one's own queries."""

    prepared: Prepared  # val: the whole catalogue; val_queries: the queries, each with its best product
    relevance: Judgements  # of prepared.val_queries and prepared.val, by their places
    left_out: str  # what could not be used, in words; empty if nothing
    shared: str  # an id that both a query and a product have, empty if there is none


@dataclasses.dataclass(frozen=True)
class _Both(collections.abc.Sequence):
    """A catalogue's products, then queries."""

    products: Sequence[Product]
    queries: Sequence[Product]

    def __len__(self) -> int:
        return len(self.products) + len(self.queries)

    def __getitem__(self, index: int) -> Product:
        count = len(self.products)
        return self.products[index] if index < count else self.queries[index - count]


@dataclasses.dataclass(frozen=True)
class Log:
    """What both files hold."""

    queries: dict[str, Product]
    grades: dict[tuple[str, str], float]  # of a query and a product, by their ids


def read(queries: str | Path, qrels: str | Path, columns: ColumnMap, max_pixels: int) -> Log:
    """
    Args:
        columns: says which column is what.
        max_pixels: of an image.

    Raises:
        UserError: a file cannot be read, or is empty; a line of it is wrong; an id or a pair is there twice.
    """
    asked = {query.id: query for query in _queries(Path(queries), columns, max_pixels)}
    grades = _grades(Path(qrels), columns)
    for flag, path, what, found in (("--queries", queries, "query", asked), ("--qrels", qrels, "judgement", grades)):
        if not found:
            raise UserError(f"{flag} {path}: holds no {what}")
    return Log(asked, grades)


def of(log: Log, prepared: Prepared) -> Judged:
    """The log's queries, to be sought among all products of the catalogue.

    Judgements of products that the catalogue has not, and of queries that are not there, are left out, and so are
    queries of which none is left.

    Raises:
        UserError: no query is left.
    """
    asked, grades = log.queries, log.grades
    count = len(prepared.train) + (len(prepared.val) if prepared.val != prepared.train else 0)
    wanted = {product for _, product in grades}
    places, shared = {}, ""
    for place in range(count):
        identity = prepared.products[place].id
        if identity in wanted:
            places[identity] = place
        if identity in asked:
            shared = shared or identity
    known: dict[str, dict[int, float]] = {}
    absent, unasked = set(), set()
    for (query, product), grade in grades.items():
        if query not in asked:
            unasked.add(query)
        elif product not in places:
            absent.add(product)
        else:
            known.setdefault(query, {})[places[product]] = grade
    answered = [query for query in asked if any(grade > 0 for grade in known.get(query, {}).values())]
    if not answered:
        raise UserError(
            "--qrels: no query has a product of this catalogue with a grade above 0; are the ids the same in queries,"
            " qrels and catalogue?"
        )
    best = [max(known[query].items(), key=lambda pair: (pair[1], -pair[0]))[0] for query in answered]
    total = len(prepared.products)
    digest = hashlib.blake2b(repr([(asked[q], sorted(known[q].items())) for q in answered]).encode(), digest_size=8)
    told = (
        (len(asked) - len(answered), "query", "queries", "without a product to be found"),
        (len(unasked), "judged query", "judged queries", "not in the queries' file"),
        (len(absent), "judged product", "judged products", "not in the catalogue"),
    )
    return Judged(
        dataclasses.replace(
            prepared,
            products=_Both(prepared.products, [asked[query] for query in answered]),
            val=range(count),
            val_queries=[(total + number, product) for number, product in enumerate(best)],
            manifest={**prepared.manifest, "fingerprint": f"{prepared.fingerprint} {digest.hexdigest()}"},
        ),
        Judgements.of(
            {(n, place): grade for n, query in enumerate(answered) for place, grade in known[query].items()},
            len(answered),
            count,
        ),
        ", ".join(f"{number:,} {one if number == 1 else many} {why}" for number, one, many, why in told if number),
        shared,
    )


def _file(path: Path, flag: str, kind: str) -> File:
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    format = SUFFIXES.get(bare.suffix.lower(), "")
    return File(path, path.name, kind, "", format, path.parent)


def _mistake(where: str, bad: BadRecord) -> UserError:
    return UserError(printable(f"{where}: {': '.join(filter(None, (bad.reason, bad.detail)))}"))


def _rows(file: File, columns: ColumnMap) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record stands, and the record."""
    checked = file.format in ("csv", "tsv")  # by their reader
    if file.format in ("parquet", "arrow"):
        columns.check(file.kind, readers.schema_of(file).names, str(file.path))
        checked = True
    for chunk in readers.chunks(file, columns):
        for number, row in readers.rows(chunk):
            where = f"{file.path} {number}"
            if isinstance(row, BadRecord):
                raise _mistake(where, row)
            if not checked:
                columns.check(file.kind, row, str(file.path))
                checked = True
            yield where, columns.apply(file.kind, row)


def _queries(path: Path, columns: ColumnMap, max_pixels: int) -> Iterator[Product]:
    file = _file(path, "--queries", "asked")
    if not file.format:
        raise UserError(f"--queries {path}: none of {', '.join(SUFFIXES)}")
    seen: set[str] = set()
    for where, record in _rows(file, columns):
        try:
            query = parse.to_product(record, "query_id")
            if query.id in seen:
                raise BadRecord("duplicate id", query.id)
            seen.add(query.id)
            yield dataclasses.replace(query, images=tuple(_image(image, file, max_pixels) for image in query.images))
        except BadRecord as bad:
            raise _mistake(where, bad) from None


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
    """The grade of each pair of a query and a product."""
    file = _file(path, "--qrels", "judgement")
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
            raise _mistake(where, bad) from None
        except (TypeError, ValueError, OverflowError):
            raise UserError(printable(f"{where}: grade {record.get('grade')!r} is no number")) from None
        if found.setdefault(pair, grade) != grade:
            raise UserError(printable(f"{where}: query {pair[0]}, product {pair[1]}: judged {found[pair]:g} before"))
    return found


@contextlib.contextmanager
def _undamaged(file: File) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--qrels {file.path}: damaged ({error})") from None


def _is_trec(file: File) -> bool:
    """By its ending, or, of tab-separated values, by a first line that is no header."""
    if file.format != "tsv":
        return not file.format
    with _undamaged(file), readers.open_file(file) as lines:
        parts = lines.readline(10_000).split()
    try:
        return len(parts) == 4 and math.isfinite(float(parts[3]))
    except ValueError:
        return False


def _trec(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """TREC's qrels: query, a number that nobody reads, product and grade, with spaces between them."""
    with _undamaged(file), readers.open_file(file) as lines:
        for number, line in enumerate(lines, 1):
            parts = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").split()
            if parts and len(parts) != 4:
                told = f"{len(parts)} words; TREC's qrels have 4: query, 0, product, grade"
                raise UserError(printable(f"{file.path} {number}: {told}"))
            if parts:
                record = dict(zip(("query_id", "", "product_id", "grade"), parts, strict=True))
                yield f"{file.path} {number}", record
