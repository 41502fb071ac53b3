"""Hard negatives: for each triplet, products that a model finds similar to what is sought, but that are not it.

The anchor is the query's own vector if the query is a product, else that of the positive: `moon-jax embed` writes the
vectors of products. The anchor's most similar training products are ranked; those with the title of anything that the
query is known to want are left out, and so are those that are nearly as similar as the positive, because they are
likely to be relevant, too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moon_jax import similarity
from moon_jax.data import known as known_lib
from moon_jax.data import prepared as prepared_lib
from moon_jax.data.records import Triplets
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.ingest import prepare

ANCHORS = 1024
"""Anchors searched at once."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Which negatives are mined."""

    count: int = 3  # per triplet, at most
    ranks: tuple[int, int] = (1, 100)  # first and last rank among the products that remain
    bound: float = 0.95  # the highest similarity, as a share of the positive's


def mine(
    prepared: prepared_lib.Prepared,
    vectors: Vectors,
    options: Options,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """The hard negatives of each triplet, most similar first.

    Args:
        advance: called with numbers of triplets.

    Returns:
        i32[triplets,count], record indices, then -1.

    Raises:
        UserError: invalid options, or no training product has a vector.
    """
    first, last = options.ranks
    if options.count < 1 or not 1 <= first <= last or options.bound <= 0:
        raise UserError("--negatives: count and ranks start at 1, the ranks rise, and the bound is positive")
    pool = np.array(prepared.train)
    found, there = vectors.encode_views([prepared.products[int(index)] for index in pool])
    richest = np.where(there[:, 2], 2, np.where(there[:, 1], 1, 0))
    embedded = found[np.arange(len(pool)), richest]
    has = there.any(axis=1)
    if not has.any():
        raise UserError("--negatives: no training product has a vector there; embed this prepared data")
    place = np.full(len(prepared.products), -1)
    place[pool[has]] = np.arange(has.sum())
    pool, embedded = pool[has], embedded[has]

    triplets = prepared.triplets if isinstance(prepared.triplets, Triplets) else Triplets.of(prepared.triplets)
    query, positive = (np.array(triplets.array[name]) for name in ("query", "positive"))
    own = np.where(place[query] >= 0, query, positive)
    keys = known_lib.keys(prepared.group, pool)
    known = known_lib.Known(triplets, prepared.group)
    mined = np.full((len(triplets), options.count), -1, np.int32)
    resident = similarity.Resident(embedded)
    # A query's known products are skipped, so the search goes deeper than the last rank.
    depth = min(2 * last + 32, len(pool), resident.chunk)
    for start in range(0, len(triplets), ANCHORS):
        rows = np.arange(start, min(start + ANCHORS, len(triplets)))
        rows = rows[place[own[rows]] >= 0]
        if len(rows):
            anchors = embedded[place[own[rows]]]
            scores, ranked = similarity.top_k(anchors, resident, depth)
            at = place[positive[rows]]
            limit = options.bound * np.where(at >= 0, (anchors * embedded[np.maximum(at, 0)]).sum(-1), 1.0)
            for row, score, candidates, most in zip(rows, scores, ranked, limit, strict=True):
                good = (score <= most) & ~np.isin(keys[candidates], known.of(int(query[row])))
                # One product of each title.
                kept = candidates[good]
                kept = kept[np.sort(np.unique(keys[kept], return_index=True)[1])][first - 1 : last][: options.count]
                mined[row, : len(kept)] = pool[kept]
        advance(min(start + ANCHORS, len(triplets)) - start)
    return mined


def write(source: Path, output: Path, vectors: str | Path, options: Options, progress: Any) -> dict[str, Any]:
    """A copy of the prepared folder `source` with mined negatives; its files are linked where the system allows.

    Returns:
        The manifest's entry "mined": {"vectors", "count", "ranks", "bound", "triplets": how many have any, "negatives":
        how many in all}.

    Raises:
        UserError: as `mine`; or `output` exists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; give a new or empty folder")
    prepared = prepared_lib.open_prepared(source)
    opened = Vectors(vectors)
    with progress("mining negatives", len(prepared.triplets)) as advance:
        mined = mine(prepared, opened, options, advance)
    about = {
        "vectors": opened.name,
        **dataclasses.asdict(options),
        "triplets": int((mined >= 0).any(axis=1).sum()),
        "negatives": int((mined >= 0).sum()),
    }
    output.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in (prepared_lib.MANIFEST, prepared_lib.NEGATIVES):
            _link(path, output / path.name)
    np.save(output / prepared_lib.NEGATIVES, mined, allow_pickle=False)
    manifest = prepare.with_negatives(output, dict(prepared.manifest), about)
    prepare.write_manifest(output, manifest)
    return about


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)
