"""A small config: the whole method, trained from scratch in minutes on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            vision=dict(depth=2, width=96, mlp_width=192, heads=3, positions=64, deepstack=(0,)),
            language=dict(
                vocab=8192,
                width=256,
                layers=2,
                heads=4,
                kv_heads=2,
                head_dim=32,
                mlp_width=240,  # two experts' width: a dense run can be upcycled to slices of it
                rope_theta=10_000.0,
                rope_sections=(6, 5, 5),
            ),
            experts=dict(count=4, width=120),
            data=dict(batch=128, text_tokens=24, visual_tokens=16, min_visual_tokens=5, fit=True),
            objective=dict(symmetric="intra"),
            training=dict(
                steps=300,
                learning_rate=2e-3,
                router_learning_rate=1e-3,
                # Token embeddings start at standard deviation 1, so they need larger steps than the matrices.
                learning_rate_factors=("encoder/token_embedding=5",),
                min_warmup=30,
                remat="none",
                save_every=50,
            ),
        )
    )
