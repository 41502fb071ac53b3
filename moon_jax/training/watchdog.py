"""Observes a run without changing it: prints all stacks when it stalls, and profiles chosen steps."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from moon_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """Stall warnings and profiling of a run. Neither affects the results."""

    profile: tuple[int, int] | None = None  # first and last step of a profiler trace, in profile/ of the workdir
    stall_minutes: float = 10.0  # print the stacks of all threads when no step finishes for this long

    def __post_init__(self) -> None:
        if not self.stall_minutes > 0:
            raise UserError(f"--stall-minutes {self.stall_minutes:g}: give more than 0")

    @contextlib.contextmanager
    def over(
        self, workdir: Path, start: int, steps: int, warn: Callable[[str], None]
    ) -> Iterator[Callable[[int, Any], None]]:
        """Watches a run of `steps` steps of which `start` are done; calls `warn` if the trace cannot be taken.

        Yields:
            alive(step, newest): call it before each step, with the number of steps done and the last step's metrics.
        """
        tracing, seen, ended = False, time.monotonic(), threading.Event()
        first, last = self.profile or (0, 0)
        if self.profile and not start < first <= steps:
            warn(f"--profile {first}:{last}: no trace: step {first} is not one of {start + 1} to {steps}")

        def alive(step: int, newest: Any) -> None:
            nonlocal tracing, seen
            seen = time.monotonic()
            if self.profile and step + 1 == first:
                jax.profiler.start_trace(str(workdir / "profile"))
                tracing = True
            if tracing and step == last:
                jax.block_until_ready(newest)
                jax.profiler.stop_trace()
                tracing = False

        def guard() -> None:
            nonlocal seen
            while not ended.wait(min(10.0, 10 * self.stall_minutes)):
                if time.monotonic() - seen > 60 * self.stall_minutes:
                    seen = time.monotonic()
                    message = f"no step for {self.stall_minutes:g} minutes; all stacks:\n{stacks()}"
                    print(message, file=sys.stderr, flush=True)

        # Not faulthandler: it reads the frames of other threads while they change, which has crashed runs.
        watchdog = threading.Thread(target=guard, name="stall watch", daemon=True)
        watchdog.start()
        try:
            yield alive
        finally:
            ended.set()
            watchdog.join()
            if tracing:
                jax.profiler.stop_trace()


def stacks() -> str:
    """The stack of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text = ""
    for ident, frame in sys._current_frames().items():
        text += f"Thread {names.get(ident, ident)}, most recent call last:\n{''.join(traceback.format_stack(frame))}\n"
    return text


def parse_profile(text: str) -> tuple[int, int]:
    """The first and last step in FIRST:LAST.

    Raises:
        UserError: the text has another form.
    """
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: write FIRST:LAST, steps counted from 1")
    return int(first), int(last)
