"""The user's own queries and qrels: file formats, errors in the files, and scores compared with trec_eval."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moon_jax import cli
from moon_jax.embedders.bm25 import BM25
from moon_jax.errors import UserError
from moon_jax.evaluation import qrels as qrels_lib
from moon_jax.evaluation import report
from moon_jax.ingest import columns
from moon_jax.serving.embedder import Embedder
from moon_jax.types import Product
from tests.conftest import jpeg, random_params, tiny

PIXELS = 10**6


def read(queries, qrels, prepared, map="own"):
    return qrels_lib.collection(qrels_lib.read(queries, qrels, columns.load(map), PIXELS), prepared)


@pytest.fixture(scope="module")
def ids(prepared):
    """Ids of all products, training products first."""
    return [prepared.products[index].id for index in range(len(prepared.train) + len(prepared.val))]


def written(folder, ids, format="jsonl"):
    """Writes four queries and their qrels, in a format. One query has no qrels, one has only an unknown product."""
    (folder / "photo.jpg").write_bytes(jpeg((200, 30, 30), (30, 40), 0))
    records = [
        {"query_id": "q1", "title": "red mug"},
        {"query_id": 2, "image": "photo.jpg"},
        {"query_id": "q3", "title": "no qrels"},
        {"query_id": "q4", "title": "green", "image": "photo.jpg"},
    ]
    pairs = [("q1", ids[0], 3), ("q1", ids[-1], 1), ("q1", ids[1], 0), ("2", ids[5], 2), ("2", ids[6], 2)]
    pairs += [("q4", "unknown", 4), ("q9", ids[3], 1)]
    queries, qrels = folder / "queries.jsonl", folder / f"qrels.{format}"
    queries.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    names = ("query_id", "product_id", "grade")
    lines = {
        "txt": [f"{query} 0 {product}\t{grade}" for query, product, grade in pairs] + [""],
        "csv": [",".join(names), *(",".join(map(str, pair)) for pair in pairs)],
        "jsonl": [json.dumps(dict(zip(names, pair, strict=True))) for pair in pairs],
        "tsv": ["query-id\tcorpus-id\tscore", *("\t".join(map(str, pair)) for pair in pairs)],
    }
    if format == "parquet":
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True))), qrels)
    else:
        qrels.write_text("\n".join(lines[format]), encoding="utf-8")
    return queries, qrels


@pytest.mark.parametrize("name", ["qrels.tsv", "qrels.txt.gz", "qrels.TSV.GZ"])
def test_trec_lines_are_recognized_under_other_suffixes(prepared, ids, tmp_path, name):
    """Such as MS MARCO's qrels.*.tsv, which have no header."""
    queries, qrels = written(tmp_path, ids, "txt")
    lines = "\n".join("\t".join(line.split()) for line in qrels.read_text().splitlines()).encode()
    own = tmp_path / name
    own.write_bytes(gzip.compress(lines) if name.lower().endswith("gz") else lines)
    expected, found = read(queries, qrels, prepared), read(queries, own, prepared)
    assert found.prepared.fingerprint == expected.prepared.fingerprint and found.left_out == expected.left_out
    own.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines) if name.lower().endswith("gz") else b"\xef\xbb\xbf" + lines)
    assert read(queries, own, prepared).prepared.fingerprint == expected.prepared.fingerprint
    for damaged in (own.read_bytes()[:-9], own.read_bytes()[:12], b"no gzip") if name.lower().endswith("gz") else ():
        own.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            read(queries, own, prepared)


