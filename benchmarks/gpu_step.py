"""Time and memory of one training step on this machine's device, and of the same objective in transformers.

Random weights, full rows of random tokens and pixels; the step is the real one of the config. With --transformers, a
dense Qwen3-VL of the same size runs instead, as a user of transformers would write it: one call per view, SDPA,
gradient checkpointing, autocast to bfloat16, fused AdamW. Run the two one after the other on one machine.

    python benchmarks/gpu_step.py                                                    2B dense, 16 triplets
    python benchmarks/gpu_step.py --transformers
    python benchmarks/gpu_step.py --config quickstart --config.data.batch=8          for a CPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moon_jax import config as config_lib

STEPS = 6
"""Timed steps; the first is left out."""


def timed(step: Callable[[], None]) -> float:
    """The median time of a step in seconds."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def ours(config: config_lib.Config) -> dict[str, Any]:
    import jax

    from moon_jax import backend, sharding
    from moon_jax.data import rows as rows_lib
    from moon_jax.training import chips, loop, plan

    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = loop.abstract_batch(config, mesh)
        state = loop.abstract_state(config, batch.rows, mesh)
        began = time.perf_counter()
        compiled = loop.lower_step(config, state, batch).compile(compiler_options=backend.compiler_options())
        compiling = time.perf_counter() - began
        rng = np.random.default_rng(0)
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch)
        rows = plan.full_rows(blank.rows, rows_lib.row_text(config))
        count = rows.tokens.shape[0]
        side = round((config.data.visual_tokens * config.vision.merge**2) ** 0.5)
        first, tokens = rows_lib.row_text(config) + 1, config.data.visual_tokens
        visual = np.full(rows.visual.shape, -1, np.int32)
        visual[:, first : first + tokens] = np.arange(tokens)
        grid = np.stack(np.divmod(np.arange(rows.patches.shape[1]), side), -1).astype(np.int32)
        rows = rows.replace(
            tokens=rng.integers(0, config.language.vocab, rows.tokens.shape).astype(np.int32),
            patches=rng.integers(0, 255, rows.patches.shape).astype(np.uint8),
            visual=visual,
            patch_yx=np.broadcast_to(grid, rows.patch_yx.shape).copy(),
            image_hw=np.full_like(rows.image_hw, side),
        )
        ids = np.arange(count, dtype=np.int32)
        given = blank.replace(
            rows=rows,
            weight=np.ones_like(blank.weight),
            product=ids,
            group=ids,
            known=np.full_like(blank.known, -1),
        )
        given = jax.device_put(given, jax.tree.map(lambda leaf: leaf.sharding, batch))
        held = [loop.creation(config, state, batch.rows)({})]

        def step() -> None:
            held[0], metrics = compiled(held[0], given)
            jax.block_until_ready((held[0], metrics))

        seconds = timed(step)
    chip = chips.of_device(jax.devices()[0])
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": jax.devices()[0].device_kind,
        "compiling": compiling,
        "seconds": seconds,
        "peak_gb": peak and peak / 1e9,
        "mfu": chips.model_flops(config) / seconds / chip.flops if chip else None,
    }


def theirs(config: config_lib.Config) -> dict[str, Any]:
    import torch
    from torch.nn import functional
    from transformers import Qwen3VLConfig, Qwen3VLModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    language, vision, batch = config.language, config.vision, config.data.batch
    rope = {
        "rope_type": "default",
        "rope_theta": language.rope_theta,
        "mrope_section": list(language.rope_sections),
        "mrope_interleaved": True,
    }
    settings = Qwen3VLConfig(
        text_config=dict(
            vocab_size=max(language.vocab, 151936),
            hidden_size=language.width,
            intermediate_size=language.mlp_width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            head_dim=language.head_dim,
            rope_parameters=rope,
        ),
        vision_config=dict(
            depth=vision.depth,
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_heads=vision.heads,
            out_hidden_size=language.width,
            num_position_embeddings=vision.positions,
            deepstack_visual_indexes=list(vision.deepstack),
        ),
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = Qwen3VLModel(settings).float().train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.05, fused=device == "cuda"
    )
    rows, tokens = 3 * batch, config.data.visual_tokens
    side = round((tokens * vision.merge**2) ** 0.5)
    start, end, pad = settings.vision_start_token_id, settings.vision_end_token_id, settings.image_token_id
    text = torch.randint(0, 150000, (rows, config.data.text_tokens), device=device)
    image = torch.full((rows, tokens + 2), pad, device=device)
    image[:, 0], image[:, -1] = start, end
    pixels = torch.rand(rows * side * side, 3 * config_lib.FRAMES * vision.patch**2, device=device)
    grid = torch.tensor([[1, side, side]] * rows, device=device)

    def encode(ids: Any, sees: bool) -> Any:
        more = {}
        if sees:
            more = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == pad).int()}
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more).last_hidden_state
        return functional.normalize(hidden.float().mean(1), dim=-1)

    def contrast(query: Any, candidates: Any, own: Any) -> Any:
        return functional.cross_entropy(query @ candidates.T / 0.05, own)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            t, i, mm = encode(text, False), encode(image, True), encode(torch.cat([image, text], 1), True)
        q, p, n = slice(batch), slice(batch, 2 * batch), slice(2 * batch, 3 * batch)
        items, texts, own = torch.cat([mm[p], mm[n]]), torch.cat([t[p], t[n]]), torch.arange(batch, device=device)
        loss = contrast(t[q], items, own) + contrast(i[q], items, own) + contrast(mm[q], items, own)
        loss = (loss + contrast(i[p], texts, own) + contrast(i[n], texts, own + batch)) / 5
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed(step)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "seconds": seconds, "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="moon2_qwen3vl_2b_dense")
    parser.add_argument("--transformers", action="store_true", help="run transformers instead")
    parsed, overrides = parser.parse_known_args()
    config = config_lib.load(parsed.config)
    if parsed.config == "moon2_qwen3vl_2b_dense":
        config = config_lib.replace(config, {"data.batch": 16})
    config = config_lib.override(config, overrides)
    found = theirs(config) if parsed.transformers else ours(config)
    found["triplets_per_second"] = config.data.batch / found["seconds"]
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}))


if __name__ == "__main__":
    main()
