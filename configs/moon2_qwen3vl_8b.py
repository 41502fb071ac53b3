"""MOON2.0 on Qwen3-VL-8B, every second decoder layer upcycled to 8 experts.

Start it with `moon-jax train --config moon2_qwen3vl_8b --init hf://Qwen/Qwen3-VL-8B-Instruct --data … --workdir …`.

Parameters: 27.2 B, 10.9 B active per token. Cost: about 20 PFLOP per step, at 6 FLOPs per parameter and token, with
full rows and no recomputation; the vision tower's part grows with the number of images. Parameters and AdamW's two
moments in float32 take 326 GB, divided over the devices of `mesh.fsdp`.

From the paper: the method, learning rate 1e-5 with a cosine schedule, 256 triplets per batch, 22,500 steps (one epoch
of MBE2.0). Ours, because the paper does not state it: the backbone, 8 experts with 2 active per token, experts in
every second layer, the router's learning rate, 256 visual tokens and 64 text tokens, and everything in
moon_jax/options.py marked "ours".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            vision=dict(depth=27, width=1152, mlp_width=4304, deepstack=(8, 16, 24)),
            language=dict(width=4096, layers=36, heads=32, mlp_width=12288),
            experts=dict(width=12288, every=2),
            training=dict(dtype="bfloat16"),
            mesh=dict(data=1, fsdp=-1),
        )
    )
