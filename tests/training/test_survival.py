"""Runs that are killed, stopped, split over processes and moved to other machines: real processes and signals."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import moon_jax
from moon_jax import config as config_lib
from moon_jax import distributed, interrupt, sharding, storage
from moon_jax.data.prepared import open_prepared
from moon_jax.errors import UserError
from moon_jax.training import checkpoints
from moon_jax.training import metrics as metrics_lib
from tests.conftest import ROOT, environment, tiny

pytestmark = pytest.mark.slow  # each test starts processes; tests/training/test_run.py has a kill that is fast

STEPS = 12
CONFIG = tiny(
    training__steps=STEPS, training__save_every=4, training__keep_best=1, evaluation__every=6, evaluation__batch=16
)
LAUNCHER = str(ROOT / "launch" / "local.sh")


def arguments(catalogue, workdir, *more):
    return ["train", "--config", "quickstart", "--data", str(catalogue), "--workdir", str(workdir), *_tiny(), *more]


@functools.cache
def _tiny():
    """Overrides that turn the quickstart config into CONFIG."""
    base, wanted = config_lib.leaves(config_lib.load("quickstart")), config_lib.leaves(CONFIG)
    return tuple(f"--config.{k}={v!r}" for k, v in wanted.items() if v != base[k] and k != "data.path")


def start(command, devices=1, variables=None):
    """Starts a process with the tests' settings and its output in pipes."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = environment(devices) | {"PYTHONPATH": str(ROOT)} | (variables or {})
    return subprocess.Popen([str(word) for word in command], env=env, cwd=ROOT, **pipes)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(catalogue, workdir, *more, devices=1):
    return finish(start([sys.executable, "-m", "moon_jax.cli", *arguments(catalogue, workdir, *more)], devices))


READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
"""For processes that get killed: a half-written entry in the compilation cache would affect all tests."""


def run_killed(catalogue, workdir, phase, count, delay):
    command = [sys.executable, "-m", "tests.training.killed", phase, count, delay, *arguments(catalogue, workdir)]
    return finish(start(command, variables=READ_ONLY))


def several(processes, catalogue, workdir, *more, restarts=0, by=(sys.executable, "-m", "moon_jax.cli")):
    """The command for a run of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [LAUNCHER, "--processes", processes, "--restarts", restarts, "--port", port, "--"]
    return [*launcher, *by, *arguments(catalogue, workdir, *more)]


def losses(workdir):
    return [json.loads(line)["total"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def like(catalogue, tokenizer):
    """Abstract parameters of CONFIG."""
    from moon_jax.serving.embedder import abstract_params

    return jax.tree.map(checkpoints.on_one_device, abstract_params(CONFIG, tokenizer))


def trained(workdir, like):
    return checkpoints.latest_params(storage.Store(workdir).checkpoints, like)


def same_parameters(like, a, b):
    (step, one), (other, two) = (trained(workdir, like) for workdir in (a, b))
    assert step == other == STEPS
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, two)))


@pytest.fixture(scope="module")
def uninterrupted(catalogue, tmp_path_factory):
    """The workdir and output of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "w"
    code, out, err = run(catalogue, workdir)
    assert code == 0, err
    return workdir, out


