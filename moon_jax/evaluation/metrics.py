"""Per-query measures of ranked lists: pure functions of the ranked candidates and the relevant ones.

R@k is the share of queries with a relevant candidate among the first k, as in the paper. MRR is the inverse rank of the
first relevant candidate. mAP is the sum of the precisions at the ranks of relevant candidates, divided by the number of
relevant candidates. MRR and mAP are cut off at DEPTH. nDCG@10 uses the grade as the gain, like trec_eval. All are in
percent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

RANKS = (1, 5, 10)
DEPTH = 100
"""Length of a ranked list."""

RESAMPLES = 1000
"""Bootstrap resamples."""

ALL = slice(None)
"""Selects all queries, or all candidates."""

LEVEL = 0.95
"""Confidence level of bootstrap intervals."""

FEWEST = 10
"""Minimum number of queries for an interval. Resampling very few says nothing: all resamples of one query are equal."""


class Relevance(Protocol):
    """Which candidates are relevant to which queries, with grades."""

    @property
    def number(self) -> np.ndarray:
        """i64[Q], number of relevant candidates of each query."""

    def gains(self, found: np.ndarray) -> np.ndarray:
        """f64[Q,k], the grades of the candidates `found` i64[Q,k]; 0 means not relevant."""

    def ideal(self, depth: int) -> np.ndarray:
        """f64[Q,depth], the highest grades of each query in descending order, padded with 0."""

    def take(self, queries: Any, candidates: Any = ALL) -> Relevance:
        """The relevance restricted to some queries and candidates; each argument is any numpy index."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """A candidate is relevant, with grade 1, to every query with the same key, such as a title group."""

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
class Qrels:
    """Graded pairs of query and candidate, as in a qrels file. A pair that is not listed has grade 0."""

    query: np.ndarray  # i64[pairs], ascending
    candidate: np.ndarray  # i64[pairs], ascending within a query; no duplicate pairs
    grade: np.ndarray  # f64[pairs], positive
    queries: int
    candidates: int

    @classmethod
    def of(cls, pairs: Mapping[tuple[int, int], float], queries: int, candidates: int) -> Qrels:
        """From {(query, candidate): grade}; pairs of grade 0 or less are dropped."""
        kept = sorted((pair, grade) for pair, grade in pairs.items() if grade > 0)
        query = np.array([pair[0] for pair, _ in kept], np.int64)
        candidate = np.array([pair[1] for pair, _ in kept], np.int64)
        return cls(query, candidate, np.array([grade for _, grade in kept], np.float64), queries, candidates)

    @classmethod
    def by_key(
        cls, query: np.ndarray, key: np.ndarray, grade: np.ndarray, candidates: np.ndarray, queries: int
    ) -> Qrels:
        """From pairs of a query and a key, such as a title group, that stands for all candidates which have it.

        Args:
            query, key, grade: i64, i64 and f64[pairs]; of repeated pairs the highest grade counts.
            candidates: i64[C], the candidates' keys.
            queries: Q.
        """
        order = np.argsort(candidates, kind="stable")
        first, last = (np.searchsorted(candidates[order], key, side) for side in ("left", "right"))
        count = last - first
        query, grade = np.repeat(query, count), np.repeat(grade, count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        candidate = order[np.repeat(first, count) + within]
        order = np.lexsort((-grade, candidate, query))
        query, candidate, grade = query[order], candidate[order], grade[order]
        kept = np.ones(len(query), bool)
        kept[1:] = (query[1:] != query[:-1]) | (candidate[1:] != candidate[:-1])
        return cls(query[kept], candidate[kept], grade[kept], queries, len(candidates))

    @property
    def number(self) -> np.ndarray:
        return np.bincount(self.query, minlength=self.queries)

    def gains(self, found: np.ndarray) -> np.ndarray:
        known = np.append(self.query * self.candidates + self.candidate, -1)
        wanted = np.arange(self.queries)[:, None] * self.candidates + found
        index = np.searchsorted(known[:-1], wanted)
        return np.where(known[index] == wanted, np.append(self.grade, 0.0)[index], 0.0)

    def ideal(self, depth: int) -> np.ndarray:
        order = np.lexsort((-self.grade, self.query))
        rank = np.arange(len(order)) - np.searchsorted(self.query, self.query)
        best = np.zeros((self.queries, depth))
        top = rank < depth
        best[self.query[top], rank[top]] = self.grade[order][top]
        return best

    def take(self, queries: Any, candidates: Any = ALL) -> Qrels:
        query, queries = _renumbered(self.query, self.queries, queries)
        candidate, candidates = _renumbered(self.candidate, self.candidates, candidates)
        kept = (query >= 0) & (candidate >= 0)
        parts = query[kept], candidate[kept], self.grade[kept]
        order = np.lexsort((parts[1], parts[0]))
        return Qrels(*(part[order] for part in parts), queries, candidates)


def _renumbered(entries: np.ndarray, count: int, chosen: Any) -> tuple[np.ndarray, int]:
    """The index of each of `entries` among the chosen of `count` items, -1 if not chosen; and the number chosen."""
    chosen, position = np.arange(count)[chosen], np.full(count, -1)
    position[chosen] = np.arange(len(chosen))
    return position[entries], len(chosen)


def by_query(found: np.ndarray, relevance: Relevance) -> dict[str, np.ndarray]:
    """The measures of each query: name → f64[Q] in percent.

    Args:
        found: i64[Q,k], candidates by descending similarity; k is DEPTH, or the number of candidates if smaller.
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


