"""Exact search against a FAISS flat index on the same cores: seconds, their ratio, and share of equal results.

    pip install faiss-cpu
    python benchmarks/search_speed.py [--candidates 1000000] [--width 256] [--k 10] [--rounds 5]

Both hold the same unit vectors in memory and are queried in alternation; the ratio is the median over the rounds. By
default FAISS also uses a matmul from 20 queries on, but with a less suitable block size for its result heap; setting
the threshold to 20 explicitly is fastest for it. Queries are new in every round.
"""

import argparse
import os
import statistics
import time

# Every call maps fresh buffers, so huge pages help; moon_jax.cli._enable_huge_pages does the same for all commands.
if "GLIBC_TUNABLES" not in os.environ:
    import sys

    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from moon_jax import similarity


def unit(shape, rng):
    vectors = rng.standard_normal(shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(call):
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    rng = np.random.default_rng(0)
    candidates = unit((parsed.candidates, parsed.width), rng)
    faiss.cvar.distance_compute_blas_threshold = 20
    resident = similarity.Resident(candidates)
    index = faiss.IndexFlatIP(parsed.width)
    index.add(candidates)
    table = Table(title=f"{parsed.candidates:,} × {parsed.width}, k={parsed.k}, {len(os.sched_getaffinity(0))} cores")
    for name in ("queries", "moon_jax (s)", "FAISS flat (s)", "FAISS / moon_jax", "same results"):
        table.add_column(name, justify="right")
    for count in (1, 16, 256, 1024, 4096):
        similarity.top_k(unit((count, parsed.width), rng), resident, parsed.k)  # compiles
        ours, theirs, same = [], [], []
        for _ in range(parsed.rounds):
            queries = unit((count, parsed.width), rng)
            seconds, (scores, found) = timed(lambda: similarity.top_k(queries, resident, parsed.k))  # noqa: B023
            ours.append(seconds)
            seconds, (other_scores, other) = timed(lambda: index.search(queries, parsed.k))  # noqa: B023
            theirs.append(seconds)
            # Two candidates may swap ranks if their similarities differ by rounding only.
            same.append(((found == other) | (np.abs(scores - other_scores) <= 1e-6)).mean())
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        seconds = (f"{statistics.median(values):.3f}" for values in (ours, theirs))
        table.add_row(f"{count:,}", *seconds, f"{ratio:.2f}", f"{min(same):.6%}")
    Console().print(table)


if __name__ == "__main__":
    main()
