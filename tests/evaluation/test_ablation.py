"""benchmarks/ablation.py: each row changes only the options in its name; noise, signs, and the table."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from benchmarks import ablation, ablation_tables
from moon_jax import config as config_lib
from moon_jax.data import pipeline
from moon_jax.data.prepared import open_prepared
from moon_jax.evaluation import report
from moon_jax.serving.embedder import Embedder, abstract_params
from moon_jax.training import step as step_lib
from tests.conftest import random_params, tiny

QUICKSTART = config_lib.load("quickstart")
FULL = config_lib.replace(QUICKSTART, ablation_tables.COMMON)
EXPERTS = FULL.experts
ROWS = {row.name: row for row in ablation_tables.rows()}


def leaves(config):
    return {
        f"{group.name}.{leaf.name}": getattr(getattr(config, group.name), leaf.name)
        for group in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, group.name))
        for leaf in dataclasses.fields(getattr(config, group.name))
    }


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_changes_only_what_its_name_says(row):
    config, old = leaves(config_lib.replace(FULL, row.options)), leaves(FULL)
    assert {leaf for leaf, value in config.items() if value != old[leaf]} == set(row.options)
    named = {
        "experts.count": ("without experts", "by view, hard"),
        "experts.width": ("whole copies",),
        "experts.reinitialized": ("half reinitialized",),
        "experts.router_term": ("router by",),
        "experts.term_init": ("learned",),
        "data.augmented": ("co-augmentation", "half of the time"),
        "data.mixture": ("12:3:2",),
        "objective.levels": ("alignment",),
        "objective.phi_threshold": ("without filtering",),
        "objective.similar_margin": ("similar negatives",),
        "objective.weighting": ("ω ",),
    }
    for option, words in named.items():
        assert (option in row.options) == any(word in row.name for word in words), option
    assert row.noisy == ("noise" in row.name) and row.against in ROWS
    assert row.noisy == (row.against != "full") or row.name == ablation_tables.NOISY
    assert not row.paper or len(row.paper) == len(ablation_tables.PAPER_COLUMNS)


def test_the_fixed_mixture_is_that_of_the_predecessor():
    assert ROWS["fixed mixture 12:3:2"].options == {"data.mixture": (3.0, 12.0, 2.0)}  # t, i, mm: most are images


def test_rows_have_the_size_and_the_flops_that_their_names_say(tokenizer):
    def size(name):
        config = config_lib.replace(FULL, ROWS[name].options)
        return ablation.sizes(abstract_params(config, tokenizer)["encoder"], config.experts)

    (total, active), (dense, same) = size("full"), size("without experts, equal FLOPs")
    one = 3 * FULL.language.width * EXPERTS.width * FULL.language.layers  # one expert in every layer
    router = active - dense
    assert dense == same and 0 < router < one / 20
    assert total - active == (EXPERTS.count - EXPERTS.per_token) * one
    copies = size("experts: whole copies, twice the FLOPs")
    assert copies[1] - active == EXPERTS.per_token * one  # the active experts are twice as wide


def test_noise_corrupts_some_purchases_and_nothing_else(prepared, tmp_path):
    before = {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.is_file()}
    ablation.noisy_copy(prepared.folder, tmp_path / "noisy")
    found = open_prepared(tmp_path / "noisy")
    assert {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.is_file()} == before
    assert found.fingerprint != prepared.fingerprint and len(found.products) == len(prepared.products)
    old, new = (np.array([(t.query, t.positive, t.negative) for t in data.triplets]) for data in (prepared, found))
    np.testing.assert_array_equal(old[:, [0, 2]], new[:, [0, 2]])
    wrong = old[:, 1] != new[:, 1]
    assert wrong.mean() == pytest.approx(ablation_tables.NOISE, abs=4 * np.sqrt(0.21 / len(old)))
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
            found = ablation_tables.sign((ours - theirs).tolist())
            assert found == expected
            seen.add(found)
    assert "·" in seen and not ablation_tables.sign([3.0])
    assert abs(shift) < 1 or ("↑" if shift > 0 else "↓") in seen


def made(row, seed, score, options=None):
    scores = dict.fromkeys((*ablation_tables.PAPER_COLUMNS, "mean"), score)
    return {
        "row": row,
        "seed": seed,
        "options": options,
        "scores": scores,
        "curve": [{"step": 50, "mean": score - 1}, {"step": 100, "mean": score}],
        "omega": [0.2] * 5,
        "bits": [0.25, 0.5],
        "phi_low": 0.125,
        "parameters": 2e6,
        "active": 1e6,
        "seconds_per_step": 0.5 + seed,
    }


def printed(runs):
    console = Console(width=250, record=True)
    for table in ablation_tables.tables({"runs": runs, "title": "made up"}):
        console.print(table)
    return console.export_text().splitlines()


def test_the_tables_have_means_errors_and_signs_with_those_of_the_paper():
    runs = [made("full", seed, 50.0 + seed) for seed in range(3)]
    dense = "without experts, equal FLOPs"
    runs += [made(dense, seed, 40.0 + seed + 0.1 * (seed == 1)) for seed in range(3)]
    runs += [made("ω lagging", 0, 99.0)]
    lines = printed(runs)
    full, sizes, curve = (line for line in lines if "full (3)" in line)
    assert full.count("51.0 ±0.6") == len(ablation_tables.PAPER_COLUMNS) + 1
    expected = ["2.00", "1.00", "0.50", " ".join(["0.20"] * 5), "12.5 ±0.0", "0.25 0.50"]
    assert [cell.strip() for cell in sizes.split("│")[2:-1]] == expected
    assert "51.00 ±0.58 (9.97 ±0.03)" in curve
    without, change, _, curve = (line for line in lines if f"{dense} (3)" in line)
    assert without.count("41.0 ±0.6 ↓(↓)") == len(ablation_tables.PAPER_COLUMNS)  # the paper has no mean
    assert without.count("41.0 ±0.6 ↓") == len(ablation_tables.PAPER_COLUMNS) + 1
    assert change.count("-9.97 ±0.03") == len(ablation_tables.PAPER_COLUMNS) + 1
    assert "40.03 ±0.58" in curve and "41.03 ±0.58" in curve
    single = next(line for line in lines if "ω lagging (1)" in line)
    assert single.count("99.0 ") == len(ablation_tables.PAPER_COLUMNS) + 1


def test_every_run_is_made_once_with_its_own_options(tmp_path, monkeypatch, capsys):
    """Runs the whole script with preparation and training replaced."""
    trained = []

    def make(runs, row, seeds):
        trained.append((row.name, tuple(seeds)))
        if row.name == "start":
            for seed in seeds:
                runs.start(seed).touch()
        kept = [run for run in runs.results["runs"] if run["row"] != row.name or run["seed"] not in seeds]
        runs.results["runs"] = kept + [made(row.name, seed, 50.0, runs.options(row)) for seed in seeds]
        ablation.save(runs.output / "results.json", runs.results)

    def run(*more):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--data", "x", "--output", str(tmp_path / "o"), *more])
        ablation.main()
        return list(trained)

    monkeypatch.setattr(ablation, "prepare", lambda data, output: None)
    monkeypatch.setattr(ablation.Runs, "make", make)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    names = ["start", *ROWS]
    assert run("--seeds", "2", "--steps", "100") == [(name, (seed,)) for seed in range(2) for name in names]
    assert run("--seeds", "2", "--steps", "100") == []
    # With other steps they are other runs, except the models that all start from.
    assert run("--seeds", "2", "--steps", "200", "--device") == [(name, (0, 1)) for name in ROWS]
    some = [("start", (2,)), ("without filtering", (2,)), ("without filtering, 30% noise", (2,))]
    assert run("--seeds", "3", "--steps", "200", "--rows", "without filt") == some
    # A lost model is trained again, and nothing else.
    (tmp_path / "o" / "start-1.npz").unlink()
    assert run("--seeds", "3", "--steps", "200", "--rows", "without filt") == [("start", (1,))]
    # An option of the dense model that rows start from makes them other runs, too.
    monkeypatch.setitem(ablation_tables.START, "training.min_warmup", 31)
    again = [(name, (seed,)) for seed in range(3) for name in ("start", "full", ablation_tables.NOISY)]
    assert run("--seeds", "3", "--steps", "200", "--rows", "full") == again
    capsys.readouterr()
    # So does a new default.
    with monkeypatch.context() as patch:
        config = ablation.Runs.config
        newer = {"prepare.longest_side": 9}
        patch.setattr(ablation.Runs, "config", lambda self, row: config_lib.replace(config(self, row), newer))
        assert len(run("--seeds", "1", "--steps", "200", "--rows", "full")) == 3
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--rows", "full|nonsense")
    assert "--rows nonsense: no such row; the rows are full | without experts" in capsys.readouterr().err
    assert run("--seeds", "4", "--steps", "200", "--minutes", "-1") == []
    assert "stopped after -1 minutes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--steps", "110")
    assert "--steps 110: give a multiple of 25" in capsys.readouterr().err
    found = json.loads((tmp_path / "o" / "results.json").read_text())["runs"]
    assert {run["options"]["training.steps"] for run in found} == {200, ablation_tables.START["training.steps"]}
    assert all(run["options"]["noisy"] == ("noise" in run["row"]) for run in found)


@pytest.fixture
def output(prepared, tokenizer, tmp_path):
    (tmp_path / "augmented").symlink_to(prepared.folder)
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path


def test_a_model_is_evaluated_in_the_columns_of_the_paper(prepared, tokenizer, output, monkeypatch):
    """Compares with report.evaluate: R@10 of the nine directions, and labels predicted from the image. The photos of
    this catalogue have no plain background to replace.
    """
    monkeypatch.setattr(ablation, "BACKGROUND", "photos_viewpoint")
    config = tiny()
    params = random_params(config, tokenizer)
    found = ablation.Evaluator(config, ablation.Data(output, config, False)).scores(params)
    expected = report.evaluate(Embedder(config, params, tokenizer, "f00d", 1), prepared, output)
    directions = expected["retrieval"]["products"]
    for name, entry in directions.items():
        assert found[name] == pytest.approx(entry["R@10"], abs=1e-3)
    assert found["mean"] == pytest.approx(np.mean([entry["R@10"] for entry in directions.values()]), abs=1e-3)
    assert len(directions) == 9
    changed = expected["retrieval"]["photos_viewpoint"]["i→i"]["R@10"]
    assert found["background"] == pytest.approx(changed, abs=1e-3)
    assert found["category"] == pytest.approx(expected["labels"]["category"]["i"]["accuracy"], abs=1e-3)
    own = [entry["i"]["accuracy"] for name, entry in expected["labels"].items() if name != "category"]
    assert found["attribute"] == pytest.approx(np.mean(own), abs=1e-3)


@pytest.mark.slow
def test_seeds_train_side_by_side_as_they_do_alone(prepared, tokenizer, output, monkeypatch):
    """From one dense model each, with experts; and alone it is the training step, batch after batch."""
    monkeypatch.setattr(ablation, "CHUNK", 2)
    dense = tiny(experts__count=0, language__mlp_width=40, data__batch=4)
    config = config_lib.replace(dense, {"experts.count": 4})
    data = ablation.Data(output, config, False)
    batches = data.all(3)
    assert data.all(3).triplet.tolist() == batches.triplet.tolist()  # read again from the output
    for number in range(3):
        live = pipeline.batches(prepared, pipeline.Reader(data.config, tokenizer))[number]
        for a, b in zip(jax.tree.leaves(batches), jax.tree.leaves(live), strict=True):
            np.testing.assert_array_equal(a[number], b)

    encoders = [random_params(dense, tokenizer, seed) for seed in (0, 1)]
    both = ablation.Trainer(data.config, batches, (0, 1))
    both.start(encoders, dense)
    steps = [step for step, _ in both.train(4)]
    assert steps == [2, 4]
    for seed in (0, 1):
        alone = ablation.Trainer(data.config, batches, (seed,))
        alone.start(encoders[seed : seed + 1], dense)
        state = jax.tree.map(lambda x: x[0], alone.states)
        with jax.set_mesh(alone.mesh):
            for number in ablation.order(seed, 4, 3):
                batch = jax.tree.map(lambda x, n=number: jnp.asarray(x[n]), batches)
                state, _ = step_lib.train_step(state, batch, data.config)
        last = [found for _, found in alone.train(4)][-1]
        assert np.isfinite(last["objectives"].total).all()
        expected = jax.tree.leaves(state.params["encoder"])
        for found in (alone.encoder(0), both.encoder(seed)):
            for a, b in zip(jax.tree.leaves(found), expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    orders = [ablation.order(seed, 9, 3).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1] and all(sorted(one) == [0, 0, 0, 1, 1, 1, 2, 2, 2] for one in orders)
