"""Bulk embedding: the vectors of a whole catalogue, on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import outputs, similarity
from moon_jax.data import records
from moon_jax.data.prepared import Prepared
from moon_jax.errors import UserError
from moon_jax.ingest import shards as shards_lib
from moon_jax.types import VIEWS, Product


def write_vectors(
    path: Path, ids: Sequence[str], vectors: np.ndarray, present: np.ndarray, fingerprint: str, synthetic: bool
) -> None:
    """Writes a Parquet file with the columns id, view and vector (float32), one row for each present view.

    Args:
        vectors: f32[products,3,D].
        present: bool[products,3].
        fingerprint: of the model; stored in the file's metadata, because vectors of different models do not compare.
        synthetic: whether the products are synthetic; stored in the metadata too.
    """
    product, view = np.nonzero(present)
    flat = pa.array(np.ascontiguousarray(vectors[product, view]).reshape(-1), pa.float32())
    table = pa.table(
        {
            "id": pa.array([ids[index] for index in product], pa.string()),
            "view": pa.array([VIEWS[index] for index in view], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[-1]),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(
        table.replace_schema_metadata({"model": fingerprint, "synthetic": str(synthetic).lower()}), temporary
    )
    temporary.replace(path)


SHARD = 4096
"""Products per file."""

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the folder format."""

RICHEST = "product"
"""Instead of a view: one vector per product, from everything it has: mm, or else i or t."""

