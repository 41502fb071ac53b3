"""Ctrl-C that is never lost, and never strikes inside a library.

A KeyboardInterrupt vanishes where a library swallows every exception (an optional import, a callback from C), and has
crashed C extensions while they were imported. So the first Ctrl-C is only remembered, and whoever reports progress asks
for it; the second one strikes at once. Imports nothing that is slow.
"""

import signal
import sys
import threading

REQUESTED = threading.Event()


def listen() -> None:
    """From now on Ctrl-C is remembered."""
    REQUESTED.clear()
    signal.signal(signal.SIGINT, _remember)


def _remember(*_: object) -> None:
    if REQUESTED.is_set():
        raise KeyboardInterrupt
    REQUESTED.set()
    print("\nstopping after this piece of work; Ctrl-C again stops at once", file=sys.stderr)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed."""
    if REQUESTED.is_set():
        raise KeyboardInterrupt
