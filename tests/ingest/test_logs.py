"""Triplets from logs, compared with a plain Python implementation."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest

from tests.conftest import jpeg, prepared_from, quarantine

WEIGHTS = {"impression": 0, "click": 1, "cart": 2, "purchase": 4}


def write(folder, products, rows, name="log.jsonl"):
    folder.mkdir(exist_ok=True)
    for number, product in enumerate(products):
        (folder / f"{number}.jpg").write_bytes(jpeg((90, 90, 90), (8, 8), number))
        product.setdefault("images", [f"{number}.jpg"])
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, products)))
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def catalogue(count, category=3):
    return [
        {"product_id": f"p{n}", "title": f"thing {n // 2}", "category": ["all", f"c{n % category}"]}
        for n in range(count)
    ]


def triplets(found):
    ids = [product.id for product in found.products]
    texts = [product.text for product in found.products]
    return {
        (texts[t.query], ids[t.positive]): (None if t.negative is None else ids[t.negative], t.weight)
        for t in found.triplets
    }


def test_weights_negatives_and_the_split_by_time(tmp_path):
    rows = []

    def page(query, session, time, shown, events):
        for position, product in enumerate(shown):
            common = {"query": query, "session": session, "product_id": product, "position": position}
            rows.append(common | {"event": "impression", "time": time})
            for event in events.get(product, ()):
                rows.append(common | {"event": event, "time": time + 1})

    # p4 and p5 share a title, so p4 is not a negative of p5.
    page("red", "a", 10, ["p0", "p4", "p9", "p5"], {"p5": ["click", "purchase"]})
    # Nothing was shown above, so the negative is from the same category.
    page("blue", "b", 20, ["p1", "p2"], {"p1": ["click"]})
    # p0 was skipped here, but chosen for the same query elsewhere, so p7, skipped above p8, is the negative.
    page("mug", "c", 30, ["p0", "p7", "p8"], {"p8": ["cart"]})
    page("mug", "d", 40, ["p0", "p1"], {"p0": ["click"]})
    rows.append({"query": "mug", "product_id": "p8", "event": "click", "count": 3, "time": 50})
    # Later than 90% of the choices, so held out. A training pair is not evaluated again.
    page("late", "e", 1000, ["p3", "p6"], {"p6": ["click"]})
    rows += [{"query": f"filler {n}", "product_id": "p10", "event": "click", "time": 60 + n} for n in range(14)]
    rows.append({"query": "red", "product_id": "p5", "event": "click", "time": 1002})
    found = prepared_from(write(tmp_path / "data", catalogue(12), rows), tmp_path / "p")
    made = triplets(found)
    assert made["red", "p5"] == ("p9", pytest.approx(math.log2(1 + 5)))
    negative, weight = made["blue", "p1"]
    assert weight == 1.0 and int(negative[1:]) % 3 == 1 and negative != "p1" and negative != "p0"
    assert made["mug", "p8"] == ("p7", pytest.approx(math.log2(1 + 2 + 3)))
    assert made["mug", "p0"][1] == 1.0
    assert ("late", "p6") not in made and len(made) == 4 + 14
    evaluated = [(found.products[q].text, found.products[p].id) for q, p, _ in found.val_queries]
    assert evaluated == [("late", "p6")]
    assert found.manifest["read"]["log"] == found.manifest["kept"]["log"] == len(rows)
    assert found.manifest["negatives_skipped_above"] == 2
    # With a log no title is held out, and each query is one record.
    assert list(found.val) == list(found.train) == list(range(12))
    assert len(found.products) == 12 + len({query for query, _ in made} | {"late"})


def test_a_large_log_equals_a_plain_implementation(tmp_path):
    rng = np.random.default_rng(0)
    products = catalogue(60, 4)
    rows = []
    for session in range(700):
        query = f"query {rng.integers(40)}"
        shown = rng.choice(60, 8, replace=False)
        time = float(rng.uniform(0, 100))
        for position, product in enumerate(shown):
            row = {"query": query, "session": str(session), "product_id": f"p{product}", "position": position}
            rows.append(row | {"event": "impression", "time": time})
            if rng.random() < 0.15:
                event = str(rng.choice(["click", "cart", "purchase"]))
                rows.append(row | {"event": event, "time": time, "count": int(rng.integers(1, 4))})
    found = prepared_from(write(tmp_path / "data", products, rows), tmp_path / "p")

    times = [row["time"] for row in rows if WEIGHTS[row["event"]]]
    share = {cut: sum(time >= cut for time in times) / len(times) for cut in times}
    cut = min((cut for cut in times if share[cut] < 1), key=lambda cut: (abs(share[cut] - 0.1), -cut))
    weight, pages, late = defaultdict(float), defaultdict(dict), set()
    for row in rows:
        pair = row["query"], row["product_id"]
        if row["time"] >= cut:
            if WEIGHTS[row["event"]]:
                late.add(pair)
            continue
        gained = WEIGHTS[row["event"]] * row.get("count", 1)
        if gained:
            weight[pair] += gained
        page = pages[row["query"], row["session"]]
        top, taken = page.get(row["product_id"], (row["position"], 0))
        page[row["product_id"]] = min(top, row["position"]), taken + gained
    skipped = defaultdict(list)
    title = {product["product_id"]: product["title"] for product in products}
    bought = defaultdict(set)
    for query, product in weight:
        bought[query].add(title[product])
    for (query, session), page in pages.items():
        for product, (position, taken) in page.items():
            for other, (above, other_taken) in page.items():
                good = taken and not other_taken and above < position and title[product] != title[other]
                if good and title[other] not in bought[query]:
                    skipped[query, product].append((position - above, session, other))
    made = triplets(found)
    assert set(made) == set(weight)
    direct = 0
    for (query, product), (negative, found_weight) in made.items():
        assert found_weight == pytest.approx(math.log2(1 + weight[query, product]), rel=1e-6)
        near = [other for gap, _, other in skipped[query, product] if gap == min(skipped[query, product])[0]]
        if near:
            assert negative in near
            direct += 1
        else:
            assert title[negative] not in bought[query] and int(negative[1:]) % 4 == int(product[1:]) % 4
    assert direct > 50 and direct == found.manifest["negatives_skipped_above"]
    evaluated = {(found.products[q].text, found.products[p].id) for q, p, _ in found.val_queries}
    assert evaluated == {(query, product) for query, product in late if title[product] not in bought[query]}
    assert len(evaluated) < len(late - set(weight))  # some titles were bought in training


def held_out(found):
    return {(found.products[q].text, found.products[p].id) for q, p, _ in found.val_queries}


def test_the_names_of_log_files_say_what_is_held_out(tmp_path):
    """Whatever their times; a log without a split in its name is cut by time as ever."""
    early = [{"query": f"early {n}", "product_id": f"p{n}", "event": "click", "time": n} for n in range(4)]
    late = [{"query": f"late {n}", "product_id": f"p{n}", "event": "click", "time": 100 + n} for n in range(20)]
    folder = write(tmp_path / "data", catalogue(24), early, "log_val.jsonl")
    (folder / "log-train.jsonl").write_text("\n".join(map(json.dumps, late)))
    found = prepared_from(folder, tmp_path / "p")
    assert held_out(found) == {(f"early {n}", f"p{n}") for n in range(4)}
    assert set(triplets(found)) == {(f"late {n}", f"p{n}") for n in range(20)}
    (folder / "log-train.jsonl").rename(folder / "log.jsonl")
    found = prepared_from(folder, tmp_path / "q")
    assert held_out(found) == {(f"early {n}", f"p{n}") for n in range(4)} | {(f"late {n}", f"p{n}") for n in (18, 19)}


@pytest.mark.parametrize(
    ("days", "last"),
    [
        ([10] * 9 + [80], 1),  # the last day alone is far more than a tenth, but there is no smaller share
        ([40] * 2 + [15, 5], 1),
        ([85, 8, 7], 1),
        ([92, 5, 3], 2),
    ],
)
def test_a_log_of_days_is_cut_between_days(tmp_path, days, last):
    rows = [
        {"query": f"day {day}, {n}", "product_id": f"p{n % 40}", "event": "click", "time": f"2026-01-{day + 1:02}"}
        for day, count in enumerate(days)
        for n in range(count)
    ]
    found = prepared_from(write(tmp_path / "data", catalogue(40), rows), tmp_path / "p")
    assert {query.split(",")[0] for query, _ in held_out(found)} == {
        f"day {day}" for day in range(len(days) - last, len(days))
    }


def test_a_log_of_one_day_is_cut_by_queries(tmp_path):
    rows = [
        {"query": f"query {n}", "product_id": f"p{n % 40}", "event": "click", "time": "2026-01-01"} for n in range(400)
    ]
    found = prepared_from(write(tmp_path / "data", catalogue(40), rows), tmp_path / "p")
    assert 20 < len(held_out(found)) < 60
    assert {query for query, _ in held_out(found)}.isdisjoint(query for query, _ in triplets(found))


def purchases(count, queries, products, seed=0):
    """A made log: queries and products are drawn by Zipf's law, at rising times."""
    rng = np.random.default_rng(seed)
    draw = lambda size: int((rng.zipf(1.3, 1) - 1)[0] % size)  # noqa: E731
    return [
        {"query": f"query {draw(queries)}", "product_id": f"p{draw(products)}", "event": "purchase", "time": number}
        for number in range(count)
    ]


