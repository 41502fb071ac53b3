"""The report that a run writes when its loss or gradients stay NaN or Inf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moon_jax import config as config_lib
from moon_jax import distributed
from moon_jax.data.prepared import Prepared
from moon_jax.training import optimizer
from moon_jax.training.step import loss
from moon_jax.types import OBJECTIVES, Batch, TrainState

FILE = "bad_step.json"

STACKED = ("layers", "periods")
"""Path components whose parameters have a leading axis of layers."""


def norms(tree: Any) -> dict[str, jax.Array]:
    """The norm of every parameter by path: f32[], or f32[L] for a stack of layers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = tuple(range(1 if {*STACKED} & {*name.split("/")} else 0, leaf.ndim))
        found[name] = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
    return found


def dump(
    config: config_lib.Config,
    workdir: Path,
    state: TrainState,
    batch: Batch,
    placed: Batch,
    prepared: Prepared,
    step: int,
) -> None:
    """Writes FILE: the triplets of the step's batch, its losses, and the norms of gradients and parameters.

    Numbers that are not finite become null. All processes call this; the first one writes.

    Args:
        state: after the step; a bad step leaves parameters unchanged.
        batch: numpy arrays.
        placed: the same batch on the devices.
        step: number of steps done, including this one.
    """

    def measure(params: Any, batch: Batch) -> dict[str, Any]:
        trained = optimizer.trained(config.training, params)
        gradient = jax.value_and_grad(
            lambda trained: loss(optimizer.merge(trained, params), batch, config, step - 1), has_aux=True
        )
        (total, metrics), grads = gradient(trained)
        return {
            "total": total,
            "loss": dict(zip(OBJECTIVES, metrics["objectives"].loss, strict=True)),
            "gradient_norms": norms(grads),
            "parameter_norms": norms(params),
        }

    mesh = placed.weight.sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    try:
        with jax.set_mesh(mesh):
            measured = jax.device_get(jax.jit(measure, out_shardings=whole)(state.params, placed))
    except jax.errors.JaxRuntimeError as error:  # for example, no memory left beside the run's own
        measured, reason = {}, str(error).splitlines()[0]

    def to_json(value: Any) -> Any:
        if np.ndim(value):
            return [to_json(item) for item in value]
        return float(value) if np.isfinite(value) else None

    triplets = []
    for index in batch.triplet.tolist():
        triplet = prepared.triplets[index]
        ids = [None if member is None else prepared.products[member].id for member in triplet[:3]]
        named = dict(zip(("query", "positive", "negative"), ids, strict=True))
        triplets.append({"triplet": index, **named, "weight": triplet.weight})
    content = {"step": step, "triplets": triplets, **jax.tree.map(to_json, measured)}
    if not measured:
        content["not_measured"] = reason
    if distributed.is_primary():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (workdir / FILE).write_text(text, encoding="utf-8")
