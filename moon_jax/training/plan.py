"""The cost of a training step on a machine you do not have: compiles it ahead of time for a named TPU slice.

libtpu, which needs no TPU, compiles the real step of the config, and training/hlo.py reads the result. The step time is
a lower bound, not a forecast: every matmul at the chip's peak, every byte at full bandwidth, collectives on a ring of
two links, all of it overlapped; the slowest of the four determines the step. Without a topology, the step is compiled
for the devices of this machine and timed on them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.table import Table

from moon_jax import backend, sharding
from moon_jax import config as config_lib
from moon_jax.data import rows as rows_lib
from moon_jax.errors import UserError
from moon_jax.training import hlo, loop
from moon_jax.training.chips import CHIPS, model_flops
from moon_jax.training.step import initial_state

REPORTED = ("experts.dispatch", "experts.capacity", "training.remat", "training.dtype")
"""Options with much influence on the cost of a step; reported with it."""

TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """The chip and shape of a slice, given as v5p:4x4x4 or by a cloud name, v5p-128 (v4 and v5p: two cores per chip).

    Raises:
        UserError: anything else.
    """
    shaped = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    counted = re.fullmatch(r"(\w+)-(\d+)", name)
    chip = (shaped or counted).group(1) if shaped or counted else ""
    chip = {"v5litepod": "v5e"}.get(chip, chip)
    if chip not in TPUS:
        known = ", ".join(TPUS)
        raise UserError(f"--topology {name}: give a shape such as v5p:4x4x4, or a name such as v5p-128, of {known}")
    axes = CHIPS[chip].axes
    if shaped:
        sizes = tuple(int(size) for size in shaped.group(2).split("x"))
        if len(sizes) != axes or min(sizes) < 1:
            raise UserError(f"--topology {name}: a slice of {chip} has {axes} axes, such as {'x'.join('4' * axes)}")
        return chip, sizes
    chips, odd = divmod(int(counted.group(2)), CHIPS[chip].cores)
    power = chips.bit_length() - 1
    if odd or chips != 2**power or (axes == 3 and chips < 4):
        example = f"{chip}:{'x'.join('4' * axes)}"
        raise UserError(f"--topology {name}: not a known size; give the shape, as in {example}")
    exponents = [(power + axis) // axes for axis in range(axes)]
    sizes = [2**exponent for exponent in exponents]
    return chip, (2, 2, 1) if chips == 4 and axes == 3 else tuple(sizes)


def devices_of(chip: str, shape: tuple[int, ...], slices: int = 1) -> list[Any]:
    """Abstract devices of TPU slices that this machine lacks.

    Raises:
        UserError: libtpu is not installed, or does not know the slice.
    """
    # Keep libtpu from querying the metadata server, locking the machine, and warning about missing hardware.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in (quiet | {"TPU_ACCELERATOR_TYPE": f"{chip}-8", "TPU_WORKER_ID": "0"}).items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    name = f"{chip}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices)
    except Exception as error:
        if "TPU support not installed" in str(error) or "libtpu" in str(error):
            raise UserError(f"--topology {name}: needs libtpu; pip install -e '.[tpu]'") from None
        raise UserError(f"--topology {name}: libtpu rejects it ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layout of one config on one machine. Memory, work and traffic are per chip and per step."""

    config: str
    machine: str
    chips: int
    slices: int
    mesh: dict[str, int]
    options: dict[str, Any]  # those in REPORTED
    triplets: int  # of the global batch
    parameters: int
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int  # of outputs that do not alias an argument
    memory_bytes: int | None  # the chip's
    flops: float
    model_flops: float
    moved_bytes: float
    collective_bytes: dict[str, float]  # "all-gather over 4" → bytes sent; with " between slices" if it crosses them
    uncounted: list[str]  # loops and kernels whose work could not be read
    seconds: dict[str, float]  # of compute, memory, links, network: each at full speed
    step_seconds: float | None  # the longest of them
    bound: str | None  # the name of the longest
    utilization: float | None  # model_flops over the chip's peak, in the measured step or at the bound
    triplets_per_second: float | None
    measured_step_seconds: float | None  # on this machine; None if only compiled

    @property
    def held_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes + self.output_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.memory_bytes is None else self.held_bytes <= self.memory_bytes


def machine_of(topology: str, slices: int) -> tuple[str, str, list[Any]]:
    """The chip, the machine's name, and its devices; without a topology those of this machine."""
    if not topology:
        devices = jax.devices()
        chip = devices[0].device_kind
        return chip, f"this machine, {len(devices)} x {chip}", devices
    chip, shape = parse_topology(topology)
    machine = f"{chip}:{'x'.join(map(str, shape))}" + (f" x {slices} slices" if slices > 1 else "")
    return chip, machine, devices_of(chip, shape, slices)


