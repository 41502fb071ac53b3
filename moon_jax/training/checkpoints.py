"""Checkpoints of a TrainState with Orbax. Parameters are an item of their own, so that a reader needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.types import TrainState


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously, each whole or absent."""

    def __init__(self, workdir: Path, config: config_lib.Training | None = None):
        """Opens for writing with `config`, for reading without."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
        self._every = config.save_every if config else 0

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, last: bool) -> None:
        """Saves at every `save_every`-th step and at the last one."""
        if (last or step % self._every == 0) and self.latest() != step:
            rest = {"step": state.step, "opt_state": state.opt_state, "bad_steps": state.bad_steps}
            items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(rest)}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` gives shapes, dtypes and shardings."""
        rest = {"step": like.step, "opt_state": like.opt_state, "bad_steps": like.bad_steps}
        items = {"params": ocp.args.StandardRestore(like.params), "rest": ocp.args.StandardRestore(rest)}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(params=found["params"], **found["rest"])

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters of `step` alone."""
        items = {"params": ocp.args.StandardRestore(like)}
        return self._manager.restore(step, args=ocp.args.Composite(**items))["params"]

    def close(self) -> None:
        """Waits for saves under way; raises if one failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()


def latest_params(workdir: Path, like: Any) -> tuple[int, Any]:
    """Step and parameters of the newest checkpoint.

    Args:
        like: abstract parameters; shardings are taken from it where it has them.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoints there; train first, or give another model")
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir}: its training has not reached a first checkpoint yet")
        return step, checkpoints.restore_params(step, jax.tree.map(_on_one_device, like))
    finally:
        checkpoints.close()


def _on_one_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding)
