"""Reads, changes and checks configs. All options and their defaults are in options.py.

A file in `configs/` returns an `ml_collections.ConfigDict` of *differences* from the defaults. `resolve` applies it,
and rejects unknown keys and values that equal the default.
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
from moon_jax.options import (
    FRAMES,
    TEMPLATES,
    Config,
    Data,
    Evaluation,
    Experts,
    Language,
    Mesh,
    Objective,
    Prepare,
    Training,
    Vision,
    batch_rows,
    period,
    sparse_layers,
    warmup_steps,
)

__all__ = [
    "FRAMES",
    "TEMPLATES",
    "Config",
    "Data",
    "Evaluation",
    "Experts",
    "Language",
    "Mesh",
    "Objective",
    "Prepare",
    "Training",
    "Vision",
    "batch_rows",
    "check",
    "leaves",
    "load",
    "override",
    "period",
    "read_json",
    "replace",
    "resolve",
    "shipped_configs",
    "sparse_layers",
    "to_json",
    "warmup_steps",
]


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
    "data.augmented": ("drawn", "half", "original", "augmented", "all"),
    "language.pooling": ("mean", "last"),
    "experts.dispatch": ("grouped", "expert_parallel", "dense"),
    "experts.router_term": ("none", "learned", "hard", "token", "token_hard"),
    "objective.levels": ("dual", "inter", "mm→mm"),
    "objective.weighting": ("samples", "uniform", "lagging", "routed", "product", "stopped"),
    "objective.known": ("masked", "positive"),
    "objective.symmetric": ("none", "intra", "all"),
    "training.dtype": ("float32", "bfloat16"),
    "training.param_dtype": ("float32", "bfloat16"),
    "training.remat": ("full", "selective", "none"),
}
"""Options with a fixed set of values."""


RENAMED = {
    "data.known": "objective.further",
    "data.mirror": "data.flip",
    "experts.redrawn": "experts.reinitialized",
    "training.bad_steps": "training.max_bad_steps",
    "training.rates": "training.learning_rate_factors",
}
"""Former names of options."""

RETIRED = {"objective.weighting": {"balanced": "samples"}}
"""Values that options no longer have, and what a saved config is read as. Only training uses this option."""


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
    may_be_zero = ("seed", "evaluation.every", "experts.count", "objective.further")
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
            config.objective.similar_margin < 2,
            "objective.similar_margin must lie below 2: two cosines differ by no more, so it would mask nothing",
        ),
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
            experts.router_term != "token_hard" or experts.per_token <= experts.count // 2,
            f"experts.router_term: token_hard divides {experts.count} experts between text and image, and a token needs"
            f" {experts.per_token}; set experts.count to {2 * experts.per_token} or more, or lower experts.per_token",
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
        values |= {name: RETIRED[name].get(values[name], values[name]) for name in RETIRED if name in values}
    except (ValueError, AttributeError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: not a config written by moon_jax ({error})") from None
    return replace(Config(), values)
