"""The launchers: dry runs, runs with stubs of the clouds' programs, and the schema of the manifest."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from moon_jax import cli
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
def test_shellcheck_passes_and_help_has_an_example(script):
    assert shutil.which("shellcheck"), "pip install -e '.[test]'"
    checked = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    done = run(script, "--help")
    assert done.returncode == 0 and f"launch/{script} " in done.stdout and "moon-jax train" in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", ["--processes", "two", "--", "x"], "--processes two: give a whole number"),
        ("local.sh", ["--prosesses", "2"], "--prosesses: not understood"),
        ("local.sh", ["--processes", "2"], "no command; give it after --"),
        ("local.sh", ["--processes", "2", "--gpus", "2", "--", "x"], "--processes and --gpus: give one of them"),
        ("local.sh", ["--", "x"], "--processes or --gpus is missing"),
        ("slurm.sh", [], "no command"),
        ("slurm.sh", ["--dryrun", "x"], "--dryrun: not understood"),
        ("slurm.sh", ["x"], "no srun on this machine; submit this script with sbatch"),
        ("tpu.sh", ["--name", "a", "--zone", "z", "--", "x"], "--type is missing"),
        ("tpu.sh", [*TPU[:-1], "v9-8", "--", "x"], "--type v9-8: unknown runtime version"),
        ("gke.sh", [*GKE[:-4], "--", "x"], "--claim is missing"),
        ("gke.sh", [*GKE, "--image", 'a"b', "--", "x"], '--image a"b: letters, digits'),
    ],
)
def test_a_mistake_is_reported_in_one_line(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_dry_run_of_local():
    lines = run("local.sh", "--dry-run", "--gpus", 2, "--port", 9, "--", *COMMAND).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:9 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 CUDA_VISIBLE_DEVICES=1 'moon-jax' "
    )
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {lines[0].split("DEVICES=0 ")[1]}'], capture_output=True, text=True
    )
    assert words.stdout.splitlines() == COMMAND


@pytest.mark.parametrize(
    ("last", "code"),
    [("exit 0", 0), ("exit 7", 7), ("exit 2", 2), ("kill -KILL $$", 137), ("exec no-such-command", 127)],
)
def test_local_restarts_after_a_failure_but_not_after_a_mistake(last, code):
    """One of two processes fails: the other is killed at once. All restart, unless it was a mistake."""
    other = last if code in (0, 2) else "exec sleep 50"
    script = f"if [ $JAX_PROCESS_ID = 1 ]; then {last}; fi; {other}"
    began = time.monotonic()
    done = run("local.sh", "--processes", 2, "--restarts", 2, "--", "bash", "-c", script)
    assert done.returncode == code and time.monotonic() - began < 20
    assert done.stderr.count("restarting all") == (0 if code in (0, 2, 127) else 2)


def test_a_mistake_of_one_process_counts_more_than_the_loss_of_others():
    script = "if [ $JAX_PROCESS_ID = 1 ]; then exit 2; fi; exit 1"
    done = run("local.sh", "--processes", 2, "--", "bash", "-c", script)
    assert done.returncode == 2 and "restarting" not in done.stderr


def test_local_forwards_sigterm(tmp_path):
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
    [
        ("exit 0", "0", 0, False),
        ("exit 1", "0", 1, True),
        ("exit 1", "20", 1, False),
        ("exit 2", "0", 2, False),
        ("exit $MOON_JAX_STOP_CODE", "20", 85, True),  # all tasks received SIGTERM and saved
    ],
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


def test_slurm_waits_for_the_tasks_after_sigterm(tmp_path):
    """If SIGTERM reaches the script too, it still waits for its tasks, which the signal is for."""
    stand_in(tmp_path, "srun", f"touch {tmp_path}/on; sleep 1; touch {tmp_path}/saved; exit $MOON_JAX_STOP_CODE")
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.log')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "9"}
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sh", *COMMAND], env=env)
    while not (tmp_path / "on").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 85
    assert (tmp_path / "saved").exists() and (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_slurm_signals_the_tasks_and_not_the_script():
    """If srun itself gets SIGTERM, it kills its tasks."""
    assert "#SBATCH --signal=TERM@120\n" in (LAUNCH / "slurm.sh").read_text()


def test_dry_run_of_tpu():
    done = run("tpu.sh", "--dry-run", *TPU, "--slices", 2, "--spot", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "--node-prefix' 'run1' '--node-count' '2' '--spot'" in lines[0] and "v2-alpha-tpuv5" in lines[0]
    assert [re.search(r"'ssh' '(\S+)'", line)[1] for line in lines[2:6]] == ["run1-0", "run1-1"] * 2
    # The command that ssh would run receives the words as given.
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {lines[4]}'], capture_output=True, text=True
    ).stdout.splitlines()
    inner = words[-1].split("; ", 1)[1]
    assert (
        subprocess.run(["bash", "-c", f'printf "%s\\n" {inner}'], capture_output=True, text=True).stdout.splitlines()
        == COMMAND
    )


GCLOUD = """echo "$*" >> {0}/calls
case "$*" in
  *describe*) cat {0}/state ;;
  *delete*) rm -f {0}/state ;;
  *create*) {1} ;;
  *ssh*pip*) ;;
  *ssh*) echo x >> {0}/runs; case $(wc -l < {0}/runs) in {2} esac ;;
