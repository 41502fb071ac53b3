"""Every record is either read or quarantined with a reason; unusable sources give a one-line error."""

import fcntl
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax import config as config_lib
from moon_jax.errors import UserError
from moon_jax.ingest import columns, parse, prepare, readers, shards, sources
from moon_jax.training import workdir as workdir_lib
from tests.conftest import SCHEMA, jpeg, prepared_from, quarantine, records

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
    parquet = prepared_from(tmp_path / "products.parquet", tmp_path / "a")
    jsonl = prepared_from(tmp_path / "jsonl", tmp_path / "b")
    assert len(parquet.products) == 20 and not parquet.quarantined
    assert list(parquet.products) == list(jsonl.products)
    assert parquet.fingerprint == jsonl.fingerprint
    by_id = {product.id: product for product in parquet.products}
    for record in made:
        product = by_id[record["product_id"]]
        assert product.text == record["title"] and product.category == tuple(record["category"])
        assert product.images == tuple(image["bytes"] for image in record["images"])
        assert product.attributes == dict(record["attributes"]) and product.brand == ""


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
    found = prepared_from(folder, tmp_path / "p")
    listed = quarantine(found)
    reasons = [entry["reason"] for entry in listed]
    assert {reason: reasons.count(reason) for reason in bad} == {reason: len(group) for reason, group in bad.items()}
    assert len(found.products) + len(listed) == len(lines)
    assert found.manifest["read"]["product"] == len(lines) and found.manifest["kept"]["product"] == len(good)
    assert found.quarantined == {reason: len(group) for reason, group in bad.items()}
    assert set(reasons) <= set(parse.REASONS)
    # By line of the file, counted from 1: the bad ones follow the 40 good ones.
    assert [entry["number"] for entry in listed] == list(range(41, 41 + len(reasons)))
    assert reasons == [reason for reason, group in bad.items() for _ in group]
    assert all(entry["file"] == "products.jsonl" for entry in listed)
    assert listed[4]["id"] == "g3"
    assert all(entry["detail"] or entry["reason"] == "no text and no image" for entry in listed)


def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path):
    write_jsonl(tmp_path, [{"product_id": f"{n}", "title": f"t{n}", "images": [f"{n}.jpg"]} for n in range(30)])
    for n in range(30):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg((9, 9, 9), (40, 40) if n == 4 else (8, 8), n))
    [entry] = quarantine(prepared_from(tmp_path, tmp_path / "p", data__max_pixels=1000))
    assert (entry["number"], entry["id"], entry["reason"]) == (5, "4", "bad image")
    assert "40 x 40 pixels, above data.max_pixels" in entry["detail"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "no file that ends with one of .parquet, .jsonl"),
        (lambda p: write_jsonl(p, [{"sku": "1", "title": "x"}]), "no column product_id; the columns are sku, title"),
        (
            lambda p: write_jsonl(p, [{"product_id": "1", "name": "x"}]),
            "no column title or images or image; the columns are name, product_id",
        ),
        (
            lambda p: write_jsonl(p, []).joinpath("queries.jsonl").write_text('{"product_id": "1", "title": "x"}')
            and p,
            "queries.jsonl: no column query_id",
        ),
        (lambda p: write_jsonl(p, []), "no usable training product; at least two different titles are needed"),
        (lambda p: write_jsonl(p, [{"product_id": "1", "titel": "x"}]), "rename titel"),
        (
            lambda p: write_jsonl(p, [{"product_id": "1", "title": 7}]),
            "no usable training product; at least two different titles are needed; 1 left out (1 bad text), such as"
            " products.jsonl 1: title is of type int",
        ),
        (lambda p: (p / "a.parquet").write_bytes(b"PAR") and p, "not a readable parquet file"),
        (lambda p: write_jsonl(p, [{"product_id": "1", "title": "x"}]), "no usable training product; at least two"),
    ],
)
def test_unusable_sources_give_a_one_line_error(tmp_path, make, message):
    with pytest.raises(UserError) as error:
        prepared_from(make(tmp_path), tmp_path / "p")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_queries_and_splits(tmp_path):
    for name, ids in (("train", range(8)), ("val", range(8, 12))):
        rows = [{"product_id": str(n), "title": f"thing {n}", "images": [{"bytes": GOOD}]} for n in ids]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / f"{name}.parquet")
    photo = {"bytes": GOOD, "path": "q.jpg"}
    for name, targets in (("train", ("1", "2", "99", "8")), ("val", ("9", "1"))):
        rows = [{"query_id": f"{name}-{n}", "product_id": t, "image": photo} for n, t in enumerate(targets)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"queries_{name}.parquet")
    found = prepared_from(tmp_path, tmp_path / "p")
    ids = [product.id for product in found.products]
    assert [ids[index] for index in found.train] == [str(n) for n in range(8)]
    assert [ids[index] for index in found.val] == [str(n) for n in range(8, 12)]
    assert [(ids[q], ids[p]) for q, p, _ in found.val_queries] == [("val-0", "9")]
    from_queries = [t for t in found.triplets if t.query != t.positive]
    assert [(ids[t.query], ids[t.positive]) for t in from_queries] == [("train-0", "1"), ("train-1", "2")]
    # Unknown, or in the other part of the split: a held-out product is never a training positive, nor vice versa.
    assert [tuple(entry.values())[:4] for entry in quarantine(found)] == [
        ("queries_train.parquet", 3, "train-2", "unknown product"),
        ("queries_train.parquet", 4, "train-3", "unknown product"),
        ("queries_val.parquet", 2, "val-1", "unknown product"),
    ]


