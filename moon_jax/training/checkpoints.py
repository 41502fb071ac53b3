"""Checkpoints of a TrainState with Orbax. Parameters are an item of their own, so that a reader needs nothing else.

A checkpoint also holds what it says of itself (about.py). What is read counts only if it is bit for bit what was saved.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from moon_jax import config as config_lib
from moon_jax import distributed, storage
from moon_jax.errors import Unavailable, UserError
from moon_jax.training import provenance as about_lib
from moon_jax.types import TrainState

ITEMS = ("params", "rest")

SETTLE = 60
"""Seconds after which all processes must see the same checkpoints."""

LOOKED_AT = 100
"""So many of the newest are compared."""

BEST = "R@10"
"""What `training.keep_best` goes by: the mean of R@10 over all directions, in percent."""


class Damaged(Exception):
    """A checkpoint that is not what was saved; says why."""


class _Remembering:
    """A save under way whose failure is remembered: Orbax tells it only after all processes have waited for each other,
    and one that failed is waited for in vain.
    """

    def __init__(self, future: Any, failures: list[Exception]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise


def _handler(failures: list[Exception]) -> ocp.StandardCheckpointHandler:
    """Orbax's own, with failures remembered. Its type stays: arguments are registered by type."""
    handler = ocp.StandardCheckpointHandler()
    async_save = handler.async_save

    async def remembering(*arguments: Any, **options: Any) -> list[_Remembering]:
        return [_Remembering(future, failures) for future in await async_save(*arguments, **options) or ()]

    handler.async_save = remembering
    return handler


class _Best:
    """Orbax's policy for what is kept, after scores that outlive a restart."""

    def __init__(self, count: int, scores: dict[int, float]):
        self._count, self._scores = count, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        scored = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(scored, key=lambda step: (self._scores[step], step))[-self._count :]
        return [info.step in best for info in checkpoints]


def _split(state: TrainState) -> dict[str, Any]:
    rest = {name: getattr(state, name) for name in ("step", "opt_state", "bad_steps", "bad_in_a_row")}
    return {"params": state.params, "rest": rest}


