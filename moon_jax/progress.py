"""Terminal output of commands: lines, tables, progress bars and spinners; and the log of a run."""

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
"""If the output is not a terminal, shorter work prints a single line."""

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[..., None]]]
"""Shows the progress of named work with a known number of steps; yields a function that reports steps done."""


@contextlib.contextmanager
def silent(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A `Progress` that shows nothing."""
    del what, total
    yield lambda count=1: None


class Terminal:
    """The terminal, and `run.log` in the workdir. Timings go here; metrics must depend on the config alone."""

    def __init__(self, workdir: Path | None = None, console: Console | None = None):
        # In a notebook, plain lines read better than one HTML block per line. Only the first process prints.
        self.console = console or Console(highlight=False, force_jupyter=False, quiet=not distributed.is_primary())
        self.workdir = workdir if distributed.is_primary() else None
        self._unwritten = ""

    def line(self, text: str) -> None:
        """Prints one line, and appends it to run.log."""
        text = printable(text)
        self.console.print(text, markup=False, soft_wrap=True)
        self._unwritten += time.strftime("%Y-%m-%dT%H:%M:%S ") + text + "\n"
        # Lines printed before the workdir exists, or while it holds only half-prepared data, are written later.
        if self.workdir and self.workdir.is_dir() and any(name[0] != "." for name in os.listdir(self.workdir)):
            with (self.workdir / "run.log").open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
            self._unwritten = ""

    def table(self, table: Table) -> None:
        """Prints a table."""
        self.console.print(table)

    def heading(self, text: str) -> None:
        """Prints a section heading."""
        self.console.print()
        self.line(f"── {text} " + "─" * max(0, min(self.console.width, 100) - len(text) - 4))

    @contextlib.contextmanager
    def progress(
        self, what: str, total: int, start: int = 0, interruptible: bool = True
    ) -> Iterator[Callable[..., None]]:
        """A progress bar with rate and time left; if the output is not a terminal, one line every 10%.

        Yields:
            advance(count=1, note=""): reports work done. If `interruptible`, raises KeyboardInterrupt if a stop was
                requested.
        """
        began, done, tenths = time.monotonic(), start, 0
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
            speed_estimate_period=3600.0,  # a step may take minutes
        )
        shown = self.console.is_terminal
        task = bar.add_task(what, total=total, completed=start, rate="", note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, tenths
            if interruptible:
                interrupt.check()
            done += count
            rate = (done - start) / max(time.monotonic() - began, 1e-9)
            speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
            if shown:
                bar.update(task, completed=done, rate=speed, **({"note": note} if note else {}))
            elif done * 10 // total > tenths and done < total and time.monotonic() - began > QUIET_SECONDS:
                tenths = done * 10 // total
                left = (total - done) / max(rate, 1e-9)
                self.line(f"{what} {done}/{total}, {speed}, {left:.0f} s left {note}".rstrip())

        with bar if shown else contextlib.nullcontext():
            yield advance
        self.line(f"{what}: {done - start} in {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """For work of unknown length: a spinner with the elapsed time; if the output is not a terminal, one line."""
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
        """Yields the items of `work` and shows progress."""
        with self.progress(what, total) as advance:
            for item in work:
                yield item
                advance()
