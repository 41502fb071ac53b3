"""Every option, once: its default, its type, one line of doc. The only place for a default.

A file of `configs/` returns an `ml_collections.ConfigDict` of *differences* from these defaults; `resolve`
applies it, and refuses keys that do not exist and differences that are none. The defaults describe the paper's
setting on a Qwen3-VL-2B backbone. What the paper does not state is ours (the docs of such options say "ours").
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

FRAMES = 2  # that the patch kernel spans, in all of Qwen3-VL; a still image is repeated

TEMPLATES = {
    "bare": "{}",
    "qwen3_vl_embedding": (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
"""Named values of `data.template`: what stands around a view, whose own tokens take the place of {}."""


def option(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Vision:
    """The vision transformer and its mergers."""

    depth: int = option(24, "layers")
    width: int = option(1024, "width of a patch")
    mlp_width: int = option(4096, "inner width of the feed-forward")
    heads: int = option(16, "attention heads")
    patch: int = option(16, "pixels along a patch's side")
    merge: int = option(2, "patches along the side of one merged visual token")
    positions: int = option(2304, "learned positions, a square grid that is interpolated")
    deepstack: tuple[int, ...] = option((5, 11, 17), "layers whose output also enters the first language layers")


@dataclasses.dataclass(frozen=True)
class Language:
    """The decoder."""

    vocab: int = option(151936, "rows of the token embedding")
    width: int = option(2048, "D, width of a token and of the embedding")
    layers: int = option(28, "decoder layers")
    heads: int = option(16, "query heads")
    kv_heads: int = option(8, "key and value heads")
    head_dim: int = option(128, "width of a head")
    mlp_width: int = option(6144, "inner width of a dense feed-forward")
    rope_theta: float = option(5_000_000.0, "base of the rotary frequencies")
    rope_sections: tuple[int, ...] = option((24, 20, 20), "rotary frequencies for time, row and column")
    norm_eps: float = option(1e-6, "epsilon of the RMS norms")
    pooling: str = option("mean", "a view's embedding is the mean of its tokens, or the last of them")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The modality-driven mixture of experts. The paper states none of the sizes: these are ours."""

    count: int = option(8, "E; 0 leaves every feed-forward dense")
    per_token: int = option(2, "K, experts of one token")
    width: int = option(6144, "F, the inner width of one expert")
    every: int = option(1, "the last of every so many layers holds experts")
    dense_layers: tuple[int, ...] = option((), "layers that stay dense although `every` would give them experts")
    dispatch: str = option("grouped", "grouped, expert_parallel, or dense, the oracle (model/experts.py)")
    capacity: float = option(1.25, "room of an expert in expert-parallel training, in even shares; 0 drops no token")
    router_term: str = option("none", "what the router adds for the token's view: none (paper), learned or hard")
    router_init: float = option(0.02, "standard deviation of the router's start; zero would tie all experts")
    reinitialized: float = option(0.0, "share of each expert's inner units drawn anew when a dense model is upcycled")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """How a source becomes prepared data; its seed is fixed, so that runs of different seeds are judged alike."""

    val_fraction: float = option(0.1, "title groups, or of a log the time, kept for evaluation where no file is")
    longest_side: int = option(1024, "pixels; a larger image is made smaller when it is written")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and how a product becomes a row."""

    path: str = option("", "prepared data, or what can be prepared (docs/data.md); empty renders a synthetic catalogue")
    synthetic: int = option(4000, "products of the synthetic catalogue, where path is empty")
    tokenizer: str = option("", "tokenizer.json; empty takes training.init's, or trains a BPE of language.vocab")
    template: str = option("bare", "what stands around a view: bare, qwen3_vl_embedding, or a text with {} in it")
    batch: int = option(256, "triplets of a global batch, B")
    images: int = option(1, "images of a product in one row, N; training draws them, evaluation takes the first")
    text_tokens: int = option(64, "longest text in tokens; the rest is cut")
    visual_tokens: int = option(256, "pixel budget of an image, in merged visual tokens")
    min_visual_tokens: int = option(4, "smaller images are enlarged to about this many merged visual tokens")
    max_pixels: int = option(178_956_970, "an image of more pixels is refused before it is decoded")
    keep_word: float = option(0.7, "a training query keeps each word with this probability, at least two")
    crop: tuple[float, float] = option((0.7, 1.0), "area of the crop of a training query's image")
    flip: float = option(0.5, "probability that a training query's image is mirrored")
    mixture: tuple[float, ...] = option(
        (), "shares of t, i and mm among queries, each of one view; empty: of all (paper)"
    )
    augmented: str = option("drawn", "an item's titles and images: drawn, original, augmented or all (pipeline.py)")
    threads: int = option(2, "reader threads")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Losses and their weights. All numbers are ours but the threshold 0.6, which is the paper's."""

    temperature: tuple[float, float] = option((0.05, 0.05), "start of ε (inter-product) and ε̃ (intra-product)")
    balance: float = option(0.01, "ρ, weight of L_aux")
    router_z: float = option(0.0, "weight of the router z-loss")
    sparsity: float = option(0.01, "ς, weight of L_sparsity; 0 during warm-up")
    levels: str = option("dual", "alignment that trains: dual (paper); inter, without the intra-product one; or mm→mm")
    weighting: str = option("balanced", "of ω: balanced, product, stopped or counted (objectives/weighting.py)")
    dual_init: float = option(0.02, "standard deviation of W*'s start")
    phi_threshold: float = option(0.6, "φ from which a triplet counts fully (paper); 0 turns the filter off")
    phi_slope: float = option(10.0, "κ, slope of φ")
    margin: tuple[float, float] = option((0.1, -0.2), "m̄ at the first and the last step, a cosine between")
    matryoshka: tuple[int, ...] = option((), "widths below D at which the losses are also taken, and the model judged")
    chunk: int = option(4096, "candidates whose similarities are held at once")


