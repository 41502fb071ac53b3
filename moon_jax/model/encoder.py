"""The network: rows in, one unit vector per view out.

Visual tokens are inserted at the positions that the row gives, and the decoder runs over the row. A view's embedding
is the mean of the last hidden states over its span (or, as in Qwen3-VL-Embedding, the state of the span's last token),
scaled to unit length.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from moon_jax import config as config_lib
from moon_jax import sharding
from moon_jax.model.attention import partitioned
from moon_jax.model.language import Decoder, place_visual
from moon_jax.model.vision import VisionTower
from moon_jax.types import Array, EncoderOutput, Rows


def span_mask(rows: Rows) -> Array:
    """1 for the tokens of each span; all 0 for an absent view. f32[R,G,S]."""
    position = jnp.arange(rows.tokens.shape[1])
    inside = (position >= rows.span[..., :1]) & (position < rows.span[..., 1:])
    return (inside & (rows.view > 0)[..., None]).astype(jnp.float32)


def last_token_mask(rows: Rows) -> Array:
    """1 for the last token of each span; all 0 for an absent view. f32[R,G,S]."""
    last = jnp.arange(rows.tokens.shape[1]) == rows.span[..., 1:] - 1
    return (last & (rows.view > 0)[..., None]).astype(jnp.float32)


def pool_mean(hidden: Array, mask: Array) -> Array:
    """Unit vector along the mean of each span's tokens, zero for an empty span; float32.

    Args:
        hidden: [R,S,D].
        mask: f32[R,G,S].

    Returns:
        f32[R,G,D].
    """
    total = jnp.einsum("rgs,rsd->rgd", mask, hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    # Normalising the sum makes the division by the count unnecessary. Only an empty span is below the floor.
    square = jnp.sum(total * total, axis=-1, keepdims=True)
    return total * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def composition(rows: Rows) -> Array:
    """The view that each token's segment forms, 1 to 3 as in `Rows.view`; 0 for padding. i32[R,S].

    A segment [images then text] holds two views; its tokens get the one that spans all of it.
    """
    return (span_mask(rows) * rows.view[..., None]).max(axis=1).astype(jnp.int32)


def modality_mask(rows: Rows) -> Array:
    """1 for the text tokens, and 1 for the visual tokens of a row; 0 for padding. f32[R,2,S]."""
    image, real = rows.visual >= 0, rows.segment > 0
    return jnp.stack([real & ~image, real & image], axis=1).astype(jnp.float32)


def token_kind(rows: Rows, router_term: str) -> Array:
    """The kind of each token for the router's term (router.TERMS), from 1; 0 for padding. i32[R,S]."""
    if router_term in ("token", "token_hard"):
        return jnp.where(rows.segment > 0, jnp.where(rows.visual >= 0, 2, 1), 0)
    return composition(rows)


class Encoder(nn.Module):
    """Rows → EncoderOutput. Layers are rematerialized, and experts may drop tokens, only in `training`."""

    config: config_lib.Config
    training: bool = False

    @nn.compact
    def __call__(self, rows: Rows) -> EncoderOutput:
        c, rows = self.config, jax.tree.map(jnp.asarray, rows)
        dtype, param_dtype = jnp.dtype(c.training.dtype), jnp.dtype(c.training.param_dtype)
        # Of the scale of the visual tokens and of what the layers add: at 0.02, mm would begin as the image alone.
        init = partitioned(("vocab", "embed"), nn.initializers.normal(1.0))
        table = self.param("token_embedding", init, (c.language.vocab, c.language.width), param_dtype)
        x = sharding.by_rows(sharding.lookup(table, rows.tokens)).astype(dtype)
        if rows.patches.shape[1]:
            remat = c.training.remat if self.training else "none"
            tower = VisionTower(c.vision, c.language.width, dtype, param_dtype, remat, name="vision")
            merged, deepstack = tower(rows)
            x = jnp.where(rows.visual[..., None] >= 0, place_visual(merged, rows.visual), x)
        else:  # text only: the tower is not part of the program
            deepstack = jnp.zeros((0, rows.tokens.shape[0], 0, c.language.width), dtype)
        mask = span_mask(rows)
        decoder = Decoder(c, self.training, name="decoder")
        kind = token_kind(rows, c.experts.router_term)
        pool, spans = jnp.concatenate([mask, modality_mask(rows)], axis=1), mask.shape[1]
        x, sums = decoder(x, rows.segment, rows.position, pool, kind, rows.visual, deepstack)
        gate = jnp.zeros((0, *pool.shape[:2], c.experts.count)) if sums is None else sums.gate
        self.sow("intermediates", "hidden", x)
        shape = (0, c.experts.count)
        return EncoderOutput(
            embedding=pool_mean(x, last_token_mask(rows) if c.language.pooling == "last" else mask),
            gate=gate[:, :, :spans],
            modality=gate[:, :, spans:].sum(1),
            tokens=mask.sum(-1).astype(jnp.int32),
            load=jnp.zeros(shape) if sums is None else sums.load,
            prob=jnp.zeros(shape) if sums is None else sums.prob,
            z=jnp.zeros(0) if sums is None else sums.z,
            dropped=jnp.zeros(0, jnp.int32) if sums is None else sums.dropped,
            valid=(rows.segment > 0).sum(dtype=jnp.int32),
        )


def initialize(config: config_lib.Config, rng: jax.Array, rows: Rows) -> dict:
    """Encoder parameters with their partitioning boxes. Run it under `jax.eval_shape` or `jit`."""
    return Encoder(config).init(rng, rows)["params"]
