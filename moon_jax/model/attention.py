"""Attention within segments, rotary embeddings, and the norms: what the vision tower and the decoder share."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moon_jax.types import Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding in the half-split layout. x [R,S,H,d]; cos, sin f32[R,S,d/2]; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(query: Array, key: Array, value: Array, segment: Array, causal: bool) -> Array:
    """Softmax attention in which a token sees its own segment, and with `causal` nothing after itself.

    Args:
        query: [R,S,H,d].
        key, value: [R,S,H/g,d]; each serves g query heads (grouped-query attention).
        segment: i32[R,S]. Padding sees padding; nothing reads what it computes.

    Returns:
        [R,S,H,d] in the dtype of `query`; softmax in float32.
    """
    rows, length, heads, width = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, length, groups, heads // groups, width) * width**-0.5
    logits = jnp.einsum("rsghd,rtgd->rghst", query, key, preferred_element_type=jnp.float32)
    mask = segment[:, :, None] == segment[:, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones((length, length), bool))
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("rghst,rtgd->rsghd", weights, value).reshape(rows, length, heads, width)


def partitioned(names: tuple[str | None, ...], initializer: nn.initializers.Initializer):
    """An initializer whose parameter carries the logical names of its axes (sharding.py)."""
    return nn.with_logical_partitioning(initializer, names)


class Dense(nn.Module):
    """x @ kernel (+ bias), with logical axis names. [..., D] → [..., features]."""

    features: int
    names: tuple[str | None, str | None]
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = partitioned(self.names, nn.initializers.lecun_normal())
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.bias:
            init = partitioned(self.names[1:], nn.initializers.zeros)
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32."""

    epsilon: float
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(("norm",), nn.initializers.ones), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, in float32."""

    epsilon: float = 1e-6
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", partitioned(("norm",), nn.initializers.ones), (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", partitioned(("norm",), nn.initializers.zeros), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale + bias).astype(x.dtype)