DTYPES = ("float32", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which vectors of a catalogue are written, and how."""

    views: tuple[str, ...] = (RICHEST,)  # or some of t, i and mm: those of them that a product has
    dtype: str = "float32"  # one of DTYPES; int8 has one scale per vector
    width: int = 0  # keeps the first `width` dimensions, normalized again; 0 keeps all


def embed(
    embedder: Any,
    prepared: Prepared,
    output: str | Path,
    options: Options = Options(),  # noqa: B008
    progress: Callable[..., contextlib.AbstractContextManager] | None = None,
) -> dict[str, Any]:
    """Embeds all products of prepared data into Parquet files with columns id, view, vector and, for int8, scale.

    Files are written atomically. Calling it again creates the missing and damaged files, with the same bytes. The
    catalogue's queries are not embedded.

    Args:
        embedder: a serving.Embedder, or any other embedder that returns vectors (embedders/protocol.py).
        progress: like Terminal.progress; none by default.

    Returns:
        The contents of manifest.json; see docs/search.md.

    Raises:
        UserError: invalid options; the folder contains other files, or vectors of another model, other data or other
            options; a vector is not finite.
    """
    _check(options)
    output = Path(output).resolve()
    numbers = sorted({*prepared.train, *prepared.val})
    template, pooling = (getattr(embedder, name, "") for name in ("template", "pooling"))
    manifest_head = {
        "schema": SCHEMA,
        "model": embedder.name,
        "views": list(options.views),
        "dtype": options.dtype,
        "template": template,
        "pooling": pooling,
        "data": prepared.fingerprint,
        "synthetic": prepared.synthetic,
        "products": len(numbers),
    }
    source = json.dumps(manifest_head | {"width": options.width, "shard": SHARD}, sort_keys=True)
    if (output / MANIFEST).is_file():
        if not outputs.is_from(output, source):
            raise outputs.conflict(output)
        manifest: dict[str, Any] = {"shards": []}
        with contextlib.suppress(UserError):  # if it is damaged, all files are written again
            manifest = read_manifest(output)
        if manifest["shards"] and all(map(functools.partial(_is_intact, output), manifest["shards"])):
            shutil.rmtree(output / outputs.WORK, ignore_errors=True)
            return manifest
        _reopen(output, source, manifest["shards"])
    count = -(-len(numbers) // SHARD)
    with outputs.claim(output, source, ("shards",)) as work:
        shards = []
        with (progress or _silent)("embedding", len(numbers)) as advance:
            for shard in range(count):
                chosen = numbers[shard * SHARD : (shard + 1) * SHARD]
                path = output / f"vectors-{shard:05}-of-{count:05}.parquet"
                note = shards_lib.note(path.name, work)
                if note.is_file() and _is_intact(output, json.loads(note.read_text(encoding="utf-8"))):
                    advance(len(chosen))
                else:
                    table = _vectors(embedder, records.Subset(prepared.products, chosen), options, advance)
                    table = table.replace_schema_metadata({"model": embedder.name})
                    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                    pq.write_table(table, temporary)
                    temporary.replace(path)
                    fields = {
                        "file": path.name,
                        "rows": len(table),
                        "bytes": path.stat().st_size,
                        "checksum": outputs.checksum(path),
                        "width": table.schema.field("vector").type.list_size,
                    }
                    outputs.write_atomic(note, json.dumps(fields))
                shards.append(json.loads(note.read_text(encoding="utf-8")))
        # The width of a file without rows means nothing.
        width = max((shard["width"] for shard in shards if shard["rows"]), default=0)
        manifest = manifest_head | {"width": width, "rows": sum(shard["rows"] for shard in shards), "shards": shards}
        outputs.write_atomic(output / outputs.SOURCE, source)
        # The manifest is written last: its presence means that all files are complete.
        outputs.write_atomic(output / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(work)
    return manifest


FIELDS = {"schema": int, "model": str, "views": list, "dtype": str, "width": int, "rows": int, "shards": list}
SHARD_FIELDS = {"file": str, "rows": int, "bytes": int, "checksum": str, "width": int}
"""Required fields of a manifest and of each of its shards."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads manifest.json.

    Raises:
        UserError: it does not exist, or embed did not write it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        parts = [(manifest, FIELDS), *((shard, SHARD_FIELDS) for shard in manifest["shards"])]
        whole = all(isinstance(part[name], kind) for part, kinds in parts for name, kind in kinds.items())
        whole = whole and all(Path(shard["file"]).name == shard["file"] for shard in manifest["shards"])
        if not whole or manifest["rows"] != sum(shard["rows"] for shard in manifest["shards"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: not a complete output of moon-jax embed; run it first") from None
    if manifest["schema"] != SCHEMA:
        raise UserError(f"{folder}: format {manifest['schema']}, but this version reads {SCHEMA}; embed again")
    return manifest


def _is_intact(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a file exists as it was written."""
    path = folder / shard["file"]
    same = path.is_file() and path.stat().st_size == shard["bytes"]
    return same and outputs.checksum(path) == shard["checksum"]


def _reopen(output: Path, source: str, shards: Sequence[dict[str, Any]]) -> None:
    """Turns a finished folder into an unfinished one that keeps its intact files."""
    (output / outputs.WORK / "shards").mkdir(parents=True, exist_ok=True)
    for shard in shards:
        if _is_intact(output, shard):
            outputs.write_atomic(shards_lib.note(shard["file"], output / outputs.WORK), json.dumps(shard))
    outputs.write_atomic(output / outputs.WORK / outputs.SOURCE, source)
    (output / MANIFEST).unlink()


def _check(options: Options) -> None:
    known = (RICHEST, *VIEWS)
    wrong = [view for view in options.views if view not in known]
    if wrong or not options.views or len(set(options.views)) < len(options.views):
        raise UserError(f"--views {','.join(options.views)}: give product, or some of t, i and mm, each once")
    if RICHEST in options.views and len(options.views) > 1:
        raise UserError(f"--views {','.join(options.views)}: product already is one of t, i or mm; give it alone")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if options.width < 0:
        raise UserError(f"--width {options.width}: give 1 or more, or leave it out")


@contextlib.contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    del what, total
    yield lambda count: None


def _vectors(embedder: Any, products: Sequence[Product], options: Options, advance: Callable[[int], None]) -> pa.Table:
    """The rows of one file, in the products' order."""
    vectors, present = embedder.encode_views(products, advance=advance)
    if RICHEST in options.views:
        # mm if present, else i, else t.
        last = present.shape[1] - 1 - present[:, ::-1].argmax(axis=1)
        present = present & (np.arange(present.shape[1]) == last[:, None])
    else:
        present = present & np.isin(VIEWS, options.views)
    ids = [product.id for product in products]
    product, view = np.nonzero(present)
    kept = vectors[product, view]
    wrong = np.flatnonzero(~np.isfinite(kept).all(axis=1))
    if len(wrong):
        raise UserError(f"product {ids[product[wrong[0]]]}: its vector is not finite; check the model")
    if options.width and len(kept):
        if options.width > kept.shape[1]:
            raise UserError(f"--width {options.width}: the model has {kept.shape[1]} dimensions; give fewer")
        kept = np.asarray(similarity.truncate(kept, options.width))
    columns: dict[str, Any] = {
        "id": pa.array([ids[index] for index in product.tolist()], pa.string()),
        "view": pa.array([VIEWS[index] for index in view.tolist()], pa.string()),
    }
    if options.dtype == "int8":
        scale = np.abs(kept).max(axis=1, initial=0) / 127
        kept = np.rint(kept / np.where(scale > 0, scale, 1)[:, None])
        columns["scale"] = pa.array(scale.astype(np.float32))
    flat = pa.array(np.ascontiguousarray(kept.astype(options.dtype)).reshape(-1))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, kept.shape[1])
    return pa.table(columns)