def test_a_run_reports_what_trains_and_where_time_goes(uninterrupted):
    workdir, out = uninterrupted
    assert re.search(r"│ alignment/log_temperature +│ +2 │ +frozen │", out)
    assert re.search(r"│ encoder/decoder/experts/router +│ +192 │ +0.0001 │ +100% │", out)
    found = re.search(r"share of training time: data (.*)%, device (.*)%, checkpoint (.*)%, evaluation (.*)%", out)
    assert 50 < sum(map(float, found.groups())) <= 100.4
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "6", "8"]  # 6 for its score
    lines = [json.loads(line) for line in (workdir / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert 0 < sum(line[phase] for phase in metrics_lib.PHASES) <= line["seconds"] * 1.01
        assert line["host_bytes"] > 1e8
    # The line of an evaluated step has the scores, and its checkpoint is kept.
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["evaluation"] for line in metrics if "evaluation" in line}
    assert [*scores] == [6, 12] and set(scores[6]) == {"R@10", "directions"} and len(scores[6]["directions"]) == 9
    assert scores[6]["R@10"] == pytest.approx(np.mean([*scores[6]["directions"].values()]), abs=1e-3)


KILLS = [("device", 5, 0.01), ("checkpoint", 8, 0.02), ("evaluation", 1, 0.05), ("data", 3, 0.0)]


def test_a_run_killed_in_every_phase_gives_identical_results(catalogue, uninterrupted, like, tmp_path):
    """One run is killed four times; the fifth start finishes."""
    _kill(catalogue, tmp_path / "w", KILLS)
    assert same_parameters(like, uninterrupted[0], tmp_path / "w")
    for name in ("metrics.jsonl", "data/manifest.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "w" / name).read_bytes() == (uninterrupted[0] / name).read_bytes(), name


def _kill(catalogue, workdir, kills):
    for phase, count, delay in kills:
        code, _, err = run_killed(catalogue, workdir, phase, count, delay)
        assert code == -signal.SIGKILL, (phase, code, err)
    code, out, err = run(catalogue, workdir)
    assert code == 0, err
    return out


def test_a_run_killed_at_random_moments_gives_identical_results(catalogue, uninterrupted, like, tmp_path, kill_seed):
    """Killed once or twice: in any phase of a step, or at any moment from the start on."""
    rng, workdir, killed = np.random.default_rng(kill_seed), tmp_path / "w", 0
    most = {"data": 12, "device": 24, "checkpoint": 12, "evaluation": 2, "any": 1}
    while killed < 1 + kill_seed % 2:
        phase = [*most][kill_seed % 5] if not killed else str(rng.choice([*most]))
        count = int(rng.integers(1, most[phase] + 1))
        delay = float(rng.uniform(0, 8 if phase == "any" else 0.3))
        code, _, err = run_killed(catalogue, workdir, phase, count, delay)
        assert code in (-signal.SIGKILL, 0), (phase, code, err)
        killed += code != 0
        if not code:
            shutil.rmtree(workdir)  # it finished before the kill: start over
    code, _, err = run(catalogue, workdir)
    assert code == 0, err
    assert same_parameters(like, uninterrupted[0], workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (uninterrupted[0] / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def by_two(catalogue, tmp_path_factory):
    """The workdir of an uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("two") / "w"
    code, out, err = finish(start(several(2, catalogue, workdir)))
    assert code == 0, err
    assert "on 2 cpu device(s) of 2 processes" in out
    return workdir


def test_two_processes_have_the_losses_of_one(uninterrupted, by_two):
    np.testing.assert_allclose(losses(by_two), losses(uninterrupted[0]), rtol=1e-6)
    assert (by_two / "data" / "manifest.json").read_bytes() == (
        uninterrupted[0] / "data" / "manifest.json"
    ).read_bytes()


def test_four_processes_have_the_losses_of_one(catalogue, uninterrupted, tmp_path):
    code, _, err = finish(start(several(4, catalogue, tmp_path / "w")))
    assert code == 0, err
    np.testing.assert_allclose(losses(tmp_path / "w"), losses(uninterrupted[0]), rtol=1e-6)


def test_one_of_two_processes_is_killed(catalogue, by_two, like, tmp_path):
    """The launcher kills the other, restarts both, and the results are identical."""
    _kill_one(catalogue, by_two, like, tmp_path / "w", "1", "device", 14, 0.02)


def test_one_of_two_processes_is_killed_at_random(catalogue, by_two, like, tmp_path, kill_seed):
    rng = np.random.default_rng(kill_seed)
    phase = str(rng.choice(["data", "device", "checkpoint", "evaluation"]))
    count = int(rng.integers(1, {"data": 10, "device": 20, "checkpoint": 10, "evaluation": 2}[phase] + 1))
    _kill_one(catalogue, by_two, like, tmp_path / "w", str(kill_seed % 2), phase, count, float(rng.uniform(0, 0.3)))


def _kill_one(catalogue, by_two, like, workdir, victim, phase, count, delay):
    marker, script = workdir.parent / "killed", workdir.parent / "one.sh"
    script.write_text(
        f'if [ "$JAX_PROCESS_ID" = {victim} ] && mkdir {marker} 2>/dev/null\n'
        f'then exec {sys.executable} -m tests.training.killed {phase} {count} {delay} "$@"\n'
        f'else exec {sys.executable} -m moon_jax.cli "$@"\nfi\n'
    )
    command = several(2, catalogue, workdir, restarts=1, by=("bash", script))
    code, _, err = finish(start(command, variables=READ_ONLY))
    assert code == 0, err
    assert "restarting all (1 of 1)" in err and marker.is_dir()
    assert same_parameters(like, by_two, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (by_two / "metrics.jsonl").read_bytes()


def test_damage_in_the_part_of_one_process_is_skipped_by_both(tmp_path):
    workdir = tmp_path / "w"
    workdir.mkdir()
    launched = several(2, "", workdir)
    command = [*launched[: launched.index("--") + 1], sys.executable, "-m", "tests.training.torn", workdir]
    code, out, err = finish(start(command))
    assert code == 0, err
    lines = sorted(line for line in out.splitlines() if line.startswith("process"))
    assert lines == [f"process {index}: step 5, equal True, warnings 1" for index in range(2)]
    assert (workdir / "damaged" / "7").is_dir() and (workdir / "checkpoints" / "5").is_dir()


def test_a_save_that_fails_in_one_of_two_processes_ends_both(prepared, tmp_path):
    """Its disk rejects large files, so the data is prepared beforehand. Orbax alone would hang here."""
    script = tmp_path / "one.sh"
    script.write_text(
        f'if [ "$JAX_PROCESS_ID" = 1 ]; then ulimit -f 100; fi\nexec {sys.executable} -m moon_jax.cli "$@"\n'
    )
    more = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.training.steps=5000", *NOT_EVALUATED)
    code, _, err = finish(start(several(2, prepared.folder, tmp_path / "w", *more, by=("bash", script))))
    assert code == 2 and "Traceback" not in err
    assert err.count("a checkpoint could not be written: File too large") == 1
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes().count(b"\n") < 200


NOT_EVALUATED = ("--config.evaluation.every=0", "--config.training.keep_best=0")


def test_a_workdir_is_locked_against_a_second_run(catalogue, tmp_path, monkeypatch):
    from moon_jax.training import workdir as workdir_lib

    monkeypatch.setattr(workdir_lib, "LOCK_SECONDS", 1)
    store = storage.Store(tmp_path / "w")
    with workdir_lib.locked(store):
        script = "import sys\nfrom moon_jax import storage\nfrom moon_jax.training import workdir\n"
        script += "workdir.LOCK_SECONDS = 1\nwith workdir.locked(storage.Store(sys.argv[1])): pass"
        code, _, err = finish(start([sys.executable, "-c", script, store]))
        assert code == 1 and "another process is training there" in err
    code, _, err = finish(start([sys.executable, "-c", script, store]))
    assert code == 0, err


def test_ctrl_c_in_the_python_api_saves_too(catalogue, uninterrupted, like, tmp_path):
    """It leaves no flag set that would stop the next call."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nimport moon_jax\nfrom moon_jax import config, interrupt\n"
        "config = config.read_json(__import__('pathlib').Path(sys.argv[1]))\n"
        "try:\n    moon_jax.train(config, sys.argv[2])\n"
        "except KeyboardInterrupt:\n    print('interrupted', interrupt.REQUESTED.is_set())\n"
        "moon_jax.train(config, sys.argv[2])\n"
    )
    process = start([sys.executable, script, uninterrupted[0] / "config.json", tmp_path / "w"])
    _wait_for_lines(tmp_path / "w", process, 2)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"saved at step (\d+) of 12", out)[1])
    assert "interrupted False" in out and f"resuming {tmp_path / 'w'} at step {step} of 12" in out
    assert same_parameters(like, uninterrupted[0], tmp_path / "w")


def _wait_for_lines(workdir, process, lines):
    log = workdir / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_sigterm_saves_and_ends_with_zero(catalogue, uninterrupted, like, tmp_path):
    workdir = tmp_path / "w"
    process = start([sys.executable, "-m", "moon_jax.cli", *arguments(catalogue, workdir)])
    _wait_for_lines(workdir, process, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0 and time.monotonic() - began < 20
    step = int(re.search(r"saved at step (\d+) of 12", out)[1])
    assert step < STEPS and "stopped by SIGTERM; the same command resumes from here" in err
    assert (workdir / "checkpoints" / str(step)).is_dir()
    code, out, err = run(catalogue, workdir)
    assert code == 0 and f"resuming {workdir} at step {step} of 12" in out
    assert same_parameters(like, uninterrupted[0], workdir)


def _pid_of(process, index):
    """The pid of the launcher's child with JAX_PROCESS_ID=index."""
    for entry in os.listdir("/proc"):
        try:
            settings = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process.pid and f"JAX_PROCESS_ID={index}".encode() in settings:
            return int(entry)
    raise AssertionError(f"no process {index}")


def test_sigterm_on_one_host_stops_all_at_one_step_and_one_process_resumes(catalogue, uninterrupted, tmp_path):
    workdir = tmp_path / "w"
    process = start(several(2, catalogue, workdir, "--config.training.save_every=100"))
    _wait_for_lines(workdir, process, 2)
    os.kill(_pid_of(process, 1), signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"saved at step (\d+) of 12", out)[1])
    assert step < STEPS and [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step)]
    # One process with four devices takes over.
    code, out, err = run(catalogue, workdir, devices=4)
    assert code == 0, err
    assert f"resuming {workdir} at step {step} of 12" in out and "on 4 cpu device(s)" in out
    np.testing.assert_allclose(losses(workdir), losses(uninterrupted[0]), rtol=1e-6)


