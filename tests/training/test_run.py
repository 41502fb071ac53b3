"""Whole quickstart runs as users start them: real processes, signals and files."""

import json
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import moon_jax
from moon_jax import cli
from moon_jax.commands import export
from moon_jax.data import records
from moon_jax.errors import UserError
from moon_jax.types import VIEWS
from tests.conftest import COLOURS, QUICKSTART, environment, jpeg, overrides, quickstart, tiny
from tests.test_cli import arguments, one_line


def run(*arguments):
    return subprocess.run(quickstart(*arguments), env=environment(), capture_output=True, text=True, timeout=600)


def test_a_run_lists_the_files_that_it_wrote(finished):
    workdir, printed = finished
    for name in ("checkpoints", "pictures", "metrics.jsonl", "tensorboard", "metrics.json", "embeddings/val.parquet"):
        assert (workdir / name).exists() and str(workdir / name) in printed
    assert "training step compiled 1 time(s); bad steps: 0" in (workdir / "run.log").read_text()
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert set(metrics["retrieval"]["products"]) == {f"{q}→{c}" for q in VIEWS for c in VIEWS}
    table = pq.read_table(workdir / "embeddings" / "val.parquet")
    vectors = np.array(table["vector"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert table.schema.metadata[b"model"].decode() == metrics["model"]
    assert table.schema.metadata[b"synthetic"] == b"false" and metrics["synthetic"] is False
    assert set(metrics["labels"]) == {"category", "attribute colour"}
    assert metrics["labels"]["attribute colour"]["labels"] == len(COLOURS)


def test_the_summary_at_the_end(finished, catalogue):
    workdir, printed = finished
    results, rest = printed.split("── Results ─")[1].split("── Files ─")
    files, commands = rest.split("── Next steps ─")
    assert "text to image (t→i): R@10 " in results and "(chance " in results
    assert "objective weights ω: highest " in results
    assert "expert usage of text and image tokens overlaps by " in results
    assert f"log:         {workdir / 'run.log'}" in files and "quarantine" not in files
    again = shlex.join(["moon-jax", "quickstart", "--data", str(catalogue), *overrides(QUICKSTART)])
    assert f"{again} --workdir {workdir}-dense --config.experts.count=0" in commands
    assert f"moon-jax export --model {workdir} --output {workdir}-served" in commands
    # No colours and no cursor movement if the output is not a terminal.
    assert "\x1b" not in printed and "\r" not in printed


@pytest.mark.parametrize("name", ["training", "phi", "experts", "directions", "gallery"])
def test_pictures_are_drawn(finished, name):
    with Image.open(finished[0] / "pictures" / f"{name}.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def events(workdir):
    """(step, tag) → value of all TensorBoard events; fails on duplicates."""
    found = {}
    for path in (workdir / "tensorboard").iterdir():
        data, offset = path.read_bytes(), 0
        while offset < len(data):  # a record: length, checksum, content, checksum
            (size,) = struct.unpack_from("<Q", data, offset)
            event = Event.FromString(data[offset + 12 : offset + 12 + size])
            offset += size + 16
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value
    return found


def check_events(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = events(workdir)
    assert {step for step, _ in found} == {line["step"] for line in lines}
    for line in lines:
        step = line["step"]
        assert found[step, "total"].simple_value == pytest.approx(line["total"])
        assert found[step, "omega/n_i_n_t"].simple_value == pytest.approx(line["omega"]["n_i→n_t"])
        assert found[step, "experts/1/2/image"].simple_value == pytest.approx(line["experts"][1][2]["image"])
        if line["phi_histogram"]:
            drawn = found[step, "phi"].histo
            assert [int(count) for count in drawn.bucket] == line["phi_histogram"]
            assert drawn.num == sum(line["phi_histogram"]) and drawn.bucket_limit[-1] == 1.0
            middles = np.arange(0.025, 1, 0.05)
            assert drawn.sum == pytest.approx(middles @ line["phi_histogram"])
            assert drawn.sum_squares == pytest.approx(middles**2 @ line["phi_histogram"])


def test_tensorboard_events_equal_the_metric_lines(finished):
    check_events(finished[0])


def test_the_metric_lines_are_plausible(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        assert sum(line["omega"].values()) == pytest.approx(1.0, abs=0.05)
        assert all(0 < count <= 8 for count in line["count"].values())
        for layer in line["experts"]:
            for modality in ("text", "image"):
                assert sum(expert[modality] for expert in layer) == pytest.approx(1.0, abs=1e-4)
        assert sum(line["phi_histogram"]) <= 8 and line["synthetic"] is False
        assert 0 <= line["phi_below_threshold"] <= 1 and 0 < line["negatives_mean"] < 16
    assert any(line["count"]["q_mm→p_mm"] < 8 for line in lines)  # some products lack an image or a text
    assert lines[-1]["total"] < lines[0]["total"]


@pytest.mark.parametrize("kills", [(33,), pytest.param((1, 20), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_a_killed_run_gives_results_identical_to_an_uninterrupted_one(catalogue, finished, tmp_path, kills):
    workdir = tmp_path / "w"
    rng = np.random.default_rng(sum(kills))
    for lines in kills:
        process = subprocess.Popen(
            quickstart(catalogue, workdir), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = workdir / "metrics.jsonl"
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (workdir / "metrics.json").exists()  # not finished yet
    done = run(catalogue, workdir)
    assert done.returncode == 0, done.stderr
    if max(kills) > 12:
        assert "resuming" in done.stdout
    for name in ("metrics.json", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (finished[0] / name).read_bytes()
    check_events(workdir)


@pytest.mark.slow
def test_repeating_the_command_only_evaluates(catalogue, finished):
    workdir, _ = finished
    before = {name: (workdir / name).read_bytes() for name in ("metrics.json", "metrics.jsonl")}
    done = run(catalogue, workdir)
    assert done.returncode == 0 and "compiled" not in done.stdout
    assert before == {name: (workdir / name).read_bytes() for name in before}


@pytest.mark.slow
def test_a_workdir_of_another_config_or_other_data_is_refused(catalogue, finished, tmp_path):
    done = run(catalogue, finished[0], "--config.training.steps=50")
    assert done.returncode == 2
    message = f"config.training.steps = 40, not 50; to train further, --init {finished[0]} in another workdir"
    assert message in done.stderr and done.stderr.count("\n") == 1
    other = tmp_path / "other"
    other.mkdir()
    table = pq.read_table(catalogue / "products.parquet")
    pq.write_table(table.slice(0, 50), other / "products.parquet")
    done = run(other, finished[0])
    assert done.returncode == 2 and "holds data other than that given" in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_catalogue_leaves_no_workdir(tmp_path):
    done = run(tmp_path / "nowhere", tmp_path / "w")
    assert done.returncode == 2 and "no such file or folder" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_an_unwritable_workdir_is_reported_before_anything_is_read(catalogue):
    done = run(catalogue, catalogue / "products.parquet" / "w")
    assert done.returncode == 2 and "Not a directory; give a writable folder" in done.stderr
    assert done.stderr.count("\n") == 1 and "reading" not in done.stdout


@pytest.fixture(scope="module")
def embedder(finished):
    return moon_jax.load(finished[0])


ITEMS = [
    "plain red shirt",
    {"text": "plain blue shoe", "image": jpeg(COLOURS["blue"], (30, 20), 1)},
    moon_jax.Product(images=(jpeg(COLOURS["green"], (20, 30), 2),)),
    {"image": jpeg(COLOURS["red"], (24, 24), 3)},
    "bag",
    moon_jax.Product(text="plain yellow hat", images=(jpeg(COLOURS["yellow"], (24, 24), 4),)),
] * 3


def test_a_vector_does_not_depend_on_its_neighbours(embedder):
    together = embedder.encode(ITEMS)
    alone = np.concatenate([embedder.encode([item]) for item in ITEMS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(ITEMS[::-1], batch_size=5), together[::-1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
    assert together.shape == (18, 24) and together.dtype == np.float32
    assert embedder.encode("bag").shape == (1, 24) and embedder.encode([]).shape == (0, 24)


def test_encode_gives_the_vectors_of_the_evaluation(finished, embedder, prepared):
    table = pq.read_table(finished[0] / "embeddings" / "val.parquet").to_pylist()
    stored = {(row["id"], row["view"]): row["vector"] for row in table}
    for index in prepared.val[:6]:
        product = prepared.products[index]
        richest = "mm" if product.text and product.images else "i" if product.images else "t"
        np.testing.assert_allclose(embedder.encode(product)[0], stored[product.id, richest], atol=1e-5)


def test_truncated_vectors_have_unit_length(embedder):
    full, short = embedder.encode(ITEMS[:4]), embedder.encode(ITEMS[:4], truncate_dim=8)
    np.testing.assert_allclose(short, full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(embedder.similarity(full, full).diagonal(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["ok", moon_jax.Product()], "item 1: neither text nor image"),
        ([{"image": "/nowhere/shoe.jpg"}], "^item 0: image: /nowhere/shoe.jpg: No such file or directory$"),
        ([{"txt": "x"}], "item 0: 'txt': unknown key; use"),
        ([7], "item 0: an item of type int cannot be embedded"),
        ([""], "item 0: neither text nor image"),
    ],
)
def test_bad_items_are_reported_in_one_line(embedder, items, message):
    with pytest.raises(UserError, match=message):
        embedder.encode(items)


@pytest.mark.slow
def test_without_data_it_renders_a_catalogue_and_says_so(tmp_path):
    workdir = tmp_path / "w"
    config = tiny(training__steps=3, data__synthetic=60, objective__matryoshka=(8, 16))
    command = [sys.executable, "-m", "moon_jax.cli", "quickstart", "--workdir", str(workdir), *overrides(config)]
    offline = ["unshare", "-rn"]  # a network namespace without connections
    if shutil.which("unshare") and not subprocess.run([*offline, "true"], capture_output=True).returncode:
        command = [*offline, *command]
    else:
        warnings.warn("no network namespaces here: not testing that it needs no network", stacklevel=1)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "── Results (synthetic catalogue) ─" in done.stdout
    assert "synthetic training products" in done.stdout
    for title in ("synthetic catalogue; R@1 / R@5 / R@10", "synthetic catalogue; accuracy / macro F1", "at width 16"):
        assert title in " ".join(done.stdout.split()), title
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["synthetic"] is True and metrics["step"] == 3 and list(metrics["widths"]) == ["16", "8"]
    assert set(metrics["labels"]) >= {"category", "attribute colour", "attribute material"}
    # The scores of a width are those of the stored vectors truncated to it.
    rows = pq.read_table(workdir / "embeddings" / "val.parquet").to_pylist()
    vectors = {view: np.array([row["vector"] for row in rows if row["view"] == view], np.float32) for view in VIEWS}
    catalogue = pq.read_table(workdir / "catalogue" / "synthetic.parquet").to_pylist()
    titles = {record["product_id"]: record["title"] for record in catalogue}
    groups = [records.title_group(titles[row["id"]]) for row in rows if row["view"] == "t"]
    key = np.unique(groups, return_inverse=True)[1]
    for width, found in ((24, metrics), (16, metrics["widths"]["16"]), (8, metrics["widths"]["8"])):
        cut = {
            view: part[:, :width] / np.linalg.norm(part[:, :width], axis=1, keepdims=True)
            for view, part in vectors.items()
        }
        hits = key[np.argsort(-cut["t"] @ cut["i"].T, axis=1, kind="stable")] == key[:, None]
        expected = {f"R@{rank}": 100 * hits[:, :rank].any(axis=1).mean() for rank in (1, 5, 10)}
        scores = found["retrieval"]["products"]["t→i"]
        assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    for found in metrics["widths"].values():
        assert set(found["retrieval"]["products"]) == set(metrics["retrieval"]["products"])
        assert found["labels"].keys() == metrics["labels"].keys()
    assert all(json.loads(line)["synthetic"] for line in (workdir / "metrics.jsonl").read_text().splitlines())
    assert json.loads((workdir / "data" / "manifest.json").read_text())["synthetic"] is True
    table = pq.read_schema(workdir / "embeddings" / "val.parquet")
    assert table.metadata[b"synthetic"] == b"true"
    assert pq.read_schema(workdir / "catalogue" / "synthetic.parquet").metadata[b"synthetic"]
    # Repeating the command reuses the catalogue.
    rendered = (workdir / "catalogue" / "synthetic.parquet").stat().st_mtime_ns
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "rendering" not in again.stdout
    assert (workdir / "catalogue" / "synthetic.parquet").stat().st_mtime_ns == rendered


@pytest.mark.slow
def test_a_dense_run(catalogue, tmp_path):
    """Without experts there is no W*, so none to checkpoint or show, and no suggestion to disable experts."""
    dense = (catalogue, tmp_path / "w", "--config.experts.count=0", "--config.training.steps=2")
    done = run(*dense)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "w" / "metrics.jsonl").read_text().splitlines()[-1])
    count = sum(line["count"].values())
    assert line["omega"] == pytest.approx({name: part / count for name, part in line["count"].items()}, rel=1e-5)
    assert "objective weights ω: " in done.stdout and "dense model:" not in done.stdout
    assert (tmp_path / "w" / "checkpoints" / "2").is_dir()
    assert moon_jax.load(tmp_path / "w").encode("red shoe").shape == (1, 24)


def test_blank_text_is_none(embedder):
    image = jpeg((200, 30, 30), (20, 30), 0)
    np.testing.assert_array_equal(
        embedder.encode({"text": " \n", "image": image}), embedder.encode({"text": None, "image": image})
    )


@pytest.mark.slow
def test_the_model_card_states_data_and_scores(finished, tmp_path, capsys):
    assert cli.main(["export", "--model", str(finished[0]), "--output", str(tmp_path / "served")]) == 0
    assert f"{tmp_path / 'served'}: 0." in capsys.readouterr().out
    card = (tmp_path / "served" / "README.md").read_text()
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    row = metrics["retrieval"]["products"]["t→i"]
    assert f"| t→i | {row['R@1']:.1f} | {row['R@5']:.1f} | {row['R@10']:.1f} |" in card
    assert "a private catalogue: 54 products" in card and metrics["model"] in card
    assert "none, random weights" in card and "40 steps of 8 triplets" in card
    items = ["red shoe", {"image": jpeg((200, 30, 30), (20, 30), 0)}]
    np.testing.assert_array_equal(
        moon_jax.load(tmp_path / "served").encode(items), moon_jax.load(finished[0]).encode(items)
    )
    with pytest.raises(UserError, match="export takes no config; leave this out"):
        export.run(cli.parse(["export", "--model", "m", "--output", "o"])[0], ["--config.seed=1"])


def test_a_missing_model_is_reported_in_one_line(finished, tmp_path):
    for path, message in (
        (tmp_path, "no config.json and no tokenizer.json in this folder; give a workdir or a Hugging Face folder"),
        (tmp_path / "nowhere", "no such folder; give a workdir"),
        (finished[0] / "checkpoints", f"no config.json and no tokenizer.json in this folder; try {finished[0]}"),
    ):
        with pytest.raises(UserError) as error:
            moon_jax.load(path)
        assert str(error.value).startswith(f"{path}: {message}")


def test_a_workdir_with_a_run_on_other_data_is_refused(capsys, catalogue, finished):
    message = one_line(capsys, "--workdir", finished[0], *overrides(QUICKSTART))
    assert (
        f"--workdir {finished[0]}: holds a run on --data {catalogue}; give the same, or use another workdir" in message
    )


def test_the_run_log_is_complete_from_the_start(finished):
    lines = (finished[0] / "run.log").read_text().splitlines()
    assert "training products" in "".join(lines[:6]) and "done in" in lines[-1]


def test_a_checkpoint_of_another_architecture(capsys, catalogue, finished, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(finished[0], workdir)
    held = json.loads((workdir / "config.json").read_text())
    held["experts"]["width"] = 28
    (workdir / "config.json").write_text(json.dumps(held))
    message = one_line(capsys, *arguments(catalogue, workdir), "--config.experts.width=28")
    assert "a checkpoint of another architecture: encoder/" in message and "28" in message and "20" in message
    assert str(workdir / "checkpoints" / "40") in message


def test_a_damaged_checkpoint(capsys, catalogue, finished, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(finished[0], workdir)
    for file in workdir.glob("checkpoints/*/params/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    message = one_line(capsys, *arguments(catalogue, workdir))
    assert f"{workdir / 'checkpoints'}: all checkpoints are damaged: " in message