@dataclasses.dataclass(frozen=True)
class Training:
    """The optimiser, the schedule, and what is kept."""

    init: str = option("", "Hugging Face folder, or hf://owner/name, whose weights begin the run; empty draws them")
    steps: int = option(22500, "optimiser steps; an epoch of MBE2.0 at batch 256 (paper)")
    optimizer: str = option("adamw", "any of optax by name")
    learning_rate: float = option(1e-5, "backbone and experts (paper)")
    router_learning_rate: float = option(1e-4, "router (ours)")
    dual_learning_rate: float = option(1e-2, "W* (ours)")
    temperature_learning_rate: float = option(0.0, "log temperatures; 0 keeps them fixed, as the paper does")
    learning_rate_factors: tuple[str, ...] = option(
        (), "PATTERN=FACTOR of learning rates by path, the first counts; 0 freezes"
    )
    warmup: float = option(0.03, "share of the steps that warm up")
    min_warmup: int = option(100, "least number of warm-up steps")
    betas: tuple[float, float] = option((0.9, 0.98), "decay of the optimizer's moments, where it has them")
    weight_decay: float = option(0.05, "on matrices only")
    clip: float = option(1.0, "largest global norm of the gradient")
    param_dtype: str = option("float32", "dtype of the parameters")
    dtype: str = option("float32", "dtype of the computation; norms, softmax, router and pooling stay float32")
    remat: str = option("full", "recomputed backwards: full, all of a layer; selective, no product with weights; none")
    log_every: int = option(10, "steps between metric lines")
    max_bad_steps: int = option(20, "so many steps in a row that are not finite end the run")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(3, "newest checkpoints that are kept")
    keep_every: int = option(0, "checkpoints of every so many steps are kept as well; 0 keeps none")
    keep_best: int = option(0, "of the evaluated ones so many of the highest mean R@10 are kept as well")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what the others leave."""

    data: int = option(-1, "data parallel")
    fsdp: int = option(1, "data parallel with sharded parameters")
    expert: int = option(1, "expert parallel")
    tensor: int = option(1, "heads and feed-forward widths")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When the model is judged, and how fast."""

    every: int = option(0, "steps between evaluations while training; 0 leaves them to the end")
    batch: int = option(64, "rows encoded at once")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run is a function of this."""

    seed: int = option(0, "of parameters, data order and alterations")
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
    """Which decoder layers hold experts: transformers' rule of `decoder_sparse_step` and `mlp_only_layers`."""
    experts = config.experts
    return tuple(
        experts.count > 0 and (layer + 1) % experts.every == 0 and layer not in experts.dense_layers
        for layer in range(config.language.layers)
    )