@pytest.mark.parametrize("format", ["txt", "csv", "jsonl", "parquet"])
def test_qrels_are_the_same_in_every_format(prepared, ids, tmp_path, format):
    found = read(*written(tmp_path, ids, format), prepared)
    assert found.left_out == (
        "2 queries without a relevant product, 1 query of the qrels not in the queries file,"
        " 1 product of the qrels not in the catalogue"
    )
    total, count = len(prepared.products), len(ids)
    assert list(found.prepared.val) == list(range(count))
    assert found.prepared.val_queries == [(total, 0, 1.0), (total + 1, 5, 1.0)]
    first, second = found.prepared.products[total], found.prepared.products[total + 1]
    assert (first.id, first.text, first.images) == ("q1", "red mug", ())
    assert (second.id, second.text, second.images) == ("2", None, ((tmp_path / "photo.jpg").read_bytes(),))
    assert found.prepared.products[3].id == ids[3] and len(found.prepared.products) == total + 2
    grades = found.qrels.gains(np.tile(np.arange(count), (2, 1)))
    expected = np.zeros((2, count))
    expected[0, [0, -1]], expected[1, [5, 6]] = (3, 1), 2
    np.testing.assert_array_equal(grades, expected)


def test_the_beir_column_map(prepared, ids, tmp_path):
    _, qrels = written(tmp_path, ids, "tsv")
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "red mug"}))
    found = read(tmp_path / "queries.jsonl", qrels, prepared, "beir")
    assert found.prepared.val_queries == [(len(prepared.products), 0, 1.0)] and list(found.qrels.grade) == [3, 1]


def test_queries_and_qrels_change_the_fingerprint(prepared, ids, tmp_path):
    queries, qrels = written(tmp_path, ids, "txt")
    names = set()
    for change in ("", f"q1 0 {ids[2]} 1\n", f"q1 0 {ids[2]} 2\n"):
        own = tmp_path / "own.txt"
        own.write_text(qrels.read_text() + change)
        names.add(read(queries, own, prepared).prepared.fingerprint)
    queries.write_text(queries.read_text().replace("red mug", "a red mug"))
    names.add(read(queries, qrels, prepared).prepared.fingerprint)
    assert len(names) == 4 and prepared.fingerprint not in names


@pytest.mark.parametrize(
    ("query", "line", "message"),
    [
        (None, "q1 0 x", "own.txt 1: 3 fields; TREC qrels have 4"),
        (None, "", "own.txt: contains no qrels"),
        (None, "q1 0 {} good", "own.txt 1: grade 'good' is not a finite number"),
        (None, "q1 0 {} 1e999", "own.txt 1: grade '1e999' is not a finite number"),
        (None, "q1 0 {} inf", "own.txt 1: grade 'inf' is not a finite number"),
        (None, "q1 0 {0} 1\nq1 0 {0} 2", "own.txt 2: query q1, product"),
        (None, "q1 0 {} 0", "a grade above 0; check that queries, qrels and catalogue use the same ids"),
        ({"query_id": "q1"}, "q1 0 {} 1", "has no column title or images or image"),
        ({"query_id": "", "title": "x"}, "q1 0 {} 1", "queries.jsonl 2: no id"),
        ({"query_id": "q1", "title": "x"}, "q1 0 {} 1", "queries.jsonl 2: duplicate id: q1"),
        ({"query_id": "q2", "image": "../x.jpg"}, "q1 0 {} 1", "queries.jsonl 2: bad image: ../x.jpg is outside"),
        ({"query_id": "q2", "image": "x.jpg"}, "q1 0 {} 1", "queries.jsonl 2: bad image: x.jpg: No such file"),
        ({"query_id": "q2", "image": "https://x/y.jpg"}, "q1 0 {} 1", "queries.jsonl 2: image not fetched: https://x"),
        ([], "q1 0 {} 1", "queries.jsonl 2: not readable: not a JSON object"),
    ],
)
def test_errors_name_the_line(prepared, ids, tmp_path, query, line, message):
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "own.txt"
    records = [{"query_id": "q1", "title": "red mug"}, *([] if query is None else [query])]
    if message.startswith("has no"):
        records, message = records[1:], message.removeprefix("has ")
    queries.write_text("\n".join(map(json.dumps, records)))
    qrels.write_text(line.format(ids[0]))
    with pytest.raises(UserError) as error:
        read(queries, qrels, prepared)
    assert message in str(error.value) and "\n" not in str(error.value)


