"""The parts shared by the vision tower and the decoder: attention within segments, rotary embeddings, norms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moon_jax import backend, sharding
from moon_jax.types import Array

LANES = 128
"""Width of a TPU's vector registers. Block sizes of its kernels are multiples of it."""


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding in the half-split layout. x [R,S,H,d]; cos, sin f32[R,S,d/2]; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(query: Array, key: Array, value: Array, segment: Array, causal: bool) -> Array:
    """Softmax attention within segments; with `causal`, a token does not see later tokens.

    Uses the splash kernel (Pallas) on a TPU, cuDNN on an NVIDIA GPU in bfloat16, and `reference` elsewhere. The two
    kernels keep the logits on the chip.

    Args:
        query: [R,S,H,d].
        key, value: [R,S,H/g,d]; each serves g query heads (grouped-query attention).
        segment: i32[R,S]. Padding attends to padding; its output is never read.

    Returns:
        [R,S,H,d] in the dtype of `query`; softmax in float32.
    """
    platform = backend.platform()
    if platform == "tpu":
        return _on_mesh(functools.partial(splash, causal=causal), query, key, value, segment)
    if platform == "gpu" and query.dtype == jnp.bfloat16:
        return _on_mesh(functools.partial(cudnn, causal=causal), query, key, value, segment)
    return reference(query, key, value, segment, causal)


def _mask(segment: Array, causal: bool) -> Array:
    """Which query token attends to which key token. bool[R,S,S]."""
    mask = segment[:, :, None] == segment[:, None, :]
    return mask & jnp.tril(jnp.ones((segment.shape[1],) * 2, bool)) if causal else mask


def reference(query: Array, key: Array, value: Array, segment: Array, causal: bool) -> Array:
    """`attention` in plain JAX, with all logits in memory."""
    probabilities = weights(query, key, segment, causal).astype(value.dtype)
    return jnp.einsum("rghst,rtgd->rsghd", probabilities, value).reshape(query.shape)


def weights(query: Array, key: Array, segment: Array, causal: bool) -> Array:
    """The attention weights, by groups of heads: f32[R,g,H/g,S,S], rows of sum 1. Arguments as in `attention`."""
    rows, length, heads, width = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, length, groups, heads // groups, width) * width**-0.5
    logits = jnp.einsum("rsghd,rtgd->rghst", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(_mask(segment, causal)[:, None, None], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def _on_mesh(local: Callable[..., Array], query: Array, key: Array, value: Array, segment: Array) -> Array:
    """`local` on each device's rows and heads. The compiler cannot partition a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return local(query, key, value, segment)
    heads = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(sharding.ROWS, None, heads)
    specs = (spec, spec, spec, PartitionSpec(sharding.ROWS))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(query, key, value, segment)


def splash(query: Array, key: Array, value: Array, segment: Array, causal: bool, interpret: bool = False) -> Array:
    """`attention` with JAX's splash kernel for TPUs. Rows are padded to whole blocks of the kernel."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, length, heads, width = query.shape
    groups = key.shape[2]
    whole = -(-length // LANES) * LANES
    block = next(size for size in (512, 384, 256, LANES) if whole % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
    one = (kernels.CausalMask if causal else kernels.FullMask)((whole, whole))
    kernel = kernels.make_splash_mqa_single_device(
        kernels.MultiHeadMask([one] * (heads // groups)),
        block_sizes=sizes,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, whole - length)) + ((0, 0),) * (x.ndim - 2))

    def by_row(query: Array, key: Array, value: Array, segment: Array) -> Array:
        ids = kernels.SegmentIds(q=segment, kv=segment)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(query, key, value)

    query = padded(query * width**-0.5).reshape(-1, whole, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    key, value = (padded(x).transpose(0, 2, 1, 3) for x in (key, value))
    segment = jnp.pad(segment, ((0, 0), (0, whole - length)), constant_values=-2)  # an unused segment
    y = jax.vmap(by_row)(query, key, value, segment)  # [R,g,H/g,S,d]
    return y.transpose(0, 3, 1, 2, 4).reshape(-1, whole, heads, width)[:, :length]


def cudnn(query: Array, key: Array, value: Array, segment: Array, causal: bool) -> Array:
    """`attention` with cuDNN's kernel, in bfloat16. Its backward pass needs an even row length."""
    odd = query.shape[1] % 2
    query, key, value = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (query, key, value))
    mask = _mask(jnp.pad(segment, ((0, 0), (0, odd)), constant_values=-2), causal)[:, None]
    y = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    return checkpoint_name(y[:, : y.shape[1] - odd], KEPT)


KEPT = "kept"
"""The checkpoint name of results that selective rematerialization keeps for the backward pass."""


def rematerialized(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """`module` with rematerialization: its backward pass recomputes activations as `training.remat` says."""
    if remat == "none":
        return module
    policies = jax.checkpoint_policies
    selected = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
    )
    return nn.remat(module, prevent_cse=False, policy=selected if remat == "selective" else None)


def partitioned(names: tuple[str | None, ...], initializer: nn.initializers.Initializer):
    """An initializer that attaches the logical names of the axes to its parameter (sharding.py)."""
    return nn.with_logical_partitioning(initializer, names)


class Dense(nn.Module):
    """x @ kernel (+ bias), with logical axis names. [..., D] → [..., features]."""

    features: int
    names: tuple[str | None, str | None]
    bias: bool = False
    scale: float = 1.0  # of the initial kernel
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = partitioned(self.names, nn.initializers.variance_scaling(self.scale**2, "fan_in", "truncated_normal"))
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
