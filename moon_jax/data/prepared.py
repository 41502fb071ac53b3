"""What prepare wrote, opened: products, triplets as indices, the split. Training and evaluation read this."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moon_jax.data.records import PAIR, TRIPLET, Records, Shard, Triplets
from moon_jax.errors import UserError, printable
from moon_jax.types import Product, Triplet

SCHEMA = 1
"""Version of the folder's format."""

MANIFEST, QUARANTINE, TRIPLETS, VAL_QUERIES, GROUPS = (
    "manifest.json",
    "quarantine.jsonl",
    "triplets.npy",
    "val_queries.npy",
    "groups.npy",
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A catalogue ready for use. Indices point into `products`; nothing of it is held in memory but what is small."""

    products: Sequence[Product]
    group: np.ndarray  # i32[products]: number of the title group, -1 without a title
    triplets: Sequence[Triplet]  # training
    train: Sequence[int]  # training products
    val: Sequence[int]  # candidates of the evaluation; those of `train` where none are kept apart
    val_queries: Sequence[tuple[int, int]]  # query, the product it seeks
    manifest: Mapping[str, Any]  # as docs/data.md tells it
    folder: Path | None = None  # where it lies

    @property
    def synthetic(self) -> bool:
        """Rendered, not sold."""
        return bool(self.manifest.get("synthetic"))

    @property
    def fingerprint(self) -> str:
        """Of products, split and triplets."""
        return str(self.manifest.get("fingerprint", ""))

    @property
    def quarantined(self) -> Mapping[str, int]:
        """How many records were left out, by reason."""
        return self.manifest.get("quarantined", {})

    def summary(self) -> str:
        """How many were left out for each reason, and one example; empty if none was."""
        if not self.quarantined:
            return ""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.quarantined.items())
        told = f"{sum(self.quarantined.values()):,} left out ({counts})"
        first = self.manifest["first_quarantined"]
        return printable(f"{told}, such as {first['file']} {first['number']}: {first['detail'] or first['reason']}")


def is_prepared(path: str | Path) -> bool:
    """Whether this is a folder that prepare wrote."""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / GROUPS).is_file()


def open_prepared(folder: str | Path) -> Prepared:
    """
    Raises:
        UserError: another version's, or a file is missing or shorter than it was.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: not what moon-jax prepare wrote ({error})") from None
    if version != SCHEMA:
        raise UserError(f"{folder}: prepared in format {version}, this version reads {SCHEMA}; prepare the data again")
    for name, told in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != told["bytes"]:
            what = "is missing" if size < 0 else f"has {size} bytes, not {told['bytes']}"
            raise UserError(f"{path}: {what}; prepare the data again")
    shards = [Shard(**shard) for shard in manifest["shards"]]
    counts = manifest["splits"]
    train, val = range(counts["train"]), range(counts["train"], counts["train"] + counts["val"])
    pairs = _array(folder / VAL_QUERIES, PAIR)
    return Prepared(
        products=Records(folder, shards),
        group=_array(folder / GROUPS, np.dtype("<i4")),
        triplets=Triplets(_array(folder / TRIPLETS, TRIPLET)),
        train=train,
        val=val or train,
        val_queries=[pair.item() for pair in pairs],
        manifest=manifest,
        folder=folder,
    )


def _array(path: Path, dtype: np.dtype) -> np.ndarray:
    """An array in its file, read where it is touched."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        # An empty array cannot be mapped.
        array = np.load(path, allow_pickle=False)
    if array.dtype != dtype:
        raise UserError(f"{path}: holds {array.dtype}, not {dtype}; prepare the data again")
    return array
