"""Hard negatives: for each triplet, products that a model finds similar to what is sought, but that are not it.

The anchor is the query's own vector if the query is a product, else that of the positive: `moon-jax embed` writes the
vectors of products. The anchor's most similar training products are ranked; those with the title of anything that the
query is known to want are left out, like the triplet's own negative, and so are those that are nearly as similar as the
positive, because they are likely to be relevant, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moon_jax import outputs, similarity
from moon_jax.data import known as known_lib
from moon_jax.data import prepared as prepared_lib
from moon_jax.data.records import Subset, Triplets
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.ingest import prepare

ANCHORS = 1024
"""Anchors searched at once."""

MINED = "mined"
"""The folder of unfinished work: the negatives of ANCHORS triplets per file."""


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
    work: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """The hard negatives of each triplet, most similar first.

    Args:
        work: a folder for the negatives of every ANCHORS triplets; those that are there already are not mined again.
        advance: called with numbers of triplets.

    Returns:
        i32[triplets,count], record indices, then -1.

    Raises:
        UserError: invalid options, or no training product has a vector.
    """
    first, last = options.ranks
    if options.count < 1 or not 1 <= first <= last or not options.bound > 0:
        raise UserError("--negatives: count and ranks start at 1, the ranks rise, and the bound is positive")
    pool = np.array(prepared.train)
    found, there = vectors.encode_views(Subset(prepared.products, pool))
    richest = np.where(there[:, 2], 2, np.where(there[:, 1], 1, 0))
    embedded = found[np.arange(len(pool)), richest]
    has = there.any(axis=1)
    if not has.any():
        raise UserError("--negatives: no training product has a vector there; embed this prepared data")
    place = np.full(len(prepared.products), -1)
    place[pool[has]] = np.arange(has.sum())
    pool, embedded = pool[has], embedded[has]

    triplets = prepared.triplets if isinstance(prepared.triplets, Triplets) else Triplets.of(prepared.triplets)
    query, positive, negative = (np.array(triplets.array[name]) for name in ("query", "positive", "negative"))
    own = np.where(place[query] >= 0, query, positive)
    keys, drawn = (known_lib.keys(prepared.group, products) for products in (pool, negative))
    known = known_lib.Known(triplets, prepared.group)
    mined = np.full((len(triplets), options.count), -1, np.int32)
    resident = similarity.Resident(embedded)
    # A query's known products are skipped, so the search goes deeper than the last rank.
    depth = min(2 * last + 32, len(pool), resident.chunk)
    for start in range(0, len(triplets), ANCHORS):
        part = slice(start, min(start + ANCHORS, len(triplets)))
        path = work / f"{start:010}.npy"
        rows = np.arange(part.start, part.stop)
        rows = rows[place[own[rows]] >= 0]
        if path.exists():
            mined[part] = np.load(path, allow_pickle=False)
        elif len(rows):
            anchors = embedded[place[own[rows]]]
            scores, ranked = similarity.top_k(anchors, resident, depth)
            at = place[positive[rows]]
            limit = options.bound * np.where(at >= 0, (anchors * embedded[np.maximum(at, 0)]).sum(-1), 1.0)
            for row, score, candidates, most in zip(rows, scores, ranked, limit, strict=True):
                good = (score <= most) & ~np.isin(keys[candidates], known.of(int(query[row])))
                good &= keys[candidates] != drawn[row]
                # One product of each title.
                kept = candidates[good]
                kept = kept[np.sort(np.unique(keys[kept], return_index=True)[1])][first - 1 : last][: options.count]
                mined[row, : len(kept)] = pool[kept]
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, mined[part], allow_pickle=False)
            temporary.replace(path)
        advance(part.stop - part.start)
    return mined


def write(source: Path, output: Path, vectors: str | Path, options: Options, progress: Any) -> dict[str, Any]:
    """A copy of the prepared folder `source` with mined negatives; its files are linked where the system allows.

    The same call again goes on where the last one stopped, and changes nothing if that had finished.

    Returns:
        The manifest's entry "mined": {"vectors", "count", "ranks", "bound", "triplets": how many have any, "negatives":
        how many in all}.

    Raises:
        UserError: as `mine`; or `output` holds other files.
    """
    prepared = prepared_lib.open_prepared(source)
    try:
        opened = Vectors(vectors)
    except UserError as error:
        message = str(error).replace("--vectors", "--negatives")
        raise UserError(f"{message}; it is the output of moon-jax embed") from None
    origin = json.dumps(
        {"negatives of": prepared.fingerprint, "vectors": opened.name, "options": dataclasses.asdict(options)}
    )
    if prepared_lib.is_prepared(output):
        if not outputs.is_from(output, origin):
            raise outputs.conflict(output)
        shutil.rmtree(output / outputs.WORK, ignore_errors=True)
        return prepared_lib.open_prepared(output).manifest["mined"]
    with outputs.claim(output, origin, (MINED,)) as work:
        with progress("mining negatives", len(prepared.triplets)) as advance:
            mined = mine(prepared, opened, options, work / MINED, advance)
        about = {
            "vectors": opened.name,
            **dataclasses.asdict(options),
            "triplets": int((mined >= 0).any(axis=1).sum()),
            "negatives": int((mined >= 0).sum()),
        }
        for path in source.iterdir():
            if path.is_file() and path.name not in (
                prepared_lib.MANIFEST,
                prepared_lib.NEGATIVES,
                outputs.SOURCE,
            ):
                _link(path, output / path.name)
        np.save(output / prepared_lib.NEGATIVES, mined, allow_pickle=False)
        manifest = prepare.with_negatives(output, dict(prepared.manifest), about)
        outputs.write_atomic(output / outputs.SOURCE, origin)
        prepare.write_manifest(output, manifest)  # last: if it exists, everything else is complete
        shutil.rmtree(work)
    return about


def _link(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)
