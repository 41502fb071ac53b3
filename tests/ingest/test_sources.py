"""Every format gives the same products as Parquet; invalid column maps give a one-line error."""

import gzip
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax.errors import UserError
from moon_jax.ingest import columns, sources
from tests.conftest import ROOT, SCHEMA, jpeg, prepared_from, quarantine, records

COUNT = 30


@pytest.fixture(scope="module")
def rows():
    """Records with a title and an image each, which all formats can represent."""
    return [row for row in records(3 * COUNT) if row["title"] and row["images"]][:COUNT]


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    """A folder with their photos."""
    made = tmp_path_factory.mktemp("photos")
    for row in rows:
        (made / row["images"][0]["path"]).write_bytes(row["images"][0]["bytes"])
    return made


@pytest.fixture(scope="module")
def expected(rows, tmp_path_factory):
    made = tmp_path_factory.mktemp("parquet")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), made / "products.parquet")
    return list(prepared_from(made, made / "p").products)


def jsonl(rows, folder, path):
    lines = [
        row | {"images": [image["path"] for image in row["images"]], "attributes": dict(row["attributes"])}
        for row in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_gzipped_lines(rows, folder, expected, tmp_path):
    jsonl(rows, folder, folder / "a.txt")
    (folder / "products.jsonl.gz").write_bytes(gzip.compress((folder / "a.txt").read_bytes()))
    assert list(prepared_from(folder / "products.jsonl.gz", tmp_path / "p").products) == expected
    cut = (folder / "products.jsonl.gz").read_bytes()[:-40]
    (folder / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(UserError, match=r"cut.jsonl.gz: not a readable jsonl file after record"):
        prepared_from(folder / "cut.jsonl.gz", tmp_path / "q")


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_separated_values(rows, folder, expected, tmp_path, suffix):
    """CSV has no maps or lists; a column map describes how they are written."""
    separator = "," if suffix == "csv" else "\t"
    lines = [separator.join(("sku", "name", "photo", "path", "facts"))]
    for row in rows:
        facts = ";".join(f"{name}={value}" for name, value in row["attributes"])
        fields = (row["product_id"], row["title"], row["images"][0]["path"], ">".join(row["category"]), facts)
        lines.append(separator.join(f'"{field}"' if suffix == "csv" else field for field in fields))
    (folder / f"products.{suffix}").write_text("\ufeff" + "\n".join(lines))
    own = {
        "product": {
            "product_id": "sku",
            "title": "name",
            "images": "photo",
            "category": {"column": "path", "split": ">"},
            "attributes": {"column": "facts", "split": ";", "pairs": "="},
        }
    }
    (tmp_path / "map.json").write_text(json.dumps(own))
    found = prepared_from(folder / f"products.{suffix}", tmp_path / "p", str(tmp_path / "map.json"))
    assert list(found.products) == expected


def test_unreadable_csv_lines_affect_only_themselves(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), 0))
    good = [f"{n},thing {n},a.jpg".encode() for n in range(20)]
    bad = [b"x,too,many,fields", b"y,too few", b"z,\xff\xfe,a.jpg"]
    (tmp_path / "p.csv").write_bytes(b"\n".join([b"product_id,title,images", *good[:10], *bad, b"", *good[10:]]))
    found = prepared_from(tmp_path, tmp_path / "p")
    assert [(entry["number"], entry["reason"]) for entry in quarantine(found)] == [
        (11, "not readable"),
        (12, "not readable"),
        (13, "bad text"),
    ]
    assert len(found.products) == 20 and found.manifest["read"]["product"] == 23


