"""Orbax checkpoints of a TrainState. Parameters are a separate item, so that readers can load them alone.

A checkpoint also holds its metadata (provenance.py), with a digest of every array. Restoring verifies the digests: what
is restored is bit for bit what was saved.
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
from moon_jax.training import provenance
from moon_jax.types import TrainState

ITEMS = ("params", "rest")

SETTLE_SECONDS = 60
"""How long to wait until all processes see the same checkpoints."""

COMPARED = 100
"""How many of the newest checkpoints the processes compare."""

BEST = "R@10"
"""The score that `training.keep_best` ranks by: the mean of R@10 over all directions, in percent."""


class Damaged(Exception):
    """A checkpoint that differs from what was saved; the message says why."""


class _RecordingFuture:
    """A pending save that records its failure at once. Orbax reports a failure only after all processes have
    synchronised, and a process that failed never arrives there.
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
    """Orbax's handler, recording failures. Not a subclass: Orbax registers arguments by the handler's type."""
    handler = ocp.StandardCheckpointHandler()
    async_save = handler.async_save

    async def recording(*arguments: Any, **options: Any) -> list[_RecordingFuture]:
        return [_RecordingFuture(future, failures) for future in await async_save(*arguments, **options) or ()]

    handler.async_save = recording
    return handler


class _Best:
    """A preservation policy that keeps the best checkpoints; unlike Orbax's own, its scores survive a restart."""

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
    """Abstract arrays in their saved dtypes: digests are of the saved bits, so no cast may come first."""

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(about["arrays"][provenance.name_of(path)][1])
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, like)