def chance(number: np.ndarray, total: np.ndarray, k: int) -> float:
    """R@k in percent of a random order: 1 − C(total−h, k) / C(total, k) for h relevant candidates, mean over queries.

    Args:
        number: i64[Q], relevant candidates of each query.
        total: i64[Q], candidates of each query.
    """
    pairs, queries = np.unique(np.stack([number, total], 1), axis=0, return_counts=True)
    missed = [math.comb(all_ - hits, min(k, all_)) / math.comb(all_, min(k, all_)) for hits, all_ in pairs.tolist()]
    return 100.0 * (1 - float(np.dot(missed, queries)) / len(number))


def means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap means f64[resamples,M] of `values` f64[Q,M]: each over Q queries drawn with replacement."""
    rng, found = np.random.default_rng(seed), np.empty((resamples, values.shape[1]))
    for number in range(resamples):
        drawn = np.bincount(rng.integers(len(values), size=len(values)), minlength=len(values))
        found[number] = drawn @ values / len(values)
    return found


def intervals(measures: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The percentile bootstrap interval of the mean over queries of each measure f64[Q]: name → (low, high)."""
    drawn = means(np.stack(list(measures.values()), axis=1))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(low[m]), float(high[m])) for m, name in enumerate(measures)}


def compared(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The difference of two models on the same queries, by a paired bootstrap.

    Args:
        ours, theirs: measures f64[Q] of the same queries in the same order.

    Returns:
        {measure: {"difference": its mean, "low", "high": the ends of its interval, "significant": whether not 0,
        that is, whether the interval excludes 0; never with fewer than FEWEST queries}}.
    """
    names = [name for name in ours if name in theirs]
    difference = np.stack([ours[name] - theirs[name] for name in names], axis=1)
    low, high = np.quantile(means(difference), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: {
            "difference": float(difference[:, m].mean()),
            "low": float(low[m]),
            "high": float(high[m]),
            "significant": len(difference) >= FEWEST and bool(low[m] > 0 or high[m] < 0),
        }
        for m, name in enumerate(names)
    }


def rounded(values: Sequence[float]) -> list[float]:
    """Rounded to the four decimals of metrics.json."""
    return [round(value, 4) for value in values]
