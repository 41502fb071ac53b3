"""Checkpoints of a TrainState with Orbax. Parameters are an item of their own, so that a reader needs nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moon_jax import config as config_lib
from moon_jax.config import UserError
from moon_jax.types import TrainState

ITEMS = ("params", "rest")


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously, each whole or absent."""

    def __init__(self, workdir: Path, config: config_lib.Training | None = None):
        """Opens for writing with `config`, for reading without."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep if config else None,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
        )
        self._folder = (workdir / "checkpoints").absolute()
        handlers = {item: ocp.StandardCheckpointHandler() for item in ITEMS}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        self._every = config.save_every if config else 0

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, last: bool) -> None:
        """Saves at every `save_every`-th step and at the last one.

        Raises:
            UserError: the disk refused this save, or the one before it.
        """
        if (last or step % self._every == 0) and self.latest() != step:
            rest = {"step": state.step, "opt_state": state.opt_state, "bad_steps": state.bad_steps}
            items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(rest)}
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            with self._disk_errors():
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` gives shapes, dtypes and shardings.

        Raises:
            UserError: the checkpoint is of another architecture, or cannot be read.
        """
        rest = {"step": like.step, "opt_state": like.opt_state, "bad_steps": like.bad_steps}
        found = self._restore(step, {"params": like.params, "rest": rest})
        return TrainState(params=found["params"], **found["rest"])

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters of `step` alone. Raises what `restore` does."""
        return self._restore(step, {"params": like})["params"]

    def _restore(self, step: int, like: dict[str, Any]) -> Any:
        place = self._folder / str(step)
        try:
            held = self._manager.item_metadata(step)["params"].tree
        except Exception as error:  # Orbax and TensorStore raise nearly anything on damaged files
            raise UserError(_unreadable(place, error)) from None
        _check_architecture(place, held, like["params"])
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in like.items()})
            )
        except Exception as error:
            raise UserError(_unreadable(place, error)) from None

    def close(self) -> None:
        """Waits for saves under way.

        Raises:
            UserError: the disk refused one of them.
        """
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    def _check_room(self, size: int) -> None:
        """Refuses before anything is half written."""
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise UserError(
                f"{self._folder}: {os.strerror(errno.ENOSPC)}: a checkpoint needs {size / 1e6:,.1f} MB and"
                f" {free / 1e6:,.1f} MB are free; make room, and the same command goes on from the newest"
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """One line for a save that the disk refused; anything else is a bug and passes."""
        try:
            yield
        except Exception as error:
            # TensorStore's errors name the cause in their text only.
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    # The save's other threads fail as well, and tell so on stderr: ours shall be the last line.
                    with contextlib.suppress(Exception):
                        self._manager.close()
                    time.sleep(1)
                    raise UserError(
                        f"{self._folder}: a checkpoint could not be written: {os.strerror(code)}; older ones are whole:"
                        " mend that, and the same command goes on from the newest"
                    ) from None
            raise


def _unreadable(place: Path, error: Exception) -> str:
    first = (str(error) or type(error).__name__).splitlines()[0][:200]
    return f"{place}: not a readable checkpoint ({first}); remove it, and the one before it is taken"


def _check_architecture(place: Path, held: Any, like: Any) -> None:
    """Raises UserError for the first parameter that the checkpoint and the config do not share."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        }

    there, here = shapes(held), shapes(like)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{place}: a checkpoint of another architecture: {name} has shape {there.get(name, 'none')} there,"
                f" and {here.get(name, 'none')} by config.json; give the config that it was trained with"
            )


def latest_params(workdir: Path, like: Any) -> tuple[int, Any]:
    """Step and parameters of the newest checkpoint.

    Args:
        like: abstract parameters with shardings.

    Raises:
        UserError: none there, of another architecture, or unreadable.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoints there; train first, or give another model")
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir}: its training has not reached a first checkpoint yet")
        return step, checkpoints.restore_params(step, like)
    finally:
        checkpoints.close()


def on_one_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An abstract array on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
