"""Qwen3-VL's decoder: grouped-query attention with QK-norm and interleaved M-RoPE, SwiGLU, and the paper's
modality-driven mixture of experts in the feed-forward of configured layers.

Layers form equal periods (`config.period`) with experts at the same positions; periods are stacked and scanned.
Weights and layout are those of `qwen3_vl` and `qwen3_vl_moe` checkpoints.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.model import experts as experts_lib
from moon_jax.model import router as router_lib
from moon_jax.model.attention import Dense, RMSNorm, attention, partitioned, rematerialized, rotate
from moon_jax.types import Array


def branch_scale(layers: int) -> float:
    """The scale of the initial kernels that write to the residual stream, for a decoder of that many layers.

    All 2 L branches together start with a variance of 1/2, that of the token embedding being 1.
    """
    return (4 * layers) ** -0.5


def rotary_angles(position: Array, config: config_lib.Language) -> Array:
    """Angles of interleaved M-RoPE: frequencies alternate between time, row and column, up to `rope_sections`.

    Args:
        position: i32[R,S,3].

    Returns:
        f32[R,S,head_dim/2].
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # Frequency f belongs to axis f mod 3 within that axis's section, and to time beyond it.
    axis = [f % 3 if f % 3 and f < 3 * config.rope_sections[f % 3] else 0 for f in range(half)]
    return position[..., jnp.array(axis)].astype(jnp.float32) * frequencies


@struct.dataclass
class RouterSums:
    """The router quantities of one layer, summed over tokens (types.EncoderOutput)."""

    gate: Array  # f32[R,G,E]
    load: Array  # f32[E]
    prob: Array  # f32[E]
    z: Array  # f32[]
    dropped: Array  # i32[]


