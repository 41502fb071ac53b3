"""Memory and time of moon-jax prepare by size of the catalogue.

    python benchmarks/prepare_scale.py [--counts 10000 100000 1000000] [--clicks 0] [--folder /tmp]

Products come from the rendered catalogue, with numbers in their titles; every image differs. Each size is prepared in
a process of its own. Memory is the peak proportional set size (PSS: shared pages are divided among their processes) of
the command and its workers together, sampled ten times a second. The page cache is not counted: the kernel can reclaim
it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from moon_jax.ingest import synthetic

RENDERED = 1000


def write(folder, count, clicks):
    made = [synthetic.make(0, number) for number in range(RENDERED)]
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / "products.parquet", synthetic.SCHEMA) as file:
        for start in range(0, count, 10_000):
            rows = []
            for number in range(start, min(start + 10_000, count)):
                row = made[number % RENDERED]
                # Bytes after the end of a JPEG are ignored, and make each image unique.
                image = row["images"][0]["bytes"] + number.to_bytes(8, "little")
                title = f"{row['title']} {number // 3}"
                rows.append(
                    row | {"product_id": f"p{number}", "title": title, "images": [{"bytes": image, "path": ""}]}
                )
            file.write_table(pa.Table.from_pylist(rows, synthetic.SCHEMA))
    fields = ("query", "product_id", "event", "time", "position")
    kinds = (pa.string(), pa.string(), pa.string(), pa.int64(), pa.int32())
    if clicks:
        with pq.ParquetWriter(folder / "log.parquet", pa.schema(list(zip(fields, kinds, strict=True)))) as file:
            for start in range(0, clicks, 100_000):
                many = min(100_000, clicks - start)
                columns = [
                    [f"query {n}" for n in rng.integers(max(clicks // 10, 1), size=many)],
                    [f"p{n}" for n in rng.integers(count, size=many)],
                    rng.choice(["impression", "impression", "impression", "click"], many).tolist(),
                    list(range(start, start + many)),
                    rng.integers(0, 20, many).tolist(),
                ]
                arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
                file.write_table(pa.table(arrays, names=fields))


def pss(root):
    """The PSS of a process and its descendants, in bytes."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    total = 0
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root:
            try:
                text = Path(f"/proc/{process}/smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0]) * 1024
            except (OSError, IndexError):
                continue
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--clicks", type=int, default=0, help="log rows per product (default: no log)")
    parser.add_argument("--folder", help="a folder for temporary files, 5 kB per product")
    parsed = parser.parse_args()
    table = Table(title="moon-jax prepare")
    for column in ("products", "log rows", "seconds", "products/s", "peak PSS, MB"):
        table.add_column(column, justify="right")
    for count in parsed.counts:
        folder = Path(tempfile.mkdtemp(dir=parsed.folder))
        try:
            (folder / "in").mkdir()
            write(folder / "in", count, parsed.clicks * count)
            began, most = time.monotonic(), 0
            command = [
                sys.executable,
                "-m",
                "moon_jax.cli",
                "prepare",
                "--data",
                folder / "in",
                "--output",
                folder / "out",
            ]
            process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
            while process.poll() is None:
                most = max(most, pss(process.pid))
                time.sleep(0.1)
            took = time.monotonic() - began
            assert process.returncode == 0
            table.add_row(
                f"{count:,}", f"{parsed.clicks * count:,}", f"{took:.0f}", f"{count / took:,.0f}", f"{most / 1e6:,.0f}"
            )
            Console().print(table)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
