"""What a source is made of: its files, what their names say of them, and chunks of their records.

A file whose name has the word train is for training; one with val, valid, validation, dev or test is for evaluation,
all of them together. Any other file of products is a catalogue without a split. Files whose names begin with `queries`
hold queries, those whose first word is `log` or `logs` hold logs. Words end at `-`, `_` and `.`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from moon_jax.errors import UserError
from moon_jax.ingest.parse import BadRecord

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


@dataclasses.dataclass(frozen=True)
class Source:
    """A source whose files are known."""

    name: str  # as it was given
    files: list[File]
    chunks: Callable[[], Iterator[Chunk]]
    synthetic: bool = False  # a file says that it was rendered
    signature: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", self.sign())

    def sign(self) -> list[tuple[str, int, int]]:
        """What the files are now. Equal signatures: with all likelihood, equal files."""
        try:
            return [(file.name, file.size, file.path.stat().st_mtime_ns) for file in self.files]
        except OSError as error:
            raise UserError(f"--data {self.name}: {error.filename}: {error.strerror}") from None


def describe(path: Path, name: str, told: str, format: str, root: Path) -> File:
    """What a file holds, by the words of `told`: its name, with its folders where a library names those."""
    words = re.split(r"[-_./]", told.lower())
    kind = "query" if words[0].startswith("queries") else "log" if words[0] in ("log", "logs") else "product"
    held_out = bool(set(words) & {"val", "valid", "validation", "dev", "test"})
    train = bool(set(words) & {"train", "training"})
    split = "val" if held_out else "train" if train else "val" if kind == "query" else ""
    return File(path, name, kind, split, format, root)


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
