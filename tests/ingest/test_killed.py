"""Prepare is killed with SIGKILL at random moments and run again. The output equals that of an uninterrupted run byte
by byte, with any number of processes, and no child process survives."""

import json
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import killing
from tests.conftest import SCHEMA, jpeg, records
from tests.killing import content, finish


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """2,000 products, some of them unusable, and a log."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    made = records(400)
    rows = []
    for n in range(2000):
        row = made[n % 400] | {"product_id": f"p{n}", "title": f"thing {n % 700}"}
        if n % 17 == 0:
            row["images"] = [{"bytes": jpeg((1, 2, 3), (24, 24), n)[: rng.integers(300)], "path": ""}]
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "products.parquet")
    log = [
        {
            "query": f"q {rng.integers(90)}",
            "product_id": f"p{rng.integers(2100)}",
            "position": int(rng.integers(9)),
            "time": n,
        }
        | {"event": str(rng.choice(["impression", "click"]))}
        for n in range(3000)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return folder


def start(source, output, processes):
    return killing.start(["prepare", "--data", source, "--output", output, "--processes", processes])


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The output of an uninterrupted run, and its duration in seconds."""
    output, began = tmp_path_factory.mktemp("undisturbed") / "p", time.monotonic()
    finish(start(source, output, 2))
    took = time.monotonic() - began
    found = content(output)
    assert sum(name.startswith("moon_jax-train.") for name in found) > 5
    manifest = json.loads(found["manifest.json"])
    assert manifest["quarantined"]["bad image"] > 50 and manifest["quarantined"]["unknown product"] > 50
    assert sum(manifest["read"].values()) == sum(manifest["kept"].values()) + sum(manifest["quarantined"].values())
    return found, took


def killed(source, undisturbed, tmp_path, seed):
    assert "triplets" in killing.killed(["prepare", "--data", source], tmp_path / "p", *undisturbed, seed)


@pytest.mark.slow
def test_killed_at_random_moments(source, undisturbed, tmp_path, kill_seed):
    killed(source, undisturbed, tmp_path, kill_seed)


@pytest.mark.slow
def test_one_process_gives_the_same_output_as_two_and_a_second_run_changes_nothing(source, undisturbed, tmp_path):
    finish(start(source, tmp_path / "p", 1))
    assert content(tmp_path / "p") == undisturbed[0]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    assert "prepared in" in finish(start(source, tmp_path / "p", 1))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == times


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_resumes(source, undisturbed, tmp_path):
    process = start(source, tmp_path / "p", 2)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "p" / ".work" / "units").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), err
    if process.returncode:
        assert "interrupted; the same command resumes from here" in err and "Traceback" not in err
    finish(start(source, tmp_path / "p", 2))
    assert content(tmp_path / "p") == undisturbed[0]


@pytest.mark.slow
def test_another_source_or_another_output_is_refused(source, undisturbed, tmp_path):
    output = tmp_path / "p"
    process = start(source, output, 1)
    while not (output / ".work" / "source.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (tmp_path / "other.jsonl").write_text('{"product_id": "1", "title": "a"}')
    other = start(tmp_path / "other.jsonl", output, 1)
    _, err = other.communicate(timeout=60)
    assert other.returncode == 2 and "holds unfinished work from another or a changed source" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    full = start(source, tmp_path / "full", 1)
    _, err = full.communicate(timeout=60)
    assert full.returncode == 2 and "holds other files; give a new or empty folder" in err
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
