"""The command line: help, mistakes, system errors, Ctrl-C. Every mistake is reported in one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moon_jax
from moon_jax import cli, commands, interrupt, progress
from moon_jax.errors import Unavailable
from tests.conftest import QUICKSTART, SCHEMA, environment, jpeg, overrides


def one_line(capsys, *arguments):
    """The message of a quickstart that fails before it trains."""
    assert cli.main(["quickstart", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("moon-jax: ") and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize("command", ["", *commands.NAMES])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"] if command else ["--help"])
    printed = capsys.readouterr().out
    assert done.value.code == 0 and f"examples:\n  moon-jax {command or 'quickstart'}" in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steps", "twelve"],
            "argument --steps: invalid int value: 'twelve'; moon-jax quickstart --help has examples",
        ),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--stpes", "12"], "--stpes: not understood; the closest flag is --steps"),
        (["--verbose"], "--verbose: not understood; "),
        (["--config.experts.cuont=3"], "config.experts.cuont: no such option; the closest is config.experts.count"),
        (["--config.experts.count=lots"], "config.experts.count: 'lots' is not a whole number; an example is 8"),
        (["--config", "quikstart"], "--config quikstart: no such config; give a path, or one of: moon2_qwen3vl_2b, "),
        (["--config.experts=4"], "config.experts: a group of options, such as config.experts.count; name one of them"),
        (["--data", ""], "--data: empty; give a path, or leave the flag out"),
        (["--workdir", ""], "--workdir: empty; give a path, or leave the flag out"),
        (["--data", "nowhere.parquet"], "--data nowhere.parquet: no such file or folder"),
    ],
)
def test_a_mistake_on_the_command_line(capsys, tmp_path, arguments, message):
    assert message in one_line(capsys, "--workdir", tmp_path / "w", *arguments)
    assert not (tmp_path / "w").exists()


def test_a_missing_command_is_reported_in_one_line(capsys):
    assert cli.main([]) == 2
    message = capsys.readouterr().err
    assert "moon-jax --help has examples" in message and message.count("\n") == 1


@pytest.mark.parametrize(("old", "new"), cli.RENAMED.items())
def test_a_renamed_flag_names_the_new_one(capsys, old, new):
    given = {
        "evaluate": ["--model", "bm25", "--data", "d", "--output", "o"],
        "heatmap": ["--model", "m", "--output", "o.png"],
    }
    command = next(name for name in given if f"{new} " in f"{help_of(capsys, name)} ")
    assert cli.main([command, *given[command], f"{old}=3"]) == 2
    assert capsys.readouterr().err == f"moon-jax: {old}: this flag is now called {new}\n"


def help_of(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return capsys.readouterr().out


# --- data ---------------------------------------------------------------------------------------------------------


def empty_folder(folder):
    (folder / "notes.txt").write_text("nothing here")


def no_records(folder):
    (folder / "products.jsonl").write_bytes(b"")


def no_rows(folder):
    pq.write_table(pa.Table.from_pylist([], SCHEMA), folder / "products.parquet")


def zero_bytes(folder):
    (folder / "products.parquet").write_bytes(b"")


def no_column(folder):
    pq.write_table(pa.table({"product_id": ["1"], "titel": ["mug"]}), folder / "products.parquet")


def nearly_a_column(folder):
    pq.write_table(pa.table({"product_id": ["1"], "titel": ["mug"], "images": [[b"x"]]}), folder / "products.parquet")


def csv(folder):
    (folder / "products.csv").write_text("product_id,title\n1,mug\n2,hat\n")


def spreadsheet(folder):
    (folder / "products.xlsx").write_text("not really")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, "no file that ends with one of .parquet, .jsonl"),
        (spreadsheet, "no file that ends with one of .parquet, .jsonl"),
        (csv, "no training product has both a title and an image; 0 left out"),
        (no_records, "no usable training product; at least two different titles are needed"),
        (no_rows, "no usable training product; at least two different titles are needed"),
        (zero_bytes, "products.parquet: not a readable parquet file"),
        (
            no_column,
            "products.parquet: no column title or images or image; the columns are product_id, titel; rename titel",
        ),
        (
            nearly_a_column,
            "products.parquet: no column title, but there is titel; rename it to title, or map it with --columns"
            " FILE.json",
        ),
    ],
)
def test_a_catalogue_that_cannot_be_read(capsys, tmp_path, make, message):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    line = one_line(capsys, "--data", tmp_path / "data", "--workdir", tmp_path / "w")
    assert str(tmp_path / "data") in line and message in line
    assert not (tmp_path / "w").exists()


def test_a_file_of_another_format(capsys, tmp_path):
    spreadsheet(tmp_path)
    message = one_line(capsys, "--data", tmp_path / "products.xlsx", "--workdir", tmp_path / "w")
    assert "products.xlsx: not one of .parquet, .jsonl" in message


@pytest.mark.slow
def test_bad_records_are_skipped_listed_and_counted(capsys, tmp_path):
    folder, workdir = tmp_path / "data", tmp_path / "w"
    folder.mkdir()
    photo = jpeg((200, 30, 30), (24, 24), 0)
    for name, content in (("good.jpg", photo), ("cut.jpg", photo[: len(photo) // 2]), ("empty.jpg", b"")):
        (folder / name).write_bytes(content)
    lines = [{"product_id": f"g{n}", "title": f"thing {n}", "images": ["good.jpg"]} for n in range(30)]
    lines[3] |= {"brand": None, "category": [None, "goods"], "attributes": {"colour": None}}  # nulls without meaning
    lines[4] |= {"title": None}  # an image suffices
    bad = [
        ("bad image", {"product_id": "cut", "title": "x", "images": ["cut.jpg"]}),
        ("bad image", {"product_id": "empty", "title": "x", "images": ["empty.jpg"]}),
        ("text too long", {"product_id": "long", "title": "x" * 1_000_000, "images": ["good.jpg"]}),
        ("no id", {"product_id": None, "title": "x"}),
        ("no text and no image", {"product_id": "null", "title": None}),
        ("duplicate id", {"product_id": "g7", "title": "again"}),
    ]
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, [*lines, *(record for _, record in bad)])))
    arguments = ["--data", folder, "--workdir", workdir, "--steps", 1, *overrides(QUICKSTART)]
    assert cli.main(["train", "--config", "quickstart", *map(str, arguments)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "6 left out (2 bad image, 1 duplicate id, 1 no id, 1 no text and no image, 1 text too long),"
        " such as products.jsonl 31: " in printed
    )
    assert f"{workdir}/data/quarantine.jsonl lists what was left out" in printed
    listed = [json.loads(line) for line in (workdir / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["number"], entry["reason"]) for entry in listed] == [
        (31 + index, reason) for index, (reason, _) in enumerate(bad)
    ]
    assert json.loads((workdir / "data" / "manifest.json").read_text())["products"] == 30


@pytest.mark.slow
def test_prepare_then_a_run(capsys, catalogue, tmp_path):
    output, workdir = tmp_path / "p", tmp_path / "w"
    assert cli.main(["prepare", "--data", str(catalogue), "--output", str(output), "--processes", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "60 products read, 60 kept 0 left out 54 training products, 6 held out; 54 triplets" in printed
    assert f"--data {output} --workdir runs/first" in printed
    assert cli.main(["train", "--config", "quickstart", *arguments(output, workdir)]) == 0
    assert {path.name for path in (workdir / "data").iterdir()} == {"manifest.json", "quarantine.jsonl"}
    # The same products prepared in the workdir count as the same data.
    assert cli.main(["train", "--config", "quickstart", *arguments(catalogue, workdir)]) == 0
    assert "is already trained" in capsys.readouterr().out
    (output / "triplets.npy").write_bytes(b"x")
    message = one_line(capsys, *arguments(output, tmp_path / "other"))
    assert f"{output}/triplets.npy: has 1 bytes, not " in message and "prepare the data again" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "nowhere", "--output", "p"], "--data nowhere: no such file or folder"),
        (["--data", "gs://bucket/x", "--output", "p"], "--data gs://bucket/x: not a local path; mount it"),
        (["--data", ".", "--output", "s3://b/x"], "--output s3://b/x: not a local path; mount it"),
        (["--data", ".", "--output", "p", "--processes", "0"], "--processes 0: give 1 or more"),
        (["--data", ".", "--output", "p", "--columns", "mbe3"], "--columns mbe3: no such column map"),
        (["--data", "."], "the following arguments are required: --output"),
        (["--data", ".", "--output", "p", "--workdir", "w"], "--workdir=w: not understood"),
        (["--data", ".", "--output", "p", "--config.prepare.val_fraction=2"], "prepare.val_fraction must lie between"),
        (["--data", ".", "--output", "p"], "--data .: no file that ends with one of"),
    ],
)
def test_mistakes_of_prepare(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *given]) == 2
    line = capsys.readouterr().err
    assert message.replace("=w", "") in line.replace("--workdir w", "--workdir") and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_is_released_if_nothing_was_done(capsys, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "products.csv").write_text("sku,title,images\n1,a,\n2,b,\n")
    command = ["prepare", "--data", str(tmp_path / "c"), "--output", str(tmp_path / "p"), "--processes", "1"]
    assert cli.main(command) == 2 and "no column product_id" in capsys.readouterr().err
    (tmp_path / "c" / "products.csv").write_text("product_id,title,images\n1,a,\n2,b,\n")
    assert cli.main(command) == 2
    assert "has both a title and an image" in capsys.readouterr().err  # the next mistake, not "another source"
    (tmp_path / "file").write_text("x")
    assert cli.main([*command[:4], str(tmp_path / "file" / "p")]) == 2
    message = capsys.readouterr().err
    assert "Not a directory; give a folder that can be created" in message and message.count("\n") == 1


def test_augment_reports_its_results(capsys, catalogue, tmp_path):
    data, output = tmp_path / "p", tmp_path / "a"
    assert cli.main(["prepare", "--data", str(catalogue), "--output", str(data), "--processes", "1"]) == 0
    command = ["augment", "--data", str(data), "--output", str(output), "--processes", "1"]
    capsys.readouterr()
    assert cli.main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    manifest = json.loads((output / "manifest.json").read_text())["augmented"]
    assert f"enriched titles: {manifest['text']['added']} added of {manifest['text']['made']} made" in printed
    assert (
        "no filter: give an embedder with --model" in printed and f"--data {output} --workdir runs/augmented" in printed
    )
    assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "nowhere", "--output", "a"], "nowhere: no such folder"),
        (["--data", "gs://bucket/x", "--output", "a"], "--data gs://bucket/x: not a local path"),
        (["--data", "hf://datasets/a/b", "--output", "a"], "--data hf://datasets/a/b: not a local path"),
        (["--data", ".", "--output", "a"], "not prepared data; run moon-jax prepare on your catalogue first"),
        (["--data", ".", "--output", ""], "--output: empty; give a path"),
        (
            ["--data", ".", "--output", "a", "--processes", "2", "--beam", "runner=X"],
            "--processes: with --beam, the number of workers is a Beam option",
        ),
        (["--data", ".", "--output", "a", "--processes", "0"], "--processes 0: give 1 or more"),
        (["--data", ".", "--output", "a", "--connections", "0"], "--connections 0: give 1 or more"),
        (["--data", ".", "--output", "a", "--expansion", "3"], "--expansion: not understood; the closest flag is"),
        (["--data", ".", "--output", "a", "--config.data.batch=2"], "augment takes no config; leave this out"),
    ],
)
def test_mistakes_of_augment(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["augment", *given]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the system ---------------------------------------------------------------------------------------------------


def arguments(catalogue, workdir):
    return ["--data", str(catalogue), "--workdir", str(workdir), *overrides(QUICKSTART)]


def test_a_folder_with_other_files_is_refused_as_workdir(capsys, catalogue, tmp_path):
    (tmp_path / "shoe.jpg").write_bytes(b"mine")
    message = one_line(capsys, *arguments(catalogue, tmp_path))
    assert f"--workdir {tmp_path}: holds shoe.jpg but no run; give a new or empty folder" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shoe.jpg"]


def run(catalogue, workdir, prefix, *more):
    command = [*prefix, sys.executable, "-m", "moon_jax.cli", "quickstart", *arguments(catalogue, workdir), *more]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_full_disk(catalogue, tmp_path):
    """A file system of 400 KB: a checkpoint of this model is larger."""
    full = tmp_path / "full"
    full.mkdir()
    mount = f'mount -t tmpfs -o size=400k tmpfs "{full}" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("cannot mount a file system in a user namespace here: not testing a full disk")
    done = run(catalogue, full / "w", prefix)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moon-jax: ") and os.strerror(errno.ENOSPC) in last and str(full / "w") in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_rejects_large_files(catalogue, tmp_path):
    """A background save fails. The run notices within a few steps, and the older checkpoint is intact."""
    workdir = tmp_path / "w"
    process = start(catalogue, workdir, "--config.training.save_every=5")
    while process.poll() is None and not (workdir / "checkpoints" / "5").is_dir():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    older = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    limited = ["sh", "-c", 'ulimit -f 200 && exec "$@"', "sh"]
    done = run(catalogue, workdir, limited, "--config.training.steps=100000", "--config.training.save_every=20")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    # TensorStore's threads may print more before it; the last line is ours and says what to do.
    assert last.startswith("moon-jax: ") and os.strerror(errno.EFBIG) in last and str(workdir) in last
    steps = (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    failing = (older // 20 + 1) * 20
    assert f"resuming {workdir} at step {older} " in done.stdout and failing <= steps < failing + 20
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == [str(older)]
    assert moon_jax.load(workdir).step == older


@pytest.fixture
def foreign():
    """A read-only folder of another user. If root, this process becomes nobody: root may write anywhere."""
    folder = Path(tempfile.mkdtemp())  # user nobody cannot enter pytest's own folders
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_no_permission_to_write(capsys, foreign):
    message = one_line(capsys, "--workdir", foreign / "w")
    assert f"--workdir {foreign / 'w'}: {foreign}: Permission denied; give a writable folder" in message


@pytest.mark.parametrize("closed", ["products.jsonl", "."])
def test_no_permission_to_read(capsys, foreign, closed):
    folder = Path(tempfile.mkdtemp())
    (folder / "products.jsonl").write_text('{"product_id": "1", "title": "x"}')
    (folder / closed).chmod(0)
    message = one_line(capsys, "--data", folder, "--workdir", folder.parent / "moon-jax-never-made")
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert str((folder / closed).resolve()) in message and "permission" in message.lower()


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def start(catalogue, workdir, *more):
    command = [sys.executable, "-m", "moon_jax.cli", "quickstart", *arguments(catalogue, workdir)]
    command += ["--config.training.steps=100000", *more]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("delay", [1.5, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.3, 3.0, 6.0))])
def test_ctrl_c_is_never_lost(catalogue, tmp_path, delay):
    process = start(catalogue, tmp_path / "w")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Right after the start Python itself handles the signal.
    assert process.returncode in ((130,) if delay > 1 else (130, 1, -signal.SIGINT)), err
    if process.returncode == 130:
        first, second = err.split("\n", 1)[1].splitlines()
        assert first == "stopping after the current piece of work; press Ctrl-C again to stop at once"
        assert second.startswith("moon-jax: interrupted; the same command resumes")


@pytest.mark.slow
def test_ctrl_c_in_training_loses_no_step(catalogue, tmp_path):
    log = tmp_path / "w" / "metrics.jsonl"
    process = start(catalogue, tmp_path / "w")
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    saved = int(re.search(r"saved at step (\d+) of 100000", printed)[1])
    assert saved >= 3 and (tmp_path / "w" / "checkpoints" / str(saved)).is_dir()
    assert log.read_bytes().count(b"\n") == saved  # every step is logged here


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process(catalogue, tmp_path):
    process = start(catalogue, tmp_path / "w")
    time.sleep(3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 10


def test_a_swallowed_interrupt_is_raised_at_the_next_progress_report():
    interrupt.REQUESTED.set()
    try:
        with pytest.raises(KeyboardInterrupt), progress.Terminal().progress("work", 3) as advance:
            advance()
    finally:
        interrupt.REQUESTED.clear()


@pytest.mark.parametrize(("given", "code"), [("", 0), ("85", 85), ("x", 0), ("256", 0)])
def test_a_launcher_can_set_the_exit_code_of_a_stop(monkeypatch, capsys, given, code):
    def stopped(parsed, overrides):
        interrupt.terminate()
        interrupt.check()

    monkeypatch.setattr("moon_jax.commands.train.run", stopped)
    monkeypatch.setenv(cli.STOP_CODE, given)
    assert cli.main(["train", "--config", "quickstart", "--workdir", "w"]) == code
    assert capsys.readouterr().err == "moon-jax: stopped by SIGTERM; the same command resumes from here\n"
    assert not interrupt.REQUESTED.is_set()


def test_transient_errors_have_their_own_exit_code(monkeypatch, capsys):
    def unavailable(parsed, overrides):
        raise Unavailable("gs://shop/run: no response")

    monkeypatch.setattr("moon_jax.commands.train.run", unavailable)
    assert cli.main(["train", "--config", "quickstart", "--workdir", "w"]) == cli.AGAIN == 1
    assert capsys.readouterr().err == "moon-jax: gs://shop/run: no response\n"


@pytest.mark.parametrize("option", ["optimizer=adamm", "learning_rate_factors=encoder/vison/*=0"])
def test_a_mistake_in_a_training_option_leaves_no_workdir(capsys, catalogue, tmp_path, option):
    """Otherwise the workdir would belong to the wrong config, and reject the corrected command."""
    command = ["train", "--config", "quickstart", "--data", str(catalogue), "--workdir", str(tmp_path / "w")]
    assert cli.main([*command, f"--config.training.{option}"]) == 2
    assert "the closest is" in capsys.readouterr().err and not (tmp_path / "w").exists()