def _as_saved(like: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Abstract arrays in the dtypes that they were saved with: a digest is of bits, before any cast."""

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(about["arrays"][about_lib.name_of(path)][1])
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, like)


class Checkpoints:
    """The checkpoints of a workdir, saved asynchronously, each whole or absent."""

    def __init__(self, folder: epath.Path, config: config_lib.Training | None = None):
        """Opens `folder`, a place's `checkpoints`, for writing with `config`, for reading without."""
        policies, self._scores = [], {}
        if config:
            policies.append(keep.LatestN(config.keep))
            if config.keep_every:
                policies.append(keep.EveryNSteps(config.keep_every))
            if config.keep_best:
                policies.append(_Best(config.keep_best, self._scores))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies) if policies else None,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
        )
        self._folder = folder
        self._writes = config is not None
        self._failures: list[Exception] = []
        self._closed = False
        self._handlers = {item: _handler(self._failures) for item in ITEMS} | {"about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=self._handlers)
        for step in self._manager.all_steps() if config and config.keep_best else ():
            with contextlib.suppress(Exception):  # a damaged one, which nobody keeps for its score
                self._remember(step, self._about(step)["scores"])

    def _remember(self, step: int, scores: dict[str, float]) -> None:
        if BEST in scores:
            self._scores[step] = scores[BEST]

    def newest(self) -> int | None:
        """The step of the newest checkpoint, damaged or not."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, about: dict[str, Any], scores: dict[str, float] | None = None) -> None:
        """Begins to save, unless this step is saved already; the state may be given away as soon as this returns.

        Args:
            about: what `describe` gives.
            scores: {BEST: …} of an evaluation of this state.

        Raises:
            UserError: the disk refused this save, or the one before it.
        """
        if self.newest() == step:
            return
        items = _split(state)
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        about = about_lib.seal(about | {"step": step, "scores": scores or {}, "arrays": about_lib.arrays(items)})
        self._remember(step, scores or {})
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._disk_errors():
            args = ocp.args.Composite(**args, about=ocp.args.JsonSave(about))
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Looks whether this process's part of a save under way has failed; takes no time.

        Raises:
            UserError: the disk refused it.
        """
        with self._disk_errors():
            if self._failures:
                raise self._failures[0]
            self._manager.check_for_errors()

    def restore(
        self, like: TrainState, expected: dict[str, Any], tell: Callable[[str], None]
    ) -> tuple[int, TrainState] | None:
        """Step and state of the newest checkpoint that is whole; None where there is none at all.

        Damaged ones that are newer are moved to the workdir's folder `damaged`.

        Args:
            like: shapes, dtypes and shardings.
            expected: entries of `about` that must be these, such as the data's fingerprint.
            tell: is told of damaged ones, a line each.

        Raises:
            UserError: it is of another architecture, or of other data; it cannot be read now; or all are damaged.
        """
        found = self._newest(_split(like), expected, tell)
        return found and (found[0], TrainState(params=found[1]["params"], **found[1]["rest"]))

    def restore_params(self, like: Any, tell: Callable[[str], None]) -> tuple[int, Any] | None:
        """Step and parameters of the newest checkpoint whose parameters are whole. As `restore` otherwise."""
        found = self._newest({"params": like}, {}, tell)
        return found and (found[0], found[1]["params"])

    def _newest(self, like: dict[str, Any], expected: dict[str, Any], tell: Callable) -> tuple[int, Any] | None:
        damaged, problem = [], ""
        for step in reversed(self._agreed()):
            items, problem = None, ""
            place = self._folder / str(step)
            with distributed.fail_together(), _quiet():
                try:
                    about = self._about(step)
                    about_lib.check_architecture(place, about, like)
                    for name, value in expected.items():
                        if about[name] != value:
                            raise UserError(f"{place}: was saved with another {name}, {about[name]}; this is {value}")
                    items = {
                        name: self._read(step, name, ocp.args.StandardRestore(item))
                        for name, item in _as_saved(like, about).items()
                    }
                except UserError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise nearly anything on damaged files
                    problem = _cause(error)
                    if _unreachable(error):
                        raise Unavailable(
                            f"{place}: cannot be read now ({problem}), which tells nothing of what is there;"
                            " mend that and give the same command again, or move it away to go on from the one before"
                        ) from None
            # One process may have met what the others did not read.
            problem = next(filter(None, distributed.allgather(problem)), "")
            if not problem:
                differing = [name for name, entry in about_lib.arrays(items).items() if entry != about["arrays"][name]]
                if not differing:
                    if self._writes:
                        self._set_aside(damaged)
                    return step, jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), items, like)
                problem = f"{differing[0].removeprefix('params/')} is not what was saved"
            tell(f"{place}: a damaged checkpoint ({problem}); skipped, the one before is taken")
            damaged.append(step)
        if damaged:
            names = ", ".join(map(str, damaged))
            raise UserError(
                f"{self._folder}: no checkpoint is whole, all are damaged: {names} ({problem}); bring one back, or take"
                " another workdir"
            )
        return None

    def _agreed(self) -> list[int]:
        """The steps whose checkpoints all processes see, rising. A shared folder may show one of them later.

        Raises:
            Unavailable: they still see different ones after SETTLE seconds.
        """
        for _ in range(SETTLE):
            steps = sorted(self._manager.all_steps())
            seen = [json.loads(said) for said in distributed.allgather(json.dumps(steps[-LOOKED_AT:]))]
            if all(other == seen[0] for other in seen):
                return steps
            time.sleep(1)
            self._manager.reload()
        other = next(index for index, steps in enumerate(seen) if steps != seen[0])
        raise Unavailable(
            f"{self._folder}: process {other} sees checkpoints {seen[other]} and process 0 {seen[0]}; give all"
            " processes one folder"
        )

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """An item as its handler reads it. The manager would have all processes wait for each other after that, also
        for one that could not read its part.
        """
        return self._handlers[item].restore(self._folder / str(step) / item, args=args)

    def _about(self, step: int) -> dict[str, Any]:
        about = self._read(step, "about", ocp.args.JsonRestore())
        seal = about.pop("digest")
        if about_lib.seal(about)["digest"] != seal:
            raise Damaged("about is not what was saved")
        return about

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way: their steps will be saved anew."""
        if not steps:
            return
        if distributed.is_primary():
            for step in steps:
                storage.move(self._folder / str(step), self._folder.parent / "damaged" / str(step))
        distributed.allgather("")  # the others wait
        self._manager.reload()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Closes. After a UserError a save under way is waited for all the same, unless it is what failed."""
        if kind is None:
            self.close()
        elif issubclass(kind, UserError) and not self._failures:
            with contextlib.suppress(Exception):
                self.close()

    def close(self) -> None:
        """Waits for saves under way; the second time does nothing.

        Raises:
            UserError: the disk refused one of them.
        """
        if self._closed:
            return
        self._closed = True
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._manager.close()

    def _check_room(self, size: int) -> None:
        """Refuses before anything is half written."""
        if storage.is_remote(self._folder):
            return
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
            if jax.process_count() > 1:
                self._failures.append(error)  # no more waiting for the others
            # TensorStore's errors name the cause in their text only.
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    # The save's other threads fail as well, and tell so on stderr: ours shall be the last line.
                    if jax.process_count() == 1:
                        with contextlib.suppress(Exception):
                            self._manager.close()
                    time.sleep(1)
                    raise UserError(
                        f"{self._folder}: a checkpoint could not be written: {os.strerror(code)}; older ones are whole:"
                        " mend that, and the same command goes on from the newest"
                    ) from None
            if storage.is_remote(self._folder):
                raise Unavailable(
                    f"{self._folder}: a checkpoint could not be written: {_cause(error)}; older ones are whole:"
                    " mend that, and the same command goes on from the newest"
                ) from None
            raise


