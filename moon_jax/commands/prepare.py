"""moon-jax prepare: turns a catalogue or a click log into prepared data."""

from __future__ import annotations

import argparse
import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moon_jax import config as config_lib
from moon_jax import interrupt
from moon_jax.commands.shared import expand, process_count, silence_libraries
from moon_jax.errors import UserError

if TYPE_CHECKING:
    from moon_jax.progress import Terminal

HELP = "turn a catalogue or a click log into data for training"

DESCRIPTION = """\
Turns a catalogue, with or without a click log, into prepared data: sharded records, triplets as indices, a split, a
manifest, and a quarantine of unusable records. --data is a file or folder of Parquet, JSONL, CSV, TSV or tar
(webdataset) files, a dataset saved by Hugging Face's datasets, hf://datasets/owner/name, or tfds://name. docs/data.md
describes the formats. The same command again resumes.

examples:
  moon-jax prepare --data catalogue/ --output prepared
  moon-jax prepare --data mbe.jsonl --columns mbe --fetch img.alicdn.com --output prepared
  moon-jax prepare --data fashion200k/ --columns fashion200k --output prepared --config.prepare.longest_side=512
  moon-jax prepare --data products.csv --columns mine.json --output prepared
  moon-jax train --config quickstart --data prepared --workdir runs/first
  moon-jax prepare --data prepared --negatives vectors --output mined      hard negatives, from what embed wrote

Images are downloaded only from hosts that --fetch names (*.example.com includes subdomains), and never from addresses
of a private network; hf:// downloads from the hub.
"""

AFTER_STOP = "resumes from here"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a file, a folder, hf://datasets/owner/name or tfds://name")
    parser.add_argument("--output", required=True, help="a folder: new, empty, or left by an interrupted prepare")
    parser.add_argument("--columns", help="a column map: own (default), mbe, mbe2, … or a .json file")
    parser.add_argument("--fetch", action="append", default=[], metavar="HOST", help="download image URLs of this host")
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    parser.add_argument(
        "--negatives", metavar="VECTORS", help="mine hard negatives for prepared --data by vectors of embed"
    )
    parser.add_argument("--negative-count", type=int, metavar="N", help="mined negatives per triplet (default: 3)")
    parser.add_argument("--negative-ranks", metavar="A-B", help="ranks that they are taken from (default: 1-100)")
    parser.add_argument(
        "--negative-bound",
        type=float,
        metavar="SHARE",
        help="their highest similarity, as a share of the positive's (default: 0.95)",
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Prepares the data and prints a summary."""
    expand(parsed, ("hf://", "tfds://"))
    count = process_count(parsed)
    config = config_lib.override(config_lib.Config(), overrides)
    from moon_jax import progress
    from moon_jax.ingest import prepare, workers

    interrupt.check()
    silence_libraries()
    terminal = progress.Terminal()
    if parsed.negatives:
        useless = [("--columns", parsed.columns), ("--fetch", parsed.fetch), *((option, True) for option in overrides)]
    else:
        given = {name: getattr(parsed, f"negative_{name}") for name in ("count", "ranks", "bound")}
        useless = [(f"--negative-{name}", value is not None) for name, value in given.items()]
    for name, value in useless:
        if value:
            other = "prepares nothing anew" if parsed.negatives else "is missing"
            raise UserError(f"{name}: has no effect, because --negatives {other}; leave it out")
    if parsed.negatives:
        _mine(parsed, terminal)
        return
    options = prepare.Options.of(config, parsed.columns or "own", parsed.fetch)
    pool = functools.partial(workers.pool, count)
    prepared = prepare.prepare(parsed.data, parsed.output, options, pool, count, terminal.progress)
    manifest = prepared.manifest
    for kind, name in (("product", "products"), ("query", "queries"), ("log", "rows of logs")):
        if manifest["read"][kind]:
            terminal.line(f"{manifest['read'][kind]:,} {name} read, {manifest['kept'][kind]:,} kept")
    terminal.line(prepared.summary() or "0 left out")
    terminal.line(
        f"{prepared.sides}; {len(prepared.triplets):,} triplets, {manifest['val_queries']:,} evaluation queries"
    )
    if manifest["read"]["log"] and not manifest["val_queries"]:
        terminal.line("no query of the log is held out: the evaluation will not measure its searches")
    train = shlex.join(
        ["moon-jax", "train", "--config", "quickstart", "--data", parsed.output, "--workdir", "runs/first"]
    )
    terminal.line(f"prepared in {parsed.output}; to train: {train}")


def _mine(parsed: argparse.Namespace, terminal: Terminal) -> None:
    """Copies prepared data with mined negatives."""
    from moon_jax.augment import negatives
    from moon_jax.data import prepared as prepared_lib

    if not prepared_lib.is_prepared(parsed.data):
        raise UserError(f"--data {parsed.data}: not prepared data; --negatives adds to what moon-jax prepare wrote")
    given: dict[str, Any] = {"count": parsed.negative_count, "bound": parsed.negative_bound}
    if parsed.negative_ranks is not None:
        first, separator, last = parsed.negative_ranks.partition("-")
        if not (separator and first.isdecimal() and last.isdecimal()):
            raise UserError(f"--negative-ranks {parsed.negative_ranks}: give two ranks, such as 1-100")
        given["ranks"] = int(first), int(last)
    options = negatives.Options(**{name: value for name, value in given.items() if value is not None})
    output = Path(parsed.output)
    about = negatives.write(Path(parsed.data), output, parsed.negatives, options, terminal.progress)
    total = len(prepared_lib.open_prepared(output).triplets)
    terminal.line(f"{about['negatives']:,} negatives mined, for {about['triplets']:,} of {total:,} triplets")
    if not about["negatives"]:
        terminal.line(f"prepared in {parsed.output}, without further negatives: all were known or too similar")
        return
    train = ["moon-jax", "train", "--config", "quickstart", "--data", parsed.output, "--workdir", "runs/mined"]
    more = f"--config.data.negatives={1 + options.count}"
    terminal.line(f"prepared in {parsed.output}; to train with all of them: {shlex.join([*train, more])}")
