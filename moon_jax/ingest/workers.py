"""Worker processes of prepare and augment. They ignore Ctrl-C, which the parent handles, and exit with the parent."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any

from moon_jax import interrupt
from moon_jax.errors import UserError


@contextlib.contextmanager
def pool(processes: int) -> Iterator[Executor]:
    """An executor of this many processes, or of a single thread for 1. An exception cancels pending work."""
    if processes == 1:
        executor: Executor = ThreadPoolExecutor(1)
    else:
        # Not forked from this process: a fork would lack the threads of its libraries.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["moon_jax.ingest.prepare"])
        # Workers inherit the fork server's signal mask, so Ctrl-C never reaches one, not even during its start. (The
        # resource tracker starts first, because starting it lifts the mask.)
        # A command that fails does not wait for its workers; the tracker must not warn about that.
        sys.warnoptions.append("ignore:resource_tracker")
        resource_tracker.ensure_running()
        sys.warnoptions.remove("ignore:resource_tracker")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_initialize)
    with executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _initialize() -> None:
    """Initializes a worker process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Exits when the parent does: nothing else ends the workers of a killed parent."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def bounded(calls: Iterable[Callable[[], Future]], most: int) -> Iterator[Any]:
    """Yields the results of the futures that `calls` submit, in order, with at most `most` of them pending.

    Raises:
        UserError: a worker was killed.
    """
    waiting: collections.deque[Future] = collections.deque()
    try:
        for call in calls:
            interrupt.check()
            waiting.append(call())
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            interrupt.check()
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise UserError(
            "a worker was killed, most likely for lack of memory; run the same command with fewer --processes to resume"
        ) from None
    finally:
        for future in waiting:
            future.cancel()
