"""Whole evaluations: reproducible, independent of batch size and number of devices; and comparisons of two models."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from moon_jax import cli, config
from moon_jax.embedders import registry
from moon_jax.embedders.bm25 import BM25
from moon_jax.embedders.colours import Colours
from moon_jax.embedders.vectors import Vectors
from moon_jax.errors import UserError
from moon_jax.evaluation import labels, report, retrieval
from moon_jax.serving.embedder import Embedder
from tests.conftest import random_params, tiny


@pytest.fixture(scope="module")
def model(tokenizer):
    settings = tiny(training__dtype="float32")
    return settings, random_params(settings, tokenizer)


def evaluated(model, tokenizer, prepared, folder, batch=8, everywhere=False):
    settings, params = model
    embedder = Embedder(config.replace(settings, {"evaluation.batch": batch}), params, tokenizer, "f00d", 1)
    embedder = embedder.on_all_devices() if everywhere else embedder
    return report.evaluate(embedder, prepared, folder, probe_products=20)


def numbers(part, path=()):
    """Every number in metrics.json, by its path."""
    if isinstance(part, dict):
        return {key: value for name, inner in part.items() for key, value in numbers(inner, (*path, name)).items()}
    if isinstance(part, list):
        return {key: value for n, inner in enumerate(part) for key, value in numbers(inner, (*path, n)).items()}
    return {path: part} if isinstance(part, int | float) else {}


@pytest.fixture(scope="module")
def first(model, tokenizer, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, evaluated(model, tokenizer, prepared, folder)


def test_a_second_evaluation_writes_identical_files(first, model, tokenizer, prepared, tmp_path):
    folder, metrics = first
    assert evaluated(model, tokenizer, prepared, tmp_path) == metrics
    assert (tmp_path / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()
    assert (tmp_path / "queries.parquet").read_bytes() == (folder / "queries.parquet").read_bytes()
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("batch", "everywhere"),
    [
        (3, False),
        (24, True),
        pytest.param(64, False, marks=pytest.mark.slow),
        pytest.param(8, True, marks=pytest.mark.slow),
    ],
)
def test_scores_do_not_depend_on_batch_size_or_devices(first, model, tokenizer, prepared, tmp_path, batch, everywhere):
    expected = numbers(first[1])
    found = numbers(evaluated(model, tokenizer, prepared, tmp_path, batch, everywhere))
    assert found.keys() == expected.keys() and len(expected) > 200
    for path, value in expected.items():
        assert found[path] == pytest.approx(value, abs=1e-6), path


def test_every_query_is_in_queries_parquet(first):
    folder, metrics = first
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    for name, scores in metrics["retrieval"].items():
        for direction, entry in scores.items():
            own = [row for row in rows if (row["set"], row["direction"]) == (name, direction)]
            assert len(own) == entry["queries"] == len({row["query"] for row in own})
            for measure in ("R@1", "MRR", "nDCG@10", "mAP"):
                assert np.mean([row[measure] for row in own]) == pytest.approx(entry[measure], abs=1e-4)


def test_two_models_are_compared_on_the_queries_that_both_have(first, prepared, tmp_path):
    folder, _ = first
    report.evaluate(BM25(10**6), prepared, tmp_path)
    found = report.compare(folder, tmp_path)
    (scores,) = found.values()
    assert set(scores) == {"t→t", "t→mm", "mm→t", "mm→mm"}
    ours, theirs = ({(r["direction"], r["query"]): r["R@10"] for r in pq.read_table(f / "queries.parquet").to_pylist()}
                    for f in (folder, tmp_path))  # fmt: skip
    shared = [key for key in theirs if key in ours and key[0] == "t→t"]
    entry = scores["t→t"]
    assert entry["queries"] == len(shared)
    mean = np.mean([ours[key] - theirs[key] for key in shared])
    assert entry["R@10"]["difference"] == pytest.approx(mean)
    assert entry["R@10"]["low"] <= mean <= entry["R@10"]["high"]
    itself = report.compare(folder, folder)
    assert not any(
        e["significant"] for s in itself.values() for d in s.values() for e in d.values() if isinstance(e, dict)
    )


def test_evaluations_on_other_data_do_not_compare(first, tmp_path):
    folder, metrics = first
    (tmp_path / "queries.parquet").write_bytes((folder / "queries.parquet").read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"data": "other"}))
    with pytest.raises(UserError, match="evaluated on other data; evaluate both models on the same data"):
        report.compare(folder, tmp_path)
    with pytest.raises(UserError, match="not a complete output of moon-jax evaluate"):
        report.compare(folder, tmp_path / "nowhere")


def test_files_of_different_evaluations_are_not_mixed(first, prepared, tmp_path):
    """queries.parquet must belong to the metrics.json next to it; a new evaluation removes all files of the old one."""
    folder, metrics = first
    for name in ("metrics.json", "queries.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"model": "beef"}))
    with pytest.raises(UserError, match="not a complete output of moon-jax evaluate"):
        report.compare(folder, tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"retrieval": {"judged": {}}}))
    with pytest.raises(UserError, match="not a complete output of moon-jax evaluate, or of another version"):
        report.compare(folder, tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="not a complete output of moon-jax evaluate"):
        report.compare(folder, tmp_path)
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "val.parquet").write_bytes(b"old")
    report.evaluate(BM25(10**6), prepared, tmp_path)
    assert not (tmp_path / "embeddings" / "val.parquet").exists()
    assert pq.read_schema(tmp_path / "queries.parquet").metadata[b"model"] == b"BM25"
    vectors = tmp_path / "v"
    vectors.mkdir()
    products = [prepared.products[index] for index in (*prepared.train, *prepared.val)]
    colours, present = Colours(10**6).encode_views(products)
    seen = [number for number, there in enumerate(present[:, 1]) if there]
    rows = {"id": [products[n].id for n in seen], "view": ["i"] * len(seen), "vector": colours[seen, 1].tolist()}
    pq.write_table(pa.table(rows), vectors / "x.parquet")
    # With image vectors only, labels are evaluated but no direction of retrieval.
    assert report.evaluate(Vectors(vectors), prepared, tmp_path, probe_products=20)["retrieval"] == {}
    assert pq.read_table(tmp_path / "queries.parquet").num_rows == 0
    assert report.compare(tmp_path, folder) == {}


def test_directions_with_other_candidates_do_not_compare(first, prepared, tmp_path, capsys):
    """With vectors of only some products, the task is easier."""
    folder, metrics = first
    table = pq.read_table(folder / "embeddings" / "val.parquet")
    (tmp_path / "v").mkdir()
    some = set(sorted(set(table["id"].to_pylist()))[:3])
    pq.write_table(table.filter([i in some for i in table["id"].to_pylist()]), tmp_path / "v" / "x.parquet")
    found = report.evaluate(Vectors(tmp_path / "v"), prepared, tmp_path / "o")
    assert "products have no vector; they are left out of queries and candidates" in capsys.readouterr().out
    (name,) = found["retrieval"]
    few, all_ = (entry["retrieval"][name]["t→i"]["candidates"] for entry in (found, metrics))
    assert few < all_ and report.compare(tmp_path / "o", folder) == {}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["nobody"], "no vector for any product, such as"),
        ([None], "an id is empty"),
        ([[1]], "id is of type list"),
    ],
)
def test_vectors_with_unknown_or_invalid_ids_are_refused(prepared, tmp_path, ids, message):
    pq.write_table(pa.table({"id": ids, "view": ["t"], "vector": [[1.0, 0.0]]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        report.evaluate(Vectors(tmp_path), prepared, tmp_path / "o")


def test_compare_opens_a_workdir_as_a_model(first, model, tokenizer, prepared, tmp_path, monkeypatch):
    """The evaluation in the workdir is not used; it may be on other data or from an earlier step."""
    folder, _ = first
    settings, params = model
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    for name in ("metrics.json", "queries.parquet"):
        (other / name).write_bytes((folder / name).read_bytes())
    opened = []

    def open_embedder(name, pixels, flag):
        opened.append((flag, name))
        return BM25(pixels) if name == "bm25" else Embedder(settings, params, tokenizer, "f00d", 1)

    monkeypatch.setattr(registry, "open_embedder", open_embedder)
    given = ["evaluate", "--model", "bm25", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    assert cli.main([*given, "--probe-products", "0", "--compare", str(other)]) == 0
    assert opened == [("--model", "bm25"), ("--compare", str(other))]
    assert json.loads((tmp_path / "o" / "compared" / "metrics.json").read_text())["model"] == "f00d"


def test_precomputed_vectors_are_evaluated_in_directions_without_alterations(first, prepared, tmp_path):
    """The vectors that an evaluation wrote reproduce its scores; text labels only if no text contains a label word."""
    folder, metrics = first
    vectors = Vectors(folder / "embeddings")
    again = report.evaluate(vectors, prepared, tmp_path, probe_products=20)
    name = next(iter(metrics["retrieval"]))
    assert set(again["retrieval"]) == {name} and set(metrics["retrieval"]) <= {name, *retrieval.PHOTOS}
    assert set(again["retrieval"][name]) == {"t→i", "i→t"}
    for direction, entry in again["retrieval"][name].items():
        assert entry == metrics["retrieval"][name][direction]
    stripped = {task.name for task in labels.tasks(prepared, labels.known(prepared, 20)) if task.stripped}
    assert stripped
    for task, scores in again["labels"].items():
        expected = metrics["labels"][task]["i"]
        assert scores["i"] == {name: expected[name] for name in ("majority", "products")}
        # The few titles without a label word are not representative.
        assert not {"t", "mm"} & set(scores) or task not in stripped


def test_the_command_evaluates_and_compares(prepared, tmp_path, capsys):
    given = ["evaluate", "--model", "bm25", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    assert cli.main([*given, "--compare", "colours"]) == 0
    printed = capsys.readouterr().out
    assert "t→mm" in printed and "scores: " in printed and "; per query: " in printed
    assert json.loads((tmp_path / "o" / "compared.json").read_text())  # both embed products with text and image
    assert (tmp_path / "o" / "pictures" / "directions.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a model, or --vectors"),
        (["--model", "bm25", "--vectors", "v"], "give a model, or --vectors"),
        (["--model", "bm25", "--probe-products", "-1"], "--probe-products -1: give 0 or more"),
        (["--model", "bm25", "--columns", "mbe"], "--columns mbe: applies to --queries and --qrels"),
        (["--model", "bm25", "--prompt", "a photo"], "write {} once, where the label belongs"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--model", "bm25", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["--vectors", "nowhere"], "--vectors nowhere: no such folder"),
        (["--model", "bm25", "--compare", "nowhere"], "--compare nowhere: no such folder"),
    ],
)
def test_user_errors_are_one_line(prepared, tmp_path, capsys, flags, message):
    given = ["evaluate", "--data", str(prepared.folder), "--output", str(tmp_path / "o"), *flags]
    assert cli.main(given) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert "compare" in "".join(flags) or not (tmp_path / "o").exists()  # nothing was done


def test_an_output_contains_one_evaluation_and_nothing_else(prepared, tmp_path, capsys):
    given = ["evaluate", "--model", "bm25", "--data", str(prepared.folder), "--output"]
    (tmp_path / "file").touch()
    for output, message in (
        ("file", "is a file; give a folder"),
        ("file/o", "Not a directory; give a folder that can be created"),
        (".", "contains other files (file)"),
    ):
        assert cli.main([*given, str(tmp_path / output)]) == cli.USER_ERROR
        error = capsys.readouterr().err
        assert message in error and "--output" in error and len(error.splitlines()) == 1
    output = tmp_path / "o"
    assert cli.main([*given, str(output), "--compare", "colours"]) == 0
    printed = capsys.readouterr().out
    folded = " ".join(printed.split())
    assert "replacing the older scores" not in folded and (output / "compared" / "metrics.json").is_file()
    assert f"scores of colours, {output}/compared/metrics.json:" in folded
    ranks = json.loads((output / "compared" / "metrics.json").read_text())["retrieval"]["products"]["i→i"]
    assert " / ".join(f"{ranks[f'R@{k}']:.1f}".replace("100.0", "100") for k in (1, 5, 10)) in printed
    left = folded.partition("not compared, since queries or candidates differ: ")[2]
    assert left.startswith("t→t, t→mm, mm→t (products as queries) scores:")
    # A refused command replaces nothing, however late it fails: no such vectors, vectors that allow no evaluation, and
    # a comparison with the output itself, whose scores would be deleted before they are read.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.log"}
    wrong = [(["--model", "bm25", "--compare", str(output)], "is also the output")]
    for ids, refused in (
        (["x"], "no vector for any"),
        ([product.id for product in prepared.products], "nothing to evaluate"),
    ):
        folder = tmp_path / refused
        folder.mkdir()
        rows = {"id": ids, "view": ["mm"] * len(ids), "vector": [[1.0, 0.0]] * len(ids)}
        pq.write_table(pa.table(rows), folder / "x.parquet")
        wrong.append((["--vectors", str(folder), "--probe-products", "0"], refused))
    for flags, refused in wrong:
        assert cli.main(["evaluate", *flags, "--data", str(prepared.folder), "--output", str(output)]) == cli.USER_ERROR
        assert refused in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
    # A second evaluation without --compare removes the older comparison.
    assert cli.main([*given, str(output)]) == 0
    assert "replacing the older scores in" in capsys.readouterr().out and not (output / "compared.json").exists()
    assert not (output / "compared").exists()


def test_vectors_that_allow_no_evaluation_are_refused(first, prepared, tmp_path):
    """Such as what `embed` writes by default: one vector per product, from everything it has."""
    table = pq.read_table(first[0] / "embeddings" / "val.parquet")
    pq.write_table(table.filter(pa.compute.equal(table["view"], "mm")), tmp_path / "mm.parquet")
    with pytest.raises(UserError, match=r"nothing to evaluate: the vectors are mm only.*embed --views t,i,mm"):
        report.evaluate(Vectors(tmp_path), prepared, tmp_path / "o", probe_products=0)
    assert not (tmp_path / "o" / "metrics.json").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_model_gets_no_scores(prepared, tmp_path, which):
    class Damaged(Colours):
        calls = 0

        def encode_views(self, *args, **more):
            vectors, present = super().encode_views(*args, **more)
            if self.calls == which:
                vectors[2, 1, 3] = np.nan
            self.calls += 1
            return vectors, present

    with pytest.raises(UserError, match=f"product {prepared.products[prepared.val[2]].id}: its vector is not finite"):
        report.evaluate(Damaged(10**6), prepared, tmp_path, probe_products=0)
    assert not (tmp_path / "metrics.json").exists()


def test_equally_many_other_candidates_do_not_compare(first, prepared, tmp_path):
    table = pq.read_table(first[0] / "embeddings" / "val.parquet")
    ids = [prepared.products[index].id for index in prepared.val]
    for name, kept in (("a", ids[:-1]), ("b", ids[1:]), ("c", ids[:-1])):
        (tmp_path / name).mkdir()
        some = table.filter(pa.compute.is_in(table["id"], pa.array(kept)))
        pq.write_table(some, tmp_path / name / "x.parquet")
        report.evaluate(Vectors(tmp_path / name), prepared, tmp_path / f"scores {name}", probe_products=0)
    assert report.compare(tmp_path / "scores a", tmp_path / "scores c")
    assert report.compare(tmp_path / "scores a", tmp_path / "scores b") == {}


def test_the_command_passes_probe_products_and_prompts_on(model, tokenizer, prepared, tmp_path, monkeypatch):
    settings, params = model
    embedder = Embedder(settings, params, tokenizer, "f00d", 1)
    monkeypatch.setattr(registry, "open_embedder", lambda name, pixels, flag: embedder)
    given = ["evaluate", "--model", "m", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    prompts = ["a photo of {}", "{}"]
    assert cli.main([*given, "--probe-products", "20", "--prompt", prompts[0], "--prompt", prompts[1]]) == 0
    expected = report.evaluate(embedder, prepared, tmp_path / "e", probe_products=20, prompts=prompts)["labels"]
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())["labels"]
    assert found == json.loads(json.dumps(expected)) and any(scores["known"] for scores in found.values())
    assert found != report.evaluate(embedder, prepared, tmp_path / "p", probe_products=20)["labels"]
