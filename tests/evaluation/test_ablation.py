"""benchmarks/ablation.py: each row changes only the options in its name; noise, signs, and the table."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from benchmarks import ablation
from moon_jax import config as config_lib
from moon_jax.data.prepared import open_prepared
from moon_jax.evaluation import labels, report
from moon_jax.serving import embedder as serving
from moon_jax.serving.embedder import Embedder, abstract_params
from tests.conftest import prepared_from, random_params, tiny

QUICKSTART = config_lib.load("quickstart")
EXPERTS = QUICKSTART.experts
WIDTHS = EXPERTS.per_token * EXPERTS.width, EXPERTS.count * EXPERTS.width
ROWS = {row.name: row for row in ablation.rows(*WIDTHS)}


def leaves(config):
    return {
        f"{group.name}.{leaf.name}": getattr(getattr(config, group.name), leaf.name)
        for group in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, group.name))
        for leaf in dataclasses.fields(getattr(config, group.name))
    }


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("full", set()),
        ("without MoE, equal active FLOPs", {"experts.count", "language.mlp_width"}),
        ("dense, equal parameters", {"experts.count", "language.mlp_width"}),
        ("without dual-level alignment", {"objective.levels"}),
        ("without intra-product alignment", {"objective.levels"}),
        ("without co-augmentation", {"data.augmented"}),
        ("without filtering", {"objective.phi_threshold"}),
        ("fixed mixture 12:3:2", {"data.mixture", "objective.weighting"}),
        ("full, 30% noise", set()),
        ("without filtering, 30% noise", {"objective.phi_threshold"}),
    ],
)
def test_a_row_changes_only_what_its_name_says(name, changed):
    config = config_lib.override(QUICKSTART, list(ROWS[name].overrides))
    other = leaves(QUICKSTART)
    assert {leaf for leaf, value in leaves(config).items() if value != other[leaf]} == changed
    assert ROWS[name].noisy == ("noise" in name) and ROWS[name].against in ROWS
    assert not ROWS[name].paper or len(ROWS[name].paper) == len(ablation.COLUMNS)


def test_dense_rows_have_the_size_that_their_names_say(tokenizer):
    def size(config):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, tokenizer)["encoder"]))

    full, active, total = (
        size(config_lib.override(QUICKSTART, list(ROWS[name].overrides)))
        for name in ("full", "without MoE, equal active FLOPs", "dense, equal parameters")
    )
    one = 3 * QUICKSTART.language.width * EXPERTS.width * QUICKSTART.language.layers  # one expert in every layer
    router = full - total
    assert 0 < router < one / 4
    assert total - active == (EXPERTS.count - EXPERTS.per_token) * one


def test_noise_corrupts_some_purchases_and_nothing_else(prepared, tmp_path):
    before = {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.is_file()}
    ablation.noisy_copy(prepared.folder, tmp_path / "noisy")
    found = open_prepared(tmp_path / "noisy")
    assert {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.is_file()} == before
    assert found.fingerprint != prepared.fingerprint and len(found.products) == len(prepared.products)
    old, new = (np.array([(t.query, t.positive, t.negative) for t in data.triplets]) for data in (prepared, found))
    np.testing.assert_array_equal(old[:, [0, 2]], new[:, [0, 2]])
    wrong = old[:, 1] != new[:, 1]
    assert wrong.mean() == pytest.approx(ablation.NOISE, abs=4 * np.sqrt(0.21 / len(old)))
    assert set(new[:, 1]) <= set(old[:, 1]) and not (new[:, 1] == new[:, 2]).any()
    kept = (tmp_path / "noisy" / "triplets.npy").stat().st_mtime_ns
    ablation.noisy_copy(prepared.folder, tmp_path / "noisy")
    assert (tmp_path / "noisy" / "triplets.npy").stat().st_mtime_ns == kept


@pytest.mark.parametrize("shift", [-1.0, -0.2, 0.0, 0.2, 1.0])
def test_signs_come_from_a_paired_t_test(shift):
    rng = np.random.default_rng(int(10 * shift + 20))
    seen = set()
    for seeds in (2, 3, 5):
        for _ in range(30):
            ours, theirs = rng.normal(shift, 0.5, seeds), rng.normal(0, 0.1, seeds)
            p = stats.ttest_rel(ours, theirs).pvalue
            expected = "·" if p >= 0.05 else "↑" if (ours - theirs).mean() > 0 else "↓"
            found = ablation.sign((ours - theirs).tolist())
            assert found == expected
            seen.add(found)
    assert "·" in seen and ablation.sign([3.0]) == "·"
    assert abs(shift) < 1 or ("↑" if shift > 0 else "↓") in seen


def test_the_table_has_means_errors_and_signs_with_those_of_the_paper():
    def run(row, seed, score):
        scores = dict.fromkeys(ablation.COLUMNS, score)
        return {"row": row, "seed": seed, "scores": scores, "parameters": 2e6, "active": 1e6, "bytes": 512, "ms": 2.0}

    runs = [run("full", seed, 50.0 + seed) for seed in range(3)]
    runs += [run("without MoE, equal active FLOPs", seed, 40.0 + seed + 0.1 * (seed == 1)) for seed in range(3)]
    runs += [run("dense, equal parameters", 0, 99.0)]
    console = Console(width=250, record=True)
    for table in ablation.tables({"runs": runs, "title": "made up", "widths": WIDTHS}):
        console.print(table)
    printed = console.export_text().splitlines()
    (full,) = (line for line in printed if "full (3)" in line)
    assert full.count("51.0 ±0.6") == len(ablation.COLUMNS)
    (without,) = (line for line in printed if "active FLOPs (3)" in line)
    assert without.count("41.0 ±0.6 ↓(↓)") == len(ablation.COLUMNS)
    (single,) = (line for line in printed if "equal parameters (1)" in line)
    assert single.count("99.0 ·") == len(ablation.COLUMNS)
    assert any(line.split()[1:] == ["full", "│", "2.00", "│", "1.00", "│", "512", "│", "2.0", "│"] for line in printed)


def test_every_row_is_trained_once_with_its_own_arguments(catalogue, tmp_path, monkeypatch):
    """Runs the whole script with training and evaluation replaced."""
    trained = []

    def command(*words):
        if words[0] != "train":
            options = dict(zip(words[1::2], words[2::2], strict=True))
            source = Path(options["--data"])
            (prepared_from if words[0] == "prepare" else shutil.copytree)(source, Path(options["--output"]))
        else:
            trained.append(words)

    def evaluate(workdir, prepared, tasks):
        assert trained[-1][trained[-1].index("--workdir") + 1] == str(workdir)
        scores = dict.fromkeys(ablation.COLUMNS, float(len(trained)))
        return {"scores": scores, "parameters": 2e6, "active": 1e6, "bytes": 512, "ms": 2.0}

    def run(*more):
        trained.clear()
        flags = ["--data", str(catalogue), "--output", str(tmp_path / "o"), *more]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *flags])
        ablation.main()
        return [list(words) for words in trained]

    monkeypatch.setattr(ablation, "command", command)
    monkeypatch.setattr(ablation, "evaluate", evaluate)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "copytree", functools.partial(shutil.copytree, dirs_exist_ok=True))
    first = run("--seeds", "2", "--steps", "7")
    assert len(first) == 2 * len(ROWS)
    for number, words in enumerate(first):
        row, seed = list(ROWS.values())[number % len(ROWS)], number // len(ROWS)
        options = dict(zip(words[1:9:2], words[2:9:2], strict=True))
        assert options["--data"] == str(tmp_path / "o" / ("noisy" if row.noisy else "augmented"))
        assert (options["--config"], options["--steps"]) == ("quickstart", "7")
        assert words[9:] == [*ablation.COMMON, f"--config.seed={seed}", *row.overrides]
    assert len({words[words.index("--workdir") + 1] for words in first}) == len(first)
    assert "--config.data.batch=64" in ablation.COMMON
    mixture = config_lib.override(QUICKSTART, list(ROWS["fixed mixture 12:3:2"].overrides)).data.mixture
    assert tuple(mixture) == (3.0, 12.0, 2.0)  # text, image, both: most queries are images
    made = open_prepared(tmp_path / "o" / "noisy").triplets, open_prepared(tmp_path / "o" / "augmented").triplets
    assert [t.positive for t in made[0]] != [t.positive for t in made[1]]
    assert run("--seeds", "2", "--steps", "7") == []
    assert len(run("--seeds", "2", "--steps", "9")) == len(first)  # with other steps, they are other runs
    assert len(run("--seeds", "3", "--steps", "9", "--rows", "dense")) == 1
    held = json.loads((tmp_path / "o" / "results.json").read_text())["runs"]
    assert len(held) == len(first) + 1 and all("9" in run["arguments"] for run in held)


def test_a_run_is_evaluated_in_the_columns_of_the_paper(prepared, tokenizer, tmp_path, monkeypatch):
    """Compares with report.evaluate: R@10 of the nine directions, and labels predicted from the image."""
    settings = tiny()
    params = random_params(settings, tokenizer)
    model = Embedder(settings, params, tokenizer, "f00d", 1)
    monkeypatch.setattr(serving, "load", lambda workdir: model)
    monkeypatch.setattr(serving, "read", lambda workdir: SimpleNamespace(encoder=params))
    tasks = labels.tasks(prepared)
    found = ablation.evaluate(tmp_path, prepared, tasks)
    expected = report.evaluate(model, prepared, tmp_path)
    retrieved = next(iter(expected["retrieval"].values()))
    for name, entry in retrieved.items():
        assert found["scores"][name] == pytest.approx(entry["R@10"], abs=1e-3)
    assert found["scores"]["class"] == pytest.approx(expected["labels"]["category"]["i"]["accuracy"], abs=1e-3)
    own = [entry["i"]["accuracy"] for name, entry in expected["labels"].items() if name != "category"]
    assert found["scores"]["attribute"] == pytest.approx(np.mean(own), abs=1e-3)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    experts = settings.experts
    one = 3 * settings.language.width * experts.width * len(config_lib.sparse_layers(settings))
    assert found["parameters"] == sum(sizes) and found["bytes"] == 4 * model.dimension and found["ms"] > 0
    assert found["parameters"] - found["active"] == (experts.count - experts.per_token) * one
