"""The cost of a compiled program on one device, read from its optimised HLO: FLOPs, bytes moved, collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here each computation is counted as often as it runs, with the
trip count of a loop read from its condition.

- FLOPs: matmuls and convolutions, 2 per multiplication, without those by the zeros of padding or dilation; and what
  custom kernels report. Elementwise work is left out.
- Bytes: what each instruction or fusion reads from and writes to the device's main memory. If an array is only sliced,
  gathered or updated, only that part counts. Arrays in on-chip memory (memory space 1 and above) do not count.
- Collectives: the bytes that a device sends on a ring: (n − 1)/n of the whole array for a gather, scatter or all-to-all
  among n devices, twice that for an all-reduce, the array itself for a permutation. If a group spans slices, traffic
  inside a slice and between slices are counted separately; between slices each device sends its share.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"),
    *("replica-id", "opt-barrier", "domain", "add-dependency", "while", "conditional", "call"),
}
RENAMES = ("bitcast", "copy", "convert")
KERNELS = re.compile(r'custom_call_target="(tpu_custom_call|__cublas|__cudnn|triton|__triton)')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

SHAPE = re.compile(r"(\w+)\[([\d,<=\s]*)\](?:\{([^}]*)\})?")
AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array; `on_chip` means that it is not in the device's main memory."""

    dims: tuple[int, ...]
    bytes: float
    on_chip: bool

    @property
    def moved(self) -> float:
        return 0.0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shapes opcode(text), attributes`; `operands` are the names within `text`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    attributes: str
    text: str  # between the parentheses


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions in program order; `root` names the instruction that it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of the program on one device."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Counter = dataclasses.field(default_factory=Counter)  # (kind, group size, between slices) → bytes
    uncounted: frozenset[str] = frozenset()  # loops of unknown length (counted once), kernels that report no FLOPs

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            self.uncounted | other.uncounted,
        )

    def times(self, count: int) -> Cost:
        collectives = Counter({key: value * count for key, value in self.collectives.items()})
        return Cost(self.flops * count, self.bytes * count, collectives, self.uncounted)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in SHAPE.findall(text):
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype).group())
        sizes = tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip())
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(sizes, math.prod(sizes) * bits / 8, bool(space and int(space.group(1)) > 0)))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:120]}")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of an HLO module by name, and the name of its entry computation."""
    computations, entry = {}, ""
    instructions: dict[str, Instruction] = {}
    name = root = ""
    for line in text.splitlines():
        if not line or line[0] not in " }%E":
            continue
        if line[0] == "}":
            computations[name] = Computation(name, instructions, root)
        elif line[0] != " ":
            instructions, root = {}, ""
            name = NAME.search(line).group(1)
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line:
            head, _, rest = line.strip().partition(" = ")
            rest = re.sub(r"/\*.*?\*/", "", rest)
            end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
            opening = rest.index("(", end)
            closing = _closing(rest, opening)
            inside = rest[opening + 1 : closing]
            found = NAME.search(head).group(1)
            root = found if head.startswith("ROOT") else root
            instructions[found] = Instruction(
                found,
                rest[end:opening].strip(),
                _shapes(rest[:end]),
                tuple(NAME.findall(inside)),
                rest[closing + 1 :],
                inside,
            )
    return computations, entry


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([^\s,]+)", instruction.attributes)
    return found.group(1) if found else ""


def _numbers(instruction: Instruction, name: str) -> list[int]:
    found = re.search(rf"\b{name}={{([\d,]*)}}", instruction.attributes)
    return [int(number) for number in found.group(1).split(",") if number] if found else []


def _window(instruction: Instruction, rank: int) -> list[dict[str, tuple[int, ...]]]:
    """The size, stride, low padding, lhs_dilate and rhs_dilate of each spatial axis of a convolution."""
    found = re.search(r"window={([^}]*)}", instruction.attributes)
    given = dict(item.split("=") for item in found.group(1).split()) if found else {}
    fields = {}
    for name, default in (("size", 1), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1)):
        fields[name] = [int(part) for part in given[name].split("x")] if name in given else [default] * rank
    fields["pad"] = [int(part.split("_")[0]) for part in given["pad"].split("x")] if "pad" in given else [0] * rank
    return [{name: values[axis] for name, values in fields.items()} for axis in range(rank)]


def _matmul_flops(instruction: Instruction, shape: dict[str, Shape]) -> float:
    """FLOPs of a dot or a convolution."""
    left, right = (shape[operand].dims for operand in instruction.operands[:2])
    out = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in _numbers(instruction, "lhs_contracting_dims"))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    spatial = [letter for letter in labels[2] if letter.isdigit()]
    total = 2.0 * out[labels[2].index("b")] * out[labels[2].index("f")] * right[labels[1].index("i")]
    for letter, window in zip(sorted(spatial), _window(instruction, len(spatial)), strict=True):
        size_in, size_out = left[labels[0].index(letter)], out[labels[2].index(letter)]
        position = (
            np.arange(size_out)[:, None] * window["stride"]
            + np.arange(window["size"]) * window["rhs_dilate"]
            - window["pad"]
        )
        within = (position >= 0) & (position <= (size_in - 1) * window["lhs_dilate"])
        total *= int((within & (position % window["lhs_dilate"] == 0)).sum())
    return total


def _groups(instruction: Instruction, devices: int, slice_devices: int) -> tuple[int, int]:
    """The number of devices in a collective's group, and the number of slices that a group spans."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        count, size = int(found.group(1)), int(found.group(2))
        order = np.arange(count * size).reshape([int(part) for part in found.group(3).split(",")])
        if found.group(4):
            order = order.transpose([int(part) for part in found.group(4).split(",")])
        groups = order.reshape(count, size)
    elif found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\))?\s*{([^}]*)}", text):
        groups = _mesh_groups(*found.groups())
    elif found := re.search(r"(?:replica_groups|source_target_pairs)={({.*?})}", text):
        groups = [[int(item) for item in group.split(",")] for group in re.findall(r"{([\d,]+)}", found.group(1))]
    else:
        groups = [range(devices)]
    spans = max(len({number // slice_devices for number in group}) for group in groups)
    return max(len(group) for group in groups), spans


def _mesh_groups(mesh: str, device_ids: str | None, named: str) -> np.ndarray:
    """Groups given as axes of a mesh: 'a'=4,'b'=16; [4,4,4]T(1,0,2; and the axes, 'a' or part of one, 'b':(4)2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    order = np.arange(math.prod(axes.values()))
    if device_ids:
        sizes, turned = ([int(number) for number in re.findall(r"\d+", part)] for part in device_ids.split("T("))
        order = order.reshape(sizes).transpose(turned)
    order = order.reshape([*axes.values()])
    chosen = {name: (int(before or 1), int(size or axes[name])) for name, before, size in AXIS.findall(named)}
    shape, mine = [], []
    for name, size in axes.items():
        before, part = chosen.get(name, (1, 1))
        mine.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    order = order.reshape(shape)
    rest = [axis for axis in range(order.ndim) if axis not in mine]
    return order.transpose(rest + mine).reshape(-1, math.prod(part for _, part in chosen.values()))


class Program:
    """An HLO module whose cost can be counted."""

    def __init__(self, text: str, devices: int = 1, slices: int = 1):
        self.computations, self.entry = parse(text)
        self.devices, self.slice_devices = devices, max(1, devices // slices)
        self._cost = functools.cache(self._count)

    def cost(self) -> Cost:
        return self._cost(self.entry)

    def _count(self, name: str) -> Cost:
        computation = self.computations[name]
        shapes = {one.name: one.shapes[0] for one in computation.instructions.values() if one.shapes}
        total = Cost()
        for instruction in computation.instructions.values():
            total += self._one(instruction, shapes, computation)
        return total

    def _one(self, instruction: Instruction, shapes: dict[str, Shape], computation: Computation) -> Cost:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode == "while":
            count = self._trips(instruction, computation)
            body = self._cost(_attribute(instruction, "body"))
            return body.times(count) if count is not None else body + Cost(uncounted=frozenset([instruction.name]))
        if opcode == "conditional":
            branches = re.search(r"branch_computations={([^}]*)}", instruction.attributes)
            names = NAME.findall(branches.group(1) if branches else "") or [
                _attribute(instruction, f"{which}_computation") for which in ("true", "false")
            ]
            return max((self._cost(name) for name in names), key=lambda cost: (cost.flops, cost.bytes))
        if opcode == "call":
            return self._cost(_attribute(instruction, "to_apply"))
        if opcode in ("async-start", "call-start"):
            return self._cost(_attribute(instruction, "calls"))
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return Cost()
        flops = self._flops(instruction, shapes)
        is_kernel = opcode == "custom-call" and KERNELS.search(instruction.attributes)
        if is_kernel and self._kernel_flops(instruction) is None:
            return Cost(0.0, self._bytes(instruction, shapes), uncounted=frozenset([instruction.name.split(".")[0]]))
        if kind in COLLECTIVES:
            return Cost(flops, self._bytes(instruction, shapes), self._collective(instruction, kind, shapes))
        return Cost(flops, self._bytes(instruction, shapes))

    def _flops(self, instruction: Instruction, shapes: dict[str, Shape]) -> float:
        if instruction.opcode in ("dot", "convolution"):
            return _matmul_flops(instruction, shapes)
        if instruction.opcode == "fusion":
            inner = self.computations[_attribute(instruction, "calls")]
            table = {one.name: one.shapes[0] for one in inner.instructions.values() if one.shapes}
            return sum(self._flops(one, table) for one in inner.instructions.values())
        return self._kernel_flops(instruction) or 0.0 if instruction.opcode == "custom-call" else 0.0

    def _kernel_flops(self, kernel: Instruction) -> float | None:
        """The FLOPs that a kernel reports. Splash attention reports none: it does 2 matmuls forward and 5 backward."""
        if found := re.search(r'"cost_estimate":({[^}]*})', kernel.attributes):
            return float(json.loads(found.group(1))["flops"])
        if kernel.name.startswith("splash_"):
            # The query has the most axes: [R,groups,H/g,S,d]. The backward pass has a copy for each block of keys.
            query = max((shape.dims for shape in kernel.shapes), key=len)
            backward = "dkv" in kernel.name
            copies = query[2] if backward else 1
            return (10.0 if backward else 4.0) * math.prod(query) / copies * query[-2]
        return None

    def _trips(self, loop: Instruction, computation: Computation) -> int | None:
        """The trip count of a loop that counts from one constant up to another, or None if it is not of that form."""
        if known := re.search(r'"known_trip_count":{"n":"(\d+)"}', loop.attributes):
            return int(known.group(1))
        condition = self.computations[_attribute(loop, "condition")]
        inside = condition.instructions
        compare = inside[condition.root]
        if compare.opcode == "fusion":
            fused = self.computations[_attribute(compare, "calls")]
            inside = inside | fused.instructions
            arguments = [one for one in fused.instructions.values() if one.opcode == "parameter"]
            renamed = {one.name: compare.operands[int(one.text)] for one in arguments}
            compare = fused.instructions[fused.root]
            compare = dataclasses.replace(compare, operands=tuple(renamed.get(name, name) for name in compare.operands))
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (inside[name] for name in compare.operands)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        index = int(_attribute(counter, "index"))
        step = self._step(self.computations[_attribute(loop, "body")], index)
        if step is None:
            return None
        start = self._constant(computation, computation.instructions[loop.operands[0]], index)
        return None if start is None else max(0, -(-(int(limit.text) - start) // step))

    def _step(self, body: Computation, index: int) -> int | None:
        """The increment of a loop's counter, or None if it is not a constant."""
        inside = body.instructions
        grown = inside[inside[body.root].operands[index]]
        while grown.opcode in ("copy", "bitcast"):
            grown = inside[grown.operands[0]]
        if grown.opcode == "fusion":
            inside = self.computations[_attribute(grown, "calls")].instructions
            grown = inside[self.computations[_attribute(grown, "calls")].root]
        found = [inside[name].text for name in grown.operands if inside[name].opcode == "constant"]
        return int(found[0]) if grown.opcode == "add" and len(found) == 1 and int(found[0]) > 0 else None

    def _constant(self, computation: Computation, made: Instruction, index: int) -> int | None:
        """The value of a tuple's element, or None if it is not a constant."""
        if made.opcode != "tuple":
            return None
        element = computation.instructions[made.operands[index]]
        while element.opcode in ("copy", "bitcast", "convert"):
            element = computation.instructions[element.operands[0]]
        return int(element.text) if element.opcode == "constant" and re.fullmatch(r"-?\d+", element.text) else None

    def _collective(self, instruction: Instruction, kind: str, shapes: dict[str, Shape]) -> Counter:
        size, slices = _groups(instruction, self.devices, self.slice_devices)
        given = sum(shapes[operand].bytes for operand in instruction.operands if operand in shapes)
        inner = size // slices
        if kind == "collective-permute":
            return Counter({(kind, size, slices > 1): given})
        if kind == "all-gather":
            inside, between = given * slices * (inner - 1), given * (slices - 1)
        elif kind in ("all-reduce", "reduce-scatter"):
            twice = 2 if kind == "all-reduce" else 1
            inside, between = (twice * given * (n - 1) / n for n in (inner, slices))
            between /= inner
        else:
            inside, between = given * (inner - 1) / size, given * (size - inner) / size
        sent = {(kind, inner, False): inside, (kind, slices, True): between}
        return Counter({key: value for key, value in sent.items() if value})

    def _bytes(self, instruction: Instruction, shapes: dict[str, Shape]) -> float:
        opcode = instruction.opcode
        operands = [shapes[name] for name in instruction.operands if name in shapes]
        results = instruction.shapes
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        if opcode.endswith("-start"):  # the tuple repeats the operands
            results = (results[len(operands) :] or results)[: len(operands)] if opcode != "copy-start" else results[:1]
        if opcode in ("dynamic-slice", "slice", "gather"):
            operands = [dataclasses.replace(results[0], on_chip=operands[0].on_chip), *operands[1:]]
        elif opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1 if opcode == "dynamic-update-slice" else 2]
            results, operands = (dataclasses.replace(update, on_chip=results[0].on_chip),), [update]
        return sum(shape.moved for shape in (*operands, *results))

    def _fusion_bytes(self, fusion: Instruction, operands: list[Shape]) -> float:
        inner = self.computations[_attribute(fusion, "calls")]
        total = 0.0
        for one in inner.instructions.values():
            if one.opcode == "parameter" and not operands[int(one.text)].on_chip:
                total += min(self._read(inner.name, one.name), operands[int(one.text)].bytes)
        instructions, root = inner.instructions, inner.instructions[inner.root]
        written = [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for made, result in zip(written, fusion.shapes, strict=False):
            while made.opcode in RENAMES:
                made = instructions[made.operands[0]]
            if not result.on_chip:
                updates = made.opcode == "dynamic-update-slice"
                total += instructions[made.operands[1]].shapes[0].bytes if updates else result.bytes
        return total

    def _read(self, computation: str, name: str) -> float:
        """The bytes of an array that a fused computation reads; infinite if it reads the whole array."""
        inside = self.computations[computation]
        total = 0.0
        for user in inside.instructions.values():
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in RENAMES:
                    total += math.inf if user.name == inside.root else self._read(computation, user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    total += user.shapes[0].bytes
                elif user.opcode == "fusion":
                    nested = self.computations[_attribute(user, "calls")]
                    (mine,) = (
                        one.name
                        for one in nested.instructions.values()
                        if one.opcode == "parameter" and int(one.text) == position
                    )
                    total += self._read(nested.name, mine)
                elif user.opcode != "dynamic-update-slice" or position:  # it updates operand 0 in place, without a read
                    total = math.inf
        return total
