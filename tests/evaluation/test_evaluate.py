"""Judging as a whole: the same digits again, for any batch and any number of devices; two models side by side."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from moon_jax import cli, config
from moon_jax.config import UserError
from moon_jax.evaluation import baselines, harness, report
from moon_jax.serving.embedder import Embedder
from tests.conftest import random_params, tiny


@pytest.fixture(scope="module")
def model(tokenizer):
    settings = tiny(training__dtype="float32")
    return settings, random_params(settings, tokenizer)


def judged(model, tokenizer, prepared, folder, batch=8, everywhere=False):
    settings, params = model
    embedder = Embedder(config.replace(settings, {"evaluation.batch": batch}), params, tokenizer, "f00d", 1)
    embedder = embedder.on_all_devices() if everywhere else embedder
    return report.evaluate(embedder, prepared, folder, known=20)


def numbers(part, path=()):
    """Every number of metrics.json by its path."""
    if isinstance(part, dict):
        return {key: value for name, inner in part.items() for key, value in numbers(inner, (*path, name)).items()}
    if isinstance(part, list):
        return {key: value for n, inner in enumerate(part) for key, value in numbers(inner, (*path, n)).items()}
    return {path: part} if isinstance(part, int | float) else {}


@pytest.fixture(scope="module")
def first(model, tokenizer, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return folder, judged(model, tokenizer, prepared, folder)


def test_judged_again_the_digits_are_the_same(first, model, tokenizer, prepared, tmp_path):
    folder, metrics = first
    assert judged(model, tokenizer, prepared, tmp_path) == metrics
    assert (tmp_path / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()
    assert (tmp_path / "queries.parquet").read_bytes() == (folder / "queries.parquet").read_bytes()
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("batch", "everywhere"),
    [
        (3, False),
        (24, True),
        pytest.param(64, False, marks=pytest.mark.long),
        pytest.param(8, True, marks=pytest.mark.long),
    ],
)
def test_neither_batch_nor_devices_change_a_score(first, model, tokenizer, prepared, tmp_path, batch, everywhere):
    expected = numbers(first[1])
    found = numbers(judged(model, tokenizer, prepared, tmp_path, batch, everywhere))
    assert found.keys() == expected.keys() and len(expected) > 200
    for path, value in expected.items():
        assert found[path] == pytest.approx(value, abs=1e-6), path


def test_every_query_is_written(first):
    folder, metrics = first
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    for name, scores in metrics["retrieval"].items():
        for direction, entry in scores.items():
            own = [row for row in rows if (row["set"], row["direction"]) == (name, direction)]
            assert len(own) == entry["queries"] == len({row["query"] for row in own})
            for measure in ("R@1", "MRR", "nDCG@10", "mAP"):
                assert np.mean([row[measure] for row in own]) == pytest.approx(entry[measure], abs=1e-4)


def test_two_models_are_compared_on_the_queries_of_both(first, prepared, tmp_path):
    folder, _ = first
    report.evaluate(baselines.BM25(10**6), prepared, tmp_path)
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
    assert not any(e["told"] for s in itself.values() for d in s.values() for e in d.values() if isinstance(e, dict))


def test_what_was_judged_on_other_data_does_not_compare(first, tmp_path):
    folder, metrics = first
    (tmp_path / "queries.parquet").write_bytes((folder / "queries.parquet").read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"data": "other"}))
    with pytest.raises(UserError, match="judged on other data"):
        report.compare(folder, tmp_path)
    with pytest.raises(UserError, match="nothing that moon-jax evaluate wrote"):
        report.compare(folder, tmp_path / "nowhere")


def test_given_vectors_are_judged_where_nothing_must_be_altered(first, prepared, tmp_path):
    """The vectors that an evaluation left behind give its scores again; labels by what was not struck."""
    folder, metrics = first
    vectors = harness.Vectors(folder / "embeddings")
    again = report.evaluate(vectors, prepared, tmp_path, known=20)
    (name,) = metrics["retrieval"]
    assert set(again["retrieval"][name]) == {"t→i", "i→t"}
    for direction, entry in again["retrieval"][name].items():
        assert entry == metrics["retrieval"][name][direction]
    for task, scores in again["labels"].items():
        for view in ("i", "t", "mm"):
            assert "accuracy" not in scores.get(view, {})
        assert scores.get("t", {}).get("products", 0) < metrics["labels"][task]["t"]["products"]


def test_the_command_judges_and_compares(prepared, tmp_path, capsys):
    given = ["evaluate", "--model", "bm25", "--data", str(prepared.folder), "--output", str(tmp_path / "o")]
    assert cli.main([*given, "--compare", "colours"]) == 0
    said = capsys.readouterr().out
    assert "t→mm" in said and "all scores:" in said
    assert json.loads((tmp_path / "o" / "compared.json").read_text())  # both embed products with text and image
    assert (tmp_path / "o" / "pictures" / "directions.png").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give a model, or --vectors"),
        (["--model", "bm25", "--vectors", "v"], "give a model, or --vectors"),
        (["--model", "bm25", "--known", "-1"], "--known -1: give 0 or more"),
        (["--model", "bm25", "--prompt", "a photo"], "write {} where the label belongs"),
        (["--model", "nowhere"], "nowhere"),
        (["--vectors", "nowhere"], "no .parquet file there"),
    ],
)
def test_mistakes_are_one_line(prepared, tmp_path, capsys, flags, said):
    given = ["evaluate", "--data", str(prepared.folder), "--output", str(tmp_path / "o"), *flags]
    assert cli.main(given) == cli.MISTAKE
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