esac"""


def on_tpu(tmp_path, created, runs, *more):
    """Runs tpu.sh with a stub of gcloud. `created` runs on create; `runs` are the cases of the first, second, … run."""
    stand_in(tmp_path, "gcloud", GCLOUD.format(tmp_path, created, runs))
    done = run("tpu.sh", *TPU, *more, "--", *COMMAND, path=tmp_path, POLL_SECONDS="0", SETTLE_SECONDS="0")
    lines = (tmp_path / "calls").read_text().splitlines()
    calls = [next(word for word in ("create", "describe", "ssh", "delete") if word in line.split()) for line in lines]
    return done, [call for call in calls if call != "describe"]


ACTIVE = "echo ACTIVE > {0}/state"


@pytest.mark.parametrize("code", [0, 85, 255])
def test_tpu_requests_a_new_slice_after_a_preemption(tmp_path, code):
    """The slice is preempted during the first run, which may have saved and exited before."""
    active = ACTIVE.format(tmp_path)
    lost = f"1) echo SUSPENDED > {tmp_path}/state; exit {code} ;;"
    done, calls = on_tpu(tmp_path, active, f"{lost} 2) exit 0 ;;")
    if code == 0:  # finished, whatever happened to the slice
        assert done.returncode == 0 and calls == ["create", "ssh", "ssh", "delete"]
        return
    assert done.returncode == 0, done.stderr
    assert calls == ["create", "ssh", "ssh", "delete"] * 2
    assert f"exited with {code}; retrying (1 of 20)" in done.stderr and "run1 is SUSPENDED" in done.stderr


def test_tpu_restarts_a_lost_process_on_the_same_slice(tmp_path):
    done, calls = on_tpu(tmp_path, ACTIVE.format(tmp_path), "1) exit 1 ;; 2) exit 0 ;;")
    assert done.returncode == 0 and calls == ["create", "ssh", "ssh", "ssh", "ssh", "delete"]


@pytest.mark.parametrize(("created", "runs", "code"), [("ACTIVE", "*) exit 1 ;;", 1), ("FAILED", "*) ;;", 1)])
def test_tpu_gives_up_after_the_given_number_of_restarts(tmp_path, created, runs, code):
    done, calls = on_tpu(tmp_path, f"echo {created} > {tmp_path}/state", runs, "--restarts", 2)
    assert done.returncode == code and calls.count("ssh") == (6 if created == "ACTIVE" else 0)
    assert calls.count("create") == (1 if created == "ACTIVE" else 3) and calls[-1] == "delete"


def test_tpu_does_not_repeat_a_mistake(tmp_path):
    done, calls = on_tpu(tmp_path, ACTIVE.format(tmp_path), "*) exit 2 ;;")
    assert done.returncode == 2 and calls == ["create", "ssh", "ssh", "delete"]


def manifest(*arguments):
    done = run("gke.sh", "--dry-run", *GKE, *arguments, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_the_manifest_is_a_valid_jobset():
    """A round trip through the models generated from JobSet's schema loses nothing, so every field is known."""
    found = manifest()
    assert JobsetV1alpha2JobSet.from_dict(found).to_dict() == found
    wrong = manifest()
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    assert JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong  # an unknown field is detected
    slices = found["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 16
    container = job["template"]["spec"]["containers"][0]
    command = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes does
    assert (
        command == COMMAND
        and "$$(x)" in container["command"][-1]
        and container["resources"]["limits"] == {"google.com/tpu": 4}
    )
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert not re.search("@[A-Z]+@", str(found))


def test_an_evicted_pod_counts_as_failed_and_a_mistake_ends_the_job():
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert {"name": cli.STOP_CODE, "value": "85"} in container["env"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [cli.USER_ERROR]}


def test_gke_passes_the_manifest_to_kubectl(tmp_path):
    stand_in(tmp_path, "kubectl", f'echo "$@" > {tmp_path}/call; cat > {tmp_path}/manifest')
    done = run("gke.sh", *GKE, "--", *COMMAND, path=tmp_path)
    assert done.returncode == 0 and (tmp_path / "call").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest()