def period(config: Config) -> int:
    """Layers of the shortest block whose repetition gives the decoder: blocks are stacked and scanned.

    A pattern that does not repeat is one block, and its layers are compiled one by one.
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
"""Options that hold as many values as one likes, of this type."""

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
"""Options that are one of these words."""


RENAMED = {
    "data.mirror": "data.flip",
    "experts.redrawn": "experts.reinitialized",
    "training.bad_steps": "training.max_bad_steps",
    "training.rates": "training.learning_rate_factors",
}
"""Options that had another name once."""


def _coerce(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`, or an error that names the option."""
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
    """`config` with the options of `values` (dotted names) changed.

    Raises:
        UserError: a name that does not exist (the closest one is named), or a value of another type.
    """
    known, defaults = leaves(config), leaves(Config())
    for name, value in values.items():
        if name not in known:
            group = [option for option in known if option.startswith(f"{name}.")]
            if group:
                raise UserError(f"config.{name}: a group of options, such as config.{group[0]}; name one of them")
            if name in RENAMED:
                raise UserError(f"config.{name}: this option is called config.{RENAMED[name]} now")
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
    """Refuses what cannot work, in one line each; returns `config`."""
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
        # transformers tells the two layouts of an expert's matrices apart by their shape alone.
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
            "experts.router_term must be none where experts.count is 0",
        ),
        (
            experts.router_term != "hard" or experts.per_token <= experts.count // 3,
            f"experts.router_term: hard divides {experts.count} experts among three views, and a token shall have"
            f" {experts.per_token}; set experts.count to {3 * experts.per_token} or more, or lower experts.per_token",
        ),
        (
            0 < config.data.min_visual_tokens <= config.data.visual_tokens,
            "data.min_visual_tokens must lie between 1 and data.visual_tokens",
        ),
        (0 < config.data.crop[0] <= config.data.crop[1] <= 1, "data.crop must be two shares of the area, rising"),
        (
            not config.data.mixture or (len(config.data.mixture) == 3 and sum(config.data.mixture) > 0),
            "data.mixture must be three shares, of queries by text, by image and by both, or empty",
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
            "training.keep_best keeps what evaluations found best: set evaluation.every",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"config.{message}")
    return config


def _flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name → value of a nested dict or ConfigDict."""
    flat = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return flat


def resolve(differences: Any, base: dict[str, Any] | None = None) -> Config:
    """The defaults with an `ml_collections.ConfigDict` (or nested dict) of differences applied.

    Args:
        base: options by dotted name that stand between the two, such as the sizes of a model to begin from.

    Raises:
        UserError: also for a difference that restates its default.
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
    """The folder of the shipped configs: installed within the package, in a clone at the top of the repository."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def load(source: str, base: dict[str, Any] | None = None) -> Config:
    """A config by name (quickstart, or configs/quickstart.py), or by path: Python with `get_config()`, or config.json.

    A Python config is code and is run: load only what you trust.

    Args:
        base: see `resolve`; a config.json holds every option, and leaves it no place.
    """
    shipped, path = shipped_configs(), Path(source)
    if not source.endswith((".py", ".json")):
        path = shipped / f"{source}.py"
    elif path.parent == Path("configs") and not path.is_file():
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
    except Exception as error:  # it is the user's code
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--config {source}: get_config() there gives no ConfigDict ({what})") from None
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
    except (ValueError, AttributeError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: not a config written by moon_jax ({error})") from None
    return replace(Config(), values)


def warmup_steps(training: Training) -> int:
    """Warm-up steps of a run: a share of it, at least `min_warmup`, never more than half of it."""
    return min(max(round(training.warmup * training.steps), training.min_warmup), training.steps // 2)