def test_no_negative_is_something_that_the_query_wants(tmp_path):
    """Nor has its title. A quarter of the drawn negatives were other purchases of the same query."""
    products, rows = catalogue(60, 4), purchases(2000, 50, 60)
    found = prepared_from(write(tmp_path / "data", products, rows), tmp_path / "p")
    wants, full = defaultdict(set), set()
    for triplet in found.triplets:
        wants[triplet.query].add(found.products[triplet.positive].text)
    assert max(map(len, wants.values())) > 10
    for triplet in found.triplets:
        if triplet.negative is None:
            full.add(triplet.query)
        else:
            assert found.products[triplet.negative].text not in wants[triplet.query]
    assert all(len(wants[query]) == 30 for query in full)  # only a query that wants all titles has no negative


def test_the_one_product_that_a_query_does_not_want_is_found(tmp_path):
    """In another category than the positives, whose categories the query wants completely."""
    rows = [{"query": "all but one", "product_id": f"p{n}", "event": "click", "time": n} for n in range(38)]
    products = catalogue(40, 4)
    rows += [{"query": "late", "product_id": "p0", "event": "click", "time": 100 + n} for n in range(3)]
    found = prepared_from(write(tmp_path / "data", products, rows), tmp_path / "p")
    negatives = {found.products[t.negative].text for t in found.triplets if found.products[t.query].text != "late"}
    assert negatives == {"thing 19"}


