"""Detection of multi-process runs, and agreement between processes."""

import json
import os
import signal

import jax
import pytest

from moon_jax import distributed, interrupt
from moon_jax.errors import Unavailable, UserError

NAMES = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_JOB_ID",
    "CUDA_VISIBLE_DEVICES",
    *distributed.VARIABLES,
)


@pytest.fixture
def started(monkeypatch):
    """The recorded calls of a stubbed jax.distributed.initialize, with no variables set."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_on_tpu", lambda: False)
    yield calls
    interrupt.RELAY.clear()
    interrupt.forget()


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
    distributed.initialize()
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
        (  # each task sees all GPUs of the node: JAX picks the one with its local index
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            {"num_processes": 4, "process_id": 1},
        ),
    ],
)
def test_several_processes_are_connected(started, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    given = {name: value for name, value in started[0].items() if name != "cluster_detection_method"}
    assert len(started) == 1 and given == expected and interrupt.RELAY.is_set()


def test_on_a_tpu_jax_finds_the_others(started, monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu", lambda: True)
    distributed.initialize()
    assert started == [{}]


def test_a_tpu_host_that_cannot_find_the_others_runs_alone_and_says_so(started, monkeypatch, capsys):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "_on_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    distributed.initialize()
    err = capsys.readouterr().err
    assert "running on this host only. If there are more, set JAX_COORDINATOR_ADDRESS" in err and err.count("\n") == 1
    assert not interrupt.RELAY.is_set()


def test_a_sigterm_while_waiting_for_the_others_is_passed_on_to_them(started, monkeypatch):
    sent = []
    monkeypatch.setattr(distributed.os, "kill", lambda process, kind: sent.append((process, kind)))
    monkeypatch.setattr(distributed, "_on_tpu", lambda: True)
    interrupt.terminate()
    distributed.initialize()
    assert sent == [(os.getpid(), signal.SIGTERM)] and not interrupt.REQUESTED.is_set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"dev/accel0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, True),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, True),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x10de\n"}, False),  # another vendor
        ({"dev/vfio/vfio": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, False),  # no chip is passed through
        ({}, False),
    ],
)
def test_a_tpu_is_detected_by_its_chips(tmp_path, monkeypatch, files, expected):
    monkeypatch.delenv("JAX_PLATFORMS")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert distributed._on_tpu(tmp_path) == expected
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not distributed._on_tpu(tmp_path)


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
            "JAX_COORDINATOR_ADDRESS: a has no port; write host:port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "1"},
            "JAX_NUM_PROCESSES: four is not a whole number",
        ),
    ],
)
def test_invalid_variables_are_reported_in_one_line(started, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize()
    assert not started


@pytest.mark.parametrize(
    ("reports", "own", "kind", "message"),
    [
        (["", "UserError no such file"], None, UserError, "process 1: no such file"),
        (["", "Unavailable no response"], None, Unavailable, "process 1: no response"),
        (["", "OSError [Errno 28] No space"], None, UserError, "process 1: OSError: [Errno 28] No space"),
        (["UserError mine", ""], UserError("mine"), UserError, "mine"),
        (["OSError mine", ""], OSError("mine"), OSError, "mine"),
    ],
)
def test_a_failure_of_one_process_ends_all(monkeypatch, reports, own, kind, message):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "allgather", lambda _: reports)
    with pytest.raises(kind) as error, distributed.fail_together():
        if own:
            raise own
    assert type(error.value) is kind and str(error.value) == message


def test_the_error_names_the_value_in_which_processes_differ(monkeypatch):
    """Even if all values together exceed the size of one message."""
    ours = {"a": 1, "long": "x" * 10_000, "b": [2, 3]}
    theirs = ours | {"b": [2, 4]}

    def allgather(own):  # with the other process's reply to the same call
        found = next((name for name, value in ours.items() if own == json.dumps(value)), None)
        return [own, json.dumps(theirs[found]) if found else "another digest"]

    monkeypatch.setattr(distributed, "allgather", allgather)
    with pytest.raises(UserError, match=r"process 1: config.b is \[2, 4\], but \[2, 3\] in process 0") as error:
        distributed.require_equal("config", ours)
    assert error.value.shared


def test_a_single_process_agrees_with_itself():
    assert distributed.is_primary() and distributed.allgather("x") == ["x"]
    distributed.require_equal("config", {"a": 1})
    with pytest.raises(UserError, match=r"^mine$"), distributed.fail_together():
        raise UserError("mine")