class Checkpoints:
    """The checkpoints of a workdir. Saves are asynchronous and atomic."""

    def __init__(self, folder: epath.Path, config: config_lib.Training | None = None):
        """Opens `folder` (`Store.checkpoints`): with `config` for writing, without it for reading."""
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
            with contextlib.suppress(Exception):  # damaged, so not worth keeping for its score
                self._remember(step, self._about(step)["scores"])

    def _remember(self, step: int, scores: dict[str, float]) -> None:
        if BEST in scores:
            self._scores[step] = scores[BEST]

    def newest(self) -> int | None:
        """The step of the newest checkpoint, damaged or not."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, about: dict[str, Any], scores: dict[str, float] | None = None) -> None:
        """Starts a background save, unless this step is saved already. The state may be donated once this returns.

        Args:
            about: the result of `provenance.describe`.
            scores: {BEST: …} if this state was evaluated.

        Raises:
            UserError: the disk refused this save or the previous one.
        """
        if self.newest() == step:
            return
        items = _split(state)
        self._check_free_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        about = provenance.seal(about | {"step": step, "scores": scores or {}, "arrays": provenance.arrays(items)})
        self._remember(step, scores or {})
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._disk_errors():
            args = ocp.args.Composite(**args, about=ocp.args.JsonSave(about))
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Checks, without waiting, whether this process's part of a pending save has failed.

        Raises:
            UserError: the disk refused it.
        """
        with self._disk_errors():
            if self._failures:
                raise self._failures[0]
            self._manager.check_for_errors()

    def restore(
        self, like: TrainState, expected: dict[str, Any], warn: Callable[[str], None]
    ) -> tuple[int, TrainState] | None:
        """The step and state of the newest intact checkpoint, or None if there are no checkpoints.

        Newer checkpoints that are damaged are moved to `damaged/` in the workdir.

        Args:
            like: shapes, dtypes and shardings.
            expected: metadata that must match, such as the data's fingerprint.
            warn: called with one line for each damaged checkpoint.

        Raises:
            UserError: it is of another architecture or other data; it cannot be read now; or all are damaged.
        """
        found = self._newest(_split(like), expected, warn)
        return found and (found[0], TrainState(params=found[1]["params"], **found[1]["rest"]))

    def restore_params(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any] | None:
        """The step and parameters of the newest checkpoint with intact parameters. Otherwise like `restore`."""
        found = self._newest({"params": like}, {}, warn)
        return found and (found[0], found[1]["params"])

    def _newest(self, like: dict[str, Any], expected: dict[str, Any], warn: Callable) -> tuple[int, Any] | None:
        damaged, problem = [], ""
        for step in reversed(self._agreed()):
            items, problem = None, ""
            path = self._folder / str(step)
            with distributed.fail_together(), _quiet():
                try:
                    about = self._about(step)
                    provenance.check_architecture(path, about, like)
                    for name, value in expected.items():
                        if about[name] != value:
                            raise UserError(
                                f"{path}: was saved with other {name} ({about[name]}, not {value}); give the same, or"
                                " use another workdir"
                            )
                    items = {
                        name: self._read(step, name, ocp.args.StandardRestore(item))
                        for name, item in _as_saved(like, about).items()
                    }
                except UserError:
                    raise
                except Exception as error:  # on damaged files Orbax and TensorStore raise nearly anything
                    problem = _cause(error)
                    if _unreachable(error):
                        raise Unavailable(
                            f"{path}: cannot be read now ({problem}) but may be intact; fix that and run the same"
                            " command again, or move it away to resume from the previous one"
                        ) from None
            # The damage may be in a part that only one process reads.
            problem = next(filter(None, distributed.allgather(problem)), "")
            if not problem:
                differing = [name for name, entry in provenance.arrays(items).items() if entry != about["arrays"][name]]
                if not differing:
                    if self._writes:
                        self._set_aside(damaged)
                    return step, jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), items, like)
                problem = f"{differing[0].removeprefix('params/')} differs from what was saved"
            warn(f"{path}: damaged checkpoint ({problem}); skipped, trying the previous one")
            damaged.append(step)
        if damaged:
            names = ", ".join(map(str, damaged))
            raise UserError(
                f"{self._folder}: all checkpoints are damaged: {names} ({problem}); restore one from a backup, or use"
                " another workdir"
            )
        return None

    def _agreed(self) -> list[int]:
        """The checkpointed steps, ascending, once all processes see the same: a shared folder may lag on some hosts.

        Raises:
            Unavailable: they still differ after SETTLE_SECONDS.
        """
        for _ in range(SETTLE_SECONDS):
            steps = sorted(self._manager.all_steps())
            seen = [json.loads(text) for text in distributed.allgather(json.dumps(steps[-COMPARED:]))]
            if all(other == seen[0] for other in seen):
                return steps
            time.sleep(1)
            self._manager.reload()
        other = next(index for index, steps in enumerate(seen) if steps != seen[0])
        raise Unavailable(
            f"{self._folder}: process {other} sees checkpoints {seen[other]}, process 0 sees {seen[0]}; give all"
            " processes the same folder"
        )

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        """Reads an item with its handler. The manager would make all processes synchronise afterwards, and hang if one
        of them failed to read its part.
        """
        return self._handlers[item].restore(self._folder / str(step) / item, args=args)

    def _about(self, step: int) -> dict[str, Any]:
        about = self._read(step, "about", ocp.args.JsonRestore())
        seal = about.pop("digest")
        if provenance.seal(about)["digest"] != seal:
            raise Damaged("about differs from what was saved")
        return about

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way: their steps will be saved again."""
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
        """Closes. After a UserError too, a pending save is finished first, unless the save itself failed."""
        if kind is None:
            self.close()
        elif issubclass(kind, UserError) and not self._failures:
            with contextlib.suppress(Exception):
                self.close()

    def close(self) -> None:
        """Waits for pending saves; a second call does nothing.

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

    def _check_free_space(self, size: int) -> None:
        """Fails before anything is half written."""
        if storage.is_remote(self._folder):
            return
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise UserError(
                f"{self._folder}: {os.strerror(errno.ENOSPC)}: a checkpoint needs {size / 1e6:,.1f} MB and"
                f" {free / 1e6:,.1f} MB are free; free some space and run the same command again to resume"
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a save that the disk refused into a UserError; anything else is a bug and propagates."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1:
                self._failures.append(error)  # so that close() does not wait for the other processes
            # TensorStore's errors give the cause only in their text.
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                    # The other threads of the save fail too and print that to stderr. Our line should come last.
                    if jax.process_count() == 1:
                        with contextlib.suppress(Exception):
                            self._manager.close()
                    time.sleep(1)
                    raise UserError(
                        f"{self._folder}: a checkpoint could not be written: {os.strerror(code)}; older ones are"
                        " intact: fix that and run the same command again to resume from the newest"
                    ) from None
            if storage.is_remote(self._folder):
                raise Unavailable(
                    f"{self._folder}: a checkpoint could not be written: {_cause(error)}; older ones are intact:"
                    " fix that and run the same command again to resume from the newest"
                ) from None
            raise


UNREACHABLE = re.compile(
    "|".join(
        ["PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
        + [os.strerror(code) for code in (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)]
    )
)
"""Causes, as TensorStore and the system word them, that make an intact checkpoint unreadable."""


def _cause(error: BaseException) -> str:
    """Why something could not be read or written, and which file: the root cause of an error of Orbax's."""
    while error.__cause__:
        error = error.__cause__
    # TensorStore appends its whole context to the message.
    text = re.split(r" \[[a-z_]+(?:\[\d+\])?='", storage.first_line(error, 5000))[0]
    files = re.findall(r'local file "([^"]+)"|Failed to open: "([^"]+)"|(gs://[^ :]+)', text)
    if not files:
        return text[:200]
    return f"{next(filter(None, files[-1]))}: {text.rsplit(': ', 1)[-1]}"[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the unfinished tasks that Orbax leaves after a failed read: they repeat the failure on stderr."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
            gc.collect(1)  # the unfinished tasks, while they are still silenced
    finally:
        sys.unraisablehook = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _unreachable(error: BaseException | None) -> bool:
    """Whether a failed read says nothing about the contents: no permission, or a disk that does not respond."""
    while error:
        if isinstance(error, PermissionError | ConnectionError | TimeoutError) or UNREACHABLE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def latest_params(folder: epath.Path, like: Any) -> tuple[int, Any]:
    """The step and parameters of the newest intact checkpoint; warns about damaged ones.

    Args:
        folder: `Store.checkpoints`.
        like: abstract parameters with shardings.

    Raises:
        UserError: there are none, they are of another architecture, or all are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder.parent}: no checkpoints there; train first, or give another model")
    checkpoints = Checkpoints(folder)
    try:
        found = checkpoints.restore_params(like, lambda line: warnings.warn(line, stacklevel=3))
        if found is None:
            raise UserError(f"{folder.parent}: no checkpoint was saved yet; train for longer, or give another model")
        return found
    finally:
        checkpoints.close()


def steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in `folder`, damaged or not, without saves that were cut short by a kill."""
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
