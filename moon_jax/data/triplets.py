"""Triplets from a catalogue without purchase logs. They are made, and every number that rests on them says so.

A query is the product itself, or a query that the catalogue brings (another photo of the product); both are altered
when they are read (pipeline.py). The negative is another product of the same category.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from moon_jax.types import Product, Triplet


def from_catalogue(
    products: Sequence[Product], train: Sequence[int], queries: Sequence[tuple[int, int]], seed: int
) -> list[Triplet]:
    """One triplet per training product that is its own query, and one per query.

    Args:
        products: all of them.
        train: indices of the training products.
        queries: pairs (index of the query, index of the product it seeks).
        seed: the negatives follow from it.

    Returns:
        Triplets; `negative` is None only where no product with another title exists.
    """
    rng = np.random.default_rng(seed)
    members = defaultdict(list)
    for index in train:
        category = products[index].category
        for depth in range(len(category) + 1):
            members[category[:depth]].append(index)

    def differs(candidate: int, positive: int) -> bool:
        group = products[positive].group
        return candidate != positive and not (group and products[candidate].group == group)

    def negative(positive: int) -> int | None:
        product = products[positive]
        for depth in range(len(product.category), -1, -1):
            pool = members[product.category[:depth]]
            for _ in range(8 if pool else 0):
                candidate = pool[rng.integers(len(pool))]
                if differs(candidate, positive):
                    return candidate
            # Unlucky, or nearly all share the title: look at all of them.
            pool = [candidate for candidate in pool if differs(candidate, positive)]
            if pool:
                return pool[rng.integers(len(pool))]
        return None

    pairs = [(index, index) for index in train] + list(queries)
    return [Triplet(query, positive, negative(positive)) for query, positive in pairs]
