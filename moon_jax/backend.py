"""What differs between backends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax

COMPILATIONS: Counter[str] = Counter()
"""How often this process compiled each jitted function, by function name; counted from JAX's own events."""


def _count(event: str, duration: float, **details: Any) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS[details.get("fun_name", "").removeprefix("jit(").removesuffix(")")] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def platform() -> str:
    """The platform that the program being traced is for, "cpu", "tpu" or "gpu": that of the mesh in use, if any.

    A program may be compiled for devices that this machine lacks (training/plan.py).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def compiler_options() -> dict[str, str | bool]:
    """XLA options under which a program gives the same bits each time it runs; for `jit` and `compile`.

    On CPU, XLA hands reductions to YNNPACK, which splits them by what threads happen to be free: gradients then differ
    from run to run in their last bits, and a resumed run from an undisturbed one. XLA's own code does not, and the
    quickstart's step is 10% faster with it.

    Simulated devices share a few threads. Left to itself XLA runs independent collectives at a time, the devices
    wait for each other in different ones, and the process is ended.
    """
    if platform() != "cpu":
        return {}
    several = jax.sharding.get_abstract_mesh().size > 1
    one_by_one = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if several else {}
    return {"xla_cpu_experimental_ynn_fusion_type": ""} | one_by_one
