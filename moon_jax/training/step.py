"""The optimiser, the state, and one training step: pure functions, one compilation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moon_jax import config as config_lib
from moon_jax.model.encoder import Encoder, initialize
from moon_jax.objectives import objectives
from moon_jax.types import OBJECTIVES, Array, Batch, Objectives, Rows, TrainState

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


def make_optimizer(config: config_lib.Training) -> optax.GradientTransformation:
    """AdamW with a clipped global norm; each group of parameters has its own peak of a warm-up + cosine schedule."""
    peaks = {
        "backbone": config.learning_rate,
        "router": config.router_learning_rate,
        "dual": config.dual_learning_rate,
        "temperature": config.temperature_learning_rate,
    }
    warmup = config_lib.warmup_steps(config)

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)

    def by_path(function):
        return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: function(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=by_path(is_decayed)),
        optax.multi_transform(
            {group: optax.scale_by_learning_rate(schedule(peak)) for group, peak in peaks.items()},
            by_path(parameter_group),
        ),
    )


def initial_state(config: config_lib.Config, rows: Rows, encoder: Any = None) -> TrainState:
    """The state before step 0, a function of config.seed; parameters in partitioning boxes (`nn.unbox` opens them).

    Args:
        rows: any rows of the training layout; only shapes are read.
        encoder: parameters to begin from, in place of random ones.
    """
    encoder_rng, dual_rng = jax.random.split(jax.random.key(config.seed))
    alignment = {"log_temperature": jnp.log(jnp.array(config.objective.temperature))}
    layers = sum(config_lib.sparse_layers(config))
    if layers:
        shape = (layers, config.experts.count, len(OBJECTIVES))
        alignment["dual"] = config.objective.dual_init * jax.random.normal(dual_rng, shape)
    encoder = initialize(config, encoder_rng, rows) if encoder is None else encoder
    params = {"encoder": encoder, "alignment": alignment}
    opt_state = make_optimizer(config.training).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.zeros((), jnp.int32))


def loss(
    params: Any, batch: Batch, config: config_lib.Config, step: Array
) -> tuple[Array, dict[str, Array | Objectives]]:
    """The total loss, and of what it was made.

    Returns:
        f32[]; and {"objectives": Objectives, "modality": f32[L,2,E], G̃ summed over all text and all image tokens,
        "dropped": f32[L], the share of routes that found no room}.
    """
    output = Encoder(config, training=True).apply({"params": params["encoder"]}, batch.rows)
    result = objectives(output, params["alignment"], batch, config, step)
    modality = jax.lax.stop_gradient(output.gate[:, :, :2].sum(axis=1))  # the views t and i of every row
    routes = jnp.maximum(config.experts.per_token * output.valid, 1)
    return result.total, {"objectives": result, "modality": modality, "dropped": output.dropped / routes}


def train_step(
    state: TrainState, batch: Batch, config: config_lib.Config
) -> tuple[TrainState, dict[str, Array | Objectives]]:
    """One optimiser step. A step whose loss or gradient is not finite changes nothing but the counters.

    Returns:
        The next state, and what `loss` returns with {"grad_norm": f32[], "finite": bool[]}.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    (total, metrics), grads = gradient(state.params, batch, config, state.step)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)

    updates, opt_state = make_optimizer(config.training).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    bad_steps = state.bad_steps + (~finite).astype(jnp.int32)
    return TrainState(state.step + 1, params, opt_state, bad_steps), metrics | {"grad_norm": norm, "finite": finite}
