"""The rows of the ablation (ablation.py), and the tables of its results.

python -m benchmarks.ablation_tables docs/ablation/fashion.json
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

NOISE = 0.3
"""Share of the purchases that are corrupted: the positive becomes any other product."""

START = {
    "data.batch": 64,
    "training.steps": 300,
    "experts.count": 0,  # its feed-forward is as wide as two experts, which a token uses: the same FLOPs
}
"""Options of the dense models that all rows start from, beside those of the quickstart."""

COMMON = START | {"experts.count": 4, "training.learning_rate": 1e-3}
"""Options of all rows."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of the method."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    noisy: bool = False
    against: str = "full"  # the row that it is compared with
    curve: bool = False  # evaluated several times
    paper: tuple[float, ...] = ()  # the paper's scores in PAPER_COLUMNS


PAPER_COLUMNS = ("t→mm", "i→mm", "mm→mm", "t→i", "i→t", "category", "attribute")
PAPER = (63.09, 91.08, 94.21, 73.12, 64.91, 68.08, 84.29)
"""The paper's scores of the full MOON2.0 on MBE2.0 (arXiv 2511.12449), and of which measures: R@10, then accuracy."""

COLUMNS = (
    "mean",
    "t→t",
    "t→i",
    "t→mm",
    "i→t",
    "i→i",
    "i→mm",
    "mm→t",
    "mm→i",
    "mm→mm",
    "background",
    "category",
    "attribute",
)
"""The columns of our table. mean: over the nine directions, or those that the catalogue's own queries have. background:
i→i with photos before another background.
"""

DENSE = "without experts, equal FLOPs"
NOISY = f"full, {NOISE:.0%} noise"
UNFILTERED = {"objective.phi_threshold": 0.0}


START_ROW = Row("start", against="start")
"""The dense models that all rows go on from."""


