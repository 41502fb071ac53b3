"""Vectors of a catalogue on disk."""

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
    """Writes Parquet with columns id, view and vector (float32), a row for each view that is present.

    Args:
        vectors: f32[products,3,D].
        present: bool[products,3].
        fingerprint: of the model; kept in the file's metadata, since vectors of two models do not compare.
        synthetic: whether the products were rendered; kept there as well.
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
"""Products whose vectors are in one file."""

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the folder's format."""

RICHEST = "product"
"""In the place of a view: each product by all it has, mm, or else i or t."""

DTYPES = ("float32", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is kept of a catalogue's vectors."""

    views: tuple[str, ...] = (RICHEST,)  # or some of t, i and mm, of those that a product has
    dtype: str = "float32"  # of DTYPES; int8 has a scale for each vector
    width: int = 0  # first dimensions, brought to unit length again; 0 keeps all


def embed(
    embedder: Any,
    prepared: Prepared,
    output: str | Path,
    options: Options = Options(),  # noqa: B008
    progress: Callable[..., contextlib.AbstractContextManager] | None = None,
) -> dict[str, Any]:
    """Embeds all products of prepared data into Parquet files with the columns id, view and vector (and scale of int8).

    A file is whole or not there; the same call again goes on with those that are missing or damaged, and gives the same
    bytes. What the catalogue has of queries is not embedded.

    Args:
        embedder: a serving.Embedder, or any of the harness that gives vectors.
        progress: as Watch.progress.

    Returns:
        What manifest.json holds; docs/search.md tells it.

    Raises:
        UserError: the folder holds other things, or vectors of another model, other data or other options; or a vector
            is not finite.
    """
    _check(options)
    output = Path(output).resolve()
    numbers = sorted({*prepared.train, *prepared.val})
    template, pooling = (getattr(embedder, name, "") for name in ("template", "pooling"))
    about = {
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
    told = json.dumps(about | {"width": options.width, "shard": SHARD}, sort_keys=True)
    if (output / MANIFEST).is_file():
        if not outputs.is_from(output, told):
            raise outputs.conflict(output)
        manifest: dict[str, Any] = {"shards": []}
        with contextlib.suppress(UserError):  # a damaged one: all files are made again
            manifest = read_manifest(output)
        if manifest["shards"] and all(map(functools.partial(_stands, output), manifest["shards"])):
            shutil.rmtree(output / outputs.WORK, ignore_errors=True)
            return manifest
        _reopen(output, told, manifest["shards"])
    count = -(-len(numbers) // SHARD)
    with outputs.claim(output, told, ("shards",)) as work:
        shards = []
        with (progress or _silent)("embedding", len(numbers)) as advance:
            for shard in range(count):
                chosen = numbers[shard * SHARD : (shard + 1) * SHARD]
                path = output / f"vectors-{shard:05}-of-{count:05}.parquet"
                note = shards_lib.note(path.name, work)
                if note.is_file() and _stands(output, json.loads(note.read_text(encoding="utf-8"))):
                    advance(len(chosen))
                else:
                    table = _vectors(embedder, records.Chosen(prepared.products, chosen), options, advance)
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
        # Of a file without rows the width says nothing.
        width = max((shard["width"] for shard in shards if shard["rows"]), default=0)
        manifest = about | {"width": width, "rows": sum(shard["rows"] for shard in shards), "shards": shards}
        outputs.write_atomic(output / outputs.SOURCE, told)
        # The manifest comes last: where it stands, the rest is whole.
        outputs.write_atomic(output / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(work)
    return manifest


FIELDS = {"schema": int, "model": str, "views": list, "dtype": str, "width": int, "rows": int, "shards": list}
SHARD_FIELDS = {"file": str, "rows": int, "bytes": int, "checksum": str, "width": int}
"""What a manifest, and each of its shards, must say."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, or one that embed did not write.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        told = [(manifest, FIELDS), *((shard, SHARD_FIELDS) for shard in manifest["shards"])]
        whole = all(isinstance(said[name], kind) for said, kinds in told for name, kind in kinds.items())
        whole = whole and all(Path(shard["file"]).name == shard["file"] for shard in manifest["shards"])
        if not whole or manifest["rows"] != sum(shard["rows"] for shard in manifest["shards"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: nothing that moon-jax embed finished; run it first, with that --output") from None
    if manifest["schema"] != SCHEMA:
        raise UserError(f"{folder}: of format {manifest['schema']}, this version reads {SCHEMA}; embed again")
    return manifest


def _stands(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a file is there as it was written."""
    path = folder / shard["file"]
    same = path.is_file() and path.stat().st_size == shard["bytes"]
    return same and outputs.checksum(path) == shard["checksum"]


def _reopen(output: Path, told: str, shards: Sequence[dict[str, Any]]) -> None:
    """Makes a finished folder one that is half done, of which all files stand that are whole."""
    (output / outputs.WORK / "shards").mkdir(parents=True, exist_ok=True)
    for shard in shards:
        if _stands(output, shard):
            outputs.write_atomic(shards_lib.note(shard["file"], output / outputs.WORK), json.dumps(shard))
    outputs.write_atomic(output / outputs.WORK / outputs.SOURCE, told)
    (output / MANIFEST).unlink()


def _check(options: Options) -> None:
    known = (RICHEST, *VIEWS)
    wrong = [view for view in options.views if view not in known]
    if wrong or not options.views or len(set(options.views)) < len(options.views):
        raise UserError(f"--views {','.join(options.views)}: give product, or some of t, i and mm, each once")
    if RICHEST in options.views and len(options.views) > 1:
        raise UserError(f"--views {','.join(options.views)}: product is one of t, i or mm already; give it alone")
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
        # mm where there is one, else what there is.
        last = present.shape[1] - 1 - present[:, ::-1].argmax(axis=1)
        present = present & (np.arange(present.shape[1]) == last[:, None])
    else:
        present = present & np.isin(VIEWS, options.views)
    ids = [product.id for product in products]
    product, view = np.nonzero(present)
    kept = vectors[product, view]
    wrong = np.flatnonzero(~np.isfinite(kept).all(axis=1))
    if len(wrong):
        raise UserError(f"product {ids[product[wrong[0]]]}: its vector is not finite; is the model damaged?")
    if options.width and len(kept):
        if options.width > kept.shape[1]:
            raise UserError(f"--width {options.width}: the model gives {kept.shape[1]}")
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
