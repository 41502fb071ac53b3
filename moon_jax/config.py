"""All options, each with its default, type and one line of documentation. Defaults are defined nowhere else.

A file in `configs/` returns an `ml_collections.ConfigDict` of *differences* from these defaults. `resolve` applies it,
and rejects unknown keys and values that equal the default. The defaults follow the paper's setting on a Qwen3-VL-2B
backbone. Where the paper states no value, the choice is ours, and the option's doc says "ours".
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from moon_jax.errors import UserError

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
    router_term: str = option("none", "router bias for the token's view: none (paper), learned or hard")
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
    max_pixels: int = option(178_956_970, "images with more pixels are rejected before decoding")
    keep_word: float = option(0.7, "probability that a training query keeps a word; at least two are kept")
    crop: tuple[float, float] = option((0.7, 1.0), "range of the area that a crop of a training query's image keeps")
    flip: float = option(0.5, "probability that a training query's image is flipped horizontally")
    mixture: tuple[float, ...] = option(
        (), "shares of t, i and mm: each query then has one view; empty: all its views (paper)"
    )
    augmented: str = option("drawn", "titles and images read: drawn, original, augmented or all (data/pipeline.py)")
    threads: int = option(2, "reader threads")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Losses and their weights. All numbers are ours except the threshold 0.6, which is the paper's."""

    temperature: tuple[float, float] = option((0.05, 0.05), "initial ε (inter-product) and ε̃ (intra-product)")
    balance: float = option(0.01, "ρ, weight of L_aux")
    router_z: float = option(0.0, "weight of the router z-loss")
    sparsity: float = option(0.01, "ς, weight of L_sparsity; 0 during warm-up")
    levels: str = option("dual", "alignment losses: dual (paper), inter (without intra-product ones) or mm→mm")
    weighting: str = option("balanced", "of ω: balanced, product, stopped or counted (objectives/weighting.py)")
    dual_init: float = option(0.02, "standard deviation of the initial W*")
    phi_threshold: float = option(0.6, "φ below which a triplet is down-weighted (paper); 0 turns the filter off")
    phi_slope: float = option(10.0, "κ, slope of φ")
    margin: tuple[float, float] = option((0.1, -0.2), "m̄ at the first and the last step, a cosine between")
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


def period(config: Config) -> int:
    """The length of the shortest block of layers that repeats to form the decoder. Blocks are stacked and scanned.

    If the pattern of layers does not repeat, the decoder is one block, and every layer is compiled separately.
    """
    sparse = sparse_layers(config)
    return next(p for p in range(1, len(sparse) + 1) if sparse == sparse[:p] * (len(sparse) // p))


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value of every option."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= leaves(value, name + ".")
        else:
            found[name] = value
    return found


KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple of such values"}

ANY_LENGTH = {
    "vision.deepstack": int,
    "data.mixture": float,
    "experts.dense_layers": int,
    "objective.matryoshka": int,
    "training.learning_rate_factors": str,
}
"""Options that hold any number of values of this type."""

CHOICES = {
    "data.augmented": ("drawn", "original", "augmented", "all"),
    "language.pooling": ("mean", "last"),
    "experts.dispatch": ("grouped", "expert_parallel", "dense"),
    "experts.router_term": ("none", "learned", "hard"),
    "objective.levels": ("dual", "inter", "mm→mm"),
    "objective.weighting": ("balanced", "product", "stopped", "counted"),
    "training.dtype": ("float32", "bfloat16"),
    "training.param_dtype": ("float32", "bfloat16"),
    "training.remat": ("full", "selective", "none"),
}
"""Options with a fixed set of values."""


RENAMED = {
    "data.mirror": "data.flip",
    "experts.redrawn": "experts.reinitialized",
    "training.bad_steps": "training.max_bad_steps",
    "training.rates": "training.learning_rate_factors",
}
"""Former names of options."""


def _coerce(name: str, value: Any, default: Any) -> Any:
    """`value` converted to the type of `default`; raises UserError if it has another type."""
    if isinstance(default, tuple):
        if isinstance(value, str) and ANY_LENGTH.get(name) is str:
            value = (value,)
        if isinstance(value, list | tuple) and (len(value) == len(default) or name in ANY_LENGTH):
            kind = ANY_LENGTH.get(name) or type(default[0])
            return tuple(_coerce(name, item, kind()) for item in value)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, type(default)) and not isinstance(value, bool):
        return value
    raise UserError(f"config.{name}: {value!r} is not {KINDS[type(default)]}; an example is {default!r}")


def replace(config: Config, values: dict[str, Any]) -> Config:
    """`config` with the options in `values` (by dotted name) changed.

    Raises:
        UserError: an unknown name (with the closest one), or a value of another type.
    """
    known, defaults = leaves(config), leaves(Config())
    for name, value in values.items():
        if name not in known:
            group = [option for option in known if option.startswith(f"{name}.")]
            if group:
                raise UserError(f"config.{name}: a group of options, such as config.{group[0]}; name one of them")
            if name in RENAMED:
                raise UserError(f"config.{name}: this option is now called config.{RENAMED[name]}")
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"config.{name}: no such option; the closest is config.{close[0]}")
        known[name] = _coerce(name, value, defaults[name])

    def rebuild(part: Any, prefix: str) -> Any:
        fields = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            name = prefix + field.name
            fields[field.name] = rebuild(value, name + ".") if dataclasses.is_dataclass(value) else known[name]
        return type(part)(**fields)

    return check(rebuild(config, ""))


