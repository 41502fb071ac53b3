"""moon-jax embed: embeds a prepared catalogue."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from moon_jax import config as config_lib
from moon_jax import interrupt
from moon_jax.commands.shared import expand, opened, silence_libraries
from moon_jax.errors import UserError

HELP = "embed a catalogue"

DESCRIPTION = """\
Embeds every product of prepared data into Parquet files with the columns id, view and vector. manifest.json records the
model, views, width and template. The same command again resumes and gives the same files.

examples:
  moon-jax embed --model runs/first --data prepared --output vectors
  moon-jax embed --model runs/2b --data prepared --output vectors --views t,i,mm --dtype float16
  moon-jax embed --model runs/nested --data prepared --output vectors --width 64 --dtype int8
"""

AFTER_STOP = "resumes with the unfinished files"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a workdir, a Hugging Face folder or hf://owner/name")
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--output", required=True, help="a folder: new, empty, or left by an interrupted embed")
    parser.add_argument(
        "--views", default="product", help="t, i, mm or several: t,mm; default: product (all that a product has)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16 or int8")
    parser.add_argument("--width", type=int, default=0, help="keep the first WIDTH dimensions (Matryoshka)")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Embeds a prepared catalogue."""
    if overrides:
        raise UserError(f"{overrides[0]}: embed takes no config; leave this out")
    expand(parsed, ())
    from moon_jax import progress
    from moon_jax.data import prepared as prepared_lib
    from moon_jax.serving import bulk

    interrupt.check()
    silence_libraries()
    if not Path(parsed.data).is_dir():
        raise UserError(f"--data {parsed.data}: no such folder")
    if not prepared_lib.is_prepared(parsed.data):
        made = shlex.join(
            ["moon-jax", "prepare", "--data", parsed.data, "--output", f"{parsed.data.rstrip('/')}-prepared"]
        )
        raise UserError(f"--data {parsed.data}: not prepared data; first run: {made}")
    options = bulk.Options(tuple(parsed.views.split(",")), parsed.dtype, parsed.width)
    terminal = progress.Terminal()
    with terminal.busy("opening the model"):
        embedder = opened("--model", parsed.model, config_lib.Config())
        if hasattr(embedder, "rank"):
            raise UserError(f"--model {parsed.model}: produces no vectors; give an embedding model")
    prepared = prepared_lib.open_prepared(parsed.data)
    manifest = bulk.embed(embedder, prepared, parsed.output, options, terminal.progress)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    terminal.line(
        f"{manifest['rows']:,} vectors of {manifest['products']:,} products, {manifest['width']} × {manifest['dtype']},"
        f" {size / 1e6:,.1f} MB"
    )
    search = shlex.join(["moon-jax", "search", "--index", parsed.output, "--model", parsed.model, "--text", "red shoe"])
    terminal.line(f"embedded in {parsed.output}; to search: {search}")
