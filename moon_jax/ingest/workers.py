"""Processes that work for prepare and augment: they leave Ctrl-C to the one that started them, and end with it."""

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
    """So many processes; of one, a thread of this one. Work that waits is dropped when an exception passes."""
    if processes == 1:
        executor: Executor = ThreadPoolExecutor(1)
    else:
        # Not forked from here: threads of libraries would be missing there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["moon_jax.ingest.prepare"])
        # Whatever the server forks inherits its mask: Ctrl-C reaches no worker, not even one that is being born. (The
        # tracker first: as it starts, it lifts the mask.)
        # A command that fails does not wait for its workers; the tracker, which cleans up, shall not complain of it.
        sys.warnoptions.append("ignore:resource_tracker")
        resource_tracker.ensure_running()
        sys.warnoptions.remove("ignore:resource_tracker")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    with executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """What a process does first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Where the parent is killed, nobody tells its workers."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def bounded(calls: Iterable[Callable[[], Future]], most: int) -> Iterator[Any]:
    """The results of what `calls` submit, in order, of which `most` wait at a time.

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
            "a worker was killed, most likely since memory was short; give fewer --processes, then the same command"
            " goes on"
        ) from None
    finally:
        for future in waiting:
            future.cancel()
