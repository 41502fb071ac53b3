"""Nearest neighbours and linear probe, compared with their definitions."""

import numpy as np
import pytest

from moon_jax.evaluation import probe


def example(seed, labels=4, width=6):
    """Noisy vectors around one direction per label; some are closer to another label."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, labels, 150)
    vectors = np.eye(width)[truth] + 0.5 * rng.normal(size=(150, width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors[:100], truth[:100], vectors[100:], truth[100:]


def test_neighbours_vote_with_weights_by_similarity():
    known, truth, vectors, _ = example(0)
    expected = []
    for vector in vectors:
        scores = sorted(
            ((float(vector @ other), label) for other, label in zip(known, truth, strict=True)), reverse=True
        )
        votes = [sum(np.exp(s / 0.07) for s, label in scores[:20] if label == wanted) for wanted in range(4)]
        expected.append(int(np.argmax(votes)))
    np.testing.assert_array_equal(probe.nearest(known, truth, vectors), expected)


def test_fewer_known_vectors_than_neighbours():
    known = np.eye(3, dtype=np.float32)
    assert probe.nearest(known, np.array([5, 1, 2]), known[::-1]).tolist() == [2, 1, 5]


@pytest.mark.parametrize("seed", range(2))
def test_the_linear_probe_equals_scikit_learn_s_logistic_regression(seed):
    """scikit-learn's C is the inverse of the weight decay relative to the summed loss."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    known, truth, vectors, real = example(seed)
    mean, spread = known.mean(0), known.std(0)
    theirs = linear_model.LogisticRegression(C=1 / (probe.DECAY * len(known)), tol=1e-8, max_iter=5000)
    theirs.fit((known - mean) / spread, truth)
    found = probe.linear(known, truth, vectors)
    np.testing.assert_array_equal(found, theirs.predict((vectors - mean) / spread))
    assert (found == real).mean() > 0.6


def test_only_known_labels_are_predicted():
    known, truth, vectors, _ = example(1)
    assert set(probe.linear(known, truth + 3, vectors).tolist()) <= {3, 4, 5, 6}
