"""Who is taken for one of several processes, and who is not."""

import jax
import pytest

from moon_jax import hosts, interrupt
from moon_jax.config import UserError

NAMES = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", *hosts.BY_HAND)


@pytest.fixture
def started(monkeypatch):
    """Calls of jax.distributed.initialize, which does nothing; no variable is set."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_on_tpu", lambda: False)
    yield calls
    interrupt.RELAY.clear()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a shell inside an allocation
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_single_process_is_left_alone(started, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hosts.start()
    assert not started and not interrupt.RELAY.is_set()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3},
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "CUDA_VISIBLE_DEVICES": "2"},
            {"num_processes": 4, "process_id": 2, "local_device_ids": [0]},
        ),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, {"num_processes": 4, "process_id": 0}),
        (  # all GPUs of the node are shown to each task: JAX gives it the one of its local number
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            {"num_processes": 4, "process_id": 1},
        ),
    ],
)
def test_several_are_joined(started, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hosts.start()
    given = {name: value for name, value in started[0].items() if name != "cluster_detection_method"}
    assert len(started) == 1 and given == expected and interrupt.RELAY.is_set()


def test_on_a_tpu_jax_finds_the_others(started, monkeypatch):
    monkeypatch.setattr(hosts, "_on_tpu", lambda: True)
    hosts.start()
    assert started == [{}]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS: not set, while JAX_NUM_PROCESSES is"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID: 4 of 4 processes; they count from 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"},
            "JAX_COORDINATOR_ADDRESS: a names no port; write host:port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "1"},
            "JAX_NUM_PROCESSES: four is not a whole number",
        ),
    ],
)
def test_variables_that_make_no_sense_are_one_line(started, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.start()
    assert not started


def test_alone_everything_is_agreed():
    assert hosts.first() and hosts.gather("x") == ["x"]
    hosts.same("config", {"a": 1})
    with pytest.raises(UserError, match=r"^mine$"), hosts.together():
        raise UserError("mine")
