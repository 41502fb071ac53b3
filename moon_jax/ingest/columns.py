"""Column maps: how the columns of a source become the fields of a product, a query or a log. Data files, not code.

A map is a JSON file of `maps/`, or one's own. For each kind of file (`product`, `query` and `log`; for an evaluation
`asked` and `judgement`) it names a field's source: a column; a list of columns, whose values are joined;
or an object with `column` and what is done to its text:

    "split": SEPARATOR                        a list
    "take": [FIRST, LAST + 1]                 of that list
    "pairs": SEPARATOR                        a map, from the list's parts; "values": SEPARATOR where a name has several
    "format": "images/{}.jpg"                 the text in the place of {}

`events` says what an event of a log weighs. `files`, `format` and `header` say which files of a folder are read, as
what, and how their columns are called, where names and suffixes do not.
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
    "asked": ("query_id", "title", "images"),
    "judgement": ("query_id", "product_id", "grade"),
}
"""What a map may say of each kind of file."""

NEEDED = {
    "product": (("product_id",), ("title", "images")),
    "query": (("query_id",), ("product_id",), ("title", "images")),
    "log": (("product_id",), ("query", "query_image")),
    "asked": (("query_id",), ("title", "images")),
    "judgement": (("query_id",), ("product_id",), ("grade",)),
}
"""Of each tuple one field must have a column."""

ALIKE = 0.8
"""difflib's ratio, from which a column's name is a field's name mistyped."""

FORMATS = ("parquet", "jsonl", "csv", "tsv", "tar", "arrow")
OPERATIONS = {"split", "take", "pairs", "values", "format"}
SHIPPED = Path(__file__).parent / "maps"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a field comes from."""

    columns: tuple[str, ...]
    several: bool = False  # written as a list: what is there is joined
    split: str = ""
    take: tuple[int, int] | None = None
    pairs: str = ""
    values: str = ""
    format: str = ""

    def read(self, row: Mapping[str, Any]) -> Any:
        """The field's value in a row; None where no column has one."""
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
    """A map, read and checked."""

    name: str
    kinds: dict[str, dict[str, Source]]  # kind of file → field → source
    events: dict[str, float]
    files: tuple[str, ...] = ()
    format: str = ""
    header: tuple[str, ...] = ()

    def columns(self, kind: str) -> set[str]:
        """All columns that files of this kind are asked for."""
        return {column for source in self._of(kind, "").values() for column in source.columns}

    def apply(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of a file as a record of our own names, without what is not there."""
        made = {field: source.read(row) for field, source in self._of(kind, "").items()}
        return {field: value for field, value in made.items() if value is not None}

    def check(self, kind: str, columns: Iterable[str], where: str) -> None:
        """
        Raises:
            UserError: a column without which no record can be read is missing, or one seems mistyped.
        """
        sources, there = self._of(kind, where), sorted(columns)
        spare = [column for column in there if column not in self.columns(kind)]

        def guess(names: Iterable[str], cutoff: float) -> tuple[str, str] | None:
            rated = [
                (difflib.SequenceMatcher(None, name.casefold(), column.casefold()).ratio(), name, column)
                for name in names
                for column in spare
                if not _extends(name, column)
            ]
            ratio, name, column = max(rated, default=(0.0, "", ""))
            return (name, column) if ratio >= cutoff else None

        for fields in NEEDED[kind]:
            names = [column for field in fields if field in sources for column in sources[field].columns]
            if not set(names) & set(there):
                close = guess(names, 0.5)
                raise UserError(
                    f"{where}: no column {' or '.join(names) or fields[0]}; its columns are {', '.join(there)};"
                    f" rename {close[1] if close else 'the one that holds it'}, or name it in a file for --columns"
                )
        for field, source in sources.items():
            if set(source.columns) & set(there):
                continue
            close = guess([*source.columns, field], ALIKE)
            if close:
                raise UserError(
                    f"{where}: no column {close[0]}, but {close[1]}; rename it to {close[0]}, or name it in a file for"
                    " --columns"
                )

    def _of(self, kind: str, where: str) -> dict[str, Source]:
        if kind not in self.kinds:
            raise UserError(f"{where}: the column map {self.name} says nothing of {kind!r} files; add it")
        return self.kinds[kind]


def _extends(name: str, column: str) -> bool:
    """Whether one of them is the other with more behind it, as category_id or country: another word, no mistake."""
    short, long = sorted((name.casefold(), column.casefold()), key=len)
    return long.startswith(short) and len(long) - len(short) > 1


def load(name: str = "own") -> ColumnMap:
    """A map by the name of a file of `maps/`, or by path.

    Raises:
        UserError: no such map, or one that is not written as this module says.
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
        raise UserError(f"--columns {name}: {error}; docs/data.md says how a column map is written") from None


def _parsed(written: dict[str, Any], name: str) -> ColumnMap:
    known = {"about", "files", "format", "header", "events", *FIELDS}
    _refuse_others(written, known, "")
    kinds = {}
    for kind in FIELDS:
        if kind in written:
            _refuse_others(written[kind], FIELDS[kind], f"{kind}.")
            kinds[kind] = {field: _source(said, f"{kind}.{field}") for field, said in written[kind].items()}
    if not kinds:
        raise ValueError(f"says nothing of {' or '.join(FIELDS)} files")
    if written.get("format", "") not in ("", *FORMATS):
        raise ValueError(f"format {written['format']!r} is none of {', '.join(FORMATS)}")
    events = {str(event): float(weight) for event, weight in (written.get("events") or {}).items()}
    if not all(0 <= weight < float("inf") for weight in events.values()):
        raise ValueError("events must weigh 0 or more")
    default = {} if "events" in written or name == "own" else load().events
    files, header = written.get("files", ()), written.get("header", ())
    for names in (files, header):
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ValueError("files and header are lists of texts")
    if any(Path(pattern).is_absolute() or ".." in Path(pattern).parts for pattern in files):
        raise ValueError("files are patterns below the source's folder")
    return ColumnMap(name, kinds, events or default, tuple(files), written.get("format", ""), tuple(header))


def _source(said: Any, where: str) -> Source:
    if isinstance(said, str):
        return Source((said,))
    if isinstance(said, list) and said and all(isinstance(column, str) for column in said):
        return Source(tuple(said), several=True)
    if not isinstance(said, dict) or not isinstance(said.get("column"), str):
        raise ValueError(f"{where} is neither a column, a list of columns, nor an object with a column")
    _refuse_others(said, {"column", *OPERATIONS}, f"{where}.")
    take = said.get("take")
    if take is not None and not (isinstance(take, list) and len(take) == 2 and all(isinstance(n, int) for n in take)):
        raise ValueError(f"{where}.take is not [first, last + 1]")
    if not all(isinstance(said.get(operation, ""), str) for operation in OPERATIONS - {"take"}):
        raise ValueError(f"{where}: split, pairs, values and format are texts")
    if (take or said.get("pairs")) and not said.get("split"):
        raise ValueError(f"{where}: take and pairs want split")
    if "{}" not in said.get("format", "{}"):
        raise ValueError(f"{where}.format has no {{}} for the text")
    rest = {operation: said[operation] for operation in OPERATIONS - {"take"} if operation in said}
    return Source((said["column"],), take=tuple(take) if take else None, **rest)


def _refuse_others(written: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in written:
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
            raise ValueError(f"{where}{key} is not understood; the closest is {close[0]}")
