"""Engines that run the work of a pass: processes of this machine, or Apache Beam on any cluster.

Work comes as numbered items. Each item is written atomically to a file of its own. So any worker can do any item, and
the next run knows which ones are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moon_jax import interrupt
from moon_jax.errors import Unavailable, UserError
from moon_jax.ingest import workers
from moon_jax.ingest.prepare import Pool
from moon_jax.progress import Progress


class Work(Protocol):
    """Numbered work. Must be picklable."""

    work: Path
    """A folder that all workers share."""

    def done(self, number: int) -> bool: ...

    def __call__(self, number: int) -> None: ...


class Engine(Protocol):
    """Runs the items that are left."""

    def __call__(self, what: str, work: Work, numbers: Sequence[int], progress: Progress, alone: bool = False) -> None:
        """
        Args:
            what: the name shown with the progress.
            alone: run one item at a time in this process, for a model on this process's accelerator. Beam ignores it:
                each of its workers has a model of its own.
        """


@dataclasses.dataclass(frozen=True)
class Local:
    """Processes, or threads, of this machine."""

    pool: Pool
    workers: int

    def __call__(self, what: str, work: Work, numbers: Sequence[int], progress: Progress, alone: bool = False) -> None:
        left = [number for number in numbers if not work.done(number)]
        if not left:
            return
        with progress(what, len(numbers)) as advance:
            advance(len(numbers) - len(left))
            if alone or self.workers == 1:
                for number in left:
                    work(number)
                    advance()
                return
            with self.pool() as executor:
                calls = (functools.partial(executor.submit, work, number) for number in left)
                for _ in workers.bounded(calls, 2 * self.workers):
                    advance()


FAILED = "failed"
"""The folder, within the work folder, for the errors of Beam's workers."""

SECONDS = 1.0
"""Between polls of a pipeline's progress."""


@dataclasses.dataclass(frozen=True)
class Beam:
    """A pipeline of Apache Beam. Its workers must see data and output at the same paths."""

    arguments: tuple[str, ...]  # Beam's own, such as --runner=DataflowRunner

    def __call__(self, what: str, work: Work, numbers: Sequence[int], progress: Progress, alone: bool = False) -> None:
        del alone
        left = [number for number in numbers if not work.done(number)]
        if not left:
            return
        beam, options = load_beam(self.arguments)
        shutil.rmtree(work.work / FAILED, ignore_errors=True)
        error: Exception | None = None
        with progress(what, len(numbers)) as advance, _watched(work, left, advance):
            advance(len(numbers) - len(left))
            try:
                pipeline = beam.Pipeline(options=options)
                # Reshuffle spreads neighbouring numbers over the workers.
                _ = pipeline | beam.Create(left) | beam.Reshuffle() | beam.Map(functools.partial(_one, work))
                running = pipeline.run()
                while not beam.runners.runner.PipelineState.is_terminal(running.state):
                    time.sleep(SECONDS)
                    if interrupt.REQUESTED.is_set():
                        running.cancel()
                running.wait_until_finish()
            except Exception as raised:  # each runner wraps a worker's exception in its own way
                error = raised
        interrupt.check()
        _raise_failure(work.work / FAILED)
        if error or not all(map(work.done, left)):
            lines = [line for line in str(error or "").splitlines() if line.strip()]
            reason = lines[-1][:300] if lines else "some work was not done"
            raise UserError(f"--beam: {reason}; see Beam's own log") from error


def load_beam(arguments: Sequence[str]) -> tuple[Any, Any]:
    """The Apache Beam module and its pipeline options.

    Raises:
        UserError: Beam is not installed, or does not know an argument.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam warns about cloud clients that are not installed
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(list(arguments))
        known = options.get_all_options()
    except ImportError as error:
        raise UserError(f"--beam: needs Apache Beam ({error}); pip install -e '.[beam]'") from None
    except SystemExit:  # argparse within Beam
        raise UserError(f"--beam {' '.join(arguments)}: not options of Apache Beam") from None
    finally:
        logging.disable(before)
    for argument in arguments:
        # Beam ignores unknown options, and would then run on another runner.
        name = argument.removeprefix("--").partition("=")[0]
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"--beam {name}: not an option of Apache Beam; the closest is {close[0]}")
    return apache_beam, options


def _one(work: Work, number: int) -> None:
    """One item in a Beam worker. A UserError goes to a file: Beam would bury it in pages of output."""
    if interrupt.REQUESTED.is_set() or work.done(number):
        return
    try:
        work(number)
    except UserError as error:
        folder = work.work / FAILED
        folder.mkdir(exist_ok=True)
        failure = {"again": isinstance(error, Unavailable), "message": str(error)}
        (folder / f"{number:08}.json").write_text(json.dumps(failure), encoding="utf-8")
        raise
    except KeyboardInterrupt:  # the work noticed the stop request; the main process cancels the pipeline
        return


def _raise_failure(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        failure = json.loads(path.read_text(encoding="utf-8"))
        raise (Unavailable if failure["again"] else UserError)(failure["message"])


@contextlib.contextmanager
def _watched(work: Work, left: Sequence[int], advance: Any) -> Iterator[None]:
    """Reports progress by polling which items are done."""
    ended, reported = threading.Event(), 0

    def poll() -> None:
        nonlocal reported
        while not ended.wait(SECONDS):
            done = sum(map(work.done, left))
            if done > reported:
                with contextlib.suppress(KeyboardInterrupt):  # the main thread checks for stop requests itself
                    advance(done - reported)
                reported = done

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if len(left) > reported and all(map(work.done, left)):
            with contextlib.suppress(KeyboardInterrupt):
                advance(len(left) - reported)
