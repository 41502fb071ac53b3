"""Builds triplets from a log, or from the catalogue alone if there is no log. SQL over the tables of tables.py.

Without a log, triplets are constructed, and every result based on them says so. A query is the product itself, or a
query supplied with the catalogue (another photo of the product); both are altered when they are read (pipeline.py).
The negative is another product of the same category.

With a log, a query and a product chosen for it form a triplet with weight log2(1 + Σ count · weight of the event). The
negative is a product that was shown above the chosen one on the same page and not chosen ("skip above": Joachims, KDD
2002), or, if there is none, one of the same category. A page is all rows of one query in one session, or all rows of
one query if the log has no sessions.

A negative never has the title of a product that its query is known to want. What is held out decides nothing here: a
product that a query wants only later may be its negative, as it would have been at the time.
"""

from __future__ import annotations

from moon_jax.ingest.tables import TRAIN, TRAIN_QUERIES, VAL, VAL_QUERIES, Tables

MAX_DEPTH = 16
"""Maximum levels of a category path in the search for a negative."""

PROBES = 64
"""Products of a category that are tried for a negative, one after the other from a random one, before the search goes
on in the next broader category. A category of that size is thus searched completely.
"""


def from_catalogue(tables: Tables) -> None:
    """Creates `triplet(query, positive, negative, weight, sort_key)` and `val_pair(query, positive, weight)`.

    `triplet` has one row for each training product (as its own query) and one for each training query.
    """
    tables.run(f"""
        CREATE TABLE wanted AS
        SELECT index AS query, index AS positive, draw, 1.0 AS weight, index AS sort_key
        FROM product WHERE side = {TRAIN}
        UNION ALL
        SELECT index, positive, draw, 1.0, index FROM query WHERE side = {TRAIN_QUERIES}
    """)
    tables.run("CREATE TABLE skipped (query BIGINT, positive BIGINT, negative BIGINT)")
    _with_negatives(tables)
    tables.run(f"""
        CREATE TABLE val_pair AS SELECT index AS query, positive, 1.0 AS weight FROM query WHERE side = {VAL_QUERIES}
    """)


def from_log(tables: Tables, fraction: float) -> None:
    """Creates `triplet`, `val_pair` and their queries. What a file's name says is held out or trained on. Of the other
    choices the last `fraction` by time is held out for evaluation. Choices without a time, or all of one time, are held
    out by a hash of the query, with the same fraction.

    What a query chose both before and after the cut, by title, is used for training only. A product must be in the
    matching part of the split.
    """
    candidates = VAL if tables.sides()[1] else TRAIN
    tables.run("""
        INSERT INTO left_out
        SELECT unit, row, 'unknown product', 'no usable product ' || left(event.product, 200)
        FROM event LEFT JOIN alias ON alias.id = event.product WHERE reason IS NULL AND alias.id IS NULL
    """)
    tables.run("""
        CREATE TABLE shown AS
        SELECT event.*, product.index AS positive, side
        FROM event JOIN alias ON alias.id = event.product JOIN product ON product.id = alias.kept
        WHERE reason IS NULL
    """)
    cut = _cut(tables, fraction)
    by_chance = f"('0x' || left(query, 12))::BIGINT < {fraction!r} * 2.0 ** 48"
    by_time = f"CASE WHEN time IS NULL OR $cut IS NULL THEN {by_chance} ELSE time >= $cut END"
    late = f"CASE split WHEN 'val' THEN true WHEN 'train' THEN false ELSE {by_time} END"
    tables.run(f"CREATE TABLE dated AS SELECT *, {late} AS late FROM shown", cut=cut)
    # Sums integers in millionths: a sum of floats would depend on the order.
    tables.run("""
        CREATE TABLE chosen AS
        SELECT query, positive, late, any_value(side) AS side, min(draw) AS draw,
            log2(1 + sum(round(weight * 1e6)::HUGEINT) / 1e6) AS weight
        FROM dated WHERE weight > 0 GROUP BY query, positive, late
    """)
    tables.run(f"CREATE TABLE training_pair AS SELECT * FROM chosen WHERE NOT late AND side = {TRAIN}")
    tables.run("""
        CREATE TABLE bought AS
        SELECT DISTINCT training_pair.query, coalesce(title, index::UBIGINT) AS title_key
        FROM training_pair JOIN product ON product.index = training_pair.positive
    """)
    tables.run(f"""
        CREATE TABLE held_out AS
        SELECT chosen.* FROM chosen JOIN product ON product.index = chosen.positive
        ANTI JOIN bought
        ON bought.query = chosen.query AND bought.title_key = coalesce(product.title, product.index::UBIGINT)
        WHERE late AND chosen.side = {candidates}
    """)
    _log_queries(tables)
    tables.run(f"""
        CREATE TABLE wanted AS
        SELECT query.index AS query, training_pair.positive, training_pair.draw, weight, query.index AS sort_key
        FROM training_pair JOIN query ON query.id = training_pair.query AND query.positive < 0
        UNION ALL
        SELECT index, positive, draw, 1.0, index FROM query WHERE side = {TRAIN_QUERIES} AND positive >= 0
    """)
    _skipped_above(tables)
    _with_negatives(tables)
    tables.run(f"""
        CREATE TABLE val_pair AS
        SELECT query.index AS query, held_out.positive, weight
        FROM held_out JOIN query ON query.id = held_out.query AND query.positive < 0
        UNION ALL
        SELECT index, positive, 1.0 FROM query WHERE side = {VAL_QUERIES} AND positive >= 0
    """)


