"""Exact search over vectors written by bulk.embed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax import similarity
from moon_jax.data.images import BadImage
from moon_jax.errors import UserError
from moon_jax.outputs import checksum, write_atomic
from moon_jax.serving import bulk
from moon_jax.types import VIEWS


def _read(path: Path, shard: dict[str, Any]) -> pa.Table:
    """The rows of a file.

    Raises:
        OSError, ValueError: it is missing or was changed since it was written.
    """
    if path.stat().st_size != shard["bytes"]:
        raise ValueError("its size has changed")
    if checksum(path) != shard["checksum"]:
        raise ValueError("its checksum has changed")
    return pq.read_table(path)


class Index:
    """The vectors of a folder, in memory in the dtype that they were written in."""

    def __init__(self, folder: str | Path, view: str = ""):
        """
        Args:
            view: t, i or mm; required if the folder contains several views per product.

        Raises:
            UserError: no such folder; a file is damaged or from another model; the folder does not have the view.
        """
        folder = Path(folder).expanduser()
        try:
            self.manifest = bulk.read_manifest(folder)
        except UserError as error:
            raise UserError(f"--index {error}") from None
        views = self.manifest["views"]
        if len(views) > 1 and not view:
            raise UserError(f"--index {folder}: contains the views {', '.join(views)}; choose one with --view")
        # With one vector per product, --view may still select the products embedded from that view.
        if view and view not in views and not (views == [bulk.RICHEST] and view in VIEWS):
            raise UserError(f"--view {view}: give one of {', '.join(VIEWS if views == [bulk.RICHEST] else views)}")
        width = self.manifest["width"]
        ids, vectors = [], [np.zeros((0, width), self.manifest["dtype"])]
        for shard in self.manifest["shards"]:
            path = folder / shard["file"]
            try:
                table = _read(path, shard)
            except (OSError, ValueError) as error:
                why = str(error).splitlines()[0][:200]
                raise UserError(f"{path}: damaged ({why}); run the same embed command again") from None
            model = (table.schema.metadata or {}).get(b"model", b"").decode()
            if model != self.manifest["model"]:
                raise UserError(f"{path}: vectors of {model}, but others of {self.manifest['model']}; embed again")
            if not len(table):
                continue
            if table.schema.field("vector").type.list_size != width:
                raise UserError(f"{path}: the width of its vectors is not {width}; embed again")
            every = view in ("", bulk.RICHEST)
            kept = np.ones(len(table), bool) if every else np.array(table["view"].to_pylist()) == view
            values = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors.append(values.reshape(len(table), width)[kept])
            ids += [identity for identity, stays in zip(table["id"].to_pylist(), kept, strict=True) if stays]
        if not ids:
            missing = f"no vector of view {view}; leave --view out" if view else "no vectors; embed again"
            raise UserError(f"--index {folder}: contains {missing}")
        self.folder, self.ids, self._vectors = folder, ids, np.concatenate(vectors)

    @property
    def model(self) -> str:
        """Name of the embedder whose vectors these are."""
        return self.manifest["model"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> np.ndarray:
        """f32[n,D], unit length; vectors rounded to a smaller dtype are normalized again."""
        vectors = self._vectors[part].astype(np.float32)
        if self.manifest["dtype"] == "float32":
            return vectors
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # int8's scale cancels out

    def search(self, embedder: Any, items: Any, k: int = 10) -> list[list[tuple[str, float]]]:
        """The k most similar products for each item, as (id, cosine), best first; ties in the order of the folder.

        Args:
            embedder: an embedder of the same model as the vectors.
            items: as embedder.encode accepts them.

        Raises:
            UserError: the vectors are from another model; or see embedder.encode.
        """
        if embedder.name != self.model:
            raise UserError(
                f"--index {self.folder}: vectors of {self.model}, which do not compare with those of {embedder.name};"
                " query with the same model, or embed again"
            )
        try:
            vectors = embedder.encode(items)
        except BadImage as error:
            raise UserError(f"image: {error}") from None
        queries = np.asarray(similarity.truncate(vectors, self.manifest["width"]))
        scores, found = similarity.top_k(queries, self, min(k, len(self)))
        return [
            [(self.ids[index], float(score)) for index, score in zip(*row, strict=True)]
            for row in zip(found.tolist(), scores.tolist(), strict=True)
        ]

    def write_faiss(self, path: str | Path) -> None:
        """Writes a flat FAISS index of the vectors (inner product), and next to it FILE.ids.json, the id of each row.

        Raises:
            UserError: FAISS is not installed, or the file cannot be written.
        """
        path = Path(path).expanduser()
        try:
            import faiss
        except ImportError:
            raise UserError("--faiss: needs FAISS; pip install -e '.[faiss]'") from None
        index = faiss.IndexFlatIP(self.manifest["width"])
        for start in range(0, len(self), bulk.SHARD):
            index.add(np.ascontiguousarray(self[start : start + bulk.SHARD]))
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            faiss.write_index(index, str(temporary))
            write_atomic(path.with_name(f"{path.name}.ids.json"), json.dumps(self.ids) + "\n")
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError if it cannot open the file
            temporary.unlink(missing_ok=True)
            raise UserError(f"--faiss {path}: {getattr(error, 'strerror', None) or 'cannot be written'}") from None