def test_the_loss_of_another_process_is_reported_in_one_line(catalogue, tmp_path):
    """Without a launcher, which would kill this process."""
    launched = several(2, catalogue, tmp_path / "w", "--config.training.steps=500")
    command = launched[launched.index("--") + 1 :]
    settings = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{launched[launched.index('--port') + 1]}"}
    settings |= {"JAX_NUM_PROCESSES": "2"}
    processes = [start(command, variables=settings | {"JAX_PROCESS_ID": str(index)}) for index in range(2)]
    _wait_for_lines(tmp_path / "w", processes[0], 2)
    processes[1].kill()
    code, _, err = finish(processes[0])
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("moon-jax: another process was lost (")


def test_a_mistake_in_one_process_ends_all_and_is_reported(catalogue, tmp_path):
    """One process has another seed."""
    workdir = tmp_path / "w"
    script = tmp_path / "one.sh"
    script.write_text(f'exec {sys.executable} -m moon_jax.cli "$@" --config.seed=$JAX_PROCESS_ID\n')
    code, _, err = finish(start(several(2, catalogue, workdir, by=("bash", script))))
    assert code == 2
    assert "moon-jax: process 1: config.seed is 1, but 0 in process 0; give all processes the same" in err
    assert not workdir.exists()


def test_a_global_batch_that_the_devices_do_not_divide_is_refused(catalogue, tmp_path):
    code, _, err = run(catalogue, tmp_path / "w", "--config.data.batch=6", devices=4)
    assert code == 2 and "config.data.batch: 6 triplets do not divide over data x fsdp x expert, 4 devices" in err