def test_what_is_held_out_decides_nothing_in_training(tmp_path):
    """Other late purchases of the same queries at the same times leave the training data as they are."""
    rows = []
    for number, row in enumerate(purchases(600, 20, 40)):
        shown = [f"p{(7 * number + k) % 40}" for k in range(4)]
        common = {"query": row["query"], "session": str(number), "time": row["time"]}
        rows += [common | {"product_id": p, "event": "impression", "position": k} for k, p in enumerate(shown)]
        rows.append(common | {"product_id": row["product_id"], "event": "purchase", "position": 4})
    late = sorted(row["time"] for row in rows if row["event"] == "purchase")[540]
    other = [
        row | {"product_id": f"p{(int(row['product_id'][1:]) + 13) % 40}"} if row["time"] >= late else row
        for row in rows
    ]
    # The same purchases by other queries, whose records they must not bring forward.
    queries = sorted({row["query"] for row in rows})
    turned = dict(zip(queries, queries[1:] + queries[:1], strict=True))
    renamed = [row | {"query": turned[row["query"]]} if row["time"] >= late else row for row in rows]
    made = []
    for name, log in (("a", rows), ("b", other), ("c", renamed)):
        log = sorted(log, key=lambda row: row["time"] < late)  # what is late comes first in the file
        found = prepared_from(write(tmp_path / name, catalogue(40, 4), log), tmp_path / f"p{name}")
        made.append([*triplets(found).items()])
        assert found.val_queries
    assert made[0] == made[1] == made[2] and any(negative for _, (negative, _) in made[0])


def test_held_out_purchases_carry_their_weight(tmp_path):
    rows = [{"query": f"early {n}", "product_id": "p1", "event": "click", "time": n} for n in range(20)]
    rows += [
        {"query": "late", "product_id": "p2", "event": "click", "time": 100},
        {"query": "late", "product_id": "p4", "event": "purchase", "time": 101},
    ]
    found = prepared_from(write(tmp_path / "data", catalogue(12), rows), tmp_path / "p", prepare__val_fraction=0.09)
    held_out = {(found.products[q].text, found.products[p].id): weight for q, p, weight in found.val_queries}
    assert held_out == {("late", "p2"): 1.0, ("late", "p4"): pytest.approx(math.log2(5))}
    assert found.manifest["val_queries"] == 1


