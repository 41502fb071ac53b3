"""The optimiser: learning rates by group and by path, freezing, weight decay."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from moon_jax import config as config_lib
from moon_jax.errors import UserError

UNDECAYED = ("scale", "bias", "patch_bias", "router_term")


def _names(path: tuple[Any, ...]) -> list[str]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def parameter_group(path: tuple[Any, ...]) -> str:
    """The learning-rate group of a parameter: dual, temperature, router or backbone (experts included)."""
    names = _names(path)
    groups = {"dual": "dual", "log_temperature": "temperature", "router": "router", "router_term": "router"}
    return groups.get(names[-1], "backbone")


def is_decayed(path: tuple[Any, ...]) -> bool:
    """Weight decay acts on the encoder's matrices, not on norms, biases or the alignment parameters."""
    names = _names(path)
    return names[0] == "encoder" and names[-1] not in UNDECAYED


def rates(config: config_lib.Training) -> list[tuple[str, float]]:
    """Patterns of parameter paths and their learning-rate factors (`training.learning_rate_factors`)."""
    pairs = (rate.rpartition("=") for rate in config.learning_rate_factors)
    return [(pattern, float(factor)) for pattern, _, factor in pairs]


def peak(config: config_lib.Training, path: tuple[Any, ...]) -> float:
    """The peak learning rate of a parameter: its group's, times the factor of the first pattern that matches."""
    by_group = {
        "backbone": config.learning_rate,
        "router": config.router_learning_rate,
        "dual": config.dual_learning_rate,
        "temperature": config.temperature_learning_rate,
    }
    name = "/".join(_names(path))
    factors = (factor for pattern, factor in rates(config) if fnmatch.fnmatchcase(name, pattern))
    return by_group[parameter_group(path)] * next(factors, 1.0)


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def trained(config: config_lib.Training, params: Any) -> Any:
    """`params` with None for frozen ones (learning rate 0), for which no gradient is computed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if peak(config, path) else None, params, is_leaf=_is_box
    )


def merge(trained: Any, params: Any) -> Any:
    """`params` with the leaves of `trained` that are not None."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda node: node is None
    )


def named(name: str, betas: tuple[float, float] = (0.9, 0.999)) -> optax.GradientTransformation:
    """An optimizer of optax (or optax.contrib) at learning rate 1, without weight decay; `make_optimizer` adds both.

    Args:
        betas: its b1 and b2, if it has them. Everything else is optax's default.

    Raises:
        UserError: there is no such optimizer, or it needs more than gradients.
    """
    factory = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    parameters = _parameters(factory)
    if "learning_rate" not in parameters:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names that optax deprecates
            known = [one for part in (optax, optax.contrib) for one in dir(part) if one.islower() and one[0] != "_"]
            known = [one for one in known if "learning_rate" in _parameters(getattr(optax, one, None))]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"config.training.optimizer: {name} is not an optimizer of optax; the closest is {close}")
    given = {"learning_rate": 1.0, "b1": betas[0], "b2": betas[1], "weight_decay": 0.0}
    try:
        optimizer = factory(**{key: value for key, value in given.items() if key in parameters})
        probe = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        state = jax.eval_shape(lambda probe: optimizer.update(probe, optimizer.init(probe), probe)[1], probe)
        if not all(leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number) for leaf in jax.tree.leaves(state)):
            raise ValueError("a random key, which would have to follow from the seed and the step")
    except Exception as error:  # each optimizer fails in its own way
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"config.training.optimizer: {name} needs more than gradients ({first}); adamw, lion, adafactor and"
            " muon are some that do not"
        ) from None
    return optimizer


def _parameters(factory: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return {}


def make_optimizer(config: config_lib.Training) -> optax.GradientTransformation:
    """`config.optimizer` with a clipped global norm and decoupled weight decay. The learning rate follows a warm-up +
    cosine schedule with its own peak for each parameter. Takes the parameters that `trained` returns.
    """
    warmup = config_lib.warmup_steps(config)

    def scheduled(rate: float) -> optax.GradientTransformation:
        return optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps))

    def by_peak(updates: Any) -> optax.GradientTransformation:
        labels = jax.tree_util.tree_map_with_path(lambda path, _: str(peak(config, path)), updates)
        by_label = {label: scheduled(float(label)) for label in sorted({*jax.tree.leaves(labels)})}
        return optax.multi_transform(by_label, labels)

    rate_of = optax.GradientTransformation(
        init=lambda params: by_peak(params).init(params),
        update=lambda updates, state, params=None: by_peak(updates).update(updates, state, params),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        named(config.optimizer, config.betas),
        optax.add_decayed_weights(
            -config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params),
        ),
        rate_of,
    )


def check(config: config_lib.Training, params: Any) -> None:
    """Checks that the optimizer exists and that every pattern matches some of the abstract `params`.

    Raises:
        UserError: with the closest name.
    """
    named(config.optimizer, config.betas)
    names = ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in rates(config):
        if not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
            raise UserError(
                f"config.training.learning_rate_factors: {pattern} matches no parameter; the closest is {close}"
            )


def table(config: config_lib.Training, params: Any) -> Table:
    """What trains, for each part of the abstract `params`: parameter count, peak learning rate, weight decay."""
    parts: dict[tuple[str, float], list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [name for name in _names(path) if name != "periods" and not name.startswith("layer_")]
        part = "/".join(names[:2])
        if names[1] == "decoder":
            part += "/norms" if names[2].endswith("norm") else f"/{names[2]}"
        part += "/router" if parameter_group(path) == "router" else ""
        counts = parts.setdefault((part, peak(config, path)), [0, 0])
        counts[0] += leaf.size
        counts[1] += leaf.size if is_decayed(path) else 0
    shown = Table(title=f"trained with {config.optimizer}")
    shown.add_column("parameters")
    for column in ("count", "learning rate", "decayed"):
        shown.add_column(column, justify="right")
    for (part, rate), (size, decayed) in parts.items():
        share = f"{100 * decayed / size:.0f}%" if rate and config.weight_decay else "-"
        shown.add_row(part, f"{size:,}", f"{rate:g}" if rate else "frozen", share)
    return shown
