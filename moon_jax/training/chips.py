"""Peak numbers of accelerator chips, and the FLOPs of a training step."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax

from moon_jax import config as config_lib
from moon_jax.data import rows as rows_lib
from moon_jax.data.text import BARE
from moon_jax.hub import keys
from moon_jax.training.step import initial_state


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specifications of one chip by its maker, in bytes and seconds."""

    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    link: float = 0.0  # bytes/s of one inter-chip link in one direction; a ring uses two
    network: float = 0.0  # bytes/s per chip between slices
    axes: int = 0  # of the torus; 0 for GPUs
    cores: int = 1  # per chip, as the cloud's slice names count them


CHIPS = {
    "v4": Chip(2.75e14, 32e9, 1.2e12, 4.5e10, 6.25e9, axes=3, cores=2),
    "v5p": Chip(4.59e14, 95e9, 2.765e12, 9.0e10, 6.25e9, axes=3, cores=2),
    "v5e": Chip(1.97e14, 16e9, 8.1e11, 4.5e10, 3.125e9, axes=2),
    "v6e": Chip(9.18e14, 32e9, 1.64e12, 9.0e10, 1.25e10, axes=2),
    "NVIDIA H100 80GB HBM3": Chip(9.89e14, 80e9, 3.35e12),
    "NVIDIA H200": Chip(9.89e14, 141e9, 4.8e12),
    "NVIDIA A100-SXM4-80GB": Chip(3.12e14, 80e9, 2.04e12),
    "NVIDIA A100-SXM4-40GB": Chip(3.12e14, 40e9, 1.56e12),
}


def of_device(device: jax.Device) -> Chip | None:
    """The entry of CHIPS for a device, or None if there is none."""
    kind = device.device_kind
    tpu = re.fullmatch(r"TPU v(\d+)( lite|e|p)?", kind)
    if tpu:  # "TPU v5" is a v5p, "TPU v5 lite" a v5e
        number, size = tpu.groups()
        kind = "v" + number + {" lite": "e", None: "p" if number == "5" else ""}.get(size, size)
    return CHIPS.get(kind)


def model_flops(config: config_lib.Config) -> float:
    """FLOPs of a step on full rows: three times the forward matmuls, without recomputation, padding or spare capacity.

    A token uses K of E experts. Attention counts all pairs within a segment, including those that causality masks.
    """
    layout = rows_lib.Layout.of(config)
    state = jax.eval_shape(functools.partial(initial_state, config), rows_lib.pack([[]], layout, 0))
    leaves = keys.flatten(nn.unbox(state).params["encoder"])
    visual = layout.patches // layout.merge**2
    total = 0.0
    for path, leaf in leaves.items():
        name = path.split("/")[-1]
        if name in ("token_embedding", "positions") or leaf.ndim - ("layers/" in path or "periods/" in path) < 2:
            continue
        tokens = layout.length if path.startswith("decoder") else layout.patches
        if "merger" in path or "deepstack" in path:
            tokens = visual
        share = 1.0
        if name in ("gate_up", "down"):
            share = config.experts.per_token / config.experts.count
        elif name == "patch_kernel":
            share = 1 / config_lib.FRAMES
        total += 2.0 * tokens * math.prod(leaf.shape) * share
    text, language, vision = rows_lib.row_text(config), config.language, config.vision
    alone = visual + 2 * layout.images  # an image segment
    pairs = text**2 + (alone + text) ** 2
    if not rows_lib.prefix_is_view(BARE, config.experts.router_term):
        pairs += alone**2
    total += 4.0 * language.layers * language.heads * language.head_dim * pairs
    total += 4.0 * vision.depth * vision.width * layout.images * (layout.patches // max(layout.images, 1)) ** 2
    return 3 * config_lib.batch_rows(config) * total