class Attention(nn.Module):
    """Causal grouped-query attention within segments. [R,S,D] → [R,S,D]."""

    config: config_lib.Language
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, segment: Array, cos: Array, sin: Array) -> Array:
        c = self.config

        def project(name: str, heads: int) -> Array:
            dense = Dense(
                heads * c.head_dim, ("embed", "heads"), dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )
            return dense(x).reshape(*x.shape[:2], heads, c.head_dim)

        q = RMSNorm(c.norm_eps, self.param_dtype, name="q_norm")(project("q_proj", c.heads))
        k = RMSNorm(c.norm_eps, self.param_dtype, name="k_norm")(project("k_proj", c.kv_heads))
        v = project("v_proj", c.kv_heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # For evaluation/heatmap.py; nothing is stored unless intermediates are requested.
        self.sow("intermediates", "query_key", (q, k))
        y = attention(q, k, v, segment, causal=True)
        y = y.reshape(*x.shape[:2], c.heads * c.head_dim)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(c.width, ("heads", "embed"), scale=branch_scale(c.layers), name="o_proj", **dtypes)(y)


class FeedForward(nn.Module):
    """Dense SwiGLU. [R,S,D] → [R,S,D]."""

    config: config_lib.Language
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Dense(c.mlp_width, ("embed", "mlp"), name="gate_proj", **dtypes)(x)
        up = Dense(c.mlp_width, ("embed", "mlp"), name="up_proj", **dtypes)(x)
        down = Dense(c.width, ("mlp", "embed"), scale=branch_scale(c.layers), name="down_proj", **dtypes)
        return down(nn.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """The modality-driven mixture of experts. [R,S,D] → [R,S,D] and the router's sums.

    `pool` f32[R,G,S] marks the tokens of each span. `kind` i32[R,S] is the kind of each token for the router's term
    (from 1), or 0 for padding. Experts may drop tokens only in `training`.
    """

    config: config_lib.Experts
    layers: int  # of the decoder
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    training: bool

    @nn.compact
    def __call__(self, x: Array, pool: Array, kind: Array) -> tuple[Array, RouterSums]:
        c, width = self.config, x.shape[-1]
        init = partitioned(("embed", None), nn.initializers.normal(c.router_init))
        router = self.param("router", init, (width, c.count), self.param_dtype)
        variance = branch_scale(self.layers) ** 2
        kernel = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal", batch_axis=(0,))
        shape, pair = (c.count, 2, width, c.width), nn.initializers.lecun_normal(batch_axis=(0, 1))
        names = ("experts", None, "embed", "mlp")
        gate_up = self.param("gate_up", partitioned(names, pair), shape, self.param_dtype)
        shape = (c.count, c.width, width)
        down = self.param("down", partitioned(("experts", "mlp", "embed"), kernel), shape, self.param_dtype)

        tokens, kind = x.reshape(-1, width), kind.reshape(-1)
        term = None
        if c.router_term in ("learned", "token"):
            own = c.term_init * router_lib.own_experts(router_lib.TERMS[c.router_term], c.count, c.per_token)
            init = partitioned((None, None), lambda key, shape, dtype: jnp.asarray(own, dtype))
            term = self.param("router_term", init, own.shape, self.param_dtype)
        elif c.router_term != "none":
            term = jnp.asarray(router_lib.hard_term(router_lib.TERMS[c.router_term], c.count, c.per_token))
        if term is not None:
            term = term.astype(jnp.float32)[jnp.maximum(kind, 1) - 1]
        valid = kind > 0
        routing = router_lib.route(tokens, router, c.per_token, term)

        exchanged = c.dispatch == "expert_parallel"
        shards = sharding.shards() if exchanged else 1
        capacity = experts_lib.capacity_of(
            tokens.shape[0] // shards, c.per_token, c.count, c.capacity if exchanged and self.training else 0.0
        )
        keep = router_lib.keep_strongest(routing, valid, capacity, shards)
        # Without a capacity, expert_parallel's buffers would be E/K times too large; `grouped` gives the same result.
        strategy = "grouped" if exchanged and not self.training else c.dispatch
        y = tokens
        if not self.is_initializing():  # initialization needs shapes only, and its rows may not divide over the mesh
            matrices = gate_up.astype(self.dtype), down.astype(self.dtype)
            y = experts_lib.STRATEGIES[strategy](tokens, routing.gate, routing.index, keep, *matrices, capacity)
        counted = valid[:, None].astype(jnp.float32)
        sums = RouterSums(
            gate=jnp.einsum(
                "rgs,rse->rge",
                pool,
                routing.gate.reshape(*x.shape[:2], c.count),
                precision=jax.lax.Precision.HIGHEST,
            ),
            load=((jax.lax.stop_gradient(routing.gate) > 0) * counted).sum(0),
            prob=(routing.prob * counted).sum(0),
            z=(jnp.square(routing.logsumexp) * counted[:, 0]).sum(),
            dropped=c.per_token * valid.sum(dtype=jnp.int32) - keep.sum(dtype=jnp.int32),
        )
        return y.reshape(x.shape), sums


class Layer(nn.Module):
    """One pre-norm decoder layer. Returns its output, and the router's sums or None."""

    config: config_lib.Config
    sparse: bool
    training: bool

    @nn.compact
    def __call__(
        self, x: Array, segment: Array, cos: Array, sin: Array, pool: Array, kind: Array
    ) -> tuple[Array, RouterSums | None]:
        c = self.config.language
        x = sharding.by_rows(x)
        dtypes = {
            "dtype": jnp.dtype(self.config.training.dtype),
            "param_dtype": jnp.dtype(self.config.training.param_dtype),
        }
        norm = RMSNorm(c.norm_eps, dtypes["param_dtype"], name="input_norm")
        x = x + Attention(c, name="attention", **dtypes)(norm(x), segment, cos, sin)
        h = RMSNorm(c.norm_eps, dtypes["param_dtype"], name="post_attention_norm")(x)
        if self.sparse:
            moe = MixtureOfExperts(self.config.experts, c.layers, training=self.training, name="experts", **dtypes)
            y, sums = moe(h, pool, kind)
            return x + y, sums
        return x + FeedForward(c, name="mlp", **dtypes)(h), None


class Period(nn.Module):
    """A period of layers, the unit of the scan. Adds the DeepStack features to the first layers."""

    config: config_lib.Config
    training: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Array,
        segment: Array,
        cos: Array,
        sin: Array,
        pool: Array,
        kind: Array,
        visual: Array,
        deepstack: Array,
    ) -> tuple[Array, RouterSums | None]:
        c = self.config
        layer = rematerialized(Layer, c.training.remat if self.training else "none")
        period, found = config_lib.period(c), []
        for position, sparse in enumerate(config_lib.sparse_layers(c)[:period]):
            x, sums = layer(c, sparse, self.training, name=f"layer_{position}")(x, segment, cos, sin, pool, kind)
            found += [sums] if sparse else []
            if deepstack.shape[0]:
                number = index * period + position
                x = jax.lax.cond(number < deepstack.shape[0], _add_deepstack, _keep, x, number, visual, deepstack)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *found) if found else None


def _add_deepstack(x: Array, number: Array, visual: Array, deepstack: Array) -> Array:
    features = jax.lax.dynamic_index_in_dim(deepstack, number, keepdims=False)
    return x + place_visual(features, visual)


def _keep(x: Array, number: Array, visual: Array, deepstack: Array) -> Array:
    del number, visual, deepstack
    return x


def place_visual(features: Array, visual: Array) -> Array:
    """Visual tokens at their positions in the row, zero elsewhere. [R,V,D], i32[R,S] → [R,S,D]."""
    placed = jnp.take_along_axis(features, jnp.maximum(visual, 0)[..., None], axis=1)
    return jnp.where(visual[..., None] >= 0, placed, 0)


class Decoder(nn.Module):
    """Token embeddings [R,S,D] → last hidden states [R,S,D], and the router's sums stacked over layers or None."""

    config: config_lib.Config
    training: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        segment: Array,
        position: Array,
        pool: Array,
        kind: Array,
        visual: Array,
        deepstack: Array,
    ) -> tuple[Array, RouterSums | None]:
        c = self.config
        angles = rotary_angles(position, c.language)
        periods = c.language.layers // config_lib.period(c)
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0,) + (nn.broadcast,) * 7,
            length=periods,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.training, name="periods")
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x, sums = scanned(x, jnp.arange(periods), segment, cos, sin, pool, kind, visual, deepstack)
        # [periods, layers with experts in one, …] → [L, …]
        sums = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sums)
        return RMSNorm(c.language.norm_eps, jnp.dtype(c.training.param_dtype), name="norm")(x), sums
