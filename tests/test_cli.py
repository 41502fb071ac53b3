"""What a user meets at the shell: help, mistakes, refusals of the system, Ctrl-C. Each mistake is one line."""

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
from tests.conftest import SCHEMA, jpeg, overrides, tiny
from tests.training.test_run import environment

CONFIG = tiny(training__steps=4, training__save_every=2)


def one_line(capsys, *arguments):
    """The message of a command that fails before it trains."""
    assert cli.main(["quickstart", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("moon-jax: ") and told.count("\n") == 1, told
    return told


@pytest.mark.parametrize("command", ["", *commands.NAMES])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"] if command else ["--help"])
    told = capsys.readouterr().out
    assert done.value.code == 0 and f"examples:\n  moon-jax {command or 'quickstart'}" in told
    assert max(map(len, told.splitlines())) <= 120


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


def test_no_command_is_one_line(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr().err
    assert "moon-jax --help has examples" in told and told.count("\n") == 1


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
        (empty_folder, "no file there that ends with one of .parquet, .jsonl"),
        (spreadsheet, "no file there that ends with one of .parquet, .jsonl"),
        (csv, "no product to train on has both a title and an image; nothing was left out"),
        (no_records, "no product left to train on"),
        (no_rows, "no product left to train on"),
        (zero_bytes, "products.parquet: not a readable parquet file"),
        (
            no_column,
            "products.parquet: no column title or images or image; its columns are product_id, titel; rename titel",
        ),
        (
            nearly_a_column,
            "products.parquet: no column title, but titel; rename it to title, or name it in a file for --columns",
        ),
    ],
)
def test_a_catalogue_that_cannot_be_read(capsys, tmp_path, make, message):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    told = one_line(capsys, "--data", tmp_path / "data", "--workdir", tmp_path / "w")
    assert str(tmp_path / "data") in told and message in told
    assert not (tmp_path / "w").exists()


def test_a_file_of_another_format(capsys, tmp_path):
    spreadsheet(tmp_path)
    told = one_line(capsys, "--data", tmp_path / "products.xlsx", "--workdir", tmp_path / "w")
    assert "products.xlsx: none of .parquet, .jsonl" in told


@pytest.mark.slow
def test_bad_records_are_left_out_listed_and_counted(capsys, tmp_path):
    folder, workdir = tmp_path / "data", tmp_path / "w"
    folder.mkdir()
    photo = jpeg((200, 30, 30), (24, 24), 0)
    for name, content in (("good.jpg", photo), ("cut.jpg", photo[: len(photo) // 2]), ("empty.jpg", b"")):
        (folder / name).write_bytes(content)
    lines = [{"product_id": f"g{n}", "title": f"thing {n}", "images": ["good.jpg"]} for n in range(30)]
    lines[3] |= {"brand": None, "category": [None, "goods"], "attributes": {"colour": None}}  # nulls that say nothing
    lines[4] |= {"title": None}  # an image is enough
    bad = [
        ("bad image", {"product_id": "cut", "title": "x", "images": ["cut.jpg"]}),
        ("bad image", {"product_id": "empty", "title": "x", "images": ["empty.jpg"]}),
        ("text too long", {"product_id": "long", "title": "x" * 1_000_000, "images": ["good.jpg"]}),
        ("no id", {"product_id": None, "title": "x"}),
        ("no text and no image", {"product_id": "null", "title": None}),
        ("duplicate id", {"product_id": "g7", "title": "again"}),
    ]
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, [*lines, *(record for _, record in bad)])))
    arguments = ["--data", folder, "--workdir", workdir, "--steps", 1, *overrides(CONFIG)]
    assert cli.main(["train", "--config", "quickstart", *map(str, arguments)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "6 left out (2 bad image, 1 duplicate id, 1 no id, 1 no text and no image, 1 text too long),"
        " such as products.jsonl 31: " in told
    )
    assert f"what was left out is listed in {workdir}/data/quarantine.jsonl" in told
    listed = [json.loads(line) for line in (workdir / "data" / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["number"], entry["reason"]) for entry in listed] == [
        (31 + place, reason) for place, (reason, _) in enumerate(bad)
    ]
    assert json.loads((workdir / "data" / "manifest.json").read_text())["products"] == 30


def test_prepare_then_a_run(capsys, catalogue, tmp_path):
    output, workdir = tmp_path / "p", tmp_path / "w"
    assert cli.main(["prepare", "--data", str(catalogue), "--output", str(output), "--processes", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "60 products read, 60 kept nothing was left out 54 products to train on, 6 to find; 54 triplets" in told
    assert f"--data {output} --workdir runs/first" in told
    assert cli.main(["train", "--config", "quickstart", *arguments(output, workdir)]) == 0
    assert {path.name for path in (workdir / "data").iterdir()} == {"manifest.json", "quarantine.jsonl"}
    # The same products, prepared in the workdir, are the same data.
    assert cli.main(["train", "--config", "quickstart", *arguments(catalogue, workdir)]) == 0
    assert "is trained already" in capsys.readouterr().out
    (output / "triplets.npy").write_bytes(b"x")
    told = one_line(capsys, *arguments(output, tmp_path / "other"))
    assert f"{output}/triplets.npy: has 1 bytes, not " in told and "prepare the data again" in told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "nowhere", "--output", "p"], "--data nowhere: no such file or folder"),
        (["--data", "gs://bucket/x", "--output", "p"], "--data gs://bucket/x: not a folder of this machine; mount it"),
        (["--data", ".", "--output", "s3://b/x"], "--output s3://b/x: not a folder of this machine; mount it"),
        (["--data", ".", "--output", "p", "--processes", "0"], "--processes 0: give 1 or more"),
        (["--data", ".", "--output", "p", "--columns", "mbe3"], "--columns mbe3: no such column map"),
        (["--data", "."], "the following arguments are required: --output"),
        (["--data", ".", "--output", "p", "--workdir", "w"], "--workdir=w: not understood"),
        (["--data", ".", "--output", "p", "--config.prepare.val_fraction=2"], "prepare.val_fraction must lie between"),
        (["--data", ".", "--output", "p"], "--data .: no file there that ends with one of"),
    ],
)
def test_mistakes_of_prepare(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *given]) == 2
    told = capsys.readouterr().err
    assert message.replace("=w", "") in told.replace("--workdir w", "--workdir") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_where_nothing_was_done_is_free_again(capsys, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "products.csv").write_text("sku,title,images\n1,a,\n2,b,\n")
    command = ["prepare", "--data", str(tmp_path / "c"), "--output", str(tmp_path / "p"), "--processes", "1"]
    assert cli.main(command) == 2 and "no column product_id" in capsys.readouterr().err
    (tmp_path / "c" / "products.csv").write_text("product_id,title,images\n1,a,\n2,b,\n")
    assert cli.main(command) == 2
    assert "has both a title and an image" in capsys.readouterr().err  # the next mistake, not "another source"
    (tmp_path / "file").write_text("x")
    assert cli.main([*command[:4], str(tmp_path / "file" / "p")]) == 2
    told = capsys.readouterr().err
    assert "Not a directory; give a folder that can be made" in told and told.count("\n") == 1


