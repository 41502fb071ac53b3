"""Qwen3-VL's vision tower: patches → merged visual tokens, and the DeepStack features of selected layers.

2-D rotary embedding, learned positions interpolated to each image's grid, 2×2 merger (arXiv 2511.21631). The grid is
data and the number of patches is static, so one compilation handles all aspect ratios.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.model.attention import Dense, LayerNorm, attention, partitioned, rematerialized, rotate
from moon_jax.types import Array, Rows


def rotary_angles(patch_yx: Array, head_dim: int) -> Array:
    """Angles of the 2-D rotary embedding, rows then columns. i32[R,P,2] → f32[R,P,head_dim/2]."""
    frequencies = 10000.0 ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    angles = patch_yx[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*patch_yx.shape[:2], head_dim // 2)


def interpolated_positions(table: Array, patch_yx: Array, grid: Array) -> Array:
    """Learned positions from a square table, interpolated bilinearly (corners aligned).

    Args:
        table: [side²,D].
        patch_yx: i32[R,P,2].
        grid: i32[R,P,2], the grid size of the patch's image.

    Returns:
        f32[R,P,D].
    """
    side = round(table.shape[0] ** 0.5)
    position = patch_yx * (side - 1) / jnp.maximum(grid - 1, 1)
    low = jnp.floor(position).astype(jnp.int32)
    high = jnp.minimum(low + 1, side - 1)
    part = position - low
    taps, weights = [], []
    for y, wy in ((low[..., 0], 1 - part[..., 0]), (high[..., 0], part[..., 0])):
        for x, wx in ((low[..., 1], 1 - part[..., 1]), (high[..., 1], part[..., 1])):
            taps.append(y * side + x)
            weights.append(wy * wx)
    corners = sharding.lookup(table, jnp.stack(taps, -1)).astype(jnp.float32)
    return sharding.by_rows(jnp.einsum("rpk,rpkd->rpd", jnp.stack(weights, -1), corners))


class Block(nn.Module):
    """One pre-norm transformer layer over patches. [R,P,D] → [R,P,D]."""

    config: config_lib.Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, segment: Array, cos: Array, sin: Array) -> Array:
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = sharding.by_rows(x)
        h = LayerNorm(param_dtype=self.param_dtype, name="norm1")(x)
        # One kernel for [query | key | value], as in Qwen's checkpoints.
        qkv = Dense(3 * c.width, ("embed", "heads"), bias=True, name="qkv", **dtypes)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, c.heads, -1), 2, 0)
        h = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, segment, causal=False)
        x = x + Dense(c.width, ("heads", "embed"), bias=True, name="proj", **dtypes)(h.reshape(x.shape))
        h = LayerNorm(param_dtype=self.param_dtype, name="norm2")(x)
        h = nn.gelu(Dense(c.mlp_width, ("embed", "mlp"), bias=True, name="fc1", **dtypes)(h), approximate=True)
        return x + Dense(c.width, ("mlp", "embed"), bias=True, name="fc2", **dtypes)(h)


class Merger(nn.Module):
    """merge² neighbouring patches → one visual token of the decoder's width. [R,P,Dv] → [R,V,D]."""

    features: int
    merge: int
    norm_after: bool  # DeepStack's mergers normalise the concatenation, the main one each patch
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = sharding.by_rows(x)
        rows, patches, width = x.shape
        joined = (rows, patches // self.merge**2, width * self.merge**2)
        norm = LayerNorm(param_dtype=self.param_dtype, name="norm")
        x = norm(x.reshape(joined)) if self.norm_after else norm(x).reshape(joined)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.gelu(Dense(joined[-1], ("embed", "mlp"), bias=True, name="fc1", **dtypes)(x), approximate=False)
        return Dense(self.features, ("mlp", "embed"), bias=True, name="fc2", **dtypes)(x)


class _Layer(nn.Module):
    """A Block inside the scan over layers. Stores the outputs that DeepStack taps."""

    config: config_lib.Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], index: Array, segment: Array, cos: Array, sin: Array):
        x, taps = carry
        block = rematerialized(Block, self.remat)
        x = block(self.config, self.dtype, self.param_dtype, name="block")(x, segment, cos, sin)
        # A buffer for the tapped outputs only: the scan's own outputs would hold those of every layer.
        for slot, layer in enumerate(self.config.deepstack):
            taps = taps.at[slot].set(jnp.where(index == layer, x, taps[slot]))
        return (x, taps), None


class VisionTower(nn.Module):
    """uint8 patches → merged visual tokens [R,V,D] and DeepStack features [len(deepstack),R,V,D]."""

    config: config_lib.Vision
    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, rows: Rows) -> tuple[Array, Array]:
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Qwen's preprocessing on the device: x/255, with mean and standard deviation 0.5.
        pixels = (rows.patches.astype(jnp.float32) / 127.5 - 1.0).astype(self.dtype)
        init = partitioned((None, None, "embed"), nn.initializers.variance_scaling(1.0, "fan_in", "normal", (0, 1)))
        kernel = self.param("patch_kernel", init, (config_lib.FRAMES, pixels.shape[-1], c.width), self.param_dtype)
        bias = self.param("patch_bias", partitioned(("embed",), nn.initializers.zeros), (c.width,), self.param_dtype)
        # A still image is the same in all frames, so it is multiplied with the sum of the kernel over frames.
        x = pixels @ kernel.sum(0).astype(self.dtype) + bias.astype(self.dtype)

        grid = jnp.take_along_axis(rows.image_hw, jnp.maximum(rows.patch_image, 0)[..., None], axis=1)
        init = partitioned((None, "embed"), nn.initializers.normal(0.02))
        table = self.param("positions", init, (c.positions, c.width), self.param_dtype)
        x = x + interpolated_positions(table, rows.patch_yx, grid).astype(self.dtype)
        angles = rotary_angles(rows.patch_yx, c.width // c.heads)

        scanned = nn.scan(
            _Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, remat=self.remat, name="layers", **dtypes)
        taps = jnp.zeros((len(c.deepstack), *x.shape), x.dtype)
        (x, taps), _ = scanned((x, taps), jnp.arange(c.depth), rows.patch_image, jnp.cos(angles), jnp.sin(angles))

        merged = Merger(self.features, c.merge, norm_after=False, name="merger", **dtypes)(x)
        if not c.deepstack:
            return merged, jnp.zeros((0, *merged.shape), merged.dtype)
        features = [
            Merger(self.features, c.merge, norm_after=True, name=f"deepstack_{slot}", **dtypes)(taps[slot])
            for slot in range(len(c.deepstack))
        ]
        return merged, jnp.stack(features)