def test_unusable_log_rows_are_quarantined(tmp_path):
    good = {"query": "mug", "product_id": "p1", "event": "click", "time": 5}
    bad = [
        ("bad event", good | {"event": "hover"}),
        ("bad event", good | {"event": 7}),
        ("bad event", good | {"event": ["click"]}),
        ("bad event", good | {"count": 1e35}),
        ("bad event", good | {"time": "yesterday"}),
        ("bad event", good | {"time": 1e400}),
        ("bad event", good | {"count": -1}),
        ("bad event", good | {"count": "many"}),
        ("bad event", good | {"count": float("nan")}),
        ("bad event", good | {"position": "top"}),
        ("bad event", good | {"position": True}),
        ("no id", good | {"product_id": ""}),
        ("no text and no image", good | {"query": "  "}),
        ("bad text", good | {"query": 7}),
        ("bad text", good | {"query": "\ud800"}),
        ("unknown product", good | {"product_id": "p99"}),
        ("bad image", good | {"query": None, "query_image": "../secret.jpg"}),
        ("bad text", good | {"session": {"a": 1}}),
    ]
    fine = [
        good | {"time": "2026-11-24T10:00:00Z"},
        good | {"time": "1700000000.5", "count": "2"},
        *(good | {"time": time} for time in ("1.7e+09", " 1700000000", "+5", "-3.5", "2026-11-24")),
        good | {"time": None, "position": float("nan"), "query": "hat"},
        {"query": "no event counts as a choice", "product_id": "p2"},
    ]
    rows = [row for _, row in bad] + fine
    found = prepared_from(write(tmp_path / "data", catalogue(6), rows), tmp_path / "p")
    assert [(e["file"], e["number"], e["reason"]) for e in quarantine(found)] == [
        ("log.jsonl", number, reason) for number, (reason, _) in enumerate(bad, start=1)
    ]
    assert found.manifest["read"]["log"] == len(rows) and found.manifest["kept"]["log"] == len(fine)


def test_image_queries_csv_logs_and_duplicates(tmp_path):
    """Image queries and a CSV log; clicks on a duplicate count for the product that is kept."""
    products = catalogue(6)
    products.append(products[2] | {"product_id": "same as p2", "images": ["2.jpg"]})
    folder = write(tmp_path / "data", products, [], "unused.txt")
    (folder / "photo.jpg").write_bytes(jpeg((9, 200, 9), (10, 10), 0))
    (folder / "log_1.csv").write_text(
        "query,query_image,product_id,event\n"
        "red mug,,same as p2,click\n"
        'red mug,,p2,"click"\n'
        ",photo.jpg,p3,purchase\n"
        '"two\nlines",photo.jpg,p4,click\n'
    )
    found = prepared_from(folder, tmp_path / "p", prepare__val_fraction=0.0001)
    ids = [product.id for product in found.products]
    made = {
        (found.products[t.query].text, len(found.products[t.query].images), ids[t.positive]): t for t in found.triplets
    }
    assert set(made) == {("red mug", 0, "p2"), (None, 1, "p3"), ("two\nlines", 1, "p4")}
    assert made["red mug", 0, "p2"].weight == pytest.approx(math.log2(3))
    assert found.quarantined == {"duplicate product": 1}


def test_batches_from_a_log(tmp_path):
    """Text-only queries are rows with view t only."""
    from moon_jax.data import pipeline, text
    from tests.conftest import tiny

    rows = [{"query": f"thing {n % 5}", "product_id": f"p{n % 12}", "event": "click", "time": n} for n in range(40)]
    found = prepared_from(write(tmp_path / "data", catalogue(12), rows), tmp_path / "p")
    tokenizer = text.train((product.text for product in found.products if product.text), 300)
    batch = pipeline.batches(found, pipeline.Reader(tiny(), tokenizer))[0]
    assert (batch.rows.view[:8, 0] == 1).all() and not batch.rows.view[:8, 1:].any()
    assert batch.rows.view[8:16].all() and (batch.weight >= 1).all()


def test_held_out_products_are_never_negatives(tmp_path):
    rows = []
    for n in range(36):
        common = {"query": f"q{n}", "session": str(n), "time": n}
        rows.append(common | {"product_id": f"p{6 + n % 6}", "position": 1, "event": "impression"})
        rows.append(common | {"product_id": f"p{n % 6}", "position": 2, "event": "click"})
    folder = write(tmp_path / "data", catalogue(12, 1), rows)
    lines = (folder / "products.jsonl").read_text().splitlines()
    (folder / "products_train.jsonl").write_text("\n".join(lines[:6]))
    (folder / "products_val.jsonl").write_text("\n".join(lines[6:]))
    (folder / "products.jsonl").unlink()
    found = prepared_from(folder, tmp_path / "p")
    train = set(found.train)
    assert len(found.triplets) > 20 and all(triplet.negative in train for triplet in found.triplets)
