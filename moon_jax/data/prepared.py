"""Opens prepared data for training and evaluation: products, triplets as indices, and the split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moon_jax.data.records import JUDGEMENT, TRIPLET, Records, Shard, Triplets
from moon_jax.errors import UserError, printable
from moon_jax.types import Product, Triplet

SCHEMA = 2
"""Version of the folder's format."""

MANIFEST, QUARANTINE, TRIPLETS, VAL_QUERIES, GROUPS, NEGATIVES = (
    "manifest.json",
    "quarantine.jsonl",
    "triplets.npy",
    "val_queries.npy",
    "groups.npy",
    "negatives.npy",
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A catalogue ready for use. Indices refer to `products`; large parts stay on disk."""

    products: Sequence[Product]
    group: np.ndarray  # i32[len(products)]: index of the title group, -1 without a title
    triplets: Sequence[Triplet]  # training
    train: Sequence[int]  # training products
    val: Sequence[int]  # candidates of the evaluation: held-out products, or `train` if there are none
    val_queries: Sequence[tuple[int, int, float]]  # query, a relevant product, its grade; one entry per such product
    manifest: Mapping[str, Any]  # described in docs/data.md
    folder: Path | None = None  # None for data in memory
    negatives: np.ndarray | None = None  # i32[len(triplets),K]: further negatives of each triplet, -1 for none

    def members(self, triplets: Sequence[int], negatives: int) -> np.ndarray:
        """The records of some triplets: all queries, all positives, then all first negatives, all second ones, ….

        Args:
            triplets: indices.
            negatives: N, at most one more than the columns of `negatives`.

        Returns:
            i32[(2+N)·len(triplets)], -1 where there is no record.
        """
        chosen = [self.triplets[index] for index in triplets]
        roles = [[-1 if t[role] is None else t[role] for t in chosen] for role in range(3)]
        roles += [self.negatives[list(triplets), column] for column in range(negatives - 1)]
        return np.concatenate([np.asarray(role, np.int32) for role in roles])

    @property
    def product_count(self) -> int:
        """The number of products; all records from there on are queries."""
        return 1 + max(part[-1] for part in (self.train, self.val) if part)

    @property
    def sides(self) -> str:
        """How many products are for training and how many are held out, in words."""
        train, val = (self.manifest["splits"][name] for name in ("train", "val"))
        kind = "synthetic training products" if self.synthetic else "training products"
        return f"{train:,} {kind}, {f'{val:,} held out' if val else 'all of them searched in the evaluation'}"

    @property
    def synthetic(self) -> bool:
        """Whether the products are rendered, not real."""
        return bool(self.manifest.get("synthetic"))

    @property
    def fingerprint(self) -> str:
        """Digest of products, split and triplets."""
        return str(self.manifest.get("fingerprint", ""))

    @property
    def quarantined(self) -> Mapping[str, int]:
        """How many records were left out, by reason."""
        return self.manifest.get("quarantined", {})

    def summary(self) -> str:
        """The number of records left out for each reason, and an example; empty if none was left out."""
        if not self.quarantined:
            return ""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.quarantined.items())
        total = f"{sum(self.quarantined.values()):,} left out ({counts})"
        first = self.manifest["first_quarantined"]
        return printable(f"{total}, such as {first['file']} {first['number']}: {first['detail'] or first['reason']}")


def is_prepared(path: str | Path) -> bool:
    """Whether this is a folder written by prepare."""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / GROUPS).is_file()


def open_prepared(folder: str | Path) -> Prepared:
    """Opens a folder written by prepare.

    Raises:
        UserError: it has another format version, or a file is missing or has changed in size.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: not written by moon-jax prepare ({error})") from None
    if version != SCHEMA:
        raise UserError(
            f"{folder}: has format {version}, but this version reads format {SCHEMA}; prepare the data again"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["bytes"]:
            wrong = "is missing" if size < 0 else f"has {size} bytes, not {entry['bytes']}"
            raise UserError(f"{path}: {wrong}; prepare the data again")
    shards = [Shard(**shard) for shard in manifest["shards"]]
    counts = manifest["splits"]
    train, val = range(counts["train"]), range(counts["train"], counts["train"] + counts["val"])
    pairs = _array(folder / VAL_QUERIES, JUDGEMENT)
    return Prepared(
        products=Records(folder, shards),
        group=_array(folder / GROUPS, np.dtype("<i4")),
        triplets=Triplets(_array(folder / TRIPLETS, TRIPLET)),
        train=train,
        val=val or train,
        val_queries=[pair.item() for pair in pairs],
        manifest=manifest,
        folder=folder,
        negatives=_array(folder / NEGATIVES, np.dtype("<i4")) if NEGATIVES in manifest["files"] else None,
    )


def _array(path: Path, dtype: np.dtype) -> np.ndarray:
    """A memory-mapped array."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        # An empty array cannot be mapped.
        array = np.load(path, allow_pickle=False)
    if array.dtype != dtype:
        raise UserError(f"{path}: has dtype {array.dtype}, not {dtype}; prepare the data again")
    return array
