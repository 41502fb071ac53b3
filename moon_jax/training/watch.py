"""What a run tells while it works: progress on the terminal, a run log, metric lines with their TensorBoard events, and
a count of compilations."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moon_jax import config as config_lib
from moon_jax import hosts, interrupt
from moon_jax.config import UserError
from moon_jax.objectives import filtering
from moon_jax.training import chips
from moon_jax.types import OBJECTIVES

QUIET_SECONDS = 3.0
"""Off a terminal, work that is done sooner is told in one line."""

PHASES = ("data", "device", "checkpoint", "evaluation")
"""Where the time of a step goes."""

PHI_BINS = 20
"""Equal bins of [0, 1] in the histogram of φ."""

COMPILED: Counter[str] = Counter()
"""Compilations of this process by function name, counted by JAX's own events."""


def _count(event: str, duration: float, **details: Any) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED[details.get("fun_name", "").removeprefix("jit(").removesuffix(")")] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@dataclasses.dataclass(frozen=True)
class Watching:
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


class Watch:
    """The terminal, and `run.log` in the workdir. Times go here, never into metrics: those follow from the config."""

    def __init__(self, workdir: Path | None = None, console: Console | None = None):
        # In a notebook plain lines read better than one HTML block for each. Of several processes the first speaks.
        self.console = console or Console(highlight=False, force_jupyter=False, quiet=not hosts.first())
        self.workdir = workdir if hosts.first() else None
        self._unwritten = ""

    def line(self, text: str) -> None:
        """One line on the terminal and in run.log."""
        text = config_lib.printable(text)
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
        bar = Progress(
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
            with Progress(*columns, console=self.console, transient=True) as bar:
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


class MetricLog:
    """metrics.jsonl and speed.jsonl, and the same as TensorBoard events: each logged step once, in order, however often
    the run was resumed. What follows from the config stands in the first, what the clock says in the second.

    The JSON lines are the record. The events are made from them anew when a run is resumed. Of several processes the
    first writes.
    """

    def __init__(self, workdir: Path, resumed_at: int):
        self._files, self._events = {}, None
        if not hosts.first():
            return
        kept = {name: _keep(workdir / f"{name}.jsonl", resumed_at) for name in ("metrics", "speed")}
        self._files = {name: (workdir / f"{name}.jsonl").open("a", encoding="utf-8") for name in kept}
        tensorboard = workdir / "tensorboard"
        tensorboard.mkdir(exist_ok=True)
        for old in tensorboard.glob("events.out.tfevents.*"):
            old.unlink()
        # Here, since it imports torch where that is installed: seconds.
        from tensorboardX.event_file_writer import EventsWriter

        self._events = EventsWriter(str(tensorboard / "events"))
        for line in kept["metrics"]:
            self._write_events(line)
        for line in kept["speed"]:
            self._write_events({"step": line["step"], "speed": line})

    def write(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """A step's lines (`describe`, `Times.line`)."""
        for name, line in (("metrics", metrics), ("speed", speed)):
            if name in self._files:
                self._files[name].write(json.dumps(line, ensure_ascii=False) + "\n")
                self._files[name].flush()
        if self._events:
            self._write_events(metrics)
            self._write_events({"step": speed["step"], "speed": speed})

    def _write_events(self, metrics: dict[str, Any]) -> None:
        from tensorboardX import summary as events
        from tensorboardX.proto.event_pb2 import Event

        found = [events.scalar(tag, value) for tag, value in _scalars(metrics) if tag.split("/")[-1] != "step"]
        if metrics.get("phi_histogram") is not None:
            found.append(_phi_event(metrics["phi_histogram"]))
        for summary in found:
            self._events.write_event(Event(wall_time=time.time(), step=metrics["step"], summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._events:
            self._events.close()


def _keep(path: Path, resumed_at: int) -> list[dict[str, Any]]:
    """Strikes the lines of later steps from a file, and the one that a kill cut short; gives those that stay."""
    kept = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():  # a cut one ends anywhere
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["step"] <= resumed_at:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return kept


class Times:
    """Where the time goes: waiting for data, on the device, in checkpoints and evaluations, or elsewhere."""

    def __init__(self, config: config_lib.Config, devices: int, start: int):
        chip = chips.of_device(jax.local_devices()[0])
        self._ideal = chips.model_flops(config) / (devices * chip.flops) if chip else None  # seconds of a step
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._total = dict.fromkeys(PHASES, 0.0)
        self._step = start
        self._start = self._began = time.monotonic()

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time within it belongs to `phase`, one of PHASES."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase] += time.monotonic() - began

    def line(self, step: int) -> dict[str, Any]:
        """The time since the last line as one of speed.jsonl; `step` steps are done.

        Seconds of a step, and of them those of each phase; `mfu`, the model's FLOPs over the chips' peak, null where
        that is not known; bytes that this process and its first device hold.
        """
        now = time.monotonic()
        taken, count = now - self._began, step - self._step
        each = {phase: _round(seconds / count) for phase, seconds in self._seconds.items()}
        memory = jax.local_devices()[0].memory_stats() or {}
        for phase in PHASES:
            self._total[phase] += self._seconds[phase]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._step, self._began = step, now
        return {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "seconds": _round(taken / count),
            **each,
            "mfu": _round(self._ideal * count / taken) if self._ideal else None,
            "host_bytes": _held_bytes(),
            "device_bytes": memory.get("bytes_in_use"),
        }

    def summary(self) -> str:
        """Shares of the whole time, in one line."""
        whole = max(time.monotonic() - self._start, 1e-9)
        spent = {phase: self._total[phase] + self._seconds[phase] for phase in PHASES}
        told = ", ".join(f"{phase} {100 * seconds / whole:.1f}%" for phase, seconds in spent.items() if seconds)
        return f"of the time of a step: {told}"


def _held_bytes() -> int | None:
    """Memory that this process holds; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _scalars(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a metric line with its path as a tag; the histogram of φ is none."""
    for key, value in metrics.items():
        if isinstance(value, list) and key != "phi_histogram":
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


def _phi_event(counts: list[int]) -> Any:
    """The histogram of φ as TensorBoard holds it: moments of the bins' middles, then upper edges and counts."""
    edges, counts = np.linspace(0, 1, PHI_BINS + 1), np.array(counts)
    middles = (edges[1:] + edges[:-1]) / 2
    moments = dict(min=0.0, max=1.0, num=counts.sum(), sum=counts @ middles, sum_squares=counts @ middles**2)
    from tensorboardX import summary as events

    return events.histogram_raw("phi", **moments, bucket_limits=edges[1:], bucket_counts=counts)


def _exact(value: Any) -> Any:
    """A JSON number that tells a float32 from any other, or None where it is not finite."""
    return float(f"{float(value):.9g}") if np.isfinite(value) else None


def _round(value: Any) -> Any:
    """A JSON number of six significant digits, or None where it is not finite."""
    return float(f"{float(value):.6g}") if np.isfinite(value) else None


def describe(step: int, metrics: dict[str, Any], config: config_lib.Config) -> dict[str, Any]:
    """The metrics of a step (training/step.py) as one JSON line.

    `experts` holds per layer and expert the share of text tokens and of image tokens that its gate took: each
    modality's shares add up to 1 over a layer's experts. `dropped` is the share of a layer's routes that found no room.
    `phi_histogram` counts triplets in PHI_BINS equal bins of [0, 1].
    """
    result, modality = metrics["objectives"], metrics["modality"]
    shares = modality / np.maximum(modality.sum(axis=-1, keepdims=True), 1e-9)
    has_phi = np.isfinite(result.phi)
    phi = result.phi[has_phi]
    negatives = result.negatives[result.negatives > 0]  # 0 stands for a triplet that serves no inter objective
    margin = filtering.margin_at(config.objective.margin, (step - 1) / config.training.steps)  # `step` are done
    named = {
        name: dict(zip(OBJECTIVES, map(kind, values), strict=True))
        for name, kind, values in (
            ("loss", _exact, result.loss),
            ("omega", _round, result.weight),
            ("count", int, result.count),
        )
    }
    return {
        "step": step,
        "total": _exact(result.total),
        **named,
        "balance": _round(result.balance),
        "sparsity": _round(result.sparsity),
        "margin": _round(margin),
        "phi_mean": _round(phi.mean()) if phi.size else None,
        "phi_below_threshold": _round((phi < config.objective.phi_threshold).mean()) if phi.size else None,
        "phi_histogram": np.histogram(phi, PHI_BINS, (0, 1))[0].tolist() if phi.size else None,
        "negatives_mean": _round(negatives.mean()) if negatives.size else None,
        "negatives_min": int(negatives.min()) if negatives.size else None,
        "experts": [
            [{"text": _round(text), "image": _round(image)} for text, image in zip(*layer, strict=True)]
            for layer in shares
        ],
        "dropped": [_round(share) for share in metrics["dropped"]],
        "grad_norm": _round(metrics["grad_norm"]),
        "finite": bool(metrics["finite"]),
    }
