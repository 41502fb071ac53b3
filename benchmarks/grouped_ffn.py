"""Time of the strategy `grouped` against a dense feed-forward of the same active width, forward and backward.

Both run in one process, in alternation, and the ratio of each pair is reported. A ratio of 1 means that the mixture of
experts costs no more than the routed tokens. With --ragged-dot, jax.lax.ragged_dot is timed as well; on a CPU it
multiplies every row with every expert.

    python benchmarks/grouped_ffn.py                                             for a CPU: T=4096 D=256 F=1024 E=8 K=2
    python benchmarks/grouped_ffn.py --tokens 16384 --width 2048 --inner 6144 --dtype bfloat16         for a GPU or TPU
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from moon_jax import backend
from moon_jax.model import experts, grouped_matmul, router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("width", 256), ("inner", 1024), ("experts", 8), ("per-token", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--ragged-dot", action="store_true", help="also time jax.lax.ragged_dot")
    parsed = parser.parse_args()
    tokens, width, inner, count, per_token = parsed.tokens, parsed.width, parsed.inner, parsed.experts, parsed.per_token
    dtype = jnp.dtype(parsed.dtype)

    keys = jax.random.split(jax.random.key(0), 6)
    draw = lambda key, *shape: (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)  # noqa: E731
    hidden, cotangent = (jax.random.normal(key, (tokens, width)).astype(dtype) for key in keys[:2])
    kernel = 0.02 * jax.random.normal(keys[2], (width, count))
    gate_up, down = draw(keys[3], count, 2, width, inner), draw(keys[4], count, inner, width)
    wide_gate, wide_up = (draw(key, width, inner * per_token) for key in jax.random.split(keys[5]))
    wide_down = draw(keys[5], inner * per_token, width)

    def grouped(hidden, kernel, gate_up, down):
        routing = router.route(hidden, kernel, per_token)
        keep = jnp.ones(routing.index.shape, bool)
        y = experts.grouped(hidden, routing.gate, routing.index, keep, gate_up, down, tokens)
        return jnp.vdot(y, cotangent, preferred_element_type=jnp.float32)

    def ragged(hidden, kernel, gate_up, down):
        routing = router.route(hidden, kernel, per_token)
        position, order, sizes = experts.sort_routes(routing.index, jnp.ones(routing.index.shape, bool), count)
        rows = experts.permute(jnp.repeat(hidden, per_token, axis=0), order, position)
        y = experts.permute(grouped_matmul.ragged(rows, gate_up, down, sizes, jax.lax.ragged_dot), position, order)
        y = jnp.einsum("tk,tkd->td", jnp.take_along_axis(routing.gate, routing.index, 1), y.reshape(tokens, -1, width))
        return jnp.vdot(y, cotangent, preferred_element_type=jnp.float32)

    def dense(hidden, gate, up, down):
        y = (jax.nn.silu(hidden @ gate) * (hidden @ up)) @ down
        return jnp.vdot(y, cotangent, preferred_element_type=jnp.float32)

    def compiled(function, *arguments):
        gradient = jax.jit(jax.value_and_grad(function, (0, 1, 2, 3)), compiler_options=backend.compiler_options())
        return lambda: jax.block_until_ready(gradient(*arguments))

    runs = {
        "dense": compiled(dense, hidden, wide_gate, wide_up, wide_down),
        "grouped": compiled(grouped, hidden, kernel, gate_up, down),
    }
    if parsed.ragged_dot:
        runs["ragged_dot"] = compiled(ragged, hidden, kernel, gate_up, down)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(parsed.rounds + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    sizes = f"T={tokens} D={width} F={inner} E={count} K={per_token}, {dtype}"
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {sizes}; forward and backward, {parsed.rounds} rounds"
    )
    for name, found in times.items():
        ratios = sorted(one / other for one, other in zip(found, times["dense"], strict=True))
        spread = f" (from {ratios[0]:.2f} to {ratios[-1]:.2f})" if name != "dense" else ""
        print(f"{name:10} {1e3 * statistics.median(found):8.2f} ms  {statistics.median(ratios):5.2f} x dense{spread}")


if __name__ == "__main__":
    main()
