"""Measures of ranked lists, query by query: pure functions of what was found and what is relevant.

R@k is the share of queries with a relevant candidate among the first k (the paper's). MRR is the inverse rank of the
first relevant one, mAP the mean of the precisions at the ranks of relevant ones over how many there are; both look at
the first DEPTH. nDCG@10 takes the grade as the gain, as trec_eval does. All in percent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

RANKS = (1, 5, 10)
DEPTH = 100
"""Candidates of a ranked list."""

RESAMPLES = 1000
"""Of the bootstrap."""

ALL = slice(None)
"""Queries, or candidates."""

LEVEL = 0.95
"""Of its intervals."""

FEWEST = 10
"""Queries. Resampling fewer says nothing: of one query every resample is the same."""


class Relevance(Protocol):
    """Which candidates answer which queries, and how well."""

    @property
    def number(self) -> np.ndarray:
        """i64[Q], relevant candidates of each query."""

    def gains(self, found: np.ndarray) -> np.ndarray:
        """f64[Q,k], the grades of the candidates i64[Q,k]; 0 is not relevant."""

    def ideal(self, depth: int) -> np.ndarray:
        """f64[Q,depth], the highest grades of each query, falling; 0 where there are fewer."""

    def take(self, queries: Any, candidates: Any = ALL) -> Relevance:
        """That of some queries and candidates, which any index of numpy chooses."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """A candidate is relevant, of grade 1, to the queries of its key, such as a title group."""

    query: np.ndarray  # i64[Q]
    candidate: np.ndarray  # i64[C]

    @property
    def number(self) -> np.ndarray:
        ordered = np.sort(self.candidate)
        return ordered.searchsorted(self.query, "right") - ordered.searchsorted(self.query, "left")

    def gains(self, found: np.ndarray) -> np.ndarray:
        return (self.candidate[found] == self.query[:, None]).astype(np.float64)

    def ideal(self, depth: int) -> np.ndarray:
        return (np.arange(depth) < self.number[:, None]).astype(np.float64)

    def take(self, queries: Any, candidates: Any = ALL) -> Keys:
        return Keys(self.query[queries], self.candidate[candidates])


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Graded pairs, as in a qrels file. A pair that is not there has grade 0."""

    query: np.ndarray  # i64[pairs], rising
    candidate: np.ndarray  # i64[pairs], rising within a query; no pair twice
    grade: np.ndarray  # f64[pairs], positive
    queries: int
    candidates: int

    @classmethod
    def of(cls, pairs: Mapping[tuple[int, int], float], queries: int, candidates: int) -> Judgements:
        """From (query, candidate) → grade."""
        kept = sorted((pair, grade) for pair, grade in pairs.items() if grade > 0)
        query = np.array([pair[0] for pair, _ in kept], np.int64)
        candidate = np.array([pair[1] for pair, _ in kept], np.int64)
        return cls(query, candidate, np.array([grade for _, grade in kept], np.float64), queries, candidates)

    @property
    def number(self) -> np.ndarray:
        return np.bincount(self.query, minlength=self.queries)

    def gains(self, found: np.ndarray) -> np.ndarray:
        known = np.append(self.query * self.candidates + self.candidate, -1)
        asked = np.arange(self.queries)[:, None] * self.candidates + found
        place = np.searchsorted(known[:-1], asked)
        return np.where(known[place] == asked, np.append(self.grade, 0.0)[place], 0.0)

    def ideal(self, depth: int) -> np.ndarray:
        order = np.lexsort((-self.grade, self.query))
        rank = np.arange(len(order)) - np.searchsorted(self.query, self.query)
        best = np.zeros((self.queries, depth))
        top = rank < depth
        best[self.query[top], rank[top]] = self.grade[order][top]
        return best

    def take(self, queries: Any, candidates: Any = ALL) -> Judgements:
        asked, queries = _renumbered(self.query, self.queries, queries)
        offered, candidates = _renumbered(self.candidate, self.candidates, candidates)
        kept = (asked >= 0) & (offered >= 0)
        parts = asked[kept], offered[kept], self.grade[kept]
        order = np.lexsort((parts[1], parts[0]))
        return Judgements(*(part[order] for part in parts), queries, candidates)


def _renumbered(entries: np.ndarray, count: int, chosen: Any) -> tuple[np.ndarray, int]:
    """Where the `entries` below `count` stand among the chosen ones, -1 where they do not; and how many are chosen."""
    chosen, place = np.arange(count)[chosen], np.full(count, -1)
    place[chosen] = np.arange(len(chosen))
    return place[entries], len(chosen)


def by_query(found: np.ndarray, relevance: Relevance) -> dict[str, np.ndarray]:
    """The measures of each query, f64[Q] in percent.

    Args:
        found: i64[Q,k], candidates by falling similarity, k = DEPTH or all there are.
    """
    gains, number = relevance.gains(found), relevance.number
    hits = gains > 0
    ranks = np.arange(1, found.shape[1] + 1)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)
    precision = np.where(hits, np.cumsum(hits, axis=1) / ranks, 0.0)
    discount = 1 / np.log2(np.arange(10) + 2)
    dcg = (gains[:, :10] * discount[: min(10, gains.shape[1])]).sum(axis=1)
    best = (relevance.ideal(10) * discount).sum(axis=1)
    measures = {f"R@{k}": first <= k for k in RANKS}
    measures |= {
        "MRR": 1 / first,
        "nDCG@10": dcg / np.where(best > 0, best, 1.0),
        "mAP": precision.sum(axis=1) / np.maximum(number, 1),
    }
    return {name: 100.0 * values for name, values in measures.items()}


def chance(number: np.ndarray, total: int, k: int) -> float:
    """R@k in percent of a random order: 1 − C(total−h, k) / C(total, k) of h hits, the mean over queries."""
    k = min(k, total)
    numbers, queries = np.unique(number, return_counts=True)
    missed = [math.comb(total - hits, k) / math.comb(total, k) for hits in numbers.tolist()]
    return 100.0 * (1 - float(np.dot(missed, queries)) / len(number))


def means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means over queries drawn with replacement, f64[resamples,M] of f64[Q,M]."""
    rng, found = np.random.default_rng(seed), np.empty((resamples, values.shape[1]))
    for number in range(resamples):
        drawn = np.bincount(rng.integers(len(values), size=len(values)), minlength=len(values))
        found[number] = drawn @ values / len(values)
    return found


def intervals(measures: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The bootstrap's interval of each mean over queries, by percentiles."""
    drawn = means(np.stack(list(measures.values()), axis=1))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(low[m]), float(high[m])) for m, name in enumerate(measures)}


def compared(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How two models differ on the same queries: the mean difference, its interval by a paired bootstrap, and whether
    zero lies outside (never of fewer than FEWEST queries).

    Args:
        ours, theirs: measures f64[Q], the same queries in the same order.
    """
    names = [name for name in ours if name in theirs]
    difference = np.stack([ours[name] - theirs[name] for name in names], axis=1)
    low, high = np.quantile(means(difference), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: {
            "difference": float(difference[:, m].mean()),
            "low": float(low[m]),
            "high": float(high[m]),
            "told": len(difference) >= FEWEST and bool(low[m] > 0 or high[m] < 0),
        }
        for m, name in enumerate(names)
    }


def rounded(values: Sequence[float]) -> list[float]:
    """As scores are written."""
    return [round(value, 4) for value in values]
