"""Parameters and computation have the configured dtypes; norms, softmax, router and pooling are always float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moon_jax.data import rows as rows_lib
from moon_jax.model.encoder import Encoder
from tests.conftest import random_params, tiny

FLOAT32 = ("exp", "log", "rsqrt", "top_k", "reduce_max", "sin", "cos")
"""The primitives of softmax, norms, router, pooling and rotary angles; activations use other primitives."""


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def build(tokenizer, dtype, param_dtype):
    config = tiny(training__dtype=dtype, training__param_dtype=param_dtype, training__remat="none")
    params = jax.tree.map(jnp.asarray, random_params(config, tokenizer))
    rng = np.random.default_rng(0)
    from PIL import Image

    from moon_jax.data.images import ResizeRule, patchify

    image = patchify(Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)), ResizeRule.of(config))
    parts = rows_lib.segments(rng.integers(5, 300, 7).astype(np.int32), (image,), tokenizer, 2)
    rows = rows_lib.pack([[parts]], rows_lib.Layout.of(config), tokenizer.pad)
    return lambda p: Encoder(config).apply({"params": p}, rows), params


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_norms_softmax_router_and_pooling_stay_float32(tokenizer, param_dtype):
    encode, params = build(tokenizer, "bfloat16", param_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    seen, matmuls = set(), set()
    for equation in equations(jax.make_jaxpr(encode)(params).jaxpr):
        if not equation.invars or not hasattr(equation.invars[0].aval, "dtype"):
            continue
        name, dtype = equation.primitive.name, equation.invars[0].aval.dtype
        if name in FLOAT32 and jnp.issubdtype(dtype, jnp.floating):
            assert dtype == jnp.float32, equation
            seen.add(name)
        if name == "dot_general":
            matmuls.add(str(dtype))
    assert {"exp", "rsqrt", "top_k", "reduce_max"} <= seen
    assert matmuls == {"bfloat16", "float32"}  # the layers; router, pooling and position interpolation
    output = jax.eval_shape(encode, params)
    assert {leaf.dtype for leaf in (output.embedding, output.gate, output.prob, output.z)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(tokenizer):
    exact, params = build(tokenizer, "float32", "float32")
    expected = np.asarray(jax.jit(exact)(params).embedding[0])
    for dtype, param_dtype in (("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")):
        encode, _ = build(tokenizer, dtype, param_dtype)
        found = jax.jit(encode)(jax.tree.map(lambda leaf, to=param_dtype: leaf.astype(to), params)).embedding[0]
        assert ((found * expected).sum(-1) > 0.99).all()
        assert np.abs(found - expected).max() > 1e-5  # another dtype was used
