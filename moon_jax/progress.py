"""What a command prints while it works: lines, tables, progress bars and spinners; and a run's log."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from moon_jax import distributed, interrupt
from moon_jax.errors import printable

QUIET_SECONDS = 3.0
"""Where the output is not a terminal, work that takes less time prints one line."""

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[..., None]]]
"""Shows the progress of named work with a known number of steps; yields a function that reports steps done."""


@contextlib.contextmanager
def silent(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A `Progress` that shows nothing."""
    del what, total
    yield lambda count=1: None


class Terminal:
    """The terminal, and `run.log` in the workdir. Times go here, never into metrics: those follow from the config."""

    def __init__(self, workdir: Path | None = None, console: Console | None = None):
        # In a notebook plain lines read better than one HTML block for each. Of several processes the first speaks.
        self.console = console or Console(highlight=False, force_jupyter=False, quiet=not distributed.is_primary())
        self.workdir = workdir if distributed.is_primary() else None
        self._unwritten = ""

    def line(self, text: str) -> None:
        """One line on the terminal and in run.log."""
        text = printable(text)
        self.console.print(text, markup=False, soft_wrap=True)
        self._unwritten += time.strftime("%Y-%m-%dT%H:%M:%S ") + text + "\n"
        # What is said before there is a workdir, or while it holds nothing but half-prepared data, is written later.
        if self.workdir and self.workdir.is_dir() and any(name[0] != "." for name in os.listdir(self.workdir)):
            with (self.workdir / "run.log").open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
            self._unwritten = ""

    def table(self, table: Table) -> None:
        """A table on the terminal."""
        self.console.print(table)

    def heading(self, text: str) -> None:
        """A line that parts what follows from what was before."""
        self.console.print()
        self.line(f"── {text} " + "─" * max(0, min(self.console.width, 100) - len(text) - 4))

    @contextlib.contextmanager
    def progress(
        self, what: str, total: int, start: int = 0, interruptible: bool = True
    ) -> Iterator[Callable[..., None]]:
        """A bar with rate and time left; off a terminal, one line every tenth of the way.

        Yields:
            advance(count=1, note=""): reports work done. Where `interruptible`, raises KeyboardInterrupt if a stop was
                asked for.
        """
        began, done, told = time.monotonic(), start, 0
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            speed_estimate_period=3600.0,  # pieces of work may take minutes each
        )
        shown = self.console.is_terminal
        task = bar.add_task(what, total=total, completed=start, rate="", note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, told
            if interruptible:
                interrupt.check()
            done += count
            rate = (done - start) / max(time.monotonic() - began, 1e-9)
            speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
            if shown:
                bar.update(task, completed=done, rate=speed, **({"note": note} if note else {}))
            elif done * 10 // total > told and done < total and time.monotonic() - began > QUIET_SECONDS:
                told = done * 10 // total
                left = (total - done) / max(rate, 1e-9)
                self.line(f"{what} {done}/{total}, {speed}, {left:.0f} s left {note}".rstrip())

        with bar if shown else contextlib.nullcontext():
            yield advance
        self.line(f"{what}: {done - start} in {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Work whose length nobody knows: a spinner with the time gone by; off a terminal, one line."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), SpinnerColumn("dots"), TimeElapsedColumn())
            with Bar(*columns, console=self.console, transient=True) as bar:
                bar.add_task(what, total=None)
                yield
        else:
            self.line(f"{what} …")
            yield
        interrupt.check()

    def track(self, what: str, work: Iterable[Any], total: int) -> Iterator[Any]:
        """The items of `work`, with progress."""
        with self.progress(what, total) as advance:
            for item in work:
                yield item
                advance()
