"""What each query is known to want: all its training positives. None of them is a negative for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moon_jax.data.records import Triplets
from moon_jax.types import Triplet


def keys(group: np.ndarray, products: np.ndarray) -> np.ndarray:
    """A number for each product that is shared by products with an equal title. i64 from indices of products."""
    products = np.asarray(products, np.int64)
    found = np.asarray(group)[np.maximum(products, 0)].astype(np.int64)
    return np.where(products < 0, -1, np.where(found >= 0, found, -2 - products))


class Known:
    """The positives of each query in the training triplets, by title."""

    def __init__(self, triplets: Sequence[Triplet], group: np.ndarray):
        """`group` as in Prepared."""
        array = (triplets if isinstance(triplets, Triplets) else Triplets.of(triplets)).array
        query, key = array["query"].astype(np.int64), keys(group, array["positive"])
        order = np.lexsort((key, query))
        self._query, self._keys = query[order], key[order]

    def of(self, query: int) -> np.ndarray:
        """The keys of its positives, ascending; some may repeat."""
        first, last = np.searchsorted(self._query, [query, query + 1])
        return self._keys[first:last]

    def among(self, queries: np.ndarray, positives: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which candidates each query is known to want, besides those with the title of its own positive.

        Args:
            queries: i32[B], record indices.
            positives: i64[B], keys of their own positives.
            candidates: i64[C], keys; -1 for none.

        Returns:
            u8[B,⌈C/8⌉], bit c of a row for candidate c; a list would have to be cut for queries that want half of a
            batch.
        """
        found = np.zeros((len(queries), len(candidates)), bool)
        wanted: dict[int, np.ndarray] = {}
        for row, query in enumerate(np.asarray(queries).tolist()):
            if query not in wanted:
                wanted[query] = np.isin(candidates, self.of(query))
            found[row] = wanted[query] & (candidates != positives[row])
        return np.packbits(found, axis=1, bitorder="little")
