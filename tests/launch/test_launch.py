"""Launchers: what they would do, what they do with stand-ins of the clouds' programs, and their manifests' schema."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
COMMAND = ["moon-jax", "train", "--config", "c", "--data", "a b", "--workdir", 'w"\\&$(x)']
TPU = ["--name", "run1", "--zone", "z", "--type", "v5p-128"]
GKE = ["--name", "run1", "--image", "here/moon:1", "--accelerator", "tpu-v5p-slice", "--topology", "4x4x4"]
GKE += ["--hosts", "16", "--claim", "shared", "--slices", "2"]


def run(script, *arguments, path="", **variables):
    env = os.environ | variables | {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", LAUNCH / script, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing_and_help_has_an_example(script):
    assert shutil.which("shellcheck"), "pip install -e '.[test]'"
    checked = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    told = run(script, "--help")
    assert told.returncode == 0 and f"launch/{script} " in told.stdout and "moon-jax train" in told.stdout
    assert "#" not in told.stdout and "set -euo" not in told.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ["--processes", "two", "--", "x"], "--processes two: give a whole number"),
        ("local.sh", ["--prosesses", "2"], "--prosesses: not understood"),
        ("local.sh", ["--processes", "2"], "no command; give it after --"),
        ("slurm.sh", [], "no command"),
        ("tpu.sh", ["--name", "a", "--zone", "z", "--", "x"], "--type is missing"),
        ("tpu.sh", [*TPU[:-1], "v9-8", "--", "x"], "--type v9-8: its runtime version is not known here"),
        ("gke.sh", [*GKE[:-4], "--", "x"], "--claim is missing"),
        ("gke.sh", [*GKE, "--image", 'a"b', "--", "x"], '--image a"b: letters, digits'),
    ],
)
def test_a_mistake_is_one_line(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_what_local_would_start():
    told = run("local.sh", "--dry-run", "--gpus", 2, "--port", 9, "--", *COMMAND).stdout.splitlines()
    assert len(told) == 2
    assert told[1].startswith(
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:9 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 CUDA_VISIBLE_DEVICES=1 'moon-jax' "
    )
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {told[0].split("DEVICES=0 ")[1]}'], capture_output=True, text=True
    )
    assert words.stdout.splitlines() == COMMAND


@pytest.mark.parametrize(("last", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 2", 2), ("kill -KILL $$", 137)])
def test_how_local_ends(last, code):
    """One process of two ends badly: the other is not waited for, and all start again but after a mistake."""
    other = last if code in (0, 2) else "exec sleep 50"
    script = f"if [ $JAX_PROCESS_ID = 1 ]; then {last}; fi; {other}"
    began = time.monotonic()
    done = run("local.sh", "--processes", 2, "--restarts", 2, "--", "bash", "-c", script)
    assert done.returncode == code and time.monotonic() - began < 20
    assert done.stderr.count("starting all again") == (0 if code in (0, 2) else 2)


def test_local_passes_a_sigterm_on(tmp_path):
    script = 'trap "touch $0.$JAX_PROCESS_ID; exit 0" TERM; touch $0.on.$JAX_PROCESS_ID; while true; do sleep 0.1; done'
    command = ["bash", LAUNCH / "local.sh", "--processes", "2", "--", "bash", "-c", script, tmp_path / "seen"]
    process = subprocess.Popen(command)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"seen.0", "seen.1"}


def stand_in(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("ending", "count", "code", "requeued"),
    [("exit 0", "0", 0, False), ("exit 1", "0", 1, True), ("exit 1", "3", 1, False), ("exit 2", "0", 2, False)],
)
def test_slurm_requeues_a_failure_but_not_a_mistake(tmp_path, ending, count, code, requeued):
    stand_in(tmp_path, "srun", f'echo "$@" > {tmp_path}/srun.log; {ending}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.log')
    done = run("slurm.sh", *COMMAND, path=tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT=count)
    assert done.returncode == code
    assert (tmp_path / "srun.log").read_text().split()[:3] == ["--kill-on-bad-exit=1", "moon-jax", "train"]
    assert (tmp_path / "scontrol.log").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_slurm_passes_a_sigterm_on_and_requeues(tmp_path):
    stand_in(
        tmp_path,
        "srun",
        f'trap "touch {tmp_path}/told; exit 0" TERM; touch {tmp_path}/on; while true; do sleep 0.1; done',
    )
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.log')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "9"}
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sh", *COMMAND], env=env)
    while not (tmp_path / "on").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "told").exists() and (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_what_tpu_would_do():
    told = run("tpu.sh", "--dry-run", *TPU, "--slices", 2, "--spot", "--", *COMMAND)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert "--node-prefix' 'run1' '--node-count' '2' '--spot'" in lines[0] and "v2-alpha-tpuv5" in lines[0]
    assert [re.search(r"'ssh' '(\S+)'", line)[1] for line in lines[2:6]] == ["run1-0", "run1-1"] * 2
    # The command that ssh would run gets the words that were given.
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {lines[4]}'], capture_output=True, text=True
    ).stdout.splitlines()
    inner = words[-1].split("; ", 1)[1]
    assert (
        subprocess.run(["bash", "-c", f'printf "%s\\n" {inner}'], capture_output=True, text=True).stdout.splitlines()
        == COMMAND
    )


def test_tpu_asks_anew_after_a_preemption(tmp_path):
    """The first time the slice is taken away while the run is going on; the second time the run ends."""
    stand_in(
        tmp_path,
        "gcloud",
        f"""echo "$*" >> {tmp_path}/calls