def rows() -> list[Row]:
    """All rows; what decides most comes first."""
    return [
        Row("full", curve=True),
        Row(
            DENSE,
            {"experts.count": 0},
            curve=True,
            paper=(51.29, 74.59, 78.45, 62.16, 56.21, 62.55, 75.62),
        ),
        Row("router by token kind, hard", {"experts.router_term": "token_hard"}, curve=True),
        Row("experts: whole copies, twice the FLOPs", {"experts.width": 240}, curve=True),
        Row(
            "without dual-level alignment",
            {"objective.levels": "mm→mm"},
            paper=(37.99, 65.72, 67.45, 31.45, 23.35, 57.12, 67.24),
        ),
        Row("without intra-product alignment", {"objective.levels": "inter"}),
        Row(
            "without co-augmentation",
            {"data.augmented": "original"},
            paper=(59.69, 78.17, 80.62, 64.79, 58.68, 66.21, 77.77),
        ),
        Row("own photo and title half of the time", {"data.augmented": "half"}),
        Row("without filtering", UNFILTERED, paper=(60.63, 83.40, 80.00, 70.40, 63.21, 67.99, 84.04)),
        Row(NOISY, noisy=True),
        Row(f"without filtering, {NOISE:.0%} noise", UNFILTERED, True, NOISY),
        Row(f"similar negatives masked, {NOISE:.0%} noise", {"objective.similar_margin": 0.1}, True, NOISY),
        Row("fixed mixture 12:3:2", {"data.mixture": (3.0, 12.0, 2.0)}),
        Row("ω lagging", {"objective.weighting": "lagging"}),
        Row("ω product", {"objective.weighting": "product"}),
        Row("ω stopped", {"objective.weighting": "stopped"}),
        Row("ω routed", {"objective.weighting": "routed"}),
        Row("ω uniform", {"objective.weighting": "uniform"}),
        Row("experts: half reinitialized", {"experts.reinitialized": 0.5}),
        Row("router by token kind, learned", {"experts.router_term": "token", "experts.term_init": 2.0}),
        Row("router by view, hard", {"experts.count": 6, "experts.router_term": "hard"}),
        Row("router by view, learned", {"experts.router_term": "learned", "experts.term_init": 2.0}),
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error; the error of a single seed is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def sign(differences: Sequence[float]) -> str:
    """↑ or ↓ if the change between paired runs is significant at 95% by Student's t; otherwise ·; empty for one run."""
    if len(differences) < 2:
        return ""
    mean, error = mean_and_error(differences)
    if abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "·"
    return "↑" if mean > 0 else "↓"


def plus_minus(values: Sequence[float], digits: int = 1) -> str:
    """The mean over seeds, with its standard error if there are several."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ±{error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Means over seeds ± standard errors, with the sign of the change and, in brackets, of the paper's change; the
    changes, paired by seed; sizes, weights and experts; the learning curves.
    """
    by_row: dict[str, dict[int, Any]] = {}
    for run in results["runs"]:
        by_row.setdefault(run["row"], {})[run["seed"]] = run
    listed = [START_ROW, *rows()]
    columns = [name for name in COLUMNS if any(name in run["scores"] for run in results["runs"])]
    scores, changes, more, curves = (
        Table(title=results["title"]),
        Table(title="change against full, in noise against full with noise; paired by seed ± standard error"),
        Table(title="after the last step: size, weights ω, share of triplets with φ below 0.6, mutual information"),
        Table(title="mean of the directions by step, and its change against the dense model of equal FLOPs"),
    )
    for table, names in (
        (scores, columns),
        (changes, columns),
        (more, ("parameters (M)", "active (M)", "s/step", "ω", "φ low (%)", "modality and expert (bits, by layer)")),
    ):
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
    curved = {row.name for row in listed if row.curve}
    steps = sorted({point["step"] for run in results["runs"] if run["row"] in curved for point in run["curve"]})
    for name in ("", *map(str, steps)):
        curves.add_column(name, justify="right" if name else "left")
    for row in listed:
        own, other = by_row.get(row.name, {}), by_row.get(row.against, {})
        if not own:
            continue
        cells, paired = [], []
        for name in columns:
            if not all(name in run["scores"] for run in own.values()):
                cells.append("")
                paired.append("")
                continue
            cell = plus_minus([run["scores"][name] for run in own.values()])
            if row.against != row.name:
                differences = [own[s]["scores"][name] - other[s]["scores"][name] for s in own if s in other]
                cell += f" {sign(differences)}"
                paired.append(plus_minus(differences, 2) if differences else "")
                if row.paper and name in PAPER_COLUMNS:
                    column = PAPER_COLUMNS.index(name)
                    cell += f"({'↓' if row.paper[column] < PAPER[column] else '↑'})"
            cells.append(cell)
        label = f"{row.name} ({len(own)})"
        scores.add_row(label, *cells)
        if row.against != row.name:
            changes.add_row(label, *paired)
        first = next(iter(own.values()))
        weights, shared = (
            " ".join(f"{value:.2f}" for value in np.mean([run[name] for run in own.values()], axis=0))
            for name in ("omega", "bits")
        )
        more.add_row(
            label,
            f"{first['parameters'] / 1e6:.2f}",
            f"{first['active'] / 1e6:.2f}",
            f"{min(run['seconds_per_step'] for run in own.values()):.2f}",  # other load only adds time
            weights,
            plus_minus([100 * run["phi_low"] for run in own.values()]),
            shared,
        )
        points = [{point["step"]: point["mean"] for point in run["curve"]} for run in own.values()]
        if row.curve:
            cells = []
            for step in steps:
                cell = plus_minus([each[step] for each in points], 2) if all(step in each for each in points) else ""
                theirs = {s: {p["step"]: p["mean"] for p in run["curve"]} for s, run in by_row.get(DENSE, {}).items()}
                paired = [
                    each[step] - theirs[seed][step]
                    for seed, each in zip(own, points, strict=True)
                    if step in each and step in theirs.get(seed, {})
                ]
                if row.name != DENSE and cell and paired:
                    cell += f" ({plus_minus(paired, 2)})"
                cells.append(cell)
            curves.add_row(label, *cells)
    yield from (scores, changes, more, curves)


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: python -m benchmarks.ablation_tables RESULTS.json; no such file: {' '.join(sys.argv[1:])}")
    for table in tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        Console(width=240).print(table)


if __name__ == "__main__":
    main()
