"""The initial state and one training step: pure functions, compiled once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moon_jax import config as config_lib
from moon_jax.model.encoder import Encoder, initialize
from moon_jax.objectives import objectives
from moon_jax.training import optimizer
from moon_jax.types import OBJECTIVES, Array, Batch, Objectives, Rows, TrainState


def initial_state(config: config_lib.Config, rows: Rows, encoder: Any = None, alignment: Any = None) -> TrainState:
    """The state before step 0, a function of config.seed. Parameters are in partitioning boxes (see `nn.unbox`).

    Args:
        rows: any rows of the training layout; only their shapes matter.
        encoder, alignment: parameters to start from; by default random ones. W* may be missing from `alignment`.
    """
    encoder_rng, dual_rng = jax.random.split(jax.random.key(config.seed))
    alignment = alignment or {"log_temperature": jnp.log(jnp.array(config.objective.temperature))}
    layers = sum(config_lib.sparse_layers(config))
    if layers and "dual" not in alignment:  # a dense model, which gets experts, has none
        shape = (layers, config.experts.count, len(OBJECTIVES))
        alignment = alignment | {"dual": config.objective.dual_init * jax.random.normal(dual_rng, shape)}
    encoder = initialize(config, encoder_rng, rows) if encoder is None else encoder
    params = {"encoder": encoder, "alignment": alignment}
    opt_state = optimizer.make_optimizer(config.training).init(optimizer.trained(config.training, params))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, opt_state, bad_steps=zero, bad_in_a_row=zero)


def loss(
    params: Any, batch: Batch, config: config_lib.Config, step: Array
) -> tuple[Array, dict[str, Array | Objectives]]:
    """The total loss and its components.

    Returns:
        f32[]; and {"objectives": Objectives, "modality": f32[L,2,E], as in EncoderOutput, "dropped": f32[L], the share
        of routes dropped for lack of capacity}.
    """
    output = Encoder(config, training=True).apply({"params": params["encoder"]}, batch.rows)
    result = objectives(output, params["alignment"], batch, config, step)
    modality = jax.lax.stop_gradient(output.modality)
    routes = jnp.maximum(config.experts.per_token * output.valid, 1)
    return result.total, {"objectives": result, "modality": modality, "dropped": output.dropped / routes}


def train_step(
    state: TrainState, batch: Batch, config: config_lib.Config
) -> tuple[TrainState, dict[str, Array | Objectives]]:
    """One optimiser step. If the loss, gradient or new parameters are not finite, only the counters change.

    Returns:
        The next state; and the metrics of `loss` with {"grad_norm": f32[], "finite": bool[], "bad_in_a_row": i32[]}.
    """
    trained = optimizer.trained(config.training, state.params)

    def of_trained(trained: Any) -> tuple[Array, dict[str, Array | Objectives]]:
        return loss(optimizer.merge(trained, state.params), batch, config, state.step)

    (total, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.make_optimizer(config.training).update(grads, state.opt_state, trained)
    updated = optax.apply_updates(trained, updates)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    for leaf in jax.tree.leaves(updated):
        finite &= jnp.isfinite(leaf).all()
    updated, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (updated, opt_state), (trained, state.opt_state)
    )
    in_a_row = jnp.where(finite, 0, state.bad_in_a_row + 1)
    after = TrainState(
        step=state.step + 1,
        params=optimizer.merge(updated, state.params),
        opt_state=opt_state,
        bad_steps=state.bad_steps + (~finite).astype(jnp.int32),
        bad_in_a_row=in_a_row,
    )
    return after, metrics | {"grad_norm": norm, "finite": finite, "bad_in_a_row": in_a_row}
