"""Multi-process runs: several hosts, or several processes on one machine, that compute together.

All processes run the same program. The first one (index 0) writes everything except arrays, and prints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moon_jax import interrupt
from moon_jax.errors import Unavailable, UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that connect processes outside clusters: host:port of the first, their number, own index."""

MAX_BYTES = 8192
"""Maximum size of a message to the other processes, in bytes."""

GOOGLE = "0x1ae0"
"""PCI vendor of TPU chips."""


def initialize() -> None:
    """Connects the processes of this run, if there are several. Call it once, before using JAX.

    It tries, in this order: the variables in `VARIABLES`; a SLURM job step of several tasks (started by `srun`: a shell
    inside an allocation is a single process); a TPU VM, for which JAX finds the pod or slices itself. On Kubernetes,
    GKE configures pods with TPUs; other pods need the variables. If none applies, the process runs alone.

    Raises:
        UserError: variables are missing or invalid.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    options: dict[str, object] | None = None
    if given:
        options = _from_variables(given)
    elif _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        options = {"num_processes": _number("SLURM_STEP_NUM_TASKS", 1), "process_id": _number("SLURM_PROCID", 0)}
        # If SLURM shows each task only its own GPU, that GPU has number 0.
        if os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0 and os.environ.get("CUDA_VISIBLE_DEVICES"):
            options["local_device_ids"] = [0]
    elif _on_tpu():
        options = {}
    if options is None:
        return
    if options:
        print(f"joining process {options['process_id']} of {options['num_processes']}", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if options:
            raise
        # For example a container without access to the TPU's metadata.
        print(
            f"no other TPU hosts found ({error}); running on this host only. If there are more, set"
            f" {', '.join(VARIABLES)}",
            file=sys.stderr,
            flush=True,
        )
        return
    interrupt.RELAY.set()
    if interrupt.REQUESTED.is_set():  # it came while waiting for the others: pass it on to them
        interrupt.forget()
        os.kill(os.getpid(), signal.SIGTERM)


def _from_variables(given: dict[str, str]) -> dict[str, object] | None:
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise UserError(
            f"{missing[0]}: not set, while {next(iter(given))} is; set all of {', '.join(VARIABLES)}, or none"
        )
    address, count, index = given[VARIABLES[0]], _number(VARIABLES[1], 0), _number(VARIABLES[2], -1)
    if not 0 <= index < count:
        raise UserError(f"{VARIABLES[2]}: {given[VARIABLES[2]]} of {given[VARIABLES[1]]} processes; they count from 0")
    if ":" not in address:
        raise UserError(f"{VARIABLES[0]}: {address} has no port; write host:port")
    if count == 1:
        return None
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.lstrip("-").isdigit():
        raise UserError(f"{name}: {text} is not a whole number")
    return int(text)


def _on_tpu(root: Path = Path("/")) -> bool:
    """Whether this machine has TPU chips. Does not load libtpu, which would claim them."""
    if os.environ.get("JAX_PLATFORMS", "tpu") not in ("tpu", "tpu,cpu"):
        return False
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    chips = list((root / "dev").glob("accel[0-9]*")) + list((root / "dev/vfio").glob("[0-9]*"))
    return bool(chips) and any(path.read_text().strip() == GOOGLE for path in vendors)


def is_primary() -> bool:
    """Whether this is the process that writes and prints for all."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def should_stop(step: int) -> bool:
    """Whether all processes should stop after `step` steps. All of them must call this after every step.

    A SIGTERM to any one process stops all of them at the same step (JAX's preemption service).
    """
    if jax.process_count() == 1:
        return interrupt.REQUESTED.is_set()
    if multihost_utils.reached_preemption_sync_point(step):
        interrupt.terminate()
        return True
    return False


def allgather(text: str) -> list[str]:
    """The texts of all processes, by index, each cut to MAX_BYTES bytes. All processes must call this."""
    if jax.process_count() == 1:
        return [text]
    line = np.zeros(MAX_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:MAX_BYTES], np.uint8)
    line[: encoded.size] = encoded
    lines = multihost_utils.process_allgather(line)
    return [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in np.asarray(lines)]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Wraps work that all processes do: if one fails, all fail, and none waits for another forever.

    Raises:
        UserError: in all processes if any raised one (the same for Unavailable). If a process raised another exception,
            that process raises it again, and the others raise UserError.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
        if jax.process_count() == 1:
            raise
    report = "" if failed is None else f"{type(failed).__name__} {str(failed) or 'failed'}"
    for index, other in enumerate(allgather(report)):
        if not other:
            continue
        if failed is not None and not isinstance(failed, UserError):
            raise failed
        kind, _, text = other.partition(" ")
        if kind not in (UserError.__name__, Unavailable.__name__):
            text = f"{kind}: {text}"
        own = index == jax.process_index()
        error = (Unavailable if kind == Unavailable.__name__ else UserError)(
            text if own else f"process {index}: {text}"
        )
        error.shared = True
        raise error from failed


def require_equal(what: str, values: dict[str, Any]) -> None:
    """Checks that all processes have the same `values`.

    Raises:
        UserError: names the first value that differs.
    """
    if len({*allgather(hashlib.blake2b(json.dumps(values).encode()).hexdigest())}) == 1:
        return
    for name, value in values.items():
        held = allgather(json.dumps(value))
        for index, other in enumerate(held):
            if other != held[0]:
                error = UserError(
                    f"process {index}: {what}.{name} is {other}, but {held[0]} in process 0; give all processes"
                    " the same"
                )
                error.shared = True
                raise error
