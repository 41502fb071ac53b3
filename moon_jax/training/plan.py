"""What a training step will cost on a machine that is not here: compiled ahead of time for a named TPU slice.

The real step of the config is compiled by libtpu, which needs no TPU, and read back (training/hlo.py). What is told is
a bound, not a forecast: every product at the chip's peak, every byte at full bandwidth, collectives on a ring of two
links, all of it overlapped. The slowest of the four gives the step. Without a topology the step is compiled for the
devices of this machine, and timed on them.
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

TOLD = ("experts.dispatch", "experts.capacity", "training.remat", "training.dtype")
"""Options that decide much of what a step costs, and are told with it."""

TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Chip and shape of a slice: a shape, v5p:4x4x4, or a cloud's name, v5p-128 (v4 and v5p count two cores a chip).

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
        raise UserError(f"--topology {name}: no such size is known here; give its shape, as in {example}")
    exponents = [(power + axis) // axes for axis in range(axes)]
    sizes = [2**exponent for exponent in exponents]
    return chip, (2, 2, 1) if chips == 4 and axes == 3 else tuple(sizes)


def devices_of(chip: str, shape: tuple[int, ...], slices: int = 1) -> list[Any]:
    """Devices of slices that are not here.

    Raises:
        UserError: libtpu is not installed, or knows no such slice.
    """
    # libtpu is to ask no metadata server, share the machine with others of its kind, and not warn of what is not here.
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
        raise UserError(f"--topology {name}: libtpu refuses it ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layout of one config on one machine. Quantities of memory, work and traffic are of one chip and one step."""

    config: str
    machine: str
    chips: int
    slices: int
    mesh: dict[str, int]
    options: dict[str, Any]  # those of TOLD
    triplets: int  # of the global batch
    parameters: int
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int  # that do not take an argument's place
    memory_bytes: int | None  # the chip's
    flops: float
    model_flops: float
    moved_bytes: float
    collective_bytes: dict[str, float]  # "all-gather over 4" → bytes sent; "… between slices" for those that cross
    uncounted: list[str]  # loops and kernels whose work could not be read
    seconds: dict[str, float]  # compute, memory, links, network: each at full speed
    step_seconds: float | None  # the longest of them
    bound: str | None  # which that is
    utilization: float | None  # of the chip's peak by model_flops, in the measured step or at that bound
    triplets_per_second: float | None
    measured_step_seconds: float | None  # on this machine; None where it was only compiled

    @property
    def held_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes + self.output_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.memory_bytes is None else self.held_bytes <= self.memory_bytes


def machine_of(topology: str, slices: int) -> tuple[str, str, list[Any]]:
    """The kind of chip, how the machine is called, and its devices; without a topology those of this machine."""
    if not topology:
        devices = jax.devices()
        chip = devices[0].device_kind
        return chip, f"this machine, {len(devices)} x {chip}", devices
    chip, shape = parse_topology(topology)
    machine = f"{chip}:{'x'.join(map(str, shape))}" + (f" x {slices} slices" if slices > 1 else "")
    return chip, machine, devices_of(chip, shape, slices)


def check(config: config_lib.Config, topology: str = "", slices: int = 1) -> None:
    """Raises what `plan` raises before it compiles."""
    _check(config, sharding.make_mesh(config.mesh, machine_of(topology, slices)[2]))


def _check(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
    sharding.check(config, mesh)
    if config.data.template != "bare":
        raise UserError(
            "config.data.template: a plan knows no template's length; leave it bare, and raise config.data.text_tokens"
            " by its tokens"
        )


def plan(
    config: config_lib.Config,
    name: str = "",
    topology: str = "",
    slices: int = 1,
    busy: Callable[[str], AbstractContextManager] = lambda what: nullcontext(),
) -> Plan:
    """Compiles the config's training step for a slice, or for this machine, and reads what it does.

    Args:
        name: how the config is called in the result.
        topology: see `parse_topology`; empty for the devices of this machine, where the step is also timed.
        slices: how many such slices, joined by the data-center network.
        busy: shows what takes long.

    Raises:
        UserError: a topology or a mesh that does not fit, or a step that needs more memory than a chip has.
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
    if kind and kind.axes:  # a GPU's program calls libraries whose work cannot be read
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
        options={option: config_lib.leaves(config)[option] for option in TOLD},
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
    """All numbers, with what follows from them."""
    return dataclasses.asdict(one) | {"held_bytes": one.held_bytes, "fits": one.fits}


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def table(plans: list[Plan]) -> Table:
    """One column for each layout."""
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
    row("parameters in all", lambda one: f"{one.parameters:,}")
    row("memory", held)
    row("  arguments", lambda one: _amount(one.argument_bytes, "B"))
    row("  temporary", lambda one: _amount(one.temporary_bytes, "B"))
    row("  output beyond them", lambda one: _amount(one.output_bytes, "B"))
    row("FLOPs", lambda one: ("at least " if one.uncounted else "") + _amount(one.flops, "FLOP"))
    row("  the model's own", lambda one: _amount(one.model_flops, "FLOP"))
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
    """The optimised HLO that the compiler wrote: `as_text` refuses some of its TPU programs."""
    found = list(dump.glob("*train_step*after_optimizations.txt"))
    if len(found) != 1:
        raise RuntimeError(f"the compiler wrote {len(found)} optimised programs, not one: another libtpu?")
    return found[0].read_text(encoding="utf-8")


def _too_large(message: str, machine: str) -> str:
    needed = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    if not needed and "RESOURCE_EXHAUSTED" not in message:
        return f"{machine}: the compiler refuses the step ({message.splitlines()[0]})"
    need = f"{needed.group(1)} of {needed.group(2)}" if needed else "more than it has"
    return (
        f"{machine}: the step needs {need} of a chip's memory; raise config.mesh.fsdp, expert or tensor, lower"
        " config.data.batch, or recompute more (config.training.remat)"
    )


def full_rows(rows: Any, text: int) -> Any:
    """Rows in which every token is valid: a text, then images and text, whose pixels and words are all alike."""
    length = rows.segment.shape[1]
    segment, span = np.ones_like(rows.segment), np.zeros_like(rows.span)
    segment[:, text:] = 2
    span[:] = [(0, text), (text, max(text + 1, length - text)), (text, length)]
    view = np.broadcast_to(np.array([1, 2, 3], rows.view.dtype), rows.view.shape)
    return rows.replace(segment=segment, span=span, view=view, image_hw=np.full_like(rows.image_hw, 2))


def _measure(compiled: Any, config: config_lib.Config, state: Any, batch: Any, busy: Callable, steps: int = 5) -> float:
    """Seconds of a step on this machine: the median of some, on full rows of zeros."""
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