def check(config: config_lib.Config, topology: str = "", slices: int = 1) -> None:
    """Raises the errors that `plan` would raise before compiling."""
    _check(config, sharding.make_mesh(config.mesh, machine_of(topology, slices)[2]))


def _check(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
    sharding.check(config, mesh)
    if config.data.template != "bare":
        raise UserError(
            "config.data.template: a plan cannot know the length of a template; leave it bare, and raise"
            " config.data.text_tokens by its tokens"
        )


def plan(
    config: config_lib.Config,
    name: str = "",
    topology: str = "",
    slices: int = 1,
    busy: Callable[[str], AbstractContextManager] = lambda what: nullcontext(),
) -> Plan:
    """Compiles the config's training step for a slice, or for this machine, and reads its cost.

    Args:
        name: the config's name in the result.
        topology: see `parse_topology`; empty for the devices of this machine, where the step is also timed.
        slices: the number of slices, joined by the data-center network.
        busy: shows progress of slow work.

    Raises:
        UserError: the topology or the mesh does not fit, or the step needs more memory than a chip has.
    """
    chip, machine, devices = machine_of(topology, slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    _check(config, mesh)
    with jax.set_mesh(mesh):
        batch = loop.abstract_batch(config, mesh)
        state = loop.abstract_state(config, batch.rows, mesh)
        began = time.monotonic()
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
        what = f"compiling the training step for {machine}, {axes}"
        with busy(what), tempfile.TemporaryDirectory() as dump:
            options = backend.compiler_options() | ({"xla_dump_to": dump} if topology else {})
            lowered = loop.lower_step(config, state, batch)
            try:
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                raise UserError(_too_large(str(error), machine)) from None
            text = _optimized(Path(dump)) if topology else compiled.as_text()
        compiling = time.monotonic() - began
        measured = None if topology else _measure(compiled, config, state, batch, busy)
    cost = hlo.Program(text, len(devices), slices).cost()
    memory = compiled.memory_analysis()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    kind = CHIPS.get(chip)
    seconds = {}
    if kind and kind.axes:  # GPU programs call libraries, and their work cannot be read
        seconds = {"compute": cost.flops / kind.flops, "memory": cost.bytes / kind.bandwidth}
        inside = sum(sent for (_, _, crosses), sent in cost.collectives.items() if not crosses)
        across = sum(sent for (_, _, crosses), sent in cost.collectives.items() if crosses)
        seconds |= {"links": inside / (2 * kind.link), "network": across / kind.network}
    bound = max(seconds, key=seconds.get, default=None)
    step = seconds.get(bound)
    ideal = model_flops(config) / len(devices)
    taken = measured or step
    return Plan(
        config=name,
        machine=machine,
        chips=len(devices),
        slices=slices,
        mesh=dict(mesh.shape),
        options={option: config_lib.leaves(config)[option] for option in REPORTED},
        triplets=config.data.batch,
        parameters=parameters,
        compile_seconds=round(compiling, 1),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory_bytes=int(kind.memory) if kind else None,
        flops=cost.flops,
        model_flops=ideal,
        moved_bytes=cost.bytes,
        collective_bytes={
            f"{operation} over {size}" + (" between slices" if crosses else ""): sent
            for (operation, size, crosses), sent in sorted(cost.collectives.items(), key=lambda item: -item[1])
        },
        uncounted=sorted(cost.uncounted),
        seconds=seconds,
        step_seconds=step,
        bound=bound,
        utilization=ideal / kind.flops / taken if kind and taken else None,
        triplets_per_second=config.data.batch / taken if taken else None,
        measured_step_seconds=measured,
    )


def to_json(one: Plan) -> dict[str, Any]:
    """All numbers, including derived ones."""
    return dataclasses.asdict(one) | {"held_bytes": one.held_bytes, "fits": one.fits}


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def table(plans: list[Plan]) -> Table:
    """A table with one column per layout."""
    first = plans[0]
    title = f"{first.config} on {first.machine}: one chip, one step of {first.triplets:,} triplets"
    shown = Table(title=title)
    shown.add_column("")
    for one in plans:
        axes = [f"{axis}={size}" for axis, size in one.mesh.items() if size > 1]
        shown.add_column(" ".join(axes) or "1 device", justify="right")

    def row(name: str, cell: Callable[[Plan], str]) -> None:
        shown.add_row(name, *[cell(one) for one in plans])

    def held(one: Plan) -> str:
        verdict = {True: "fits", False: "TOO MUCH", None: ""}[one.fits]
        of = f" of {_amount(one.memory_bytes, 'B')}, {verdict}" if one.memory_bytes else ""
        return f"{_amount(one.held_bytes, 'B')}{of}"

    for name in ("experts.dispatch", "training.remat"):
        row(name, lambda one, name=name: str(one.options[name]))
    row("total parameters", lambda one: f"{one.parameters:,}")
    row("memory", held)
    row("  arguments", lambda one: _amount(one.argument_bytes, "B"))
    row("  temporary", lambda one: _amount(one.temporary_bytes, "B"))
    row("  other outputs", lambda one: _amount(one.output_bytes, "B"))
    row("FLOPs", lambda one: ("at least " if one.uncounted else "") + _amount(one.flops, "FLOP"))
    row("  model FLOPs", lambda one: _amount(one.model_flops, "FLOP"))
    row("bytes moved", lambda one: _amount(one.moved_bytes, "B"))
    for kind in dict.fromkeys(kind for one in plans for kind in one.collective_bytes):
        row(kind, lambda one, kind=kind: _amount(one.collective_bytes.get(kind, 0.0), "B"))
    if any(one.seconds for one in plans):
        for term in ("compute", "memory", "links", "network"):
            row(f"{term} time", lambda one, term=term: f"{1e3 * one.seconds.get(term, 0.0):,.1f} ms")
        row("step, at least", lambda one: f"{1e3 * one.step_seconds:,.1f} ms, by {one.bound}")
    limit = ", at most" if any(one.seconds for one in plans) else ""
    if any(one.measured_step_seconds for one in plans):
        row("step, measured", lambda one: f"{1e3 * one.measured_step_seconds:,.1f} ms")
    if any(one.utilization for one in plans):
        row(f"model-FLOPs utilisation{limit}", lambda one: f"{one.utilization:.1%}")
    row(f"triplets a second{limit}", lambda one: f"{one.triplets_per_second:,.0f}")
    if any(one.uncounted for one in plans):
        row("not counted", lambda one: f"{len(one.uncounted)} loops or kernels")
    row("compiled in", lambda one: f"{one.compile_seconds:,.0f} s")
    return shown


def _optimized(dump: Path) -> str:
    """The optimised HLO from the compiler's dump: `as_text` fails on some TPU programs."""
    found = list(dump.glob("*train_step*after_optimizations.txt"))
    if len(found) != 1:
        raise RuntimeError(f"the compiler dumped {len(found)} optimised programs instead of one: a different libtpu?")
    return found[0].read_text(encoding="utf-8")


def _too_large(message: str, machine: str) -> str:
    needed = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    if not needed and "RESOURCE_EXHAUSTED" not in message:
        return f"{machine}: the compiler rejects the step ({message.splitlines()[0]})"
    need = f"{needed.group(1)} of {needed.group(2)}" if needed else "more than it has"
    return (
        f"{machine}: the step needs {need} of a chip's memory; raise config.mesh.fsdp, expert or tensor, lower"
        " config.data.batch, or recompute more (config.training.remat)"
    )


def full_rows(rows: Any, text: int) -> Any:
    """Rows in which every token is valid: a text, then images and text, all with the same pixel and token values."""
    length = rows.segment.shape[1]
    segment, span = np.ones_like(rows.segment), np.zeros_like(rows.span)
    segment[:, text:] = 2
    span[:] = [(0, text), (text, max(text + 1, length - text)), (text, length)]
    view = np.broadcast_to(np.array([1, 2, 3], rows.view.dtype), rows.view.shape)
    return rows.replace(segment=segment, span=span, view=view, image_hw=np.full_like(rows.image_hw, 2))


def _measure(compiled: Any, config: config_lib.Config, state: Any, batch: Any, busy: Callable, steps: int = 5) -> float:
    """Seconds per step on this machine: the median of `steps` steps, on full rows of zeros."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    rows = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch)
    product = np.arange(len(rows.product), dtype=np.int32)
    full = full_rows(rows.rows, rows_lib.row_text(config))
    rows = rows.replace(rows=full, weight=np.ones_like(rows.weight), product=product)
    given = jax.device_put(rows, jax.tree.map(lambda leaf: leaf.sharding, batch))
    create = jax.jit(lambda: nn.unbox(initial_state(config, rows.rows)), out_shardings=shardings)
    found = []
    with busy(f"timing {steps} steps"):
        held = create()
        for _ in range(steps + 1):
            began = time.perf_counter()
            held, metrics = compiled(held, given)
            jax.block_until_ready((held, metrics))
            found.append(time.perf_counter() - began)
    return sorted(found[1:])[steps // 2]
