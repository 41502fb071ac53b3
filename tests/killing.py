"""Kills commands with SIGKILL at random moments and runs them again: the output must be the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.conftest import ROOT


def start(arguments: list[object]) -> subprocess.Popen:
    """Starts moon-jax with small chunks, units and shards, in its own session."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ingest.small", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def alive(session: int) -> list[str]:
    """The pids of a session's processes that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, owner = rest.split()[:4]
        if int(owner) == session and state != "Z":
            found.append(path.parent.name)
    return found


def killed(
    arguments: list[object],
    output: Path,
    expected: dict[str, bytes],
    seconds: float,
    seed: int,
    takes_processes: bool = True,
) -> str:
    """Kills a command twice at random moments, then lets it finish, each time with another number of processes.

    Args:
        expected: the content of `output` after an uninterrupted run.
        seconds: the duration of an uninterrupted run.
        takes_processes: whether the command has --processes.

    Returns:
        The output of the last run.
    """
    rng = np.random.default_rng(seed)

    def restart() -> subprocess.Popen:
        processes = ["--processes", rng.integers(1, 4)] if takes_processes else []
        return start([*arguments, "--output", output, *processes])

    for _ in range(2):
        process = restart()
        time.sleep(rng.uniform(0.2, 1.0) * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 20
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(process.pid), "a worker outlives its parent"
    out = finish(restart())
    assert content(output) == expected
    return out
