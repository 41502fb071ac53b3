"""moon_jax: MOON2.0 (arXiv 2511.12449) in JAX. Multimodal product embeddings for e-commerce.

    import moon_jax
    embedder = moon_jax.load("workdir")
    vectors = embedder.encode([moon_jax.Product(text="red canvas sneaker", images=("shoe.jpg",))])  # [1, D]

Names are imported on first use, so that `import moon_jax` is fast.
"""

import importlib

_HOME = {
    "Product": "moon_jax.types",
    "Config": "moon_jax.config",
    "load": "moon_jax.serving.embedder",
    "train": "moon_jax.evaluation.validation",
    "evaluate": "moon_jax.evaluation.report",
    "open_prepared": "moon_jax.data.prepared",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module moon_jax has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