def test_triplets_and_split_do_not_depend_on_the_run(catalogue, prepared, tmp_path):
    products = prepared.products
    again = prepared_from(catalogue, tmp_path / "p", seed=1)
    assert list(prepared.triplets) == list(again.triplets) and prepared.fingerprint == again.fingerprint
    assert len(prepared.triplets) == len(prepared.train) == 54
    for triplet in prepared.triplets:
        positive, negative = products[triplet.positive], products[triplet.negative]
        assert triplet.query == triplet.positive != triplet.negative and triplet.weight == 1.0
        assert positive.category == negative.category
        assert positive.group != negative.group or not positive.group
    groups = prepared.group
    train_groups = {groups[index] for index in prepared.train} - {-1}
    assert not train_groups & {groups[index] for index in prepared.val}
    assert [*prepared.train, *prepared.val] == list(range(60))
    assert {product.id for product in products} == {f"p{n}" for n in range(60)}


def test_the_manifest_counts(prepared):
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["products"] == 60 and manifest["without_image"] == 8 and manifest["without_text"] == 5
    assert manifest["read"] == manifest["kept"] == {"product": 60, "query": 0, "log": 0}
    assert set(manifest["files"]) | {"manifest.json", "source.json"} == {f.name for f in prepared.folder.iterdir()}
    assert not (prepared.folder / ".work").exists()


def test_a_run_keeps_the_manifest_and_refuses_other_data(catalogue, prepared, tmp_path):
    workdir_lib.keep_data(prepared, tmp_path / "w" / "data", "runs/w")
    assert {path.name for path in (tmp_path / "w" / "data").iterdir()} == {"manifest.json", "quarantine.jsonl"}
    assert workdir_lib.keep_data(prepared, tmp_path / "w" / "data", "runs/w") is prepared  # the same data again is fine
    other = prepared_from(catalogue, tmp_path / "p", prepare__val_fraction=0.3)
    with pytest.raises(UserError, match=r"^runs/w: holds data other than that given"):
        workdir_lib.keep_data(other, tmp_path / "w" / "data", "runs/w")


def test_the_fingerprint_covers_all_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    record = {"title": "shoe", "images": ["a.jpg"], "category": ["x"], "attributes": {"colour": "red"}, "brand": "b"}
    seen = set()
    changes = ({}, {"title": "hat"}, {"category": ["y"]}, {"attributes": {"colour": "blue"}}, {"brand": "c"})
    for number, change in enumerate(changes):
        lines = [record | change | {"product_id": "0"}, record | {"product_id": "1", "title": "mug"}]
        write_jsonl(tmp_path, lines)
        seen.add(prepared_from(tmp_path, tmp_path / f"p{number}").fingerprint)
    assert len(seen) == 5