def test_a_workdir_in_a_bucket(catalogue, uninterrupted, like, bucket, tmp_path):
    """Killed during a save, damaged, used as --init: bit for bit the same as in a local folder."""
    workdir, local = f"{bucket}/run", uninterrupted[0]
    _kill(catalogue, workdir, [("checkpoint", 8, 0.05)])
    assert same_parameters(like, local, workdir)
    store = storage.Store(workdir)
    store.pull()
    for name in ("metrics.jsonl", "data/manifest.json", "tokenizer.json", "config.json"):
        assert (store.files / name).read_bytes() == (local / name).read_bytes(), name
    assert (
        len(list((store.files / "tensorboard").iterdir())) == 1 and "saved" not in (store.files / "run.log").read_text()
    )
    newest = f"{store.checkpoints}/{STEPS}/params/ocdbt.process_0/d".removeprefix("gs://")
    objects = store._bucket.find(newest, detail=True).values()
    store._bucket.rm(max(objects, key=lambda entry: entry["size"])["name"])  # not all small ones are read
    code, out, err = run(catalogue, workdir)
    assert code == 0, err
    assert f"{store.checkpoints}/{STEPS}: damaged checkpoint (" in out and f"resuming {workdir} at step " in out
    assert (store.checkpoints.parent / "damaged" / str(STEPS)).is_dir()
    assert same_parameters(like, local, workdir)
    assert moon_jax.load(workdir).fingerprint == moon_jax.load(local).fingerprint
    code, out, err = run(catalogue, tmp_path / "w", "--init", workdir, "--config.training.steps=1")
    assert code == 0 and "randomly initialised" not in out and f"loading {workdir}" in out, err


def test_two_processes_in_a_bucket(catalogue, by_two, like, bucket):
    workdir = f"{bucket}/two"
    code, _, err = finish(start(several(2, catalogue, workdir)))
    assert code == 0, err
    assert same_parameters(like, by_two, workdir)