def check(config: Config) -> Config:
    """Returns `config`; raises UserError for the first option or combination that cannot work."""
    language, vision, experts = config.language, config.vision, config.experts
    unbounded = ("vision.deepstack", "experts.dense_layers", "objective.margin")
    may_be_zero = ("seed", "evaluation.every", "experts.count")
    may_be_zero += tuple(f"training.{name}" for name in ("min_warmup", "keep_every", "keep_best"))
    for name, value in leaves(config).items():
        if isinstance(value, bool) or name.startswith("mesh.") or name in unbounded:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            least = 0 if isinstance(number, float) or name in may_be_zero else 1
            if isinstance(number, int | float) and not least <= number < float("inf"):
                raise UserError(f"config.{name}: {number} is below {least}, or not finite")
    rules = [
        (language.heads % language.kv_heads == 0, "language.heads must be a multiple of language.kv_heads"),
        (sum(language.rope_sections) * 2 == language.head_dim, "language.rope_sections must add up to head_dim / 2"),
        (vision.width % (4 * vision.heads) == 0, "vision.width must be a multiple of 4 * vision.heads"),
        (round(vision.positions**0.5) ** 2 == vision.positions, "vision.positions must be a square number"),
        (
            all(0 <= tap < vision.depth for tap in vision.deepstack)
            and tuple(sorted(set(vision.deepstack))) == vision.deepstack
            and len(vision.deepstack) <= language.layers,
            "vision.deepstack must rise, stay below vision.depth, and be no longer than language.layers",
        ),
        (
            experts.count == 0 or 1 <= experts.per_token <= experts.count,
            "experts.per_token must lie between 1 and experts.count",
        ),
        (
            experts.count == 0 or any(sparse_layers(config)),
            "experts.every and dense_layers leave no layer with experts",
        ),
        (
            tuple(sorted(set(experts.dense_layers))) == experts.dense_layers
            and all(0 <= layer < language.layers for layer in experts.dense_layers),
            "experts.dense_layers must rise and stay below language.layers",
        ),
        # transformers distinguishes the two layouts of expert matrices by shape alone.
        (
            experts.count == 0 or language.width not in (experts.width, 2 * experts.width),
            "experts.width must be neither language.width nor half of it: no Hugging Face folder could hold the model",
        ),
        (experts.reinitialized <= 1, "experts.reinitialized must lie between 0 and 1"),
        (
            TEMPLATES.get(config.data.template, config.data.template).count("{}") == 1,
            f"data.template must be one of {', '.join(TEMPLATES)}, or a text with one {{}} in it",
        ),
        *(
            (leaves(config)[name] in words, f"{name} must be {', '.join(words[:-1])} or {words[-1]}")
            for name, words in CHOICES.items()
        ),
        (
            experts.count > 0 or experts.router_term == "none",
            "experts.router_term must be none if experts.count is 0",
        ),
        (
            experts.router_term != "hard" or experts.per_token <= experts.count // 3,
            f"experts.router_term: hard divides {experts.count} experts among three views, and a token needs"
            f" {experts.per_token}; set experts.count to {3 * experts.per_token} or more, or lower experts.per_token",
        ),
        (
            0 < config.data.min_visual_tokens <= config.data.visual_tokens,
            "data.min_visual_tokens must lie between 1 and data.visual_tokens",
        ),
        (0 < config.data.crop[0] <= config.data.crop[1] <= 1, "data.crop must be two shares of the area, ascending"),
        (
            not config.data.mixture or (len(config.data.mixture) == 3 and sum(config.data.mixture) > 0),
            "data.mixture must be empty, or three shares: of queries by text, by image and by both",
        ),
        (0 < config.prepare.val_fraction < 1, "prepare.val_fraction must lie between 0 and 1"),
        (
            tuple(sorted({*config.objective.matryoshka})) == config.objective.matryoshka
            and max(config.objective.matryoshka, default=0) < language.width,
            "objective.matryoshka must rise and stay below language.width",
        ),
        (min(config.objective.temperature) > 0, "objective.temperature must be positive"),
        (max(config.training.betas) < 1, "training.betas must lie below 1"),
        (
            all(re.fullmatch(r"[^=]+=[0-9.e+-]*[0-9.]", rate) for rate in config.training.learning_rate_factors),
            "training.learning_rate_factors must be of the form PATTERN=FACTOR, such as encoder/vision/*=0",
        ),
        (
            config.training.keep_every % config.training.save_every == 0,
            f"training.keep_every must be a multiple of training.save_every, {config.training.save_every}",
        ),
        (
            config.training.keep_best == 0 or config.evaluation.every > 0,
            "training.keep_best needs evaluations: set evaluation.every",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"config.{message}")
    return config


def _flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, from a nested dict or ConfigDict."""
    flat = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return flat


def resolve(differences: Any, base: dict[str, Any] | None = None) -> Config:
    """The defaults with an `ml_collections.ConfigDict` (or nested dict) of differences applied.

    Args:
        base: options by dotted name, applied before the differences, such as the sizes of a base model.

    Raises:
        UserError: as `replace`; also for a difference that equals its default.
    """
    values = _flatten(differences)
    base = base or {}
    config = replace(Config(), base | values)
    defaults = leaves(Config())
    for name, value in leaves(config).items():
        if name in values and name not in base and value == defaults[name]:
            raise UserError(f"config.{name}: {value!r} is the default already; leave it out")
    return config


def shipped_configs() -> Path:
    """The folder of the shipped configs: inside an installed package, or at the top of a clone."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def load(source: str, base: dict[str, Any] | None = None) -> Config:
    """A config by name (quickstart, or configs/quickstart.py), or by path: Python with `get_config()`, or config.json.

    A Python config is executed: load only files you trust.

    Args:
        base: see `resolve`; ignored for a config.json, which sets every option.
    """
    shipped, path = shipped_configs(), Path(source)
    if not source.endswith((".py", ".json")):
        path = shipped / f"{source}.py"
    elif path.parent == Path("configs") and path.suffix == ".py" and not path.is_file():
        path = shipped / path.name
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.py")))
        raise UserError(f"--config {source}: no such config; give a path, or one of: {names}")
    if path.suffix == ".json":
        return read_json(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        differences = module.get_config()
        differences.items()
    except Exception as error:  # the user's code may raise anything
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--config {source}: get_config() there returns no ConfigDict ({what})") from None
    return resolve(differences, base)


def override(config: Config, arguments: list[str]) -> Config:
    """`config` with command-line overrides, each `--config.a.b=value` (a Python literal, else a string)."""
    values = {}
    for argument in arguments:
        name, separator, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not separator:
            raise UserError(f"{argument}: not understood; options of the config are written --config.a.b=value")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return replace(config, values)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_json(path: Path) -> Config:
    """A config from a file that `to_json` wrote."""
    try:
        values = _flatten(json.loads(path.read_text(encoding="utf-8")))
        values = {RENAMED.get(name, name): value for name, value in values.items()}  # of an earlier version
    except (ValueError, AttributeError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: not a config written by moon_jax ({error})") from None
    return replace(Config(), values)


def warmup_steps(training: Training) -> int:
    """The number of warm-up steps: a share of all steps, at least `min_warmup`, at most half of all steps."""
    return min(max(round(training.warmup * training.steps), training.min_warmup), training.steps // 2)
