"""All options, each with its default, type and one line of documentation. Defaults are defined nowhere else.

The defaults follow the paper's setting on a Qwen3-VL-2B backbone. Where the paper states no value, the choice is ours,
and the option's doc says "ours". config.py reads configs and checks them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

FRAMES = 2  # that the patch kernel spans in all Qwen3-VL models; a still image is repeated

TEMPLATES = {
    "bare": "{}",
    "qwen3_vl_embedding": (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
"""Named values of `data.template`, the text around a view. The view's own tokens replace {}."""


def option(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision transformer and its mergers."""

    depth: int = option(24, "layers")
    width: int = option(1024, "width of a patch")
    mlp_width: int = option(4096, "inner width of the feed-forward layer")
    heads: int = option(16, "attention heads")
    patch: int = option(16, "side of a patch in pixels")
    merge: int = option(2, "side of a merged visual token in patches")
    positions: int = option(2304, "learned positions: a square grid, interpolated to the image's size")
    deepstack: tuple[int, ...] = option((5, 11, 17), "layers whose output is also added to the first language layers")


@dataclasses.dataclass(frozen=True)
class Language:
    """The decoder."""

    vocab: int = option(151936, "vocabulary size, the rows of the token embedding")
    width: int = option(2048, "D, width of a token and of the embedding")
    layers: int = option(28, "decoder layers")
    heads: int = option(16, "query heads")
    kv_heads: int = option(8, "key and value heads")
    head_dim: int = option(128, "width of a head")
    mlp_width: int = option(6144, "inner width of a dense feed-forward layer")
    rope_theta: float = option(5_000_000.0, "base of the rotary frequencies")
    rope_sections: tuple[int, ...] = option((24, 20, 20), "rotary frequencies for time, row and column")
    norm_eps: float = option(1e-6, "epsilon of the RMS norms")
    pooling: str = option("mean", "a view's embedding: mean (of its tokens) or last (token)")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The modality-driven mixture of experts. The paper states no sizes: these are ours."""

    count: int = option(8, "E, experts per layer; 0 makes every feed-forward layer dense")
    per_token: int = option(2, "K, experts per token")
    width: int = option(6144, "F, inner width of an expert")
    every: int = option(1, "the last of every N layers has experts")
    dense_layers: tuple[int, ...] = option((), "layers that stay dense even if `every` selects them")
    dispatch: str = option("grouped", "grouped, expert_parallel, or dense (the reference); see model/experts.py")
    capacity: float = option(1.25, "capacity factor of expert-parallel training (1 = even share); 0 drops no token")
    router_term: str = option("none", "router bias: none (paper); by view learned, hard; by token token, token_hard")
    term_init: float = option(0.0, "initial bias of a learned term towards the experts of its own view or token kind")
    router_init: float = option(0.02, "standard deviation of the router's initial weights; 0 would tie all experts")
    reinitialized: float = option(0.0, "share of each expert's inner units that upcycling a dense model reinitializes")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """How a source becomes prepared data. The split's seed is fixed: runs with different seeds share one test set."""

    val_fraction: float = option(0.1, "held-out share of title groups (of a log's time), if no file defines the split")
    longest_side: int = option(1024, "longest side of an image in pixels; larger images are downsized when written")


@dataclasses.dataclass(frozen=True)
class Data:
    """What training reads, and how a product becomes a row."""

    path: str = option("", "prepared data, or a source to prepare (docs/data.md); empty renders a synthetic catalogue")
    synthetic: int = option(4000, "products of the synthetic catalogue, if path is empty")
    tokenizer: str = option("", "tokenizer.json; empty: that of training.init, or a new BPE of language.vocab tokens")
    template: str = option("bare", "text around a view: bare, qwen3_vl_embedding, or any text with {} in it")
    batch: int = option(256, "B, triplets per global batch")
    images: int = option(1, "N, images per product in a row: random ones in training, the first in evaluation")
    text_tokens: int = option(64, "longest text in tokens; longer texts are cut")
    visual_tokens: int = option(256, "largest size of an image in merged visual tokens; larger images are downscaled")
    min_visual_tokens: int = option(4, "smallest size of an image in merged visual tokens; smaller images are upscaled")
    fit: bool = option(False, "training rows only as long as the catalogue's texts and images need (data/pipeline.py)")
    max_pixels: int = option(178_956_970, "images with more pixels are rejected before decoding")
    keep_word: float = option(0.5, "probability that a query made from a product keeps a word of its title")
    least_words: int = option(1, "words that such a query keeps in any case")
    crop: tuple[float, float] = option((0.6, 1.0), "range of the area that a crop of such a query's image keeps")
    flip: float = option(0.0, "probability that such a query's image is flipped horizontally")
    background: float = option(0.5, "probability that a plain background of such a query's image is replaced")
    mixture: tuple[float, ...] = option(
        (), "shares of t, i and mm: each query then has one view; empty: all its views (paper)"
    )
    augmented: str = option(
        "drawn", "titles and images read: drawn, half, original, augmented or all (data/pipeline.py)"
    )
    negatives: int = option(1, "N, negatives per triplet: the first, and mined ones (moon-jax prepare --negatives)")
    threads: int = option(2, "reader threads")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Losses and their weights. All numbers are ours except the threshold 0.6, which is the paper's."""

    temperature: tuple[float, float] = option((0.05, 0.05), "initial ε (inter-product) and ε̃ (intra-product)")
    balance: float = option(0.01, "ρ, weight of L_aux")
    router_z: float = option(0.0, "weight of the router z-loss")
    sparsity: float = option(0.01, "ς, weight of L_sparsity; 0 during warm-up")
    levels: str = option("dual", "alignment losses: dual (paper), inter (without intra-product ones) or mm→mm")
    weighting: str = option("samples", "of ω: samples, uniform, lagging, routed, product (paper) or stopped")
    symmetric: str = option("none", "losses taken in both directions: none (paper), intra (text → image too) or all")
    known: str = option("masked", "a query's other known positives in the batch: masked, or positive as well")
    further: int = option(32, "W, known positives in the batch that count as positive; those beyond are masked")
    similar_margin: float = option(0.0, "negatives above s⁺ by this margin are masked (0.1 is usual); 0 masks none")
    dual_init: float = option(0.02, "standard deviation of the initial W*")
    phi_threshold: float = option(0.6, "φ below which a triplet is down-weighted (paper); 0 turns the filter off")
    phi_slope: float = option(10.0, "κ, slope of φ")
    margin: tuple[float, float] = option((0.1, 0.0), "m̄ at the first and the last step, a cosine between")
    matryoshka: tuple[int, ...] = option((), "further widths below D for the losses and the evaluation")
    chunk: int = option(4096, "candidates whose similarities are in memory at once")


@dataclasses.dataclass(frozen=True)
class Training:
    """The optimiser, the schedule, logging and checkpoints."""

    init: str = option("", "initial weights: a workdir, a Hugging Face folder or hf://owner/name; empty: random")
    steps: int = option(22500, "optimiser steps; the default is one epoch of MBE2.0 at batch 256 (paper)")
    optimizer: str = option("adamw", "name of any optax optimiser that needs only gradients")
    learning_rate: float = option(1e-5, "peak learning rate of backbone and experts (paper)")
    router_learning_rate: float = option(1e-4, "peak learning rate of the router (ours)")
    dual_learning_rate: float = option(1e-2, "peak learning rate of W* (ours)")
    temperature_learning_rate: float = option(0.0, "the same for log temperatures; 0 keeps them fixed (paper)")
    learning_rate_factors: tuple[str, ...] = option(
        (), "PATTERN=FACTOR: scales learning rates by parameter path; the first match wins; 0 freezes"
    )
    warmup: float = option(0.03, "share of the steps spent in warm-up")
    min_warmup: int = option(100, "minimum number of warm-up steps")
    betas: tuple[float, float] = option((0.9, 0.98), "b1 and b2 of the optimiser, if it has them")
    weight_decay: float = option(0.05, "decoupled weight decay, on matrices only")
    clip: float = option(1.0, "gradients are clipped to this global norm")
    param_dtype: str = option("float32", "dtype of the parameters")
    dtype: str = option("float32", "dtype of the computation; norms, softmax, router and pooling stay float32")
    remat: str = option("full", "recomputed for gradients: full (layers), selective (all but weight matmuls) or none")
    log_every: int = option(10, "steps between metric lines")
    max_bad_steps: int = option(20, "the run ends after this many non-finite steps in a row")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(3, "number of newest checkpoints to keep")
    keep_every: int = option(0, "also keep the checkpoints of every N-th step; 0: none")
    keep_best: int = option(0, "also keep the N evaluated checkpoints with the highest mean R@10")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 means all remaining devices."""

    data: int = option(-1, "data parallel")
    fsdp: int = option(1, "data parallel with sharded parameters")
    expert: int = option(1, "expert parallel")
    tensor: int = option(1, "tensor parallel: heads and feed-forward widths")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When the model is evaluated, and in what batches."""

    every: int = option(0, "steps between evaluations during training; 0: not during training")
    batch: int = option(64, "rows encoded per batch")


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of a run. They determine it completely."""

    seed: int = option(0, "seed of initial parameters, data order and query alterations")
    vision: Vision = Vision()
    language: Language = Language()
    experts: Experts = Experts()
    prepare: Prepare = Prepare()
    data: Data = Data()
    objective: Objective = Objective()
    training: Training = Training()
    mesh: Mesh = Mesh()
    evaluation: Evaluation = Evaluation()


def sparse_layers(config: Config) -> tuple[bool, ...]:
    """Which decoder layers have experts; as `decoder_sparse_step` and `mlp_only_layers` of transformers."""
    experts = config.experts
    return tuple(
        experts.count > 0 and (layer + 1) % experts.every == 0 and layer not in experts.dense_layers
        for layer in range(config.language.layers)
    )


def batch_rows(config: Config) -> int:
    """R, the rows of a training batch: a query, a positive and N negatives for each triplet."""
    return (2 + config.data.negatives) * config.data.batch


def period(config: Config) -> int:
    """The length of the shortest block of layers that repeats to form the decoder. Blocks are stacked and scanned.

    If the pattern of layers does not repeat, the decoder is one block, and every layer is compiled separately.
    """
    sparse = sparse_layers(config)
    return next(p for p in range(1, len(sparse) + 1) if sparse == sparse[:p] * (len(sparse) // p))


def warmup_steps(training: Training) -> int:
    """The number of warm-up steps: a share of all steps, at least `min_warmup`, at most half of all steps."""
    return min(max(round(training.warmup * training.steps), training.min_warmup), training.steps // 2)