def test_equal_titles_are_in_the_same_part_of_the_split(tmp_path):
    titles = [("Red  shirt %d" if n % 2 else "red shirt %d") % (n // 4) for n in range(160)]
    for n in range(160):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg((90, 90, 90), (8, 8), n))
    lines = [{"product_id": str(n), "title": title, "images": f"{n}.jpg"} for n, title in enumerate(titles)]
    write_jsonl(tmp_path, lines)
    found = prepared_from(tmp_path, tmp_path / "p", prepare__val_fraction=0.3)
    assert len(found.products) == 160
    sides = [{found.group[index] for index in side} for side in (found.train, found.val)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40
    assert len(sides[1]) == 12  # 30% of 40


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_smallest_catalogues_have_a_held_out_product(tmp_path, count):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}", "image": "a.jpg"} for n in range(count)])
    found = prepared_from(tmp_path, tmp_path / "p")
    assert (len(found.train), len(found.val)) == (count - 1, 1)


@pytest.mark.parametrize("name", ["devices", "valentine", "tested_shoes", "trainers"])
def test_a_split_is_a_whole_word_of_the_name(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}", "images": ["a.jpg"]} for n in range(4)])
    (tmp_path / "products.jsonl").rename(tmp_path / f"{name}.jsonl")
    found = prepared_from(tmp_path, tmp_path / "p")
    assert (len(found.train), len(found.val)) == (3, 1)  # split at random, as no file name gives a split


def test_a_catalogue_without_images_is_refused(tmp_path):
    write_jsonl(tmp_path, [{"product_id": n, "title": f"shoe {n}"} for n in range(9)])
    with pytest.raises(UserError, match="no training product has both a title and an image"):
        prepared_from(tmp_path, tmp_path / "p")


def test_invalid_utf8_affects_only_its_record(tmp_path):
    titles = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    columns = {"product_id": pa.array(["1", "2", "3"]), "title": titles, "images": [[GOOD]] * 3}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    found = prepared_from(tmp_path, tmp_path / "p")
    assert sorted(product.text for product in found.products) == ["fine", "good"]
    assert [(entry["number"], entry["reason"]) for entry in quarantine(found)] == [(2, "not readable")]


def test_negatives_have_another_title_even_if_nearly_all_are_equal(tmp_path):
    lines = [{"product_id": str(n), "title": "same", "category": ["a", "b"], "images": [f"{n}.jpg"]} for n in range(30)]
    lines.append({"product_id": "x", "title": "other", "category": ["a", "c"], "images": ["x.jpg"]})
    lines.append({"product_id": "v", "title": "held out"})
    for line in lines[:-1]:
        (tmp_path / line["images"][0]).write_bytes(
            jpeg(
                (9, 9, 9),
                (8, 8),
                len(line["product_id"]) * 99 + ord(line["product_id"][-1]) + 7 * ord(line["product_id"][0]),
            )
        )
    write_jsonl(tmp_path, lines[:-1])
    (tmp_path / "val.jsonl").write_text(json.dumps(lines[-1]))
    found = prepared_from(tmp_path, tmp_path / "p")
    ids = [product.id for product in found.products]
    for triplet in found.triplets:
        assert (ids[triplet.negative] == "x") == (ids[triplet.positive] != "x")


def test_negatives_are_uniform_over_the_narrowest_category_that_has_another_title(tmp_path):
    """Each negative is among those a plain implementation allows, and none of them is favoured."""
    rng = np.random.default_rng(0)
    lines = []
    for n in range(900):
        category = [["a"], ["a", "b"], ["a", "c"], ["d", "e", str(n)], []][rng.integers(5)]
        title = None if n % 13 == 0 else f"thing {rng.integers(40)}"
        lines.append({"product_id": str(n), "title": title, "category": category, "images": [f"{n % 30}.jpg"]})
    for n in range(30):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), n))
    write_jsonl(tmp_path, lines)
    (tmp_path / "val.jsonl").write_text(json.dumps({"product_id": "v", "title": "held out"}))
    found = prepared_from(tmp_path, tmp_path / "p")
    products, shares = found.products[:], []
    train = [products[index] for index in found.train]
    for triplet in found.triplets:
        positive = products[triplet.positive]
        for depth in range(len(positive.category), -1, -1):
            path = positive.category[:depth]
            allowed = [
                p.id
                for p in train
                if p.category[:depth] == path and (p.group != positive.group if positive.group else p is not positive)
            ]
            if allowed:
                break
        assert products[triplet.negative].id in allowed
        shares.append((sorted(allowed).index(products[triplet.negative].id) + 0.5) / len(allowed))
    # The rank among the allowed products is uniform: ten bins of about 90, none off by five sigma.
    counts, _ = np.histogram(shares, bins=10, range=(0, 1))
    assert abs(counts - len(shares) / 10).max() < 5 * np.sqrt(len(shares) / 10)


def lines_of(count, **more):
    return [{"product_id": n, "title": f"thing {n}", "images": [f"{n}.jpg"]} | more for n in range(count)]


