"""MOON2.0 on Qwen3-VL-2B, every decoder layer upcycled to 8 experts.

Start it with `moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data … --workdir …`.

Parameters: 9.5 B, 3.2 B active per token. Cost: about 6 PFLOP per step, at 6 FLOPs per parameter and token, with full
rows and no recomputation; the vision tower's part grows with the number of images. Parameters and AdamW's two moments
in float32 take 114 GB, divided over the devices of `mesh.fsdp`.

From the paper: the method but for ω, learning rate 1e-5 with a cosine schedule, 256 triplets per batch, 22,500 steps
(one epoch of MBE2.0). Ours, because the paper does not state it: the backbone, 8 experts with 2 active per token,
experts in every layer, the router's learning rate, 256 visual tokens and 64 text tokens, and everything in
moon_jax/options.py marked "ours", the weights ω among it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            training=dict(dtype="bfloat16"),
            mesh=dict(data=1, fsdp=-1),
        )
    )
