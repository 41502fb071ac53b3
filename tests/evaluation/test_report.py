"""Tables, result lines and pictures show the scores that they are given."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from moon_jax.embedders.bm25 import BM25
from moon_jax.evaluation import pictures, retrieval, tables
from moon_jax.types import OBJECTIVES, VIEWS


def entry(first, **more):
    return {"R@1": first, "R@5": first + 1, "R@10": first + 2, "chance@10": 0.5, "queries": 40, "candidates": 50} | more


def label(accuracy, f1, majority=9.0):
    return {"accuracy": accuracy, "precision": 1.0, "recall": 2.0, "F1": f1, "majority": majority, "products": 30}


SCORES = {f"{q}→{c}": entry(30.0 * m + 10.0 * n) for m, q in enumerate(VIEWS) for n, c in enumerate(VIEWS)}
METRICS = {
    "step": 7,
    "model": "abc",
    "synthetic": True,
    "retrieval": {"products": SCORES},
    "labels": {
        "attribute colour": {
            "labels": 5,
            "leak": 77.0,
            "i": label(31.0, 32.0),
            "t": label(41.0, 42.0),
            "mm": label(51.0, 52.0),
        }
    },
    "widths": {"8": {"retrieval": {"products": {"t→i": entry(3.0)}}, "labels": {}}},
}


def printed(metrics):
    console = Console(file=io.StringIO(), width=120)
    for table in tables.scores(metrics):
        console.print(table)
    return console.file.getvalue()


def test_tables_show_each_score_in_its_cell():
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed(METRICS).splitlines() if "│" in line]
    assert lines[0] == ["t", "0.0 / 1.0 / 2.0", "10.0 / 11.0 / 12.0", "20.0 / 21.0 / 22.0"]
    assert lines[1] == ["i", "30.0 / 31.0 / 32.0", "40.0 / 41.0 / 42.0", "50.0 / 51.0 / 52.0"]
    assert lines[2] == ["mm", "60.0 / 61.0 / 62.0", "70.0 / 71.0 / 72.0", "80.0 / 81.0 / 82.0"]
    assert lines[3] == ["colour (5)", "31.0 / 32.0", "41.0 / 42.0", "51.0 / 52.0", "9.0", "77.0"]
    assert lines[4] == ["t→i 5.0"]


def test_tables_leave_out_rows_and_columns_without_scores():
    """Also the table of label texts, if the model cannot embed them."""
    few = {"queries": 3, "interval": {"R@10": [0.0, 100.0]}, "MRR": 1.0, "nDCG@10": 2.0, "mAP": 3.0}
    many = few | {"queries": 10}
    fitted = {
        "labels": 2,
        "leak": 5.0,
        "known": 20,
        "i": {"majority": 9.0, "products": 7, "neighbours": 1.0, "probe": 2.0},
    }
    scores = METRICS | {
        "retrieval": {"queries": {"i→t": entry(3.0, **few), "i→mm": entry(4.0, **many)}},
        "labels": {"category": fitted},
        "widths": {},
    }
    text = printed(scores)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [["i", "3.0 / 4.0 / 5.0", "4.0 / 5.0 / 6.0"]] and "none" not in text and "→ i " not in text
    console = Console(file=io.StringIO(), width=120)
    for table in tables.details(scores):
        console.print(table)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines() if "│" in line]
    assert rows[0][:2] == ["i→t", "5.0 [too few]"] and rows[1][:2] == ["i→mm", "6.0 [0.0, 100]"]
    assert rows[2] == ["category", "1.0 / 2.0", "9.0", "20", "7"]


def test_every_table_says_whether_the_catalogue_is_synthetic():
    assert " ".join(printed(METRICS).split()).count("synthetic catalogue; ") == 3
    assert "synthetic" not in printed(METRICS | {"synthetic": False})


def test_result_lines_show_scores_and_training_lines(tmp_path):
    weights = dict(zip(OBJECTIVES, (0.1, 0.5, 0.2, 0.15, 0.05), strict=True))
    experts = [[{"text": 0.75, "image": 0.25}, {"text": 0.25, "image": 0.75}]]
    count = dict.fromkeys(OBJECTIVES, 9)
    line = {"step": 10, "total": 5.0, "omega": weights, "phi_below_threshold": 0.25, "experts": experts, "count": count}
    write = json.dumps
    (tmp_path / "metrics.jsonl").write_text(f"{write(line)}\n{write(line | {'step': 20, 'total': 2.0})}\n")
    assert tables.results(METRICS, tmp_path) == [
        "text to image (t→i): R@10 12.0% (chance 0.5%), 40 queries, 50 candidates",
        "image to text (i→t): R@10 32.0% (chance 0.5%), 40 queries, 50 candidates",
        "colour from the image alone: correct for 31.0% of products (majority-class baseline: 9.0%)",
        "loss: 5.00 at step 10, 2.00 at step 20",
        "objective weights ω: highest q_i→p_mm (0.50), lowest n_i→n_t (0.05)",
        "the filter down-weights 25% of the triplets in the last batch",
        "expert usage of text and image tokens overlaps by 50% (100%: both use the same experts)",
    ]
    # One line for the changed photos; equal weights, but for objectives without samples.
    equal = line | {
        "omega": dict.fromkeys(OBJECTIVES, 0.25) | {OBJECTIVES[0]: 0.0},
        "count": count | {OBJECTIVES[0]: 0},
    }
    (tmp_path / "metrics.jsonl").write_text(write(equal))
    scores = METRICS["retrieval"]["products"]
    photos = {f"photos_{edit}": {"i→i": scores["t→i"]} for edit in ("background", "detail")}
    found = tables.results(METRICS | {"retrieval": METRICS["retrieval"] | photos}, tmp_path)
    assert found[2] == (
        "photo on another background to image (i→i): R@10 12.0% (chance 0.5%), 40 queries, 50 candidates"
    )
    assert f"objective weights ω: all 0.25; no samples: {OBJECTIVES[0]}" in found
    assert sum("photo" in line for line in found) == 1
    # A log: what its queries are trained to find; products are seen in training, also as changed photos.
    logged = {"products_trained_on": SCORES, "photos_background": {"i→i": scores["t→i"]}, "queries": SCORES}
    tasks = {"category": METRICS["labels"]["attribute colour"] | {"i": label(30.0, 32.0)}, **METRICS["labels"]}
    found = tables.results(METRICS | {"retrieval": logged, "labels": tasks}, tmp_path)[:6]
    assert [line.split(":")[0] for line in found] == [
        "text to image (t→i)",
        "image to text (i→t)",
        "photo on another background to image (i→i)",
        "text to text + image (t→mm)",
        "image to text + image (i→mm)",
        "colour from the image alone",
    ]
    assert [line.endswith("; seen in training") for line in found] == [True, True, True, False, False, True]
    assert "; the best of 2 tasks" in found[-1]
    assert tables.results({"retrieval": {}, "labels": {}}, tmp_path / "nowhere") == []


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are drawn."""
    drawn, save = [], pictures.Figure.savefig
    monkeypatch.setattr(
        pictures.Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more))
    )
    return drawn


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_pictures_show_the_numbers_that_they_are_given(figures, tmp_path):
    named = lambda values: dict(zip(OBJECTIVES, values, strict=True))  # noqa: E731
    numbers = np.arange(5)
    steps = [{"step": s, "loss": named(s + numbers), "omega": named(numbers / s)} for s in (10, 20)]
    pictures.training(tmp_path / "t.png", steps, "synthetic footer")
    left, right = figures[-1].axes
    np.testing.assert_allclose([line.get_ydata() for line in left.lines], [[10 + k, 20 + k] for k in range(5)])
    np.testing.assert_allclose([line.get_ydata() for line in right.lines[:5]], [[k / 10, k / 20] for k in range(5)])
    assert figures[-1].get_supxlabel() == "synthetic footer"

    shares = [[{"text": 0.9, "image": 0.2}, {"text": 0.1, "image": 0.8}]] * 2
    lines = [{"step": s, "experts": shares, "modality_information": [s / 10, s / 20]} for s in (1, 3)]
    pictures.experts(tmp_path / "e.png", lines, "")
    text, image, information = figures[-1].axes[:3]
    np.testing.assert_allclose(
        [line.get_xydata() for line in information.lines], [[[1, 0.1], [3, 0.3]], [[1, 0.05], [3, 0.15]]]
    )
    assert "text" in text.get_title(loc="left") and texts(text) == ["90", "10"] * 2
    assert "image" in image.get_title(loc="left") and texts(image) == ["20", "80"] * 2

    pictures.directions(tmp_path / "d.png", METRICS["retrieval"], "")
    panel = figures[-1].axes[0]
    assert texts(panel)[::2] == ["2", "12", "22", "32", "42", "52", "62", "72", "82"]  # rows are queries
    assert [label.get_text() for label in panel.get_yticklabels()] == list(VIEWS)


def test_altered_queries_are_shown_altered(monkeypatch, prepared, tmp_path):
    """In all directions that BM25 supports, queries are altered."""
    shown, cell = [], pictures._cell

    def watched(axes, product, view, pixels, label, *args, **more):
        shown.append((product, label))
        cell(axes, product, view, pixels, label, *args, **more)

    monkeypatch.setattr(pictures, "_cell", watched)
    encoded = retrieval.encode(BM25(10**6), prepared)
    pictures.gallery(tmp_path / "g.png", encoded, prepared, 10**6, retrieval.SEED, "")
    position = {prepared.products[index].id: position for position, index in enumerate(prepared.val)}
    queries = [(product, label) for product, label in shown if label.startswith("query")]
    assert queries and {label for _, label in queries} == {"query, altered"}
    for product, _ in queries:
        assert product.text == encoded.queries["products"].altered[position[product.id], 0]
    assert any(product.text != prepared.products[prepared.val[position[product.id]]].text for product, _ in queries)
