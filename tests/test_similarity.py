"""Chunked equals full, forward and backward, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import similarity


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def full_logsumexp(queries, candidates, mask, scale):
    logits = jnp.where(mask, queries @ candidates.T * scale, -jnp.inf)
    return jax.scipy.special.logsumexp(logits, axis=1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 17, 100])
def test_logsumexp_equals_full_in_values_and_gradients(chunk):
    queries, candidates = random((5, 6), 0), random((17, 6), 1)
    mask = np.random.default_rng(2).random((5, 17)) < 0.7
    mask[:, 3] = True

    def chunked(q, c, scale):
        keep = lambda columns: jnp.take(mask, columns, axis=1, mode="fill", fill_value=False)  # noqa: E731
        return similarity.masked_logsumexp(q, c, keep, scale, chunk)

    value, kept = chunked(queries, candidates, 20.0)
    np.testing.assert_allclose(value, full_logsumexp(queries, candidates, mask, 20.0), rtol=1e-6)
    np.testing.assert_array_equal(kept, mask.sum(1))

    weights = random(5, 3)
    ours = jax.grad(lambda *a: (chunked(*a)[0] * weights).sum(), argnums=(0, 1, 2))(queries, candidates, 20.0)
    full = jax.grad(lambda q, c, s: (full_logsumexp(q, c, mask, s) * weights).sum(), argnums=(0, 1, 2))
    for a, b in zip(ours, full(queries, candidates, 20.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_logsumexp_of_nothing_is_minus_infinity_with_zero_gradient():
    queries, candidates = random((2, 3), 0), random((5, 3), 1)
    nothing = lambda columns: jnp.zeros((2, columns.shape[0]), bool)  # noqa: E731
    value, kept = similarity.masked_logsumexp(queries, candidates, nothing, 1.0, 2)
    assert np.isneginf(value).all() and (kept == 0).all()

    def finite(q):
        value, kept = similarity.masked_logsumexp(q, candidates, nothing, 1.0, 2)
        return jnp.where(kept > 0, value, 0.0).sum()

    np.testing.assert_array_equal(jax.grad(finite)(queries), np.zeros((2, 3)))


def test_logsumexp_does_not_overflow():
    queries = np.array([[1000.0]], np.float32)
    candidates = np.array([[1.0], [2.0], [-3.0]], np.float32)
    everything = lambda columns: jnp.ones((1, columns.shape[0]), bool)  # noqa: E731
    value, _ = similarity.masked_logsumexp(queries, candidates, everything, 1.0, 1)
    np.testing.assert_allclose(value, [2000.0])


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_top_k_equals_a_stable_full_sort(chunk):
    # Whole numbers give many exact ties.
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (9, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (23, 4)).astype(np.float32)
    scores = queries @ candidates.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    values, indices = similarity.top_k(queries, candidates, 4, chunk)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=1))


def test_top_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="k=4 of 3 candidates"):
        similarity.top_k(random((2, 3), 0), random((3, 3), 1), 4)


def test_truncated_vectors_are_unit_and_their_gradient_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4, 6))
    vectors[2] = 0
    weight = rng.normal(size=(4, 3))

    def formula(x):
        short = x[:, :3]
        return (weight * short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)).sum()

    np.testing.assert_allclose(
        (weight * similarity.truncate(jnp.asarray(vectors, jnp.float32), 3)).sum(), formula(vectors), rtol=1e-5
    )
    gradient = jax.grad(lambda x: (weight * similarity.truncate(x, 3)).sum())(jnp.asarray(vectors, jnp.float32))
    for index in np.ndindex(vectors.shape):
        if index[0] != 2:
            change = np.zeros_like(vectors)
            change[index] = 1e-6
            slope = (formula(vectors + change) - formula(vectors - change)) / 2e-6
            assert gradient[index] == pytest.approx(slope, rel=1e-3, abs=1e-5)
    assert not gradient[2].any()  # an absent view
    assert similarity.truncate(vectors, 6) is vectors