def test_augment_tells_what_came_of_it(capsys, catalogue, tmp_path):
    data, output = tmp_path / "p", tmp_path / "a"
    assert cli.main(["prepare", "--data", str(catalogue), "--output", str(data), "--processes", "1"]) == 0
    command = ["augment", "--data", str(data), "--output", str(output), "--processes", "1"]
    capsys.readouterr()
    assert cli.main(command) == 0
    told = " ".join(capsys.readouterr().out.split())
    manifest = json.loads((output / "manifest.json").read_text())["augmented"]
    assert f"enriched titles: {manifest['text']['added']} added of {manifest['text']['made']} made" in told
    assert "the filter was off" in told and f"--data {output} --workdir runs/augmented" in told
    assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "nowhere", "--output", "a"], "nowhere: no such folder"),
        (["--data", "gs://bucket/x", "--output", "a"], "--data gs://bucket/x: not a folder of this machine"),
        (["--data", "hf://datasets/a/b", "--output", "a"], "--data hf://datasets/a/b: not a folder of this machine"),
        (["--data", ".", "--output", "a"], "not prepared data; moon-jax prepare makes it"),
        (["--data", ".", "--output", ""], "--output: empty; give a path"),
        (["--data", ".", "--output", "a", "--processes", "2", "--beam", "runner=X"], "--processes: Beam has"),
        (["--data", ".", "--output", "a", "--processes", "0"], "--processes 0: give 1 or more"),
        (["--data", ".", "--output", "a", "--connections", "0"], "--connections 0: give 1 or more"),
        (["--data", ".", "--output", "a", "--expansion", "3"], "--expansion: not understood; the closest flag is"),
        (["--data", ".", "--output", "a", "--config.data.batch=2"], "augment runs no config; leave this out"),
    ],
)
def test_mistakes_of_augment(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["augment", *given]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the system ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "w"
    assert cli.main(["quickstart", "--data", str(catalogue), "--workdir", str(workdir), *overrides(CONFIG)]) == 0
    return workdir


def arguments(catalogue, workdir):
    return ["--data", str(catalogue), "--workdir", str(workdir), *overrides(CONFIG)]


def test_a_run_is_not_taken_for_one_on_other_data(capsys, catalogue, trained):
    told = one_line(capsys, "--workdir", trained, *overrides(CONFIG))
    assert f"--workdir {trained}: holds a run on --data {catalogue}; give the same, or take another workdir" in told


def test_a_folder_of_other_things_is_no_workdir(capsys, catalogue, tmp_path):
    (tmp_path / "shoe.jpg").write_bytes(b"mine")
    told = one_line(capsys, *arguments(catalogue, tmp_path))
    assert f"--workdir {tmp_path}: holds no run but shoe.jpg; give a folder that is new or empty" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shoe.jpg"]


def test_the_run_log_holds_what_was_said_from_the_start(trained):
    lines = (trained / "run.log").read_text().splitlines()
    assert "products to train on" in "".join(lines[:6]) and "done in" in lines[-1]


def test_a_checkpoint_of_another_architecture(capsys, catalogue, trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    held = json.loads((workdir / "config.json").read_text())
    held["experts"]["width"] = 28
    (workdir / "config.json").write_text(json.dumps(held))
    told = one_line(capsys, *arguments(catalogue, workdir), "--config.experts.width=28")
    assert "a checkpoint of another architecture: encoder/" in told and "28" in told and "20" in told
    assert str(workdir / "checkpoints" / "4") in told


def test_a_damaged_checkpoint(capsys, catalogue, trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    for file in workdir.glob("checkpoints/*/params/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    told = one_line(capsys, *arguments(catalogue, workdir))
    assert f"{workdir / 'checkpoints'}: no checkpoint is whole, all are damaged: " in told


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
        pytest.skip("no user namespace with a file system of its own here: a full disk is not tried")
    done = run(catalogue, full / "w", prefix)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moon-jax: ") and os.strerror(errno.ENOSPC) in last and str(full / "w") in last
    assert "Traceback" not in done.stderr


def test_a_disk_that_refuses_large_files(catalogue, tmp_path):
    """The save fails behind the scenes. It is seen within some steps, and the older checkpoint is whole."""
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
    # TensorStore's threads may have said more before; the last line is ours, and says what to do.
    assert last.startswith("moon-jax: ") and os.strerror(errno.EFBIG) in last and str(workdir) in last
    steps = (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    failing = (older // 20 + 1) * 20
    assert f"resuming {workdir} at step {older} " in done.stdout and failing <= steps < failing + 20
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == [str(older)]
    assert moon_jax.load(workdir).step == older


@pytest.fixture
def foreign():
    """A folder that others own and may read, while this process is nobody: root may do anything anywhere."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to nobody
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
    told = one_line(capsys, "--workdir", foreign / "w")
    assert f"--workdir {foreign / 'w'}: {foreign}: Permission denied; give a folder that can be written" in told


@pytest.mark.parametrize("closed", ["products.jsonl", "."])
def test_no_permission_to_read(capsys, foreign, closed):
    folder = Path(tempfile.mkdtemp())
    (folder / "products.jsonl").write_text('{"product_id": "1", "title": "x"}')
    (folder / closed).chmod(0)
    told = one_line(capsys, "--data", folder, "--workdir", folder.parent / "moon-jax-never-made")
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert str((folder / closed).resolve()) in told and "permission" in told.lower()


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def start(catalogue, workdir, *more):
    command = [sys.executable, "-m", "moon_jax.cli", "quickstart", *arguments(catalogue, workdir)]
    command += ["--config.training.steps=100000", *more]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("delay", [0.3, 1.5, 3.0, pytest.param(6.0, marks=pytest.mark.slow)])
def test_ctrl_c_is_never_lost(catalogue, tmp_path, delay):
    process = start(catalogue, tmp_path / "w")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    # In its first moments Python answers by itself.
    assert process.returncode in ((130,) if delay > 1 else (130, 1, -signal.SIGINT)), told
    if process.returncode == 130:
        asked, answered = told.split("\n", 1)[1].splitlines()
        assert asked == "stopping after this piece of work; Ctrl-C again stops at once"
        assert answered.startswith("moon-jax: interrupted; the same command goes on")


def test_ctrl_c_in_training_loses_no_step(catalogue, tmp_path):
    log = tmp_path / "w" / "metrics.jsonl"
    process = start(catalogue, tmp_path / "w")
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    saved = int(re.search(r"saved at step (\d+) of 100000", printed)[1])
    assert saved >= 3 and (tmp_path / "w" / "checkpoints" / str(saved)).is_dir()
    assert log.read_bytes().count(b"\n") == saved  # every step is logged here


def test_a_second_ctrl_c_ends_the_process(catalogue, tmp_path):
    process = start(catalogue, tmp_path / "w")
    time.sleep(3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 10


def test_a_swallowed_interrupt_is_met_at_the_next_progress():
    interrupt.REQUESTED.set()
    try:
        with pytest.raises(KeyboardInterrupt), progress.Terminal().progress("work", 3) as advance:
            advance()
    finally:
        interrupt.REQUESTED.clear()


@pytest.mark.parametrize(("given", "code"), [("", 0), ("85", 85), ("x", 0), ("256", 0)])
def test_a_launcher_may_give_a_stop_a_code_of_its_own(monkeypatch, capsys, given, code):
    def stopped(parsed, overrides):
        interrupt.terminate()
        interrupt.check()

    monkeypatch.setattr("moon_jax.commands.train.run", stopped)
    monkeypatch.setenv(cli.STOP_CODE, given)
    assert cli.main(["train", "--config", "quickstart", "--workdir", "w"]) == code
    assert capsys.readouterr().err == "moon-jax: stopped by SIGTERM; the same command goes on from here\n"
    assert not interrupt.REQUESTED.is_set()


def test_what_may_go_well_later_has_an_exit_code_of_its_own(monkeypatch, capsys):
    def unavailable(parsed, overrides):
        raise Unavailable("gs://shop/run: no answer")

    monkeypatch.setattr("moon_jax.commands.train.run", unavailable)
    assert cli.main(["train", "--config", "quickstart", "--workdir", "w"]) == cli.AGAIN == 1
    assert capsys.readouterr().err == "moon-jax: gs://shop/run: no answer\n"


@pytest.mark.parametrize("option", ["optimizer=adamm", "rates=encoder/vison/*=0"])
def test_a_mistake_about_training_leaves_no_workdir(capsys, catalogue, tmp_path, option):
    """Else the workdir would be that of the mistake, and refuse the command without it."""
    command = ["train", "--config", "quickstart", "--data", str(catalogue), "--workdir", str(tmp_path / "w")]
    assert cli.main([*command, f"--config.training.{option}"]) == 2
    assert "the closest is" in capsys.readouterr().err and not (tmp_path / "w").exists()
