"""The files of a source, what their names mean, and chunks of their records.

A file with the word train in its name is for training. Files with val, valid, validation, dev or test are for
evaluation, all of them together. Any other file of products is a catalogue without a split. Files whose names start
with `queries` hold queries; files whose first word is `log` or `logs` hold logs. Words end at `-`, `_` and `.`.
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
"""File suffix → format."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source and its contents."""

    path: Path
    name: str  # relative to the source, as the quarantine lists it
    kind: str  # product, query or log
    split: str  # train, val, or empty
    format: str
    root: Path  # image paths are relative to it

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive records of a file, unparsed: the worker that gets them parses them."""

    file: File
    start: int  # number of the first record: the line in a JSONL file, else the row; counted from 1
    payload: list[bytes] | list[dict[str, Any] | BadRecord] | pa.RecordBatch
    labels: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # column → names of its class numbers
    size: int = 0  # approximate bytes of the source read since the last chunk


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its list of files."""

    name: str  # as the user gave it
    files: list[File]
    chunks: Callable[[], Iterator[Chunk]]
    synthetic: bool = False  # a file's metadata says that it was rendered
    signature: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", self.sign())

    def sign(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time (ns) of each file. Equal signatures almost certainly mean equal files."""
        try:
            return [(file.name, file.size, file.path.stat().st_mtime_ns) for file in self.files]
        except OSError as error:
            raise UserError(f"--data {self.name}: {error.filename}: {error.strerror}") from None


def describe(path: Path, name: str, label: str, format: str, root: Path) -> File:
    """Infers kind and split of a file from the words of `label`: its name, with its folders if a library named them."""
    words = re.split(r"[-_./]", label.lower())
    kind = "query" if words[0].startswith("queries") else "log" if words[0] in ("log", "logs") else "product"
    held_out = bool(set(words) & {"val", "valid", "validation", "dev", "test"})
    train = bool(set(words) & {"train", "training"})
    split = "val" if held_out else "train" if train else "val" if kind == "query" else ""
    return File(path, name, kind, split, format, root)


def confined(folder: Path, path: str) -> Path:
    """Resolves a record's path, including links, and ensures that it is inside `folder`.

    Raises:
        BadRecord: it is not a path, or leads outside `folder`.
    """
    try:
        resolved = Path(os.path.realpath(folder / path))
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRecord("bad image", f"{path!r} is not a path ({error})") from None
    if not resolved.is_relative_to(os.path.realpath(folder)):
        raise BadRecord("bad image", f"{path} is outside the catalogue's folder")
    return resolved