case "$*" in
  *describe*) cat {tmp_path}/state ;;
  *create*) echo ACTIVE > {tmp_path}/state ;;
  *ssh*pip*) ;;
  *ssh*) if mkdir {tmp_path}/once 2>/dev/null; then echo SUSPENDED > {tmp_path}/state; exit 255; fi ;;
esac""",
    )
    done = run("tpu.sh", *TPU, "--", *COMMAND, path=tmp_path, POLL_SECONDS="0", SETTLE_SECONDS="0")
    assert done.returncode == 0, done.stderr
    calls = [
        next(word for word in ("create", "describe", "ssh", "delete") if word in line.split())
        for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert [call for call in calls if call != "describe"] == ["create", "ssh", "ssh", "delete"] * 2


def manifest(*arguments):
    told = run("gke.sh", "--dry-run", *GKE, *arguments, "--", *COMMAND)
    assert told.returncode == 0, told.stderr
    return yaml.safe_load(told.stdout)


def test_the_manifest_is_a_jobset():
    """Held against the models made of JobSet's own schema: nothing is lost on the way, so every field is known."""
    found = manifest()
    assert JobsetV1alpha2JobSet.from_dict(found).to_dict() == found
    wrong = manifest()
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    assert JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong  # a field that the schema lacks is seen
    slices = found["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 16
    container = job["template"]["spec"]["containers"][0]
    assert container["args"] == COMMAND and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert not re.search("@[A-Z]+@", str(found))


def test_a_pod_that_is_sent_away_counts_as_failed(tmp_path):
    """The manifest's own shell, run here."""
    command = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "command"
    ]
    for code in (0, 2):
        assert subprocess.run([*command, "bash", "-c", f"exit {code}"], timeout=20).returncode == code
    script = f'trap "touch {tmp_path}/saved; exit 0" TERM; touch {tmp_path}/on; while true; do sleep 0.1; done'
    process = subprocess.Popen([*command, "bash", "-c", script])
    while not (tmp_path / "on").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143 and (tmp_path / "saved").exists()


def test_gke_hands_the_manifest_to_kubectl(tmp_path):
    stand_in(tmp_path, "kubectl", f'echo "$@" > {tmp_path}/call; cat > {tmp_path}/manifest')
    done = run("gke.sh", *GKE, "--", *COMMAND, path=tmp_path)
    assert done.returncode == 0 and (tmp_path / "call").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest()
