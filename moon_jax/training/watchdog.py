"""Watches a run without changing it: a warning with all stacks when it stalls, and a profiler trace of chosen steps."""

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
    """What is watched while a run goes on, and changes nothing of it."""

    profile: tuple[int, int] | None = None  # first and last step of a profiler trace, written to the workdir's profile/
    stall_minutes: float = 10.0  # without a step for so long, all threads' stacks are printed

    def __post_init__(self) -> None:
        if not self.stall_minutes > 0:
            raise UserError(f"--stall-minutes {self.stall_minutes:g}: give more than 0")

    @contextlib.contextmanager
    def over(
        self, workdir: Path, start: int, steps: int, tell: Callable[[str], None]
    ) -> Iterator[Callable[[int, Any], None]]:
        """Watches a run of `steps` that has done `start` of them; `tell` is told of a trace that will not be.

        Yields:
            alive(step, newest): to be called before each step, so many of which are done; `newest` is what the last one
                gave.
        """
        tracing, seen, ended = False, time.monotonic(), threading.Event()
        first, last = self.profile or (0, 0)
        if self.profile and not start < first <= steps:
            tell(f"--profile {first}:{last}: step {first} is not among those to come, {start + 1} to {steps}; no trace")

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
                    told = f"no step for {self.stall_minutes:g} minutes; all stacks:\n{stacks()}"
                    print(told, file=sys.stderr, flush=True)

        # A thread, not faulthandler: that reads other threads' frames while they change, and has crashed runs.
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
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = ""
    for ident, frame in sys._current_frames().items():
        told += f"Thread {names.get(ident, ident)}, most recent call last:\n{''.join(traceback.format_stack(frame))}\n"
    return told


def parse_profile(text: str) -> tuple[int, int]:
    """Steps from FIRST:LAST.

    Raises:
        UserError: it is written otherwise.
    """
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: write FIRST:LAST, steps counted from 1")
    return int(first), int(last)
