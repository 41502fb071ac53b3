"""What differs between backends."""

from __future__ import annotations

import jax


def compiler_options() -> dict[str, str]:
    """XLA options under which a program gives the same bits each time it runs; for `jit` and `compile`.

    On CPU, XLA hands reductions to YNNPACK, which splits them by what threads happen to be free: gradients then differ
    from run to run in their last bits, and a resumed run from an undisturbed one. XLA's own code does not, and the
    quickstart's step is 10% faster with it.
    """
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}
