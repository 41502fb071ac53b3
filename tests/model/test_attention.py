"""The attention kernels against the reference, and the reference against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax import backend, sharding
from moon_jax import config as config_lib
from moon_jax.model import attention as attention_lib

SHAPES = {
    "grouped queries, causal": (2, 150, 4, 2, 64, True),  # R, S, heads, key heads, d, causal
    "as many key heads": (2, 200, 4, 4, 32, False),
    "whole blocks, one key head": (1, 128, 4, 1, 128, True),
}


def draw(rows, length, heads, groups, width, causal):
    """Query, key, value, contiguous segments followed by padding, and a cotangent."""
    rng = np.random.default_rng(0)
    query, cotangent = rng.normal(size=(2, rows, length, heads, width)).astype(np.float32)
    key, value = rng.normal(size=(2, rows, length, groups, width)).astype(np.float32)
    segment = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segment[:, -length // 8 :] = 0 if causal else -1
    return query, key, value, segment, cotangent


def in_numpy(query, key, value, segment, causal):
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = np.einsum("rshd,rthd->rhst", query, key) / query.shape[-1] ** 0.5
    sees = segment[:, :, None] == segment[:, None, :]
    if causal:
        sees &= np.tri(segment.shape[1], dtype=bool)
    weights = np.where(sees[:, None], np.exp(logits), 0)
    return np.einsum("rhst,rthd->rshd", weights / weights.sum(-1, keepdims=True), value)


def value_and_gradients(function, query, key, value, segment, cotangent, causal):
    y, pull = jax.vjp(lambda q, k, v: function(q, k, v, segment, causal=causal), query, key, value)
    return y, *pull(cotangent)


@pytest.mark.parametrize("case", SHAPES)
def test_the_reference_equals_numpy(case):
    query, key, value, segment, _ = draw(*SHAPES[case])
    found = attention_lib.reference(query, key, value, segment, SHAPES[case][-1])
    np.testing.assert_allclose(found, in_numpy(query, key, value, segment, SHAPES[case][-1]), atol=2e-6)


def same(function, case, tolerance, dtype=np.float32):
    *arrays, cotangent = draw(*SHAPES[case])
    arrays = [jnp.asarray(array, dtype) if array.dtype == np.float32 else array for array in arrays]
    causal = SHAPES[case][-1]
    found = value_and_gradients(function, *arrays, jnp.asarray(cotangent, dtype), causal)
    wide = [np.asarray(array, np.float32) if array.dtype == dtype else array for array in arrays]
    expected = value_and_gradients(attention_lib.reference, *wide, cotangent, causal)
    for name, mine, theirs in zip(("y", "query", "key", "value"), found, expected, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(np.asarray(mine, np.float32) / scale, theirs / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", SHAPES)
def test_splash_equals_the_reference(case):
    """Values and gradients, in Pallas's interpreter."""
    same(functools.partial(attention_lib.splash, interpret=True), case, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES)
def test_cudnn_equals_the_reference(case):
    same(attention_lib.cudnn, case, 2e-2, jnp.bfloat16)


@pytest.mark.parametrize("heads", [2, 1], ids=["heads divided", "heads too few to divide"])
def test_a_kernel_gives_the_same_on_a_mesh(heads, monkeypatch):
    """Each device runs it on its rows and heads. The reference takes the place of the kernel here."""
    monkeypatch.setattr(backend, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_lib, "splash", attention_lib.reference)
    *arrays, cotangent = draw(4, 24, 4, heads, 8, True)
    expected = value_and_gradients(attention_lib.reference, *arrays, cotangent, True)
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, sharding.rows(mesh)) for array in (*arrays, cotangent)]
        function = functools.partial(value_and_gradients, attention_lib.attention, causal=True)
        found = jax.jit(function)(*placed)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
