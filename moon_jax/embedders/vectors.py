"""Precomputed vectors in Parquet files, instead of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax.data.pipeline import Alteration
from moon_jax.errors import UserError
from moon_jax.ingest import parse
from moon_jax.types import VIEWS, Product


class Vectors:
    """Precomputed vectors: Parquet files of a folder with the columns id, view (t, i or mm) and vector.

    Vectors are scaled to unit length. There are none for altered products, so directions and labels that need these are
    left out.
    """

    sees: tuple[str, ...] = ()
    fixed = True

    def __init__(self, folder: str | Path):
        """
        Raises:
            UserError: no such folder or files; a missing column, different widths, or a repeated id and view; a vector
                that is zero or not finite.
        """
        if not Path(folder).is_dir():
            raise UserError(f"--vectors {folder}: no such folder")
        files = sorted(Path(folder).rglob("*.parquet"))
        if not files:
            raise UserError(f"--vectors {folder}: contains no .parquet file")
        self._rows: dict[tuple[str, str], int] = {}
        parts, digest = [], hashlib.blake2b(digest_size=8)
        for path in files:
            try:
                table = pq.read_table(path, columns=["id", "view", "vector"])
                part = np.stack(table["vector"].to_numpy()).astype(np.float32) if len(table) else np.zeros((0, 1))
                if part.ndim != 2:
                    raise ValueError("vector: not a list of numbers")
            except (OSError, ValueError, TypeError, pa.ArrowException) as error:
                raise UserError(f"{path}: {str(error).splitlines()[0][:200]}; needs id, view and vector") from None
            for identity, view in zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True):
                try:
                    key = parse.label(identity, "id"), view
                except parse.BadRecord as bad:
                    raise UserError(f"{path}: {bad.detail}") from None
                if not key[0]:
                    raise UserError(f"{path}: an id is empty")
                if view not in VIEWS:
                    raise UserError(f"{path}: view {view!r}: must be t, i or mm")
                if key in self._rows:
                    raise UserError(f"{path}: view {view} of {key[0]!r} is repeated")
                self._rows[key] = len(self._rows)
                digest.update(repr(key).encode())
            if not len(part):
                continue
            parts.append(part)
            if part.shape[1] != parts[0].shape[1]:
                raise UserError(f"{path}: vectors of width {part.shape[1]}, but {parts[0].shape[1]} in other files")
            digest.update(part.tobytes())
        self._vectors = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        largest = np.abs(self._vectors).max(axis=1, initial=0.0, keepdims=True)
        if not np.isfinite(largest).all() or not largest.all():
            raise UserError(f"--vectors {folder}: some vectors are zero or not finite; leave these views out")
        self._vectors = self._vectors / largest  # keeps the squares within float32
        self._vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        self.name = f"vectors {digest.hexdigest()}"

    def encode(self, items: Sequence[Product]) -> np.ndarray:
        """Raises UserError: precomputed vectors cannot embed anything."""
        raise UserError("--vectors: cannot embed queries; give a model")

    def encode_views(
        self,
        products: Sequence[Product],
        alteration: Alteration | None = None,
        seed: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Embedder. Looks vectors up by product id; altered products have none."""
        vectors = np.zeros((len(products), len(VIEWS), self._vectors.shape[1]), np.float32)
        present = np.zeros((len(products), len(VIEWS)), bool)
        for number in range(len(products)) if alteration is None else ():
            for index, view in enumerate(VIEWS):
                row = self._rows.get((products[number].id, view))
                if row is not None:
                    vectors[number, index], present[number, index] = self._vectors[row], True
        advance(len(products))
        return vectors, present