def command(prepared, folder):
    """Evaluates the vectors in v."""
    flags = {"--vectors": folder / "v", "--data": prepared.folder, "--output": folder / "o"}
    return ["evaluate", *(str(word) for flag in flags.items() for word in flag)]


def test_scores_equal_those_of_trec_eval(prepared, ids, tmp_path):
    """For precomputed vectors, over the whole catalogue, with grades, and views that some products do not have."""
    trec = pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    rng = np.random.default_rng(0)
    vectors = {product: rng.normal(size=8) for product in ids[: len(ids) - 3]}
    queries = {f"q{n}": rng.normal(size=8) for n in range(20)}
    grades = {q: {p: int(g) for p, g in zip(ids, rng.integers(-1, 4, len(ids)), strict=True)} for q in queries}
    rows = [(i, view, list(v)) for view, part in (("t", queries), ("mm", vectors)) for i, v in part.items()]
    (tmp_path / "v").mkdir()
    columns_ = dict(zip(("id", "view", "vector"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns_), tmp_path / "v" / "all.parquet")
    (tmp_path / "queries.csv").write_text("query_id,title\n" + "\n".join(f"{q},some words" for q in queries))
    (tmp_path / "qrels.trec").write_text("\n".join(f"{q} 0 {p} {g}" for q in grades for p, g in grades[q].items()))
    given = command(prepared, tmp_path)
    given += ["--queries", str(tmp_path / "queries.csv"), "--qrels", str(tmp_path / "qrels.trec")]
    assert cli.main(given) == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert set(metrics["retrieval"]) == {"qrels"} and set(metrics["retrieval"]["qrels"]) == {"t→mm"}
    assert not metrics["labels"] and not (tmp_path / "o" / "embeddings").exists()
    found = metrics["retrieval"]["qrels"]["t→mm"]
    run = {
        q: {p: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for p, b in vectors.items()}
        for q, a in queries.items()
    }
    # Products without the view are not candidates.
    relevant = {q: {p: g for p, g in of.items() if p in vectors} for q, of in grades.items()}
    scores = trec.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recip_rank", "map_cut.100", "success.1,5,10"}).evaluate(
        run
    )
    for name, theirs in {
        "nDCG@10": "ndcg_cut_10",
        "MRR": "recip_rank",
        "mAP": "map_cut_100",
        "R@5": "success_5",
    }.items():
        expected = 100 * np.mean([entry[theirs] for entry in scores.values()])
        assert found[name] == pytest.approx(expected, abs=2e-3), name
    assert found["queries"] == 20 and found["candidates"] == len(vectors)
    gallery = tmp_path / "o" / "pictures" / "gallery.png"
    assert gallery.is_file()


def test_each_query_is_embedded_from_what_it_has(prepared, ids, tokenizer, tmp_path):
    """Our model, compared with a full sort in numpy; and BM25, which does not embed images."""
    own = read(*written(tmp_path, ids, "txt"), prepared)
    settings = tiny()
    model = Embedder(settings, random_params(settings, tokenizer), tokenizer, "f00d", 1)
    found = report.evaluate(model, own.prepared, tmp_path / "o", qrels=own.qrels)["retrieval"]["qrels"]
    assert set(found) == {f"{query}→{candidate}" for query in "ti" for candidate in ("t", "i", "mm")}
    vectors, present = model.encode_views([prepared.products[index] for index in range(len(ids))])
    queries = {
        "t": model.encode("red mug")[0],
        "i": model.encode(Product(images=((tmp_path / "photo.jpg").read_bytes(),)))[0],
    }
    for query, relevant in (("t", (0, len(ids) - 1)), ("i", (5, 6))):
        for view, candidate in enumerate(("t", "i", "mm")):
            offered = np.flatnonzero(present[:, view])
            ranked = offered[np.argsort(-(vectors[offered, view] @ queries[query]), kind="stable")]
            first = 1 + min(list(ranked).index(product) for product in relevant if product in ranked)
            entry = found[f"{query}→{candidate}"]
            assert entry["MRR"] == pytest.approx(100 / first, abs=1e-3)
            assert (entry["candidates"], entry["queries"]) == (len(offered), 1)
    words = report.evaluate(BM25(PIXELS), own.prepared, tmp_path / "w", qrels=own.qrels)
    assert set(words["retrieval"]["qrels"]) == {"t→t", "t→mm"}
    assert set(report.compare(tmp_path / "o", tmp_path / "w")["qrels"]) == {"t→t", "t→mm"}


