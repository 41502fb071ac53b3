"""Ablation: trains and evaluates the method without each of its parts, over several seeds; one table like the paper's.

    python benchmarks/ablation.py --data path/to/fashion --output ablation/fashion
    python benchmarks/ablation.py --results docs/ablation/fashion.json      prints the table of earlier runs

The same command again resumes: it trains the runs that are missing or have other arguments. All rows share data, seeds,
steps and every option that a row does not name; nothing is tuned for any of them. `results.json` in the output contains
everything that the table shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

NOISE = 0.3
"""Share of the purchases that are corrupted: the positive becomes any other product."""

COMMON = ["--config.data.batch=64", "--config.data.text_tokens=24", "--config.training.save_every=1000"]
"""Options of all rows: half the quickstart's batch, and enough tokens for enriched titles."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of the method."""

    name: str
    overrides: tuple[str, ...] = ()
    noisy: bool = False
    against: str = "full"  # the row that it is compared with
    paper: tuple[float, ...] = ()  # the paper's scores in COLUMNS


COLUMNS = ("t→mm", "i→mm", "mm→mm", "t→i", "i→t", "class", "attribute")
"""The columns of the paper's table: R@10 by direction, then accuracy."""

PAPER = (63.09, 91.08, 94.21, 73.12, 64.91, 68.08, 84.29)
"""The paper's scores of the full MOON2.0 on MBE2.0 (arXiv 2511.12449)."""

LEVELS, WEIGHTING = "--config.objective.levels", "--config.objective.weighting"


def rows(active: int, total: int) -> list[Row]:
    """All rows.

    Args:
        active: width of a dense feed-forward with the FLOPs per token of K experts.
        total: width of a dense feed-forward with the parameters of all E experts.
    """
    dense = "--config.experts.count=0"
    off = "--config.objective.phi_threshold=0.0"
    return [
        Row("full"),
        Row(
            "without MoE, equal active FLOPs",
            (dense, f"--config.language.mlp_width={active}"),
            paper=(51.29, 74.59, 78.45, 62.16, 56.21, 62.55, 75.62),
        ),
        Row("dense, equal parameters", (dense, f"--config.language.mlp_width={total}")),
        Row(
            "without dual-level alignment",
            (f"{LEVELS}=mm→mm",),
            paper=(37.99, 65.72, 67.45, 31.45, 23.35, 57.12, 67.24),
        ),
        Row("without intra-product alignment", (f"{LEVELS}=inter",)),
        Row(
            "without co-augmentation",
            ("--config.data.augmented=original",),
            paper=(59.69, 78.17, 80.62, 64.79, 58.68, 66.21, 77.77),
        ),
        Row("without filtering", (off,), paper=(60.63, 83.40, 80.00, 70.40, 63.21, 67.99, 84.04)),
        Row("fixed mixture 12:3:2", ("--config.data.mixture=(3.0,12.0,2.0)", f"{WEIGHTING}=counted")),
        Row(f"full, {NOISE:.0%} noise", noisy=True),
        Row(f"without filtering, {NOISE:.0%} noise", (off,), True, f"full, {NOISE:.0%} noise"),
    ]