def _cut(tables: Tables, fraction: float) -> float | None:
    """The time from which on choices are held out: the one whose share is nearest to `fraction`, such as a whole day if
    times are dates. None if no time leaves choices on both sides.
    """
    tables.run("""
        CREATE TABLE moment AS
        SELECT time, sum(number) OVER (ORDER BY time DESC) AS late, sum(number) OVER () AS choices
        FROM (
            SELECT time, count(*) AS number FROM shown
            WHERE weight > 0 AND time IS NOT NULL AND split = '' GROUP BY time
        )
    """)
    nearest = "SELECT time FROM moment WHERE late < choices ORDER BY abs(late - $fraction * choices), time DESC LIMIT 1"
    return next((time for (time,) in tables.rows(nearest, fraction=fraction)), None)


def _log_queries(tables: Tables) -> None:
    """Adds each log query of a triplet or of the evaluation as one record, after all others."""
    first = tables.one("SELECT (SELECT count(*) FROM product) + (SELECT count(*) FROM query)")
    tables.run(f"""
        INSERT INTO query
        WITH used AS (
            SELECT query, min(side) AS side FROM (
                SELECT query, {TRAIN_QUERIES} AS side FROM training_pair
                UNION ALL SELECT query, {VAL_QUERIES} FROM held_out
            ) GROUP BY query
        ), numbered AS (
            SELECT *, row_number() OVER (PARTITION BY query ORDER BY late, unit, row) AS nth
            FROM dated SEMI JOIN used USING (query)
        )
        SELECT row_number() OVER (ORDER BY used.side, unit, row) - 1 + {first},
            query, used.side, -1, unit, row, size, title, draw, has_text, has_image
        FROM numbered JOIN used USING (query) WHERE nth = 1
    """)


def _skipped_above(tables: Tables) -> None:
    """Creates `skipped(query, positive, negative)`: the nearest product that was skipped above each choice."""
    tables.run(f"""
        CREATE TABLE page AS
        SELECT query, session, positive AS item, min(position) AS top, sum(weight) > 0 AS taken,
            min(position) FILTER (weight > 0) AS chosen_at
        FROM dated WHERE NOT late AND side = {TRAIN} AND position IS NOT NULL GROUP BY query, session, positive
    """)
    # Of several products at one position, keeps the first in catalogue order.
    tables.run("""
        CREATE TABLE passed AS
        SELECT page.query, session, top, min(item) AS negative
        FROM page JOIN product ON product.index = page.item
        ANTI JOIN bought
        ON bought.query = page.query AND bought.title_key = coalesce(product.title, product.index::UBIGINT)
        WHERE NOT taken GROUP BY page.query, session, top
    """)
    tables.run("CREATE TABLE near (query VARCHAR, session VARCHAR, positive BIGINT, gap INT, negative BIGINT)")
    tables.run("CREATE TABLE seek AS SELECT query, session, item, chosen_at, chosen_at AS below FROM page WHERE taken")
    # The nearest above; if that has the same title as the choice, the next one. (No self-join: a page may hold
    # thousands of products.)
    for _ in range(2):
        tables.run("""
            CREATE OR REPLACE TABLE found AS
            SELECT seek.query, seek.session, seek.item, chosen_at, top, negative,
                this.title IS DISTINCT FROM that.title AS good
            FROM seek ASOF JOIN passed
            ON seek.query = passed.query AND seek.session = passed.session AND seek.below > passed.top
            JOIN product AS this ON this.index = seek.item JOIN product AS that ON that.index = negative
        """)
        tables.run("INSERT INTO near SELECT query, session, item, chosen_at - top, negative FROM found WHERE good")
        tables.run("""
            CREATE OR REPLACE TABLE seek AS
            SELECT query, session, item, chosen_at, top AS below FROM found WHERE NOT good
        """)
    tables.run("""
        CREATE TABLE skipped AS
        WITH ordered AS (
            SELECT *, row_number() OVER (PARTITION BY query, positive ORDER BY gap, session, negative) AS nth FROM near
        )
        SELECT query.index AS query, ordered.positive, negative
        FROM ordered JOIN query ON query.id = ordered.query AND query.positive < 0 WHERE nth = 1
    """)


