"""Ctrl-C that is never lost, and never strikes inside a library.

A KeyboardInterrupt vanishes where a library swallows every exception (an optional import, a callback from C), and has
crashed C extensions while they were imported. So the first Ctrl-C is only remembered, and whoever reports progress asks
for it; the second one ends the process. Imports nothing that is slow.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

REQUESTED = threading.Event()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within it the first Ctrl-C is remembered."""
    REQUESTED.clear()
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _remember(*_: object) -> None:
    if REQUESTED.is_set():
        os._exit(130)
    REQUESTED.set()
    print("\nstopping after this piece of work; Ctrl-C again stops at once", file=sys.stderr)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed."""
    if REQUESTED.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops the work that waits when an exception passes, in place of doing it all first."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
