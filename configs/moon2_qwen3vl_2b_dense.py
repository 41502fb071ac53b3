"""MOON2.0 on Qwen3-VL-2B without experts: the baseline, and the cheapest model to serve.

Start it with `moon-jax train --config moon2_qwen3vl_2b_dense --init hf://Qwen/Qwen3-VL-2B-Instruct --data … --workdir
…`.

Parameters: 2.1 B, all active. Cost: about 4 PFLOP per step, at 6 FLOPs per parameter and token, with full rows and no
recomputation; the vision tower's part grows with the number of images. Parameters and AdamW's two moments in float32
take 26 GB, divided over the devices of `mesh.fsdp`.

From the paper: the method but for ω, learning rate 1e-5 with a cosine schedule, 256 triplets per batch, 22,500 steps
(one epoch of MBE2.0). Ours, because the paper does not state it: the backbone, 256 visual tokens and 64 text tokens,
and everything in moon_jax/options.py marked "ours", the weights ω among it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            experts=dict(count=0),
            training=dict(dtype="bfloat16"),
            mesh=dict(data=1, fsdp=-1),
        )
    )
