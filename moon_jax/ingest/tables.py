"""The second pass of prepare: which records are kept, in which part of the split, and in which order.

All of it is SQL. DuckDB spills to disk whatever exceeds its memory limit, so ten million products need more time but
not more memory. Every choice depends only on the records and on hashes of them (units.py), and every order is total, so
the same records always give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from moon_jax.ingest import units

MEMORY, THREADS = "256MB", 4
"""Upper limits of DuckDB. Each thread uses part of the memory."""

SPLITS = ("train", "val", "train_queries", "val_queries")
"""The splits of the prepared data, in index order."""

TRAIN, VAL, TRAIN_QUERIES, VAL_QUERIES = range(4)


class Tables:
    """An in-memory database of everything that was read; it spills to disk.

    Tables:
        read: every record of products and queries.
        event: every row of a log.
        left_out(unit, row, reason, detail): records dropped in this pass, besides those that could not be read.
        alias(id, kept): the id of each product, and the id of the kept product that represents it.
        product(index, side, id, …): kept products in index order; side indexes SPLITS.
        query(index, side, …): kept queries in index order, after the products.
    """

    def __init__(self, folder: Path, files: dict[str, Sequence[Path]], threads: int):
        """
        Args:
            folder: where DuckDB spills to.
            files: paths of the units, by "read" and "event".
        """
        settings = {
            "memory_limit": MEMORY,
            "threads": min(threads, THREADS),
            "preserve_insertion_order": False,  # every query that needs an order has ORDER BY
            "temp_directory": str(folder / "spilled"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        self.database = duckdb.connect(config=settings)
        for name, schema in (("read", units.RECORDS), ("event", units.EVENTS)):
            fields = pa.schema([field for field in schema if field.name != "record"])
            found = pads.dataset([str(path) for path in files[name]], schema=fields, format="parquet")
            # Reads one file after the other: DuckDB's limit does not count read-ahead.
            scanner = found.scanner(batch_readahead=1, fragment_readahead=1, use_threads=False)
            self.database.register("scanned", scanner.to_reader())
            self.run(f"CREATE TABLE {name} AS SELECT * FROM scanned")
            self.database.unregister("scanned")
        self.run("CREATE TABLE left_out (unit INT, row INT, reason VARCHAR, detail VARCHAR)")

    def close(self) -> None:
        self.database.close()

    def run(self, sql: str, **values: Any) -> None:
        self.database.execute(sql, values or None)

    def one(self, sql: str, **values: Any) -> Any:
        """The only row of a result, or its value if it has a single column."""
        [row] = self.rows(sql, **values)
        return row[0] if len(row) == 1 else row

    def rows(self, sql: str, **values: Any) -> list[tuple]:
        """All rows of a result; for small results."""
        return self.database.execute(sql, values or None).fetchall()

    def batches(self, sql: str, rows: int = 1 << 16, **values: Any) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a result in batches."""
        # Uses its own cursor, because other queries run in the meantime.
        with self.database.cursor() as cursor:
            yield from cursor.sql(sql, params=values or None).to_arrow_reader(rows)

    def deduplicate(self) -> None:
        """Keeps the first record of each id. Of equal products, prefers one in an evaluation file, then one in a
        training file, then the first.

        Products are equal if their images are equal byte by byte and their titles are equal up to case and spacing.
        """
        self.run("""
            CREATE TABLE named AS
            SELECT *, row_number() OVER (PARTITION BY part, id ORDER BY unit, row) AS nth FROM read WHERE reason IS NULL
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'duplicate id', 'an earlier record has this id' FROM named WHERE nth > 1
        """)
        self.run("""
            CREATE TABLE unlike AS
            SELECT *, first_value(id) OVER copies AS kept, row_number() OVER copies AS copy
            FROM named WHERE nth = 1 AND part = 'product'
            WINDOW copies AS (PARTITION BY content ORDER BY split = 'val' DESC, split = 'train' DESC, unit, row)
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'duplicate product', 'same title and images as ' || left(kept, 200)
            FROM unlike WHERE copy > 1
        """)
        self.run("CREATE TABLE alias AS SELECT id, kept FROM unlike")

    def split(self, fraction: float) -> None:
        """Assigns each product the split of its file; products of files without a split are for training.

        If there are no evaluation products, no evaluation queries and no log, holds out `fraction` of the title groups.
        """
        held_out = self.one("""
            SELECT (SELECT count(*) FROM unlike WHERE copy = 1 AND split = 'val')
                 + (SELECT count(*) FROM named WHERE part = 'query' AND nth = 1 AND split = 'val')
                 + (SELECT count(*) FROM event)
        """)
        whole = self.one("SELECT count(*) FROM unlike WHERE copy = 1 AND split = ''")
        side = f"CASE WHEN split = 'val' THEN {VAL} ELSE {TRAIN} END"
        if not held_out:
            # Divides the files without a split, or the training files if there are none.
            divided = "" if whole else "train"
            groups = self.one("SELECT count(DISTINCT lot) FROM unlike WHERE copy = 1 AND split = $split", split=divided)
            count = min(max(1, round(fraction * groups)), groups)
            last = self.one(
                "SELECT max(lot) FROM (SELECT DISTINCT lot FROM unlike WHERE copy = 1 AND split = $split"
                " ORDER BY lot LIMIT $count)",
                split=divided,
                count=count,
            )
            if last is not None:
                side = f"CASE WHEN split = '{divided}' AND lot <= {last} THEN {VAL} ELSE {TRAIN} END"
        self.run(f"""
            CREATE TABLE product AS
            SELECT row_number() OVER (ORDER BY side, unit, row) - 1 AS index,
                id, side, unit, row, size, title, draw, categories, has_text, has_image
            FROM (SELECT *, {side} AS side FROM unlike WHERE copy = 1)
        """)

    def sides(self) -> tuple[int, int]:
        """Numbers of training products and of held-out products."""
        return self.one(f"SELECT count(*) FILTER (side = {TRAIN}), count(*) FILTER (side = {VAL}) FROM product")

    def assign_queries(self) -> None:
        """Gives an index to each query whose target is in its part of the split; leaves out the others."""
        products = self.one("SELECT count(*) FROM product")
        candidates = VAL if self.sides()[1] else TRAIN
        self.run(f"""
            CREATE TABLE targeted AS
            SELECT named.*, product.index AS positive,
                CASE WHEN named.split = 'train' THEN {TRAIN_QUERIES} ELSE {VAL_QUERIES} END AS side,
                product.side = CASE WHEN named.split = 'train' THEN {TRAIN} ELSE {candidates} END AS fits
            FROM named LEFT JOIN alias ON alias.id = named.target LEFT JOIN product ON product.id = alias.kept
            WHERE part = 'query' AND nth = 1
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'unknown product',
                'no usable product ' || left(target, 200) || ' in its part of the split'
            FROM targeted WHERE fits IS NOT TRUE
        """)
        self.run(f"""
            CREATE TABLE query AS
            SELECT row_number() OVER (ORDER BY side, unit, row) - 1 + {products} AS index,
                id, side, positive, unit, row, size, title, draw, has_text, has_image
            FROM targeted WHERE fits
        """)

    def number_titles(self) -> None:
        """Numbers the title groups in `title_number(title, number)`."""
        self.run("""
            CREATE TABLE title_number AS
            SELECT title, row_number() OVER (ORDER BY title) - 1 AS number
            FROM (SELECT title FROM product UNION SELECT title FROM query) WHERE title IS NOT NULL
        """)

    def everything(self) -> str:
        """A subquery of all records that are written: index, side, unit, row, size, title."""
        columns = "index, side, unit, row, size, title"
        return f"(SELECT {columns} FROM product UNION ALL SELECT {columns} FROM query)"

    def quarantine(self) -> Iterator[pa.RecordBatch]:
        """Yields the left-out records in source order: file, number, id, reason, detail."""
        return self.batches("""
            WITH every AS (
                SELECT unit, row, file, number, id, reason, detail FROM read
                UNION ALL SELECT unit, row, file, number, id, reason, detail FROM event
            )
            SELECT file, number, id, coalesce(left_out.reason, every.reason) AS reason,
                coalesce(left_out.detail, every.detail, '') AS detail
            FROM every LEFT JOIN left_out USING (unit, row)
            WHERE every.reason IS NOT NULL OR left_out.reason IS NOT NULL
            ORDER BY unit, row
        """)