def test_with_vectors_queries_and_products_must_not_share_ids(prepared, ids, tmp_path, capsys):
    (tmp_path / "v").mkdir()
    table = {"id": [ids[0]], "view": ["t"], "vector": [[1.0, 0.0]]}
    pq.write_table(pa.table(table), tmp_path / "v" / "all.parquet")
    (tmp_path / "q.csv").write_text(f"query_id,title\n{ids[0]},some words")
    (tmp_path / "r.txt").write_text(f"{ids[0]} 0 {ids[1]} 1")
    queries = [*command(prepared, tmp_path), "--queries", str(tmp_path / "q.csv")]
    assert cli.main([*queries, "--qrels", str(tmp_path / "r.txt")]) == cli.USER_ERROR
    assert "is the id of a query and of a product" in capsys.readouterr().err
    assert cli.main(queries) == cli.USER_ERROR
    assert "--queries, --qrels: give both or neither" in capsys.readouterr().err


def test_an_overlong_grade_is_refused_in_one_line(prepared, ids, tmp_path):
    queries, _ = written(tmp_path, ids)
    (tmp_path / "own.jsonl").write_text(f'{{"query_id": "q1", "product_id": "{ids[0]}", "grade": {"9" * 400}}}')
    with pytest.raises(UserError, match=r"own.jsonl 1: grade .* is not a finite number"):
        read(queries, tmp_path / "own.jsonl", prepared)


def test_the_command_applies_a_column_map_and_draws_a_single_direction(prepared, ids, tmp_path):
    """BEIR's column names with --columns; a query of text and image, and vectors of images only."""
    rng = np.random.default_rng(0)
    rows = [(i, "i", rng.normal(size=4).tolist()) for i in ids] + [("q1", "mm", rng.normal(size=4).tolist())]
    (tmp_path / "v").mkdir()
    columns_ = dict(zip(("id", "view", "vector"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns_), tmp_path / "v" / "x.parquet")
    (tmp_path / "q.jsonl").write_text(json.dumps({"_id": "q1", "text": "red mug"}))
    (tmp_path / "q.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{ids[0]}\t2")
    given = [*command(prepared, tmp_path), "--queries", str(tmp_path / "q.jsonl"), "--qrels", str(tmp_path / "q.tsv")]
    assert cli.main([*given, "--columns", "beir"]) == 0
    assert set(json.loads((tmp_path / "o" / "metrics.json").read_text())["retrieval"]["qrels"]) == {"mm→i"}
    assert (tmp_path / "o" / "pictures" / "gallery.png").is_file()
    assert cli.main(given) == cli.USER_ERROR


def test_queries_that_the_model_cannot_embed_are_counted(prepared, ids, tmp_path, capsys):
    queries, qrels = written(tmp_path, ids, "txt")
    given = ["evaluate", "--model", "bm25", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    assert cli.main([*given, "--queries", str(queries), "--qrels", str(qrels)]) == 0
    assert "1 of 2 queries (your queries) are not scored" in capsys.readouterr().out  # the image query


def test_both_files_are_read_before_a_model_is_opened(prepared, ids, tmp_path, capsys):
    queries, qrels = written(tmp_path, ids, "txt")
    qrels.write_text("q1 0")
    given = ["evaluate", "--model", "nowhere", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    assert cli.main([*given, "--queries", str(queries), "--qrels", str(qrels)]) == cli.USER_ERROR
    assert "qrels.txt 1: 2 fields" in capsys.readouterr().err
