"""Handles Ctrl-C and SIGTERM so that they are never lost and never interrupt a library.

A KeyboardInterrupt is lost if a library swallows all exceptions (an optional import, a callback from C), and it has
crashed C extensions during import. So the first Ctrl-C only sets a flag, which code that reports progress checks; the
second one ends the process. SIGTERM, which clusters send before they take a machine away, sets a flag too. This module
imports nothing slow.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

REQUESTED = threading.Event()
"""Work should stop at the next point where nothing is lost."""

TERMINATED = threading.Event()
"""The stop was requested by SIGTERM, not by Ctrl-C."""

RELAY = threading.Event()
"""Several processes run together (distributed.py): turn Ctrl-C into a SIGTERM, on which they agree."""

_PRESSED = threading.Event()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside it, the first Ctrl-C and any SIGTERM only set flags. With RELAY, SIGTERM is left to JAX, through which the
    processes agree. Nested, or outside the main thread (the only one that receives signals), it does nothing.
    """
    inner = signal.getsignal(signal.SIGINT) is _remember
    if inner or threading.current_thread() is not threading.main_thread():
        yield
        return
    forget()
    kinds = (signal.SIGINT,) if RELAY.is_set() else (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, _remember) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        forget()


def forget() -> None:
    """Clears all requests to stop."""
    for event in (REQUESTED, TERMINATED, _PRESSED):
        event.clear()


def _remember(kind: int, _: object) -> None:
    if kind == signal.SIGTERM:
        terminate()
        return
    if _PRESSED.is_set():
        os._exit(130)
    _PRESSED.set()
    print("\nstopping after the current piece of work; press Ctrl-C again to stop at once", file=sys.stderr)
    if RELAY.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # handled by JAX, which has replaced our handler
    else:
        REQUESTED.set()


def terminate() -> None:
    """Requests a stop, as SIGTERM does."""
    TERMINATED.set()
    REQUESTED.set()


def check() -> None:
    """Raises KeyboardInterrupt if a stop was requested."""
    if REQUESTED.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that cancels queued work on an exception, instead of finishing it first."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
