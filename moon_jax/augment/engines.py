"""What does the work of a pass: processes of this machine, or Apache Beam, which any cluster runs.

Work is numbered, each number's is done whole or not at all, and its result is a file: so it does not matter who does
it, and the next try knows what is left.
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
    """Numbered work, which can be pickled."""

    work: Path
    """A folder that all workers share."""

    def done(self, number: int) -> bool: ...

    def __call__(self, number: int) -> None: ...


class Engine(Protocol):
    """Runs what is left of some work to its end."""

    def __call__(self, what: str, work: Work, numbers: Sequence[int], progress: Progress, alone: bool = False) -> None:
        """
        Args:
            what: its name, for the progress.
            alone: one at a time, in this process, as a model on its accelerator wants it. Beam's workers have one each.
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
"""In the work folder: what went wrong where Beam's workers were."""

SECONDS = 1.0
"""Between looks at how far a pipeline is."""


@dataclasses.dataclass(frozen=True)
class Beam:
    """A pipeline of Apache Beam, whose workers see data and output at the same paths."""

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
                # Neighbours in numbers shall not be one worker's.
                _ = pipeline | beam.Create(left) | beam.Reshuffle() | beam.Map(functools.partial(_one, work))
                running = pipeline.run()
                while not beam.runners.runner.PipelineState.is_terminal(running.state):
                    time.sleep(SECONDS)
                    if interrupt.REQUESTED.is_set():
                        running.cancel()
                running.wait_until_finish()
            except Exception as raised:  # Beam wraps what a worker raises, in ways of its own for every runner
                error = raised
        interrupt.check()
        _raise_failure(work.work / FAILED)
        if error or not all(map(work.done, left)):
            lines = [line for line in str(error or "").splitlines() if line.strip()]
            told = lines[-1][:300] if lines else "work is left undone"
            raise UserError(f"--beam: {told}; see Beam's own log") from error


def load_beam(arguments: Sequence[str]) -> tuple[Any, Any]:
    """The library, and its options.

    Raises:
        UserError: it is not installed, or does not know the arguments.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of clouds whose clients are not installed
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions

        options = PipelineOptions(list(arguments))
        known = options.get_all_options()
    except ImportError as error:
        raise UserError(f"--beam: wants Apache Beam ({error}); pip install -e '.[beam]'") from None
    except SystemExit:  # argparse within Beam
        raise UserError(f"--beam {' '.join(arguments)}: not options of Apache Beam") from None
    finally:
        logging.disable(before)
    for argument in arguments:
        # Beam leaves out what it does not know, and would run somewhere else.
        name = argument.removeprefix("--").partition("=")[0]
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"--beam {name}: not an option of Apache Beam; the closest is {close[0]}")
    return apache_beam, options


def _one(work: Work, number: int) -> None:
    """What a worker of Beam does. A mistake of the user's is noted: Beam would tell it by pages."""
    if interrupt.REQUESTED.is_set() or work.done(number):
        return
    try:
        work(number)
    except UserError as error:
        folder = work.work / FAILED
        folder.mkdir(exist_ok=True)
        told = {"again": isinstance(error, Unavailable), "message": str(error)}
        (folder / f"{number:08}.json").write_text(json.dumps(told), encoding="utf-8")
        raise
    except KeyboardInterrupt:  # asked for within; the pipeline ends by itself
        return


def _raise_failure(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        raise (Unavailable if told["again"] else UserError)(told["message"])


@contextlib.contextmanager
def _watched(work: Work, left: Sequence[int], advance: Any) -> Iterator[None]:
    """Reports progress by looking at what is done."""
    ended, told = threading.Event(), 0

    def look() -> None:
        nonlocal told
        while not ended.wait(SECONDS):
            done = sum(map(work.done, left))
            if done > told:
                with contextlib.suppress(KeyboardInterrupt):  # the main thread asks for itself
                    advance(done - told)
                told = done

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if len(left) > told and all(map(work.done, left)):
            with contextlib.suppress(KeyboardInterrupt):
                advance(len(left) - told)