UNREACHABLE = re.compile(
    "|".join(
        ["PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
        + [os.strerror(code) for code in (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)]
    )
)
"""Causes, in TensorStore's words and the system's, of a failure to read what may be whole."""


def _cause(error: BaseException) -> str:
    """Why something could not be read or written, and which file: what lies at the bottom of Orbax's errors."""
    while error.__cause__:
        error = error.__cause__
    text = re.split(r" \[[a-z_]+(?:\[\d+\])?='", storage.first_line(error, 5000))[
        0
    ]  # TensorStore appends all that it knows
    files = re.findall(r'local file "([^"]+)"|Failed to open: "([^"]+)"|(gs://[^ :]+)', text)
    if not files:
        return text[:200]
    return f"{next(filter(None, files[-1]))}: {text.rsplit(': ', 1)[-1]}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Orbax leaves unfinished when it cannot read a checkpoint tells nothing but that, at length, on stderr."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
            gc.collect(1)  # what was made just now
    finally:
        sys.unraisablehook = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _unreachable(error: BaseException | None) -> bool:
    """Whether a failure to read tells nothing of what is there: no permission, or a disk that does not answer."""
    while error:
        if isinstance(error, PermissionError | ConnectionError | TimeoutError) or UNREACHABLE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def latest_params(folder: epath.Path, like: Any) -> tuple[int, Any]:
    """Step and parameters of the newest checkpoint that is whole; warns of damaged ones.

    Args:
        folder: a place's `checkpoints`.
        like: abstract parameters with shardings.

    Raises:
        UserError: none there, of another architecture, or all are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder.parent}: no checkpoints there; train first, or give another model")
    checkpoints = Checkpoints(folder)
    try:
        found = checkpoints.restore_params(like, lambda line: warnings.warn(line, stacklevel=3))
        if found is None:
            raise UserError(f"{folder.parent}: its training has not reached a first checkpoint yet")
        return found
    finally:
        checkpoints.close()


def steps(folder: epath.Path) -> list[int]:
    """The steps whose checkpoints stand in `folder`, damaged or not; those that a kill cut short do not."""
    if not folder.is_dir():
        return []
    opened = Checkpoints(folder)
    try:
        return sorted(opened._manager.all_steps())
    finally:
        opened._manager.close()


def on_one_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An abstract array on the first device of this process."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
