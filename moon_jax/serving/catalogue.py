"""Vectors of a catalogue on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moon_jax.types import VIEWS


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
