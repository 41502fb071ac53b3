"""Measures compared with loops over their definitions, and with trec_eval."""

import itertools
import math

import numpy as np
import pytest

from moon_jax.evaluation import metrics


def ranking(scores):
    """Candidates by descending score; ties go to the lower index."""
    return sorted(range(len(scores)), key=lambda c: (-scores[c], c))


def oracle(scores, grades):
    """One query's measures, by loops over all candidates."""
    order = ranking(scores)[: metrics.DEPTH]
    relevant = sum(grade > 0 for grade in grades)
    first, found, precision, dcg = 0.0, 0, 0.0, 0.0
    for rank, candidate in enumerate(order, start=1):
        if rank <= 10:
            dcg += grades[candidate] / math.log2(rank + 1)
        if grades[candidate] > 0:
            found += 1
            precision += found / rank
            first = first or 1 / rank
    ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades, reverse=True)[:10], start=1))
    values = {f"R@{k}": float(any(grades[c] > 0 for c in order[:k])) for k in metrics.RANKS}
    values |= {"MRR": first, "nDCG@10": dcg / ideal if ideal else 0.0, "mAP": precision / relevant if relevant else 0.0}
    return {name: 100 * value for name, value in values.items()}


def example(seed, queries=17, candidates=150):
    """Similarities with many ties, and grades 0 to 3; one query has no relevant candidate, one has many."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (queries, candidates)).astype(np.float64)
    grades = np.where(rng.random((queries, candidates)) < 0.05, rng.integers(1, 4, (queries, candidates)), 0)
    grades[0], grades[1, :120] = 0, 1
    return scores, grades.astype(np.float64)


def to_qrels(grades):
    pairs = {(q, c): grades[q, c] for q, c in zip(*np.nonzero(grades), strict=True)}
    return metrics.Qrels.of(pairs, *grades.shape)


def found_of(scores):
    return np.argsort(-scores, axis=1, kind="stable")[:, : metrics.DEPTH]


@pytest.mark.parametrize("seed", range(4))
def test_graded_measures_equal_a_loop(seed):
    scores, grades = example(seed)
    measures = metrics.by_query(found_of(scores), to_qrels(grades))
    for query in range(len(scores)):
        for name, value in oracle(scores[query], grades[query]).items():
            assert measures[name][query] == pytest.approx(value, abs=1e-9), (name, query)
    assert 0 < measures["nDCG@10"].mean() < 100 and measures["R@10"][0] == 0


@pytest.mark.parametrize("seed", range(2))
def test_keys_equal_qrels_of_grade_one(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (20, 130)).astype(np.float64)
    keys = metrics.Keys(rng.integers(0, 30, 20), rng.integers(0, 25, 130))
    grades = (keys.candidate == keys.query[:, None]).astype(np.float64)
    pairs, found = to_qrels(grades), found_of(scores)
    np.testing.assert_array_equal(keys.number, pairs.number)
    np.testing.assert_array_equal(keys.ideal(10), pairs.ideal(10))
    expected = metrics.by_query(found, pairs)
    for name, values in metrics.by_query(found, keys).items():
        np.testing.assert_array_equal(values, expected[name])


def test_fewer_candidates_than_ranks():
    scores, grades = np.array([[1.0, 2.0, 2.0]]), np.array([[2.0, 0.0, 1.0]])
    measures = metrics.by_query(found_of(scores), to_qrels(grades))
    for name, value in oracle(scores[0], grades[0]).items():
        assert measures[name][0] == pytest.approx(value), name
    assert measures["MRR"][0] == 50.0


def test_selected_queries_keep_their_grades():
    _, grades = example(3)
    chosen = np.array([5, 1, 9])
    part = to_qrels(grades).take(chosen)
    found = np.tile(np.arange(150), (3, 1))
    np.testing.assert_array_equal(part.gains(found), grades[chosen])
    mask = np.isin(np.arange(17), chosen)
    np.testing.assert_array_equal(to_qrels(grades).take(mask).gains(found), grades[mask])
    keys = metrics.Keys(np.array([4, 5, 6]), np.array([6, 5])).take(np.array([False, True, True]))
    np.testing.assert_array_equal(keys.query, [5, 6])


def run_of(scores):
    """The ranking as scores for trec_eval, which sorts by similarity and breaks ties its own way; so without ties."""
    order = found_of(scores)
    return {
        f"q{q}": {f"c{c}": float(len(order[q]) - rank) for rank, c in enumerate(order[q])} for q in range(len(scores))
    }


def trec_qrels(grades):
    return {f"q{q}": {f"c{c}": int(grades[q, c]) for c in range(grades.shape[1])} for q in range(len(grades))}


def test_measures_equal_trec_eval():
    trec = pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    scores, grades = example(7)
    evaluator = trec.RelevanceEvaluator(trec_qrels(grades), {"map", "recip_rank", "ndcg_cut_10", "success"})
    theirs = evaluator.evaluate(run_of(scores))
    ours = metrics.by_query(found_of(scores), to_qrels(grades))
    names = {"mAP": "map", "MRR": "recip_rank", "nDCG@10": "ndcg_cut_10"} | {
        f"R@{k}": f"success_{k}" for k in (1, 5, 10)
    }
    for name, other in names.items():
        expected = [100 * theirs[f"q{q}"][other] for q in range(len(scores))]
        np.testing.assert_allclose(ours[name], expected, atol=1e-4, err_msg=name)


def test_chance_is_the_mean_over_all_orders():
    number = np.array([1, 2, 2, 5, 0])
    tops = list(itertools.combinations(range(9), 4))
    share = np.mean([[min(top) < hits for hits in number] for top in tops])
    assert metrics.chance(number, np.full(len(number), 9), 4) == pytest.approx(100 * share)
    assert metrics.chance(number[:4], np.full(4, 9), 50) == 100.0
    # One of 20, and two of 11, in ten places.
    expected = 100 * np.mean([10 / 20, 1 - (1 / 11) * (0 / 10)])
    assert metrics.chance(np.array([1, 2]), np.array([20, 11]), 10) == pytest.approx(expected)


def test_bootstrap_intervals_of_many_independent_values_are_the_normal_ones():
    values = np.random.default_rng(1).normal(50, 10, 400)
    (low, high) = metrics.intervals({"x": values})["x"]
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=0.15)
    assert high == pytest.approx(values.mean() + spread, abs=0.15)
    assert metrics.intervals({"x": values}) == metrics.intervals({"x": values})


def test_a_paired_difference_can_be_significant_though_unpaired_intervals_overlap():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 300)
    ours, theirs = hard + rng.normal(1, 2, 300), hard
    found = metrics.compared({"x": ours, "y": hard}, {"x": theirs, "y": hard})
    assert found["x"]["difference"] == pytest.approx((ours - theirs).mean()) and found["x"]["significant"]
    assert metrics.intervals({"x": theirs})["x"][1] > metrics.intervals({"x": ours})["x"][0]
    assert found["y"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "significant": False}
    # With few queries all resamples may be equal, which says nothing.
    for number in (1, metrics.FEWEST - 1, metrics.FEWEST):
        few = metrics.compared({"x": np.ones(number)}, {"x": np.zeros(number)})["x"]
        assert few["significant"] == (number == metrics.FEWEST)
