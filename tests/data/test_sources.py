"""Every record is read or quarantined with a reason; what cannot be used at all is one line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax.config import UserError
from moon_jax.data import prepare, sources, triplets
from moon_jax.types import Product
from tests.conftest import SCHEMA, jpeg, records, tiny

GOOD = jpeg((200, 30, 30), (24, 24), 0)


def write_jsonl(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "products.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    return folder


def test_parquet_and_jsonl_give_the_same_products(tmp_path):
    made = records(20)
    pq.write_table(pa.Table.from_pylist(made, SCHEMA), tmp_path / "products.parquet")
    lines = []
    for record in made:
        paths = []
        for image in record["images"]:
            (tmp_path / "jsonl" / "images").mkdir(parents=True, exist_ok=True)
            (tmp_path / "jsonl" / "images" / image["path"]).write_bytes(image["bytes"])
            paths.append(f"images/{image['path']}")
        lines.append(record | {"images": paths, "attributes": dict(record["attributes"])})
    write_jsonl(tmp_path / "jsonl", lines)
    parquet, jsonl = sources.read(tmp_path / "products.parquet"), sources.read(tmp_path / "jsonl")
    assert len(parquet.products) == 20 and not parquet.quarantine
    for a, b in zip((r.product for r in parquet.products), (r.product for r in jsonl.products), strict=True):
        assert [path.read_bytes() for path in b.images] == list(a.images)
        assert (a.id, a.text, a.group, a.category, a.attributes) == (b.id, b.text, b.group, b.category, b.attributes)


def test_every_bad_record_is_quarantined_with_its_reason(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(GOOD)
    folder = tmp_path / "catalogue"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(GOOD)
    (folder / "short.jpg").write_bytes(GOOD[: len(GOOD) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no image at all")
    good = [{"product_id": f"g{n}", "title": f"good {n}", "images": ["good.jpg"]} for n in range(40)]
    bad = {
        "not readable": [
            "{broken",
            "[1, 2]",
            "[" * 100_000,
        ],
        "no id": [{"product_id": None, "title": "x"}],
        "duplicate id": [{"product_id": "g3", "title": "again"}],
        "bad text": [
            {"product_id": "b1", "title": 7},
            {"product_id": "c1", "title": "x", "category": 3},
            {"product_id": "c2", "title": "x", "attributes": [7]},
            {"product_id": "c3", "title": "x", "attributes": [{"key": "a", "value": "b"}]},
            '{"product_id": "\\ud800", "title": "x"}',
        ],
        "text too long": [{"product_id": "b2", "title": "x" * 1_000_000}],
        "no text and no image": [{"product_id": "b3", "title": None}, {"product_id": "b4", "title": " ", "images": []}],
        "bad image": [
            {"product_id": f"i{n}", "title": "x", "images": [path]}
            for n, path in enumerate(
                ("short.jpg", "empty.jpg", "text.jpg", "missing.jpg", "../outside.jpg", 7, "nul\x00.jpg")
            )
        ],
    }
    lines = good + [line for group in bad.values() for line in group]
    write_jsonl(folder, lines)
    found = prepare.prepare(tiny(data__path=str(folder)))
    reasons = [entry.reason for entry in found.quarantine]
    assert {reason: reasons.count(reason) for reason in bad} == {reason: len(group) for reason, group in bad.items()}
    assert len(found.products) + len(found.quarantine) == len(lines)
    assert set(reasons) <= set(sources.REASONS)
    # By line of the file, counted from 1: the bad ones follow the 40 good ones.
    assert [entry.number for entry in found.quarantine] == list(range(41, 41 + len(reasons)))
    assert reasons == [reason for reason, group in bad.items() for _ in group]
    assert all(entry.file == "products.jsonl" for entry in found.quarantine)
    assert found.quarantine[4].id == "g3"
    found.save(tmp_path / "data", tmp_path)
    assert len((tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()) == len(reasons)
    assert all(entry.detail or entry.reason == "no text and no image" for entry in found.quarantine)


def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path):
    write_jsonl(tmp_path, [{"product_id": f"{n}", "title": f"t{n}", "images": [f"{n}.jpg"]} for n in range(30)])
    for n in range(30):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg((9, 9, 9), (40, 40) if n == 4 else (8, 8), n))
    found = prepare.prepare(tiny(data__path=str(tmp_path), data__max_pixels=1000))
    assert [(entry.number, entry.id, entry.reason) for entry in found.quarantine] == [(5, "4", "bad image")]
    assert "40 x 40 pixels, above data.max_pixels" in found.quarantine[0].detail


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "no .parquet or .jsonl file there"),
        (lambda p: write_jsonl(p, [{"sku": "1", "title": "x"}]), "no column product_id; its columns are sku, title"),
        (lambda p: write_jsonl(p, [{"product_id": "1", "name": "x"}]), "no column title or images or image"),
        (
            lambda p: write_jsonl(p, []).joinpath("queries.jsonl").write_text('{"product_id": "1", "title": "x"}')
            and p,
            "queries.jsonl: no column query_id",
        ),
        (lambda p: write_jsonl(p, []), "no usable product; no records there"),
        (lambda p: write_jsonl(p, [{"product_id": "1", "titel": "x"}]), "rename titel"),
        (
            lambda p: write_jsonl(p, [{"product_id": "1", "title": 7}]),
            "no usable product; 1 left out (1 bad text), such as products.jsonl 1: title is of type int",
        ),
        (lambda p: (p / "a.parquet").write_bytes(b"PAR") and p, "not a readable Parquet file"),
        (lambda p: write_jsonl(p, [{"product_id": "1", "title": "x"}]), "no product left to"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, make, message):
    with pytest.raises(UserError) as error:
        prepare.prepare(tiny(data__path=str(make(tmp_path))))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_queries_and_splits(tmp_path):
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        rows = [{"product_id": str(n), "title": f"thing {n}", "images": [{"bytes": GOOD}]} for n in ids]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / f"{name}.parquet")
    photo = {"bytes": GOOD, "path": "q.jpg"}
    for name, targets in (("train", ("1", "2", "99", "8")), ("val", ("9", "1"))):
        rows = [{"query_id": f"{name}-{n}", "product_id": t, "image": photo} for n, t in enumerate(targets)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"queries_{name}.parquet")
    found = prepare.prepare(tiny(data__path=str(tmp_path)))
    ids = [product.id for product in found.products]
    assert [ids[index] for index in found.train] == [str(n) for n in range(8)]
    assert [ids[index] for index in found.val] == [str(n) for n in range(8, 12)]
    assert [(ids[q], ids[p]) for q, p in found.val_queries] == [("val-0", "9")]
    asked = [t for t in found.triplets if t.query != t.positive]
    assert [(ids[t.query], ids[t.positive]) for t in asked] == [("train-0", "1"), ("train-1", "2")]
    # Unknown, or on the other side of the split: a held-out product is no training positive, nor the reverse.
    assert [(entry.file, entry.number, entry.id, entry.reason) for entry in found.quarantine] == [
        ("queries_train.parquet", 3, "train-2", "unknown product"),
        ("queries_train.parquet", 4, "train-3", "unknown product"),
        ("queries_val.parquet", 2, "val-1", "unknown product"),
    ]


def test_triplets_and_split_follow_from_the_seed(catalogue, prepared):
    products = prepared.products
    assert prepared.triplets == prepare.prepare(tiny(data__path=str(catalogue))).triplets
    assert prepared.triplets != prepare.prepare(tiny(data__path=str(catalogue), seed=1)).triplets
    for triplet in prepared.triplets:
        positive, negative = products[triplet.positive], products[triplet.negative]
        assert triplet.query == triplet.positive != triplet.negative
        assert positive.category == negative.category
        assert positive.group != negative.group or not positive.group
    groups = prepared.group
    train_groups = {groups[index] for index in prepared.train} - {-1}
    assert not train_groups & {groups[index] for index in prepared.val}
    assert sorted(prepared.train + prepared.val) == list(range(60))


def test_the_manifest_counts_and_refuses_other_data(catalogue, prepared, tmp_path):
    prepared.save(tmp_path, "runs/w")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["products"] == 60 and manifest["without_image"] == 8 and manifest["without_text"] == 5
    stored = pq.read_table(tmp_path / "triplets.parquet").to_pylist()
    assert [tuple(row.values()) for row in stored] == [tuple(t) for t in prepared.triplets]
    prepared.save(tmp_path, "runs/w")  # the same again is fine
    other = prepare.prepare(tiny(data__path=str(catalogue), seed=1))
    with pytest.raises(UserError, match=r"^--workdir runs/w: holds a run on other data than is given now"):
        other.save(tmp_path, "runs/w")


def test_the_fingerprint_is_of_all_that_is_used(tmp_path):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    record = {"title": "shoe", "images": ["a.jpg"], "category": ["x"], "attributes": {"colour": "red"}, "brand": "b"}
    seen = set()
    for change in ({}, {"title": "hat"}, {"category": ["y"]}, {"attributes": {"colour": "blue"}}, {"brand": "c"}):
        lines = [record | change | {"product_id": "0"}, record | {"product_id": "1", "title": "mug"}]
        write_jsonl(tmp_path, lines)
        seen.add(prepare.prepare(tiny(data__path=str(tmp_path))).fingerprint)
    assert len(seen) == 5


def test_equal_titles_stay_on_one_side_of_the_split(tmp_path):
    titles = [("Red  shirt %d" if n % 2 else "red shirt %d") % (n // 4) for n in range(160)]
    (tmp_path / "a.jpg").write_bytes(GOOD)
    lines = [{"product_id": str(n), "title": title, "images": "a.jpg"} for n, title in enumerate(titles)]
    write_jsonl(tmp_path, lines)
    found = prepare.prepare(tiny(data__path=str(tmp_path), data__val_fraction=0.3))
    sides = [{found.group[index] for index in side} for side in (found.train, found.val)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40
    assert len(sides[1]) == 12  # 30% of 40


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_smallest_catalogues_have_something_to_find(tmp_path, count):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}", "image": "a.jpg"} for n in range(count)])
    found = prepare.prepare(tiny(data__path=str(tmp_path)))
    assert (len(found.train), len(found.val)) == (count - 1, 1)


@pytest.mark.parametrize("name", ["devices", "valentine", "tested_shoes", "trainers"])
def test_a_split_is_a_whole_word_of_the_name(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}", "images": ["a.jpg"]} for n in range(4)])
    (tmp_path / "products.jsonl").rename(tmp_path / f"{name}.jsonl")
    assert len(sources.read(tmp_path).products) == 4


def test_a_catalogue_that_serves_no_objective_is_refused(tmp_path):
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}"} for n in range(9)])
    with pytest.raises(UserError, match="no product to train on has both a title and an image"):
        prepare.prepare(tiny(data__path=str(tmp_path)))


def test_text_that_is_not_utf8_costs_its_record_only(tmp_path):
    titles = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"product_id": pa.array(["1", "2", "3"]), "title": titles}), tmp_path / "p.parquet")
    found = sources.read(tmp_path)
    assert [record.product.text for record in found.products] == ["good", "fine"]
    assert [(entry.number, entry.reason) for entry in found.quarantine] == [(2, "not readable")]


def test_negatives_have_another_title_even_where_nearly_all_are_equal():
    products = [Product(text="same", group="same", id=str(n), category=("a", "b")) for n in range(30)]
    products.append(Product(text="other", group="other", id="x", category=("a", "c")))
    made = triplets.from_catalogue(products, range(31), [], seed=0)
    assert all(triplet.negative == 30 for triplet in made[:30]) and made[30].negative in range(30)