def rows_of(tmp_path, text, name="p.csv", columns="own"):
    (tmp_path / "a.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), 0))
    (tmp_path / name).write_bytes(text)
    return prepared_from(tmp_path / name, tmp_path / f"out of {name}", columns)


@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n"])
def test_an_unclosed_quote_affects_only_its_line(tmp_path, last):
    lines = [f'{n},"thing {n}",a.jpg'.encode() for n in range(3000)]
    lines[20], lines[-2] = b'20,"thing 20,a.jpg', b'2998,"thing 2998,a.jpg'
    lines[30] = b'30,"thing\n30\n\nof four lines",a.jpg'
    lines[40] = b'40,"quoted" and not,a.jpg'
    found = rows_of(tmp_path, b"\n".join([b"product_id,title,images", *lines]) + last)
    listed = {entry["number"]: entry["reason"] for entry in quarantine(found)}
    assert listed == {21: "not readable", 41: "not readable", 2999: "not readable"}
    assert found.manifest["read"]["product"] == 3000 and found.manifest["kept"]["product"] == 2997
    assert "thing\n30\n\nof four lines" in {product.text for product in found.products}


def test_byte_order_marks_and_line_endings(tmp_path):
    lines = ['"product_id","title","images"', *(f'"{n}","thing {n}","a.jpg"' for n in range(5))]
    found = rows_of(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert sorted(product.id for product in found.products) == list("01234")
    with pytest.raises(UserError, match=r"q.csv: not a readable csv file after record 0 \(header: "):
        (tmp_path / "q.csv").write_bytes("\r".join(lines).encode())
        prepared_from(tmp_path / "q.csv", tmp_path / "q")
    (tmp_path / "map.json").write_text(
        json.dumps({"header": ["product_id", "title", "images"], "product": columns.load().kinds["product"] and OWN})
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    found = rows_of(bare, b"\xef\xbb\xbf" + "\n".join(lines[1:]).encode(), columns=str(tmp_path / "map.json"))
    assert sorted(product.id for product in found.products) == list("01234")
    text = '{"product_id": "%d", "title": "thing %d", "images": "a.jpg"}'
    found = rows_of(bare, b"\xef\xbb\xbf" + "\r\n".join(text % (n, n) for n in range(4)).encode(), "P.JSONL")
    assert len(found.products) == 4 and not found.quarantined


OWN = {"product_id": "product_id", "title": "title", "images": "images"}


def tar_of(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def test_tar_shards_of_webdataset(rows, expected, tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    for shard in range(2):
        members = []
        for row in rows[shard * 15 : shard * 15 + 15]:
            facts = {"category": row["category"], "attributes": dict(row["attributes"])}
            members += [
                (f"goods/{row['product_id']}.jpg", row["images"][0]["bytes"]),
                (f"goods/{row['product_id']}.json", json.dumps(facts | {"product_id": row["product_id"]}).encode()),
                (f"goods/{row['product_id']}.txt", row["title"].encode()),
                (f"goods/{row['product_id']}.cls", b"7"),
            ]
        tar_of(source / f"shard-{shard}.tar", members)
    assert list(prepared_from(source, tmp_path / "p").products) == expected
    # The key is the id if nothing else gives one; an unreadable file affects only its own key.
    more = [
        ("a.jpg", jpeg((1, 2, 3), (8, 8), 0)),
        ("a.txt", b"from the key"),
        ("link.jpg", None),
        ("../../escaped.jpg", jpeg((1, 2, 3), (8, 8), 1)),
        ("json.json", b"{broken"),
        ("json.jpg", jpeg((1, 2, 3), (8, 8), 2)),
        ("text.txt", b"\xff\xfe"),
    ]
    tar_of(source / "shard-2.tar", more)
    found = prepared_from(source, tmp_path / "q")
    by_id = {product.id: product for product in found.products}
    assert by_id["a"].text == "from the key" and set(by_id) - {p.id for p in expected} == {"a", "../../escaped"}
    reasons = [(entry["number"], entry["reason"]) for entry in quarantine(found)]
    assert reasons == [(2, "not readable"), (4, "not readable"), (5, "bad text")]
    assert not (tmp_path / "escaped.jpg").exists() and not (tmp_path.parent / "escaped.jpg").exists()
    (source / "shard-3.tar").write_bytes((source / "shard-0.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"shard-3.tar: not a readable tar file after record"):
        prepared_from(source, tmp_path / "r")


STATE = json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})


@pytest.mark.parametrize("images", [[], None, "old.jpg", ["missing.jpg"], 7])
@pytest.mark.parametrize("first", ["jpg", "json"])
def test_image_files_of_a_tar_override_its_json(tmp_path, images, first):
    photo, members = jpeg((9, 9, 9), (8, 8), 0), []
    for n in range(6):
        deep = {"x": json.loads("[" * 900 + "]" * 900)} if n == 3 else {}
        both = [
            (f"{n}.jpg", photo),
            (f"{n}.json", json.dumps({"title": f"t{n}", "images": images, "image": 1} | deep).encode()),
        ]
        members += both if first == "jpg" else both[::-1]
    tar_of(tmp_path / "a.tar", members)
    found = prepared_from(tmp_path / "a.tar", tmp_path / "p")
    assert not found.quarantined and all(product.images == (photo,) for product in found.products)


FEATURES = {"info": {"features": {"category": {"names": ["goods", "hats"], "_type": "ClassLabel"}}}}


@pytest.mark.parametrize("layout", ["split", "dict"])
def test_datasets_saved_by_hugging_face(rows, tmp_path, layout):
    """Arrow streams with a state.json and labels as numbers; a DatasetDict has a folder for each split."""
    schema = pa.schema(
        [
            ("product_id", pa.string()),
            ("title", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("category", pa.int64()),
        ],
        metadata={"huggingface": json.dumps(FEATURES)},
    )
    root = tmp_path / "saved"
    splits = {"train": rows[:20], "validation": rows[20:]} if layout == "dict" else {"": rows}
    for split, part in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / "state.json").write_text(STATE)
        path = str(root / split / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for start in range(0, len(part), 7):
                made = [
                    {key: row[key] for key in ("product_id", "title")} | {"image": row["images"][0], "category": n % 2}
                    for n, row in enumerate(part[start : start + 7])
                ]
                stream.write_table(pa.Table.from_pylist(made, schema))
    if layout == "dict":
        (root / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
        # Cache files that map() writes beside the data are ignored.
        shutil.copyfile(path, str(root / split / "cache-1234.arrow"))
    found = prepared_from(root, tmp_path / "p")
    assert not found.quarantined
    assert sorted(p.id for p in found.products) == sorted(row["product_id"] for row in rows)
    assert {product.category for product in found.products} == {("goods",), ("hats",)}
    if layout == "dict":
        assert (len(found.train), len(found.val)) == (20, 10)


def test_a_dataset_of_the_hub(rows, tmp_path):
    """Hugging Face's client with one repository in its cache, and no network."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "datasets--owner--name"
    snapshot = repository / "snapshots" / commit / "default"
    for split in ("train", "test"):
        (snapshot / split).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pq.write_table(pa.Table.from_pylist(rows[:25], SCHEMA), snapshot / "train" / "0000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[25:], SCHEMA), snapshot / "test" / "0000.parquet")
    command = [
        sys.executable,
        "-m",
        "moon_jax.cli",
        "prepare",
        "--processes",
        "1",
        "--output",
        str(tmp_path / "p"),
        "--data",
    ]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = [
        subprocess.run(
            [*command, f"hf://datasets/owner/{name}"], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        for name in ("name", "other", "../../etc")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert f"{COUNT} products read, {COUNT} kept" in done[0].stdout
    assert "25 training products, 5 held out" in done[0].stdout
    assert done[1].returncode == 2 and done[1].stderr.startswith("moon-jax: --data hf://datasets/owner/other: ")
    assert done[2].returncode == 2 and "not a dataset name; write hf://datasets/owner/name" in done[2].stderr
    assert all(one.stderr.count("\n") == 1 for one in done[1:])


def test_tensorflow_datasets_reads_prepared_data_and_is_read(rows, expected, tmp_path):
    """Both directions, without TensorFlow, in a separate process."""
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed (the extra tfds)")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "products.parquet")
    first = prepared_from(tmp_path / "products.parquet", tmp_path / "p")
    code = (
        "import sys, hashlib, json, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "read = []\n"
        "for split in builder.info.splits:\n"
        "    for example in builder.as_data_source(split=split):\n"
        "        shapes = [list(image.shape) for image in example['images']]\n"
        "        read.append([example['id'].decode(), example['title'].decode(), shapes])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(json.dumps(read))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from moon_jax.data.images import decode

    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [[p.id, p.text, [[*decode(i, 10**6).size[::-1], 3] for i in p.images]] for p in first.products]
    assert sorted(theirs) == sorted(ours)
    with pytest.raises(UserError, match="is prepared already; pass it to train or quickstart"):
        prepared_from(tmp_path / "p", tmp_path / "q")
    # Without our own files, the folder is that of a TFDS builder, which is a valid source.
    for path in (tmp_path / "p").iterdir():
        if path.suffix in (".npy", ".jsonl") or path.name in ("manifest.json", "source.json"):
            path.unlink()
    own = {
        "product": {
            "product_id": "id",
            "title": "title",
            "images": "images",
            "category": "category",
            "attributes": "attributes",
        }
    }
    (tmp_path / "map.json").write_text(json.dumps(own))
    again = prepared_from(tmp_path / "p", tmp_path / "q", str(tmp_path / "map.json"))
    by_id = {product.id: product for product in again.products}
    assert [by_id[product.id] for product in first.products] == list(first.products)
    assert len(again.val) == len(first.val) and {p.id for p in again.products} == {p.id for p in expected}
    shard = next((tmp_path / "p").glob("*-val.*"))
    whole = shard.read_bytes()
    middle = len(whole) // 2
    for number, damage in enumerate((whole[:-100], whole[:middle] + b"\xff" * 9 + whole[middle + 9 :])):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match=r"-val.*: not a readable tfds file after record"):
            prepared_from(tmp_path / "p", tmp_path / f"r{number}", str(tmp_path / "map.json"))
    with pytest.raises(UserError, match="--data tfds://no_such_thing: "):
        prepared_from("tfds://no_such_thing", tmp_path / "r")


# --- column maps --------------------------------------------------------------------------------------------------


def apply(name, row, kind="product"):
    return columns.load(name).apply(kind, row)


def test_the_columns_of_mbe():
    row = {
        "id": 7,
        "doc_title": "红色 运动鞋",
        "doc_image": "https://img.example.com/7.jpg",
        "doc_industry_name": "鞋",
        "doc_cate1_name": "运动鞋",
        "doc_cate2_name": None,
        "doc_cate3_name": "",
        "doc_attributes": "颜色:红色,,尺码:42!!!43,,空,,材质:网:布",
    }
    assert apply("mbe", row) == {
        "product_id": 7,
        "title": "红色 运动鞋",
        "images": "https://img.example.com/7.jpg",
        "category": ["鞋", "运动鞋"],
        "attributes": {"颜色": "红色", "尺码": "42, 43", "材质": "网:布"},
    }


def test_the_columns_of_m5product_and_fashion200k(tmp_path):
    made = apply("m5product", {"item_id": 12, "title": "cup", "pv": "colour#:#red#;#size#:#4#;#"})
    assert made["images"] == "images/12.jpg" and made["attributes"] == {"colour": "red", "size": "4"}
    photo = "women/dresses/casual/91422080/91422080_0.jpeg"
    (tmp_path / "labels").mkdir()
    (tmp_path / photo).parent.mkdir(parents=True)
    lines = []
    for number in range(4):
        name = photo.replace("_0", f"_{number}")
        (tmp_path / name).write_bytes(jpeg((200, 9, 9), (20, 30), number))
        lines.append(f'{name}\t0.8{number}\tblue "a-line" dress {number}')
    (tmp_path / "labels" / "dress_train_detect_all.txt").write_text("\n".join(lines[:3]))
    (tmp_path / "labels" / "dress_test_detect_all.txt").write_text(lines[3])
    found = prepared_from(tmp_path, tmp_path / "p", "fashion200k")
    assert (len(found.train), len(found.val)) == (3, 1) and not found.quarantined
    assert found.products[0].text == 'blue "a-line" dress 0'
    assert found.products[0].category == ("women", "dresses", "casual")


@pytest.mark.parametrize("name", sorted(path.stem for path in columns.SHIPPED.glob("*.json")))
def test_shipped_maps_are_valid(name):
    assert columns.load(name).kinds and columns.load(name).events == columns.load().events


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"produkt": {}}, "produkt is unknown; the closest known key is product"),
        ({"product": {"titel": "name"}}, "product.titel is unknown; the closest known key is title"),
        ({"product": {"title": 7}}, "product.title must be a column, a list of columns, or an object with a column"),
        (
            {"product": {"title": {"column": "a", "splitt": ","}}},
            "product.title.splitt is unknown; the closest known key is split",
        ),
        ({"product": {"category": {"column": "a", "take": [0, 2]}}}, "product.category: take and pairs need split"),
        ({"product": {"category": {"column": "a", "split": "/", "take": [0]}}}, "take must be [first, last + 1]"),
        ({"product": {"images": {"column": "a", "format": "x.jpg"}}}, "format must contain {}"),
        ({"product": {"title": "a"}, "format": "xlsx"}, "format 'xlsx' is not one of"),
        ({"product": {"title": "a"}, "events": {"click": -1}}, "event weights must be finite and at least 0"),
        ({"product": {"title": "a"}, "files": "*.txt"}, "files and header must be lists"),
        ({"product": {"title": "a"}, "files": [""]}, "files and header must be lists of non-empty strings"),
        ({"product": {"title": "a"}, "header": [1]}, "files and header must be lists of non-empty strings"),
        ({"product": {"title": "a"}, "files": ["/etc/*.txt"]}, "files must be patterns inside the source's folder"),
        ({"asked": {"query_id": "id"}}, "asked is now called evaluation_query"),
        ({}, "has no section; add one of product, query, log, evaluation_query, qrel"),
        ([], "docs/data.md describes column maps"),
    ],
)
def test_an_invalid_map_gives_a_one_line_error(tmp_path, written, message):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(written))
    with pytest.raises(UserError) as error:
        columns.load(str(path))
    assert str(error.value).startswith(f"--columns {path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_map():
    with pytest.raises(
        UserError, match=r"--columns mbe3: no such column map; give a .json file, or one of: beir, fashion200k"
    ):
        columns.load("mbe3")


def test_the_closest_column_is_suggested_for_a_missing_one(tmp_path):
    pq.write_table(pa.table({"id": ["1"], "doc_titel": ["mug"], "other": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError,
        match=r"a.parquet: no column doc_title or doc_image; the columns are doc_titel, id, other; rename doc_titel",
    ):
        sources.open_source(tmp_path, columns.load("mbe"))
    lines = [{"id": "1", "doc_title": "mug", "doc_imag": "a.jpg"}]
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"a.jsonl: no column doc_image, but there is doc_imag; rename it to doc_image"):
        prepared_from(tmp_path, tmp_path / "p", "mbe")


def test_a_log_under_another_name_is_recognised(tmp_path):
    (tmp_path / "products.jsonl").write_text(json.dumps({"product_id": "1", "title": "mug"}))
    (tmp_path / "clicks.csv").write_text("query,product_id,event\nred mug,1,click\n")
    with pytest.raises(UserError, match=r"clicks.csv: has the columns of a log; give it a name that starts with log"):
        prepared_from(tmp_path, tmp_path / "p")


def test_the_map_of_a_log_in_the_docs_works(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    [written] = [part for part in text.split("```json\n")[1:] if '"events"' in part.split("```")[0]]
    (tmp_path / "map.json").write_text(written.split("```")[0])
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "mug.jpg").write_bytes(jpeg((90, 90, 90), (8, 8), 0))
    products = [{"sku": n, "name": f"mug {n}", "photo": "mug.jpg"} for n in range(6)]
    rows = [
        {"search_term": f"mug {n}", "sku": n, "action": action, "at": f"2026-01-0{n + 1}"}
        for n in range(6)
        for action in ("view", "basket", "buy")
    ]
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, products)))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepared_from(folder, tmp_path / "p", str(tmp_path / "map.json"))
    assert found.manifest["kept"]["log"] == 18
    assert {round(t.weight, 4) for t in found.triplets} == {round(math.log2(1 + 2 + 4), 4)}


def test_a_log_needs_a_map_with_a_log_section(tmp_path):
    (tmp_path / "log.parquet").write_bytes(b"")
    pq.write_table(pa.table({"product_id": ["1"], "query": ["mug"]}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"the column map mbe has no .log. section; add one"):
        sources.open_source(tmp_path, columns.load("mbe"))


def test_a_different_word_is_not_a_typo(tmp_path):
    """A typo is an error, also on the second run."""
    (tmp_path / "a.jpg").write_bytes(jpeg((9, 9, 9), (8, 8), 0))
    lines = [{"product_id": str(n), "title": f"t{n}", "images": "a.jpg", "category_id": 7} for n in range(4)]
    (tmp_path / "products.jsonl").write_text("\n".join(map(json.dumps, lines)))
    clicks = [{"product_id": str(n % 4), "query": f"q {n}", "country": "x"} for n in range(30)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, clicks)))
    assert len(prepared_from(tmp_path, tmp_path / "p").products) == 4 + 30
    lines = [{"product_id": str(n), "titel": f"t{n}", "images": "a.jpg"} for n in range(4)]
    (tmp_path / "products.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):
        with pytest.raises(UserError, match="no column title, but there is titel"):
            prepared_from(tmp_path, tmp_path / "q")
