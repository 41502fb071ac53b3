"""Chunked computations equal full ones, forward and backward, with ties."""

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
def test_logsumexp_equals_the_full_one_in_values_and_gradients(chunk):
    queries, candidates = random((5, 6), 0), random((17, 6), 1)
    mask = np.random.default_rng(2).random((5, 17)) < 0.7
    mask[:, 3] = True

    def chunked(q, c, scale):
        def keep(columns, similar):
            kept = jnp.take(mask, columns, axis=1, mode="fill", fill_value=False)
            return kept, ~kept & (similar > 0.5)

        return similarity.masked_logsumexp(q, c, keep, scale, chunk)

    value, kept, counted = chunked(queries, candidates, 20.0)
    np.testing.assert_array_equal(counted, (~mask & (queries @ candidates.T > 0.5)).sum(1))
    np.testing.assert_allclose(value, full_logsumexp(queries, candidates, mask, 20.0), rtol=1e-6)
    np.testing.assert_array_equal(kept, mask.sum(1))

    weights = random(5, 3)
    ours = jax.grad(lambda *a: (chunked(*a)[0] * weights).sum(), argnums=(0, 1, 2))(queries, candidates, 20.0)
    full = jax.grad(lambda q, c, s: (full_logsumexp(q, c, mask, s) * weights).sum(), argnums=(0, 1, 2))
    for a, b in zip(ours, full(queries, candidates, 20.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_logsumexp_of_nothing_is_minus_infinity_with_zero_gradient():
    queries, candidates = random((2, 3), 0), random((5, 3), 1)
    nothing = lambda columns, similar: (similar > jnp.inf,) * 2  # noqa: E731
    value, kept, _ = similarity.masked_logsumexp(queries, candidates, nothing, 1.0, 2)
    assert np.isneginf(value).all() and (kept == 0).all()

    def finite(q):
        value, kept, _ = similarity.masked_logsumexp(q, candidates, nothing, 1.0, 2)
        return jnp.where(kept > 0, value, 0.0).sum()

    np.testing.assert_array_equal(jax.grad(finite)(queries), np.zeros((2, 3)))


def test_logsumexp_does_not_overflow():
    queries = np.array([[1000.0]], np.float32)
    candidates = np.array([[1.0], [2.0], [-3.0]], np.float32)
    everything = lambda columns, similar: (similar < jnp.inf,) * 2  # noqa: E731
    value, _, _ = similarity.masked_logsumexp(queries, candidates, everything, 1.0, 1)
    np.testing.assert_allclose(value, [2000.0])


@pytest.fixture
def small(monkeypatch):
    """Small sizes, so that few vectors make several chunks, groups and query batches."""
    for name, value in {"QUERIES": 16, "CHUNK": 128, "GROUP": 8, "CHUNKS": 2}.items():
        monkeypatch.setattr(similarity, name, value)


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize(("count", "k"), [(23, 4), (23, 23), (129, 16), (1000, 1), (1000, 100), (5000, 200)])
def test_top_k_equals_a_stable_full_sort(small, count, k, devices):
    # Whole numbers give many exact ties.
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (37, 4)).astype(np.float32)
    candidates = rng.integers(-2, 3, (count, 4)).astype(np.float32)
    scores = queries @ candidates.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values, indices = similarity.top_k(queries, candidates, k, jax.devices()[:devices])
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=1))


def test_top_k_gives_the_same_bits_for_any_number_of_devices_queries_and_candidates(small):
    queries, candidates = random((40, 64), 0), random((3000, 64), 1)
    queries, candidates = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates))
    values, indices = similarity.top_k(queries, candidates, 10, jax.devices()[:1])
    exact = np.argsort(-(queries.astype(np.float64) @ candidates.astype(np.float64).T), axis=1, kind="stable")
    np.testing.assert_array_equal(indices, exact[:, :10])
    for devices in (2, 8):
        for a, b in zip(
            similarity.top_k(queries, candidates, 10, jax.devices()[:devices]), (values, indices), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    for number in range(3):  # a query alone
        one = similarity.top_k(queries[number : number + 1], candidates, 10, jax.devices()[:1])
        np.testing.assert_array_equal(one[0][0], values[number])
    few = similarity.top_k(queries, candidates[:700], 10)
    there = values[:, 0][indices[:, 0] < 700]
    np.testing.assert_array_equal(few[0][indices[:, 0] < 700, 0], there)


def test_resident_candidates_give_the_same_results(small):
    queries, candidates = random((9, 5), 0), random((3000, 5), 1)
    resident = similarity.Resident(candidates, jax.devices()[:3])
    assert len(resident) == 3000
    for k in (1, 10, 300):  # 300 is more than a chunk holds
        if k > 128:
            with pytest.raises(ValueError, match="k=300 of candidates in chunks of 128"):
                similarity.top_k(queries, resident, k)
            continue
        for a, b in zip(similarity.top_k(queries, resident, k), similarity.top_k(queries, candidates, k), strict=True):
            np.testing.assert_array_equal(a, b)


def test_top_k_works_while_another_mesh_is_set(small):
    """As in the evaluations of a training run, on one device and on many."""
    queries, candidates = random((3, 8), 0), random((300, 8), 1)
    expected = similarity.top_k(queries, candidates, 5)
    for shape in ((1, 1), (4, 2)):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        with jax.set_mesh(jax.sharding.Mesh(devices, ("data", "fsdp"))):
            np.testing.assert_array_equal(similarity.top_k(queries, candidates, 5), expected, strict=True)


def test_top_k_of_negative_similarities_finds_no_padding(small):
    """Padding has similarity 0, which would be the highest."""
    queries, candidates = np.ones((3, 4), np.float32), -np.abs(random((131, 4), 0))
    _, indices = similarity.top_k(queries, candidates, 131)
    assert all(sorted(row) == list(range(131)) for row in indices.tolist())


def test_top_k_reads_only_slices(small):
    """Memory is constant: candidates may be on disk, in another dtype."""

    class OnDisk:
        def __init__(self, array):
            self.array, self.sizes = array, []

        def __len__(self):
            return len(self.array)

        def __getitem__(self, part):
            self.sizes.append(part.stop - part.start)
            return self.array[part]

    whole = np.random.default_rng(1).integers(-100, 100, (5000, 6)).astype(np.int8)
    disk, queries = OnDisk(whole), random((3, 6), 0)
    found = similarity.top_k(queries, disk, 5, jax.devices()[:2])
    assert max(disk.sizes) == 2 * 2 * 128 and len(disk.sizes) == 10
    np.testing.assert_array_equal(found[1], similarity.top_k(queries, whole.astype(np.float32), 5)[1])


def test_top_k_compiles_once_for_any_number_of_candidates(small):
    from moon_jax import backend

    queries, candidates = random((16, 5), 0), random((9000, 5), 1)
    similarity.top_k(queries, candidates[:1024], 7, jax.devices()[:1])
    before = backend.COMPILATIONS["search"]
    for count in (1025, 4000, 9000):
        similarity.top_k(queries[:9], candidates[:count], 7, jax.devices()[:1])
    assert backend.COMPILATIONS["search"] == before


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_refuses_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k={k} of 3 candidates"):
        similarity.top_k(random((2, 3), 0), random((3, 3), 1), k)


def test_top_k_of_no_queries_is_nothing():
    values, indices = similarity.top_k(np.zeros((0, 3), np.float32), random((5, 3), 0), 2)
    assert values.shape == indices.shape == (0, 2)


def test_truncated_vectors_have_unit_length_and_the_gradient_of_the_formula():
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