def noisy_copy(folder: Path, output: Path) -> None:
    """Copies the prepared `folder` with a share of its purchases corrupted; records are symlinked, not copied."""
    from moon_jax.data.prepared import MANIFEST, TRIPLETS

    if (output / MANIFEST).is_file():
        return
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in (MANIFEST, TRIPLETS):
            (output / path.name).symlink_to(path.resolve())
    triplets, rng = np.load(folder / TRIPLETS), np.random.default_rng(0)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    items = np.unique(triplets["positive"])
    wrong = np.flatnonzero(rng.random(len(triplets)) < NOISE)
    for row in wrong:
        taken = (triplets["positive"][row], triplets["negative"][row])
        triplets["positive"][row] = rng.choice(items[~np.isin(items, taken)])
    np.save(output / TRIPLETS, triplets, allow_pickle=False)
    # A new fingerprint: a run started on the clean purchases must not resume with these.
    manifest["fingerprint"] = f"{manifest['fingerprint']}-noise-{NOISE}"
    (output / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def command(*words: str) -> None:
    """Runs a moon-jax command in a separate process."""
    subprocess.run([sys.executable, "-m", "moon_jax.cli", *words], check=True)


def evaluate(workdir: Path, prepared: Any, tasks: Any) -> dict[str, Any]:
    """The scores of a run in COLUMNS, its size, and the cost of a query."""
    import jax

    from moon_jax.evaluation import labels, retrieval
    from moon_jax.serving import embedder as serving

    embedder = serving.load(workdir)
    encoded = retrieval.encode(embedder, prepared)
    # Prefers the catalogue's own queries, because products seen in training say little.
    wanted = "queries" if "queries" in encoded.queries else "products"
    searches = retrieval.directions(encoded)
    scores = {name: float(found["R@10"].mean()) for group, name, _, found in searches if group == wanted}
    if wanted == "products":
        accuracies = {"category": [], "attribute": []}
        for task in tasks:
            # From the image alone, because titles often contain the label.
            named = labels.label_vectors(embedder, task.labels, labels.PROMPTS)
            none_known = encoded.candidates[:0], encoded.present[:0]
            answers = labels.Answers(task, named, encoded.candidates, encoded.present, *none_known)
            accuracies[task.name.split()[0]].append(labels.measure(answers)["i"]["accuracy"])
        scores |= {
            name: float(np.mean(found))
            for name, found in zip(("class", "attribute"), accuracies.values(), strict=True)
            if found
        }
    experts = embedder.config.experts
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(serving.read(workdir).encoder):
        total += leaf.size
        routed = {"gate_up", "down"} & {key.key for key in path} if experts.count else ()
        active += leaf.size * experts.per_token // experts.count if routed else leaf.size
    queries = [prepared.products[index] for index in list(prepared.val)[:30]]
    embedder.encode(queries[:1])
    times = []
    for query in queries:
        began = time.perf_counter()
        embedder.encode([query])
        times.append(1000 * (time.perf_counter() - began))
    return {
        "scores": scores,
        "parameters": total,
        "active": active,
        "bytes": 4 * embedder.dimension,
        "ms": statistics.median(times),
        "step": embedder.step,
        "queries": len(encoded.queries[wanted].product),
        "candidates": len(encoded.product),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error; the error of a single seed is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def sign(differences: list[float]) -> str:
    """↑ or ↓ if the change between paired runs is significant at 95% by Student's t; otherwise ·."""
    mean, error = mean_and_error(differences)
    if len(differences) < 2 or abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "·"
    return "↑" if mean > 0 else "↓"


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Two tables: means over seeds ± standard errors, with the sign of the change and, in brackets, of the paper's
    change; then sizes.
    """
    runs = results["runs"]
    columns = [name for name in (*COLUMNS, "i→i") if any(name in run["scores"] for run in runs)]
    scores, sizes = (
        Table(title=results["title"]),
        Table(title="cost; ms/query on that machine, of the fastest seed"),
    )
    for made, names in ((scores, columns), (sizes, ("parameters (M)", "active (M)", "bytes/product", "ms/query"))):
        made.add_column("")
        for name in names:
            made.add_column(name, justify="right", no_wrap=True)
    for row in rows(*results["widths"]):
        own = {run["seed"]: run for run in runs if run["row"] == row.name}
        other = {run["seed"]: run for run in runs if run["row"] == row.against}
        if not own:
            continue
        cells = []
        for name in columns:
            mean, error = mean_and_error([run["scores"][name] for run in own.values()])
            cell = f"{mean:.1f} ±{error:.1f}" if len(own) > 1 else f"{mean:.1f}"
            if row.against != row.name:
                paired = [own[seed]["scores"][name] - other[seed]["scores"][name] for seed in own if seed in other]
                cell += f" {sign(paired)}"
                if row.paper and name in COLUMNS:
                    column = COLUMNS.index(name)
                    cell += f"({'↓' if row.paper[column] < PAPER[column] else '↑'})"
            cells.append(cell)
        first = next(iter(own.values()))
        scores.add_row(f"{row.name} ({len(own)})", *cells)
        ms = min(run["ms"] for run in own.values())  # other load on the machine only adds time
        millions = (f"{first[name] / 1e6:.2f}" for name in ("parameters", "active"))
        sizes.add_row(row.name, *millions, str(first["bytes"]), f"{ms:.1f}")
    yield from (scores, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a catalogue")
    parser.add_argument("--output", type=Path, help="folder of the runs; needs some GB")
    parser.add_argument("--results", type=Path, help="print the table of this results.json; nothing runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--rows", help="train only rows with this text in their names")
    parsed = parser.parse_args()
    console = Console(width=200)
    if parsed.results:
        for table in tables(json.loads(parsed.results.read_text(encoding="utf-8"))):
            console.print(table)
        return
    if not parsed.data or not parsed.output:
        parser.error("give --data and --output, or --results")

    from moon_jax import config as config_lib
    from moon_jax.data.prepared import open_prepared
    from moon_jax.evaluation import labels

    output = parsed.output
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((output / "cache").resolve()))
    command("prepare", "--data", parsed.data, "--output", str(output / "prepared"))
    command("augment", "--data", str(output / "prepared"), "--output", str(output / "augmented"))
    noisy_copy(output / "augmented", output / "noisy")
    config = config_lib.load("quickstart")
    widths = (config.experts.per_token * config.experts.width, config.experts.count * config.experts.width)
    prepared = open_prepared(output / "augmented")
    tasks = labels.tasks(prepared)
    lock = (output / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"--output {output}: another process is working there; wait for it, or stop it")
    path = output / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    results |= {
        "title": f"{Path(parsed.data).name}: R@10 and accuracy in percent, {parsed.steps} steps; mean ± standard error"
        f" over (seeds); ↑ ↓ significant at 95%, · not significant; (sign in the paper)",
        "widths": widths,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    for seed in range(parsed.seeds):  # all rows of a seed first, so that partial results compare
        for row in rows(*widths):
            data = output / ("noisy" if row.noisy else "augmented")
            common = [*COMMON, f"--config.seed={seed}", *row.overrides]
            arguments = ["--config", "quickstart", "--steps", str(parsed.steps), *common]
            run = {"row": row.name, "seed": seed, "arguments": arguments}
            if any({name: made[name] for name in run} == run for made in results["runs"]):
                continue
            if parsed.rows and parsed.rows not in row.name:
                continue
            workdir = output / "runs" / f"{re.sub('[^A-Za-z0-9]+', '-', row.name)}-{seed}"
            shutil.rmtree(workdir, ignore_errors=True)  # has other arguments, or is unfinished
            command("train", "--data", str(data), "--workdir", str(workdir), *arguments)
            results["runs"] = [made for made in results["runs"] if (made["row"], made["seed"]) != (row.name, seed)]
            results["runs"].append(run | evaluate(workdir, prepared, tasks))
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            temporary.replace(path)
            for table in tables(results):
                console.print(table)


if __name__ == "__main__":
    main()
