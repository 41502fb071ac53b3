"""Differences between backends, and a count of compilations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

COMPILATIONS: Counter[str] = Counter()
"""How often this process compiled each jitted function, by name; counted from JAX's monitoring events."""


def _count(event: str, duration: float, **details: Any) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS[details.get("fun_name", "").removeprefix("jit(").removesuffix(")")] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def platform() -> str:
    """The platform that the current program is traced for: "cpu", "tpu" or "gpu".

    It is the platform of the mesh in use, if any: a program may be compiled for devices that this machine lacks
    (training/plan.py).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def compiler_options() -> dict[str, str | bool]:
    """XLA options, for `jit` and `compile`, that make a program give the same bits on every run.

    On CPU, XLA hands reductions to YNNPACK, which splits them by the threads that happen to be free. The last bits of
    gradients then differ from run to run, so a resumed run would differ from an uninterrupted one. XLA's own code is
    deterministic, and makes the quickstart's step 10% faster.

    Simulated devices share a few threads. By default XLA runs independent collectives concurrently; the devices then
    wait for each other in different collectives, and XLA aborts the process.
    """
    if platform() != "cpu":
        return {}
    several = jax.sharding.get_abstract_mesh().size > 1
    one_by_one = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if several else {}
    return {"xla_cpu_experimental_ynn_fusion_type": ""} | one_by_one
