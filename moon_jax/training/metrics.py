"""The metrics of a run: metrics.jsonl, speed.jsonl and their TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moon_jax import config as config_lib
from moon_jax import distributed
from moon_jax.objectives import filtering
from moon_jax.training import chips
from moon_jax.types import OBJECTIVES

PHASES = ("data", "device", "checkpoint", "evaluation")
"""The parts of a step that are timed."""

PHI_BINS = 20
"""Number of equal bins over [0, 1] in the histogram of φ."""


class MetricLog:
    """Writes metrics.jsonl and speed.jsonl, and the same values as TensorBoard events. Each logged step appears once,
    in order, however often the run resumes. metrics.jsonl depends on the config alone; timings go to speed.jsonl.

    The JSON lines are the record: when a run resumes, its events are rewritten from them. If there are several
    processes, the first one writes.
    """

    def __init__(self, workdir: Path, resumed_at: int):
        self._files, self._events = {}, None
        if not distributed.is_primary():
            return
        kept = {name: _keep(workdir / f"{name}.jsonl", resumed_at) for name in ("metrics", "speed")}
        self._files = {name: (workdir / f"{name}.jsonl").open("a", encoding="utf-8") for name in kept}
        tensorboard = workdir / "tensorboard"
        tensorboard.mkdir(exist_ok=True)
        for old in tensorboard.glob("events.out.tfevents.*"):
            old.unlink()
        # Imported here because it imports torch if that is installed, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter

        self._events = EventsWriter(str(tensorboard / "events"))
        for line in kept["metrics"]:
            self._write_events(line)
        for line in kept["speed"]:
            self._write_events({"step": line["step"], "speed": line})

    def write(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Writes a step's lines: the results of `line` and of `Times.line`."""
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
    """Removes the lines of later steps from a file, and a line truncated by a kill; returns the remaining ones."""
    kept = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():  # may be cut inside a character
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
    """Measures where the time goes: waiting for data, on the device, in checkpoints and evaluations, or elsewhere."""

    def __init__(self, config: config_lib.Config, devices: int, start: int):
        chip = chips.of_device(jax.local_devices()[0])
        self._ideal = chips.model_flops(config) / (devices * chip.flops) if chip else None  # seconds of a step
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._total = dict.fromkeys(PHASES, 0.0)
        self._step = start
        self._start = self._began = time.monotonic()

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Counts the time spent inside as `phase`, one of PHASES."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[phase] += time.monotonic() - began

    def line(self, step: int) -> dict[str, Any]:
        """A line of speed.jsonl for the time since the last line; `step` is the number of steps done.

        It has the seconds of a step and of each phase; `mfu`, model FLOPs over the chips' peak, null if the peak is not
        known; and the bytes that this process and its first device hold.
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
        """The share of each phase in the total time, in one line."""
        whole = max(time.monotonic() - self._start, 1e-9)
        spent = {phase: self._total[phase] + self._seconds[phase] for phase in PHASES}
        shares = ", ".join(f"{phase} {100 * seconds / whole:.1f}%" for phase, seconds in spent.items() if seconds)
        return f"share of training time: {shares}"


def _held_bytes() -> int | None:
    """The resident memory of this process, or None if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _scalars(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a metric line, with its path as a tag; without the histogram of φ."""
    for key, value in metrics.items():
        if isinstance(value, list) and key != "phi_histogram":
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


def _phi_event(counts: list[int]) -> Any:
    """The histogram of φ in TensorBoard's form: moments at the bin centres, then upper edges and counts."""
    edges, counts = np.linspace(0, 1, PHI_BINS + 1), np.array(counts)
    middles = (edges[1:] + edges[:-1]) / 2
    moments = dict(min=0.0, max=1.0, num=counts.sum(), sum=counts @ middles, sum_squares=counts @ middles**2)
    from tensorboardX import summary as events

    return events.histogram_raw("phi", **moments, bucket_limits=edges[1:], bucket_counts=counts)


def _exact(value: Any) -> Any:
    """A JSON number that identifies a float32 exactly, or None if it is not finite."""
    return float(f"{float(value):.9g}") if np.isfinite(value) else None


def _round(value: Any) -> Any:
    """A JSON number of six significant digits, or None if it is not finite."""
    return float(f"{float(value):.6g}") if np.isfinite(value) else None


def mutual_information(weight: np.ndarray) -> float:
    """The mutual information of a token's modality and its expert, in bits: 0 if the experts do not specialise, and at
    most 1, if text and image tokens share no expert. Both modalities count equally.

    Args:
        weight: f32[2,E], the routing weight that each expert gets from text and from image tokens.
    """
    joint = weight / np.maximum(weight.sum(1, keepdims=True), 1e-30) / 2
    either = joint.sum(0)
    ratio = np.where(joint > 0, joint / np.maximum(either / 2, 1e-30), 1.0)
    return float((joint * np.log2(ratio)).sum())


def line(step: int, metrics: dict[str, Any], config: config_lib.Config) -> dict[str, Any]:
    """The metrics of a step (training/step.py) as one JSON line.

    `experts` holds, per layer and expert, its share of the routing weight of text tokens and of image tokens; within a
    layer each modality adds up to 1. `modality_information` is the mutual information of a token's modality and its
    expert in each layer, in bits. `dropped` is the share of a layer's routes dropped for lack of capacity.
    `phi_histogram` counts triplets in PHI_BINS equal bins over [0, 1].
    """
    result, modality = metrics["objectives"], metrics["modality"]
    shares = modality / np.maximum(modality.sum(axis=-1, keepdims=True), 1e-9)
    has_phi = np.isfinite(result.phi)
    phi = result.phi[has_phi]
    serves = result.negatives >= 0
    margin = filtering.margin_at(config.objective.margin, (step - 1) / config.training.steps)  # `step` steps are done
    named = {
        name: dict(zip(OBJECTIVES, map(kind, values), strict=True))
        for name, kind, values in (
            ("loss", _exact, np.where(result.count > 0, result.loss, np.nan)),  # no samples: null
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
        "negatives_mean": _round(result.negatives[serves].mean()) if serves.any() else None,
        "negatives_min": int(result.negatives[serves].min()) if serves.any() else None,
        "known_mean": _round(result.known.mean()),
        "negatives_excluded": _round(result.excluded[serves].mean()) if serves.any() else None,
        "experts": [
            [{"text": _round(text), "image": _round(image)} for text, image in zip(*layer, strict=True)]
            for layer in shares
        ],
        "modality_information": [_round(mutual_information(layer)) for layer in modality],
        "dropped": [_round(share) for share in metrics["dropped"]],
        "grad_norm": _round(metrics["grad_norm"]),
        "finite": bool(metrics["finite"]),
    }
