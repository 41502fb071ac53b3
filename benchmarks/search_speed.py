"""Exact search against a FAISS flat index on the same cores: seconds, their ratio, and whether both find the same.

    pip install faiss-cpu
    python benchmarks/search_speed.py [--candidates 1000000] [--width 256] [--k 10] [--rounds 5]

Both hold the same unit vectors in memory, and are asked in alternation; the figure is the median of the rounds' ratios.
FAISS takes a matrix product from 20 queries on by its default, but with another block for the results' heap than
it could: its threshold is set to 20, which is what it does best with. Neither has seen the queries before.
"""

import argparse
import os
import statistics
import time

# Fresh buffers are mapped in every call: see moon_jax.cli._ask_for_huge_pages, which does this for all commands.
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
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    candidates = unit((given.candidates, given.width), rng)
    faiss.cvar.distance_compute_blas_threshold = 20
    resident = similarity.Resident(candidates)
    index = faiss.IndexFlatIP(given.width)
    index.add(candidates)
    table = Table(title=f"{given.candidates:,} × {given.width}, k={given.k}, {len(os.sched_getaffinity(0))} cores")
    for name in ("queries", "moon_jax (s)", "FAISS flat (s)", "FAISS / moon_jax", "same results"):
        table.add_column(name, justify="right")
    for count in (1, 16, 256, 1024, 4096):
        similarity.top_k(unit((count, given.width), rng), resident, given.k)  # compiles
        ours, theirs, same = [], [], []
        for _ in range(given.rounds):
            queries = unit((count, given.width), rng)
            seconds, (scores, found) = timed(lambda: similarity.top_k(queries, resident, given.k))  # noqa: B023
            ours.append(seconds)
            seconds, (other_scores, other) = timed(lambda: index.search(queries, given.k))  # noqa: B023
            theirs.append(seconds)
            # Two candidates whose similarities differ by rounding alone may change places.
            same.append(((found == other) | (np.abs(scores - other_scores) <= 1e-6)).mean())
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        seconds = (f"{statistics.median(values):.3f}" for values in (ours, theirs))
        table.add_row(f"{count:,}", *seconds, f"{ratio:.2f}", f"{min(same):.6%}")
    Console().print(table)


if __name__ == "__main__":
    main()