def photos(folder, count):
    for n in range(count):
        (folder / f"{n}.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), n))


def test_a_product_with_id_0_can_be_a_target(tmp_path):
    photos(tmp_path, 4)
    write_jsonl(tmp_path, lines_of(4))
    queries = [{"query_id": n, "product_id": float(n) if n else n, "title": "thing"} for n in range(4)]
    (tmp_path / "queries_val.jsonl").write_text("\n".join(map(json.dumps, queries)))
    found = prepared_from(tmp_path, tmp_path / "p")
    ids = [product.id for product in found.products]
    assert [(ids[q], ids[p]) for q, p, _ in found.val_queries] == [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3")]


def test_images_that_appear_later_are_found(tmp_path):
    write_jsonl(tmp_path / "s", lines_of(5))
    with pytest.raises(UserError, match="5 bad image"):
        prepared_from(tmp_path / "s", tmp_path / "p")
    photos(tmp_path / "s", 5)
    assert len(prepared_from(tmp_path / "s", tmp_path / "p").products) == 5


def test_images_that_appear_after_some_shards_were_written(tmp_path, monkeypatch):
    """The shards of the first attempt hold other records."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 2000)
    write_jsonl(tmp_path / "s", lines_of(30))
    photos(tmp_path / "s", 30)
    (tmp_path / "s" / "2.jpg").rename(tmp_path / "2.jpg")
    with monkeypatch.context() as patched:
        write, count = shards.write_shard, []

        def stop(*arguments):
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt
            return write(*arguments)

        patched.setattr(shards, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared_from(tmp_path / "s", tmp_path / "p")
    (tmp_path / "2.jpg").rename(tmp_path / "s" / "2.jpg")
    found, fresh = prepared_from(tmp_path / "s", tmp_path / "p"), prepared_from(tmp_path / "s", tmp_path / "q")
    assert list(found.products) == list(fresh.products) and len(found.products) == 30
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == {
        path.name: path.read_bytes() for path in fresh.folder.iterdir()
    }


def test_a_source_that_changes_during_prepare_is_refused(tmp_path, monkeypatch):
    photos(tmp_path, 5)
    write_jsonl(tmp_path, lines_of(5))
    write = shards.write_shard

    def append(*arguments):
        with (tmp_path / "products.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"product_id": "late", "title": "late"}))
        return write(*arguments)

    monkeypatch.setattr(shards, "write_shard", append)
    with pytest.raises(UserError, match=r"changed during prepare; remove .*/p and prepare it again"):
        prepared_from(tmp_path, tmp_path / "p")
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_a_record_larger_than_a_shard(tmp_path, monkeypatch):
    """Shards are numbered without gaps, and units with large images have more row groups."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 2000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3000)
    photos(tmp_path, 30)
    (tmp_path / "3.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), 3) + bytes(20_000))
    write_jsonl(tmp_path, lines_of(30))
    found = prepared_from(tmp_path, tmp_path / "p")
    names = sorted(path.name for path in found.folder.glob("*train.array*"))
    assert names == [f"moon_jax-train.array_record-{n:05}-of-{len(names):05}" for n in range(len(names))]
    assert len(names) > 5 and sum(len(product.images[0]) > 20_000 for product in found.products) == 1
    assert sorted(int(product.id) for product in found.products) == list(range(30))
    assert {len(found.products[index : index + 1]) for index in (0, 29)} == {1}


@pytest.mark.parametrize("part", ["val", "queries_val"])
def test_unusable_evaluation_data_is_an_error(tmp_path, part):
    photos(tmp_path, 4)
    write_jsonl(tmp_path, lines_of(4))
    lost = {"product_id": 0 if part == "val" else 99, "query_id": "q", "title": "again"}
    (tmp_path / f"{part}.jsonl").write_text(json.dumps(lost))
    (tmp_path / "products.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(
        UserError,
        match=r"it has evaluation (products|queries), but none is usable; 1 left out \(1 (duplicate id|unknown p)",
    ):
        prepared_from(tmp_path, tmp_path / "p")


def test_unrelated_files_are_never_removed(tmp_path):
    photos(tmp_path, 4)
    write_jsonl(tmp_path, lines_of(4))
    for name in (".work", ".data"):
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepared_from(tmp_path, tmp_path / "w")
    opened = sources.open_source(tmp_path, columns.load())
    options = prepare.Options.of(config_lib.Config())
    assert workdir_lib._home(tmp_path / "w", opened, options) is None
    assert (tmp_path / "w" / ".work" / "mine.txt").exists() and (tmp_path / "w" / ".data" / "mine.txt").exists()


def test_two_processes_cannot_prepare_one_output(tmp_path):
    photos(tmp_path, 4)
    write_jsonl(tmp_path, lines_of(4))
    (tmp_path / "p" / ".work").mkdir(parents=True)
    with (tmp_path / "p" / ".work" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working there"):
            prepared_from(tmp_path, tmp_path / "p")
    assert len(prepared_from(tmp_path, tmp_path / "p").products) == 4


def test_file_names_may_contain_anything(tmp_path):
    folder = tmp_path / "it's [a] *? folder"
    photos(tmp_path, 4)
    write_jsonl(folder, lines_of(4))
    photos(folder, 4)
    os.rename(folder / "products.jsonl", os.fsencode(folder) + b"/prod\xff'[1].jsonl")
    found = prepared_from(folder, tmp_path / "out's [b]")
    assert len(found.products) == 4