def test_a_run_can_move_between_meshes(catalogue, tmp_path, monkeypatch):
    """Four legs of three steps on 8, 4, 1 and 8 devices, without dropping, have the losses of a single run."""
    small = {"language.layers": 1, "vision.depth": 1, "evaluation.every": 0, "training.keep_best": 0}
    config = config_lib.replace(CONFIG, {"data.path": str(catalogue)} | small)
    on(monkeypatch, 1)
    moon_jax.train(config, tmp_path / "one")
    for leg, (devices, axes) in enumerate([(8, dict(fsdp=2, expert=2)), (4, dict(fsdp=4)), (1, {}), (8, {})]):
        on(monkeypatch, devices)
        last = 3 * (leg + 1)
        monkeypatch.setattr(distributed, "should_stop", functools.partial(_stop_at, last if last < STEPS else None))
        legs = config_lib.replace(config, {f"mesh.{axis}": size for axis, size in axes.items()})
        try:
            moon_jax.train(legs, tmp_path / "legs")
        except KeyboardInterrupt:
            interrupt.REQUESTED.clear()
        assert (tmp_path / "legs" / "checkpoints" / str(last)).is_dir()
    np.testing.assert_allclose(losses(tmp_path / "legs"), losses(tmp_path / "one"), rtol=1e-6)


def on(monkeypatch, devices):
    """Makes runs in this process use only this many devices."""
    make_mesh = sharding.make_mesh
    every = getattr(make_mesh, "func", make_mesh)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(every, devices=jax.devices()[:devices]))


def _stop_at(last, step):
    if step == last:
        interrupt.REQUESTED.set()
    return step == last


def test_non_finite_steps_in_a_row_end_the_run(catalogue, tmp_path, monkeypatch):
    """The learning rate sends the parameters to infinity; from then on no step changes anything."""
    on(monkeypatch, 1)
    config = tiny(
        data__path=str(catalogue),
        training__optimizer="sgd",
        training__learning_rate=1e30,
        training__clip=1e30,
        training__max_bad_steps=3,
        training__steps=30,
        training__min_warmup=1,
        training__warmup=0.0,
        training__save_every=1,
    )
    with pytest.raises(
        UserError, match=r"no finite loss, gradient or update for 3 steps in a row, all skipped"
    ) as error:
        moon_jax.train(config, tmp_path / "w")
    dump = json.loads((tmp_path / "w" / "bad_step.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert f"step {dump['step']}: " in str(error.value) and "\n" not in str(error.value)
    assert [line["finite"] for line in lines[-3:]] == [False] * 3 and dump["step"] == len(lines)
    assert len(dump["triplets"]) == 8
    assert all(set(triplet) == {"triplet", "query", "positive", "negative", "weight"} for triplet in dump["triplets"])
    data = open_prepared(tmp_path / "w" / "data")
    for triplet in dump["triplets"]:
        assert triplet["query"] == data.products[data.triplets[triplet["triplet"]].query].id
    norms = dump["gradient_norms"]["encoder/decoder/periods/layer_0/attention/q_proj/kernel"]
    assert len(norms) == 2  # one per layer
    frozen = {"alignment/log_temperature"}
    assert set(dump["gradient_norms"]) == set(dump["parameter_norms"]) - frozen and dump["total"] is None
    kept = sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir())
    assert kept == [
        line["step"] for line in lines if line["finite"]
    ]  # bad steps are not saved: they would push these out


def test_a_run_can_start_from_the_parameters_of_another(catalogue, uninterrupted, like, tmp_path):
    rates = ("learning_rate=0.0", "router_learning_rate=0.0", "dual_learning_rate=1e-12")
    more = ["--init", uninterrupted[0], *(f"--config.training.{rate}" for rate in (*rates, "steps=1"))]
    code, out, err = run(catalogue, tmp_path / "w", *more)
    assert code == 0, err
    assert "randomly initialised" not in out
    (_, one), (step, two) = (trained(w, like) for w in (uninterrupted[0], tmp_path / "w"))
    assert step == 1
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert (tmp_path / "w" / "tokenizer.json").read_bytes() == (uninterrupted[0] / "tokenizer.json").read_bytes()
    code, _, err = run(catalogue, tmp_path / "v", "--init", uninterrupted[0], "--config.experts.count=2")
    assert code == 2 and "another architecture" in err
