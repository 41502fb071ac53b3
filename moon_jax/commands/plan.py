"""moon-jax plan: compiles a training step ahead of time and reports its cost."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from moon_jax import config as config_lib
from moon_jax.errors import UserError

HELP = "report what a training step costs, also on hardware that you do not have"

DESCRIPTION = """\
Compiles the real training step of a config ahead of time for a TPU slice, without a TPU, and reports per chip: memory
against the chip's capacity, FLOPs, bytes moved, collectives, and a lower bound of the step time (everything at peak
speed and overlapped; not a forecast). It needs libtpu (pip install -e '.[tpu]') and takes a minute or more. --mesh
compares layouts. Without --topology, the step is compiled for this machine and timed.

examples:
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:4x4x4
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p-128 --mesh fsdp=-1 --mesh data=-1,fsdp=4,expert=4
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:8x8x8 --slices 2 --config.data.batch=4096
  moon-jax plan --config quickstart
"""

AFTER_STOP = "starts from scratch"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a shipped config by name, or a file")
    parser.add_argument(
        "--topology", default="", help="v5p:4x4x4 or, as clouds write it, v5p-128; default: this machine"
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="number of slices, joined by the slower network (default: %(default)s)"
    )
    parser.add_argument(
        "--mesh", action="append", help="sizes of mesh axes, such as data=-1,fsdp=4; repeat to compare layouts"
    )
    parser.add_argument("--json", help="write all numbers to this file; docs/experts.md describes its keys")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Compiles each layout and prints them side by side."""
    config = config_lib.override(config_lib.load(parsed.config), overrides)
    layouts = [config_lib.replace(config, _axes(mesh)) for mesh in parsed.mesh or ()] or [config]
    if parsed.slices < 1 or (parsed.slices > 1 and not parsed.topology):
        raise UserError(f"--slices {parsed.slices}: give 1 or more, and --topology for the slices' shape")
    if parsed.json and not Path(parsed.json).parent.is_dir():
        raise UserError(f"--json {parsed.json}: no folder {Path(parsed.json).parent}; create it first")
    if parsed.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles: it must not look for a TPU
    from moon_jax import progress
    from moon_jax.training import plan

    terminal = progress.Terminal()
    for one in layouts:  # report all mistakes before the first compilation
        plan.check(one, parsed.topology, parsed.slices)
    plans, refused = [], []
    for one in layouts:
        try:
            plans.append(plan.plan(one, parsed.config, parsed.topology, parsed.slices, terminal.busy))
        except UserError as error:  # this layout does not fit a chip; the others are still reported
            refused.append(error)
    if not plans:
        raise refused[0]
    terminal.table(plan.table(plans))
    for error in refused:
        terminal.line(str(error))
    if parsed.json:
        text = json.dumps([plan.to_json(one) for one in plans], indent=2) + "\n"
        Path(parsed.json).write_text(text, encoding="utf-8")


def _axes(mesh: str) -> dict[str, object]:
    """Options of the mesh from data=-1,fsdp=4; the axes that are not named are 1."""
    axes = {f"mesh.{axis}": 1 for axis in ("data", "fsdp", "expert", "tensor")}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if f"mesh.{axis}" not in axes or not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh {mesh}: {part} is not understood; write data=-1,fsdp=4,expert=4,tensor=1 or part of it"
            )
        axes[f"mesh.{axis}"] = int(size)
    return axes