def _with_negatives(tables: Tables) -> None:
    """Creates `triplet` from `wanted` and `skipped`. Missing negatives are drawn at random from the products of the
    narrowest category of the positive in which one has a title that the query is not known to want.

    Categories are ordered by title, so products with the positive's title are adjacent and the draw skips them.
    """
    tables.run("""
        CREATE TABLE known AS
        SELECT DISTINCT query, coalesce(title, index::UBIGINT) AS title_key
        FROM wanted JOIN product ON product.index = wanted.positive
    """)
    tables.run("CREATE TABLE missing AS SELECT * FROM wanted ANTI JOIN skipped USING (query, positive)")
    tables.run("CREATE TABLE drawn (query BIGINT, positive BIGINT, negative BIGINT)")
    depth = tables.one(f"SELECT coalesce(max(len(categories)), 0) FROM product WHERE side = {TRAIN}")
    for level in range(min(depth, MAX_DEPTH), -1, -1):
        key = f"categories[{level}]" if level else "0::UBIGINT"
        tables.run(f"""
            CREATE OR REPLACE TABLE pool AS
            WITH member AS (
                SELECT index, {key} AS category, coalesce(title, index::UBIGINT) AS title_key, title IS NULL AS untitled
                FROM product WHERE side = {TRAIN} AND len(categories) >= {level}
            ), placed AS (
                SELECT *, row_number() OVER (PARTITION BY category ORDER BY untitled, title_key, index) - 1 AS slot,
                    count(*) OVER (PARTITION BY category) AS count
                FROM member
            )
            SELECT index, category, slot, count, title_key, min(slot) OVER same AS first, count(*) OVER same AS equal
            FROM placed WINDOW same AS (PARTITION BY category, untitled, title_key)
        """)
        tables.run("""
            CREATE OR REPLACE TABLE turn AS
            SELECT query, positive, category, first, equal, count - equal AS size,
                (draw % (count - equal)::UBIGINT)::BIGINT AS start
            FROM missing JOIN pool ON pool.index = missing.positive ANTI JOIN drawn USING (query, positive)
            WHERE count > equal
        """)
        for probe in range(PROBES):
            if not tables.one("SELECT count(*) FROM turn"):
                break
            tables.run(f"""
                INSERT INTO drawn
                WITH tried AS (SELECT *, (start + {probe}) % size AS number FROM turn WHERE size > {probe})
                SELECT tried.query, tried.positive, pool.index
                FROM tried JOIN pool
                ON pool.category = tried.category
                AND pool.slot = CASE WHEN number < tried.first THEN number ELSE number + tried.equal END
                ANTI JOIN known ON known.query = tried.query AND known.title_key = pool.title_key
            """)
            tables.run("CREATE OR REPLACE TABLE turn AS SELECT * FROM turn ANTI JOIN drawn USING (query, positive)")
    tables.run("""
        CREATE TABLE triplet AS
        SELECT wanted.query, wanted.positive, negative, wanted.weight, wanted.sort_key FROM wanted
        LEFT JOIN (SELECT * FROM skipped UNION ALL SELECT * FROM drawn) USING (query, positive)
    """)
