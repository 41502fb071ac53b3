"""Ctrl-C and SIGTERM that are never lost, and never strike inside a library.

A KeyboardInterrupt vanishes where a library swallows every exception (an optional import, a callback from C), and has
crashed C extensions while they were imported. So the first Ctrl-C is only remembered, and whoever reports progress asks
for it; the second one ends the process. SIGTERM, by which clusters announce that a machine will be taken, is remembered
likewise. Imports nothing that is slow.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

REQUESTED = threading.Event()
"""Work shall stop at the next place where nothing is lost."""

TERMINATED = threading.Event()
"""It shall stop for a SIGTERM, not for Ctrl-C."""

RELAY = threading.Event()
"""Several processes run together (hosts.py): Ctrl-C shall become a SIGTERM, on which they agree."""

_PRESSED = threading.Event()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within it the first Ctrl-C, and any SIGTERM, is remembered; one that several processes shall agree on (RELAY) is
    left to JAX. Within another one, or beside the main thread, which alone hears of signals, it does nothing.
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
    """Nothing was asked for."""
    for event in (REQUESTED, TERMINATED, _PRESSED):
        event.clear()


def _remember(kind: int, _: object) -> None:
    if kind == signal.SIGTERM:
        terminate()
        return
    if _PRESSED.is_set():
        os._exit(130)
    _PRESSED.set()
    print("\nstopping after this piece of work; Ctrl-C again stops at once", file=sys.stderr)
    if RELAY.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler has taken the place of ours
    else:
        REQUESTED.set()


def terminate() -> None:
    """Asks for the stop that a SIGTERM asks for."""
    TERMINATED.set()
    REQUESTED.set()


def check() -> None:
    """Raises KeyboardInterrupt if a stop was asked for."""
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
