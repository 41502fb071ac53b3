"""MOON2.0 on Qwen3-VL-2B without experts: the baseline, and what is cheapest to serve.

Begin it with `moon-jax train --config moon2_qwen3vl_2b_dense --init hf://Qwen/Qwen3-VL-2B-Instruct --data … --workdir
…`.

Parameters: 2.1 B, of which a token uses 2.1 B. Cost, by 6 FLOPs for each parameter and token, full rows and no
recomputation: about 4 PFLOP a step, of which the vision tower's part grows with the images. Parameters and AdamW's
two moments in float32 take 26 GB, divided over the devices of `mesh.fsdp`.

What is the paper's: the method, learning rate 1e-5 with a cosine, 256 triplets a batch, 22,500 steps (an epoch of
MBE2.0). What is ours, because the paper does not state it: the backbone, 256 visual tokens and 64 text tokens, and
everything else in moon_jax/config.py whose line says "ours". Without experts ω has nothing to follow: every objective
weighs 1/M.
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
