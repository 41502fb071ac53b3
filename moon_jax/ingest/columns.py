"""Column maps: how the columns of a source become the fields of a product, a query or a log. Data files, not code.

A map is a JSON file, either in `maps/` or supplied by the user. For each kind of file (`product`, `query`, `log`,
`evaluation_query` and `qrel`) it gives the source of each field: a column, a list of columns (their values are joined),
or an object with `column` and the operations on its text:

    "split": SEPARATOR                        splits it into a list
    "take": [FIRST, LAST + 1]                 takes a slice of that list
    "pairs": SEPARATOR                        makes a map of its parts; "values": SEPARATOR if a name has several values
    "format": "images/{}.jpg"                 inserts the text at {}

`events` gives the weight of each event type in a log. `files`, `format` and `header` give the files to read, their
format and their column names, if file names, suffixes and header rows do not.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moon_jax.errors import UserError

FIELDS = {
    "product": ("product_id", "title", "description", "images", "category", "brand", "attributes"),
    "query": ("query_id", "product_id", "title", "images"),
    "log": ("query", "query_image", "product_id", "event", "time", "position", "count", "session"),
    "evaluation_query": ("query_id", "title", "images"),
    "qrel": ("query_id", "product_id", "grade"),
}
"""The fields that a map may set, by kind of file."""

REQUIRED = {
    "product": (("product_id",), ("title", "images")),
    "query": (("query_id",), ("product_id",), ("title", "images")),
    "log": (("product_id",), ("query", "query_image")),
    "evaluation_query": (("query_id",), ("title", "images")),
    "qrel": (("query_id",), ("product_id",), ("grade",)),
}
"""At least one field of each tuple must have a column."""

RENAMED = {"asked": "evaluation_query", "judgement": "qrel"}
"""Former names of sections."""

TYPO_RATIO = 0.8
"""From this difflib ratio on, a column name counts as a mistyped field name."""

FORMATS = ("parquet", "jsonl", "csv", "tsv", "tar", "arrow")
OPERATIONS = {"split", "take", "pairs", "values", "format"}
SHIPPED = Path(__file__).parent / "maps"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a field comes from."""

    columns: tuple[str, ...]
    several: bool = False  # written as a list: the values present are joined
    split: str = ""
    take: tuple[int, int] | None = None
    pairs: str = ""
    values: str = ""
    format: str = ""

    def read(self, row: Mapping[str, Any]) -> Any:
        """The field's value in a row; None if no column has one."""
        found = [row[column] for column in self.columns if row.get(column) is not None]
        if not found:
            return None
        if self.several:
            parts = [part for value in found for part in (value if isinstance(value, list) else [value])]
            return [part for part in parts if part != ""]
        [value] = found
        if self.format and isinstance(value, str | int):
            return self.format.replace("{}", str(value))
        if not self.split or not isinstance(value, str):
            return value
        parts = [part for part in value.split(self.split) if part]
        if self.take:
            parts = parts[slice(*self.take)]
        if not self.pairs:
            return parts
        pairs = [part.partition(self.pairs) for part in parts]
        return {
            name: ", ".join(filter(None, text.split(self.values))) if self.values else text
            for name, separator, text in pairs
            if separator
        }


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """A parsed and validated map."""

    name: str
    kinds: dict[str, dict[str, Source]]  # kind of file → field → source
    events: dict[str, float]
    files: tuple[str, ...] = ()
    format: str = ""
    header: tuple[str, ...] = ()

    def columns(self, kind: str) -> set[str]:
        """All columns that are read from files of this kind."""
        return {column for source in self._of(kind, "").values() for column in source.columns}

    def apply(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of a file as a record with our field names; absent fields are left out."""
        made = {field: source.read(row) for field, source in self._of(kind, "").items()}
        return {field: value for field, value in made.items() if value is not None}

    def check(self, kind: str, columns: Iterable[str], where: str) -> None:
        """
        Raises:
            UserError: a required column is missing, or a column name looks mistyped.
        """
        sources, present = self._of(kind, where), sorted(columns)
        spare = [column for column in present if column not in self.columns(kind)]

        def closest(names: Iterable[str], cutoff: float) -> tuple[str, str] | None:
            ratios = [
                (difflib.SequenceMatcher(None, name.casefold(), column.casefold()).ratio(), name, column)
                for name in names
                for column in spare
                if not _extends(name, column)
            ]
            ratio, name, column = max(ratios, default=(0.0, "", ""))
            return (name, column) if ratio >= cutoff else None

        for fields in REQUIRED[kind]:
            names = [column for field in fields if field in sources for column in sources[field].columns]
            if not set(names) & set(present):
                if kind == "product" and {"query", "product_id"} <= set(present):
                    raise UserError(f"{where}: has the columns of a log; give it a name that starts with log")
                close = closest(names, 0.5)
                raise UserError(
                    f"{where}: no column {' or '.join(names) or fields[0]}; the columns are {', '.join(present)};"
                    f" rename {close[1] if close else 'the matching one'}, or map it with --columns FILE.json"
                )
        for field, source in sources.items():
            if set(source.columns) & set(present):
                continue
            close = closest([*source.columns, field], TYPO_RATIO)
            if close:
                raise UserError(
                    f"{where}: no column {close[0]}, but there is {close[1]}; rename it to {close[0]}, or map it with"
                    " --columns FILE.json"
                )

    def _of(self, kind: str, where: str) -> dict[str, Source]:
        if kind not in self.kinds:
            raise UserError(f"{where}: the column map {self.name} has no {kind!r} section; add one")
        return self.kinds[kind]


def _extends(name: str, column: str) -> bool:
    """Whether one name extends the other, like category_id or country: a different word, not a typo."""
    short, long = sorted((name.casefold(), column.casefold()), key=len)
    return long.startswith(short) and len(long) - len(short) > 1


def load(name: str = "own") -> ColumnMap:
    """Loads a map by the name of a file in `maps/`, or by path.

    Raises:
        UserError: there is no such map, or it is not valid.
    """
    path = Path(name) if name.endswith(".json") else SHIPPED / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"--columns {name}: no such column map; give a .json file, or one of:"
            f" {', '.join(sorted(file.stem for file in SHIPPED.glob('*.json')))}"
        )
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), name)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--columns {name}: {error}; docs/data.md describes column maps") from None


def _parsed(written: dict[str, Any], name: str) -> ColumnMap:
    known = {"about", "files", "format", "header", "events", *FIELDS}
    _refuse_unknown(written, known, "")
    kinds = {}
    for kind in FIELDS:
        if kind in written:
            _refuse_unknown(written[kind], FIELDS[kind], f"{kind}.")
            kinds[kind] = {field: _source(value, f"{kind}.{field}") for field, value in written[kind].items()}
    if not kinds:
        raise ValueError(f"has no section; add one of {', '.join(FIELDS)}")
    if written.get("format", "") not in ("", *FORMATS):
        raise ValueError(f"format {written['format']!r} is not one of {', '.join(FORMATS)}")
    events = {str(event): float(weight) for event, weight in (written.get("events") or {}).items()}
    if not all(0 <= weight < float("inf") for weight in events.values()):
        raise ValueError("event weights must be finite and at least 0")
    default = {} if "events" in written or name == "own" else load().events
    files, header = written.get("files", ()), written.get("header", ())
    for names in (files, header):
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ValueError("files and header must be lists of non-empty strings")
    if any(Path(pattern).is_absolute() or ".." in Path(pattern).parts for pattern in files):
        raise ValueError("files must be patterns inside the source's folder")
    return ColumnMap(name, kinds, events or default, tuple(files), written.get("format", ""), tuple(header))


def _source(value: Any, where: str) -> Source:
    if isinstance(value, str):
        return Source((value,))
    if isinstance(value, list) and value and all(isinstance(column, str) for column in value):
        return Source(tuple(value), several=True)
    if not isinstance(value, dict) or not isinstance(value.get("column"), str):
        raise ValueError(f"{where} must be a column, a list of columns, or an object with a column")
    _refuse_unknown(value, {"column", *OPERATIONS}, f"{where}.")
    take = value.get("take")
    if take is not None and not (isinstance(take, list) and len(take) == 2 and all(isinstance(n, int) for n in take)):
        raise ValueError(f"{where}.take must be [first, last + 1]")
    if not all(isinstance(value.get(operation, ""), str) for operation in OPERATIONS - {"take"}):
        raise ValueError(f"{where}: split, pairs, values and format must be strings")
    if (take or value.get("pairs")) and not value.get("split"):
        raise ValueError(f"{where}: take and pairs need split")
    if "{}" not in value.get("format", "{}"):
        raise ValueError(f"{where}.format must contain {{}} for the text")
    rest = {operation: value[operation] for operation in OPERATIONS - {"take"} if operation in value}
    return Source((value["column"],), take=tuple(take) if take else None, **rest)


def _refuse_unknown(written: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in written:
        if key in RENAMED:
            raise ValueError(f"{where}{key} is now called {RENAMED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
            raise ValueError(f"{where}{key} is unknown; the closest known key is {close[0]}")
