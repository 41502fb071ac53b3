"""The second pass of prepare: which records stay, on which side of the split, in which order.

All of it is SQL, and DuckDB keeps what does not fit its memory on disk: ten million products take time, not memory.
Every choice follows from numbers that the records themselves give (units.py), and every order is total, so the same
records give the same result, whoever read them.
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
"""At most. Each thread holds some of the memory."""

SPLITS = ("train", "val", "train_queries", "val_queries")
"""The parts of the prepared data, in the order of their indices."""

TRAIN, VAL, TRAIN_QUERIES, VAL_QUERIES = range(4)


class Tables:
    """What was read, in a database in memory that goes to disk where it does not fit.

    Tables:
        read: every record of products and queries; `event`: every row of a log.
        left_out(unit, row, reason, detail): what is dropped here, beyond what could not be read.
        alias(id, kept): the id of each product, and of the one that stands for it.
        product(index, side, id, …): products in their order.
        query(index, side, …): queries in theirs, behind the products.
    """

    def __init__(self, folder: Path, files: dict[str, Sequence[Path]], threads: int):
        """
        Args:
            folder: for what does not fit into memory.
            files: the units, by "read" and "event".
        """
        settings = {
            "memory_limit": MEMORY,
            "threads": min(threads, THREADS),
            "preserve_insertion_order": False,  # every order that matters is asked for
            "temp_directory": str(folder / "spilled"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        self.database = duckdb.connect(config=settings)
        for name, schema in (("read", units.RECORDS), ("event", units.EVENTS)):
            fields = pa.schema([field for field in schema if field.name != "record"])
            found = pads.dataset([str(path) for path in files[name]], schema=fields, format="parquet")
            # One file after the other: what is read ahead is not counted by the limit.
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
        """The one row of an answer, or its value if it has a single column."""
        [row] = self.rows(sql, **values)
        return row[0] if len(row) == 1 else row

    def rows(self, sql: str, **values: Any) -> list[tuple]:
        """All rows of an answer that is short."""
        return self.database.execute(sql, values or None).fetchall()

    def batches(self, sql: str, rows: int = 1 << 16, **values: Any) -> Iterator[pa.RecordBatch]:
        """The rows of an answer, a batch at a time."""
        # On a connection of its own: other questions are asked meanwhile.
        with self.database.cursor() as cursor:
            yield from cursor.sql(sql, params=values or None).to_arrow_reader(rows)

    def keep_one_each(self) -> None:
        """Of equal ids the first record stays, of equal products the one kept for evaluation, then the first.

        A product equals another if its images do, byte by byte, and its title up to case and spacing.
        """
        self.run("""
            CREATE TABLE named AS
            SELECT *, row_number() OVER (PARTITION BY part, id ORDER BY unit, row) AS nth FROM read WHERE reason IS NULL
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'duplicate id', 'an earlier record has it' FROM named WHERE nth > 1
        """)
        self.run("""
            CREATE TABLE unlike AS
            SELECT *, first_value(id) OVER copies AS kept, row_number() OVER copies AS copy
            FROM named WHERE nth = 1 AND part = 'product'
            WINDOW copies AS (PARTITION BY content ORDER BY split = 'val' DESC, split = 'train' DESC, unit, row)
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'duplicate product', 'its title and images are those of ' || left(kept, 200)
            FROM unlike WHERE copy > 1
        """)
        self.run("CREATE TABLE alias AS SELECT id, kept FROM unlike")

    def split(self, fraction: float) -> None:
        """Products get their side: their file's; where no file says, `fraction` of the title groups is for evaluation.

        Nothing is held out where queries or a log are what the evaluation asks with. What has no split of its own is
        then for training, beside what has.
        """
        held_out = self.one("""
            SELECT (SELECT count(*) FROM unlike WHERE copy = 1 AND split = 'val')
                 + (SELECT count(*) FROM named WHERE part = 'query' AND nth = 1 AND split = 'val')
                 + (SELECT count(*) FROM event)
        """)
        whole = self.one("SELECT count(*) FROM unlike WHERE copy = 1 AND split = ''")
        side = f"CASE WHEN split = 'val' THEN {VAL} ELSE {TRAIN} END"
        if not held_out:
            # Files without split are divided; only where there are none, those for training are.
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
        """Products to train on, and to find."""
        return self.one(f"SELECT count(*) FILTER (side = {TRAIN}), count(*) FILTER (side = {VAL}) FROM product")

    def place_queries(self) -> None:
        """Queries that seek a product of their own side get their places; others are left out."""
        products = self.one("SELECT count(*) FROM product")
        to_find = VAL if self.sides()[1] else TRAIN
        self.run(f"""
            CREATE TABLE sought AS
            SELECT named.*, product.index AS positive,
                CASE WHEN named.split = 'train' THEN {TRAIN_QUERIES} ELSE {VAL_QUERIES} END AS side,
                product.side = CASE WHEN named.split = 'train' THEN {TRAIN} ELSE {to_find} END AS fits
            FROM named LEFT JOIN alias ON alias.id = named.target LEFT JOIN product ON product.id = alias.kept
            WHERE part = 'query' AND nth = 1
        """)
        self.run("""
            INSERT INTO left_out
            SELECT unit, row, 'unknown product',
                'no usable product ' || left(target, 200) || ' on its side of the split'
            FROM sought WHERE fits IS NOT TRUE
        """)
        self.run(f"""
            CREATE TABLE query AS
            SELECT row_number() OVER (ORDER BY side, unit, row) - 1 + {products} AS index,
                id, side, positive, unit, row, size, title, draw, has_text, has_image
            FROM sought WHERE fits
        """)

    def number_titles(self) -> None:
        """Title groups get numbers: `title_number(title, number)`."""
        self.run("""
            CREATE TABLE title_number AS
            SELECT title, row_number() OVER (ORDER BY title) - 1 AS number
            FROM (SELECT title FROM product UNION SELECT title FROM query) WHERE title IS NOT NULL
        """)

    def everything(self) -> str:
        """A query of all that is written: index, side, unit, row, size, title."""
        columns = "index, side, unit, row, size, title"
        return f"(SELECT {columns} FROM product UNION ALL SELECT {columns} FROM query)"

    def quarantine(self) -> Iterator[pa.RecordBatch]:
        """What is left out, in the order of the source: file, number, id, reason, detail."""
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
