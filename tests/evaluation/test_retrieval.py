import numpy as np
import pytest

from moon_jax.evaluation import retrieval


def oracle(queries, candidates, query_key, candidate_key, k):
    hits = 0
    for q, key in zip(queries, query_key, strict=True):
        scores = [float(np.dot(q, c)) for c in candidates]
        order = sorted(range(len(candidates)), key=lambda c: (-scores[c], c))
        hits += any(candidate_key[c] == key for c in order[:k])
    return 100 * hits / len(queries)


def test_recall_equals_a_loop_with_ties_and_groups():
    rng = np.random.default_rng(0)
    queries = rng.integers(-1, 2, (40, 3)).astype(np.float32)
    candidates = rng.integers(-1, 2, (30, 3)).astype(np.float32)
    query_key, candidate_key = rng.integers(0, 25, 40), rng.integers(0, 25, 30)
    found = retrieval.recall(queries, candidates, query_key, candidate_key, (1, 5, 10, 50))
    for k in (1, 5, 10, 50):
        assert found[f"R@{k}"] == pytest.approx(oracle(queries, candidates, query_key, candidate_key, k), abs=1e-3)
    assert 0 < found["R@1"] < found["R@10"] < 100


def test_only_t_and_i_share_nothing():
    apart = [(q, c) for q, c in retrieval.DIRECTIONS if not retrieval.shares_modality(q, c)]
    assert apart == [("t", "i"), ("i", "t")] and len(retrieval.DIRECTIONS) == 9
