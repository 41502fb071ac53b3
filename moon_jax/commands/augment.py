"""moon-jax augment: adds enriched titles and expanded images to prepared data."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex

from moon_jax import config as config_lib
from moon_jax import interrupt
from moon_jax.augment.options import Options
from moon_jax.commands.shared import expand, process_count, silence_libraries
from moon_jax.errors import UserError

HELP = "add enriched titles and expanded images to prepared data"

DESCRIPTION = """\
Adds enriched titles and expanded images to the training products, by rules and OpenCV or by models. Titles come from
any OpenAI-compatible server (vLLM, SGLang, transformers serve), images from an image-editing pipeline of diffusers such
as Qwen-Image-Edit. With --model, results that the embedder (a run, CLIP or SigLIP) scores as inconsistent with their
product are dropped. augmented.parquet lists where each result came from, augmented.png shows some of them. Evaluation
data is unchanged. The same command again resumes.

examples:
  moon-jax augment --data prepared --output augmented
  moon-jax augment --data prepared --output augmented --model runs/first
  moon-jax augment --data prepared --output augmented --text http://localhost:8000/v1 --text-model Qwen3-VL-8B-Instruct
  moon-jax augment --data prepared --output augmented --images hf://Qwen/Qwen-Image-Edit-2509 --model models/clip
  moon-jax augment --data prepared --output augmented --beam runner=FlinkRunner --beam flink_master=HOST:8081
  moon-jax train --config quickstart --data augmented --workdir runs/more --config.data.augmented=drawn

The network is used only for a server that --text names, whose key is read from OPENAI_API_KEY, and for hf://.
"""

AFTER_STOP = "resumes from here"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--output", required=True, help="a folder: new, empty, or left by an interrupted augment")
    parser.add_argument("--text", default=Options.text, help="rules (default), none, or the URL of a server")
    parser.add_argument("--text-model", default=Options.text_model, help="the model to request from that server")
    parser.add_argument(
        "--images", default=Options.images, help="classical (default), none, or a diffusers pipeline: folder or hf://"
    )
    parser.add_argument(
        "--image-steps", type=int, default=Options.image_steps, help="denoising steps; default: the pipeline's own"
    )
    parser.add_argument(
        "--expansions", type=int, default=Options.expansions, help="images per product, n_c (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default=Options.model, help="the filter's embedder: a workdir, a folder or hf://; default: no filter"
    )
    parser.add_argument(
        "--quantile",
        type=float,
        default=Options.quantile,
        help="share of the results that the filter drops (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=Options.seed, help="random seed (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    parser.add_argument(
        "--connections", type=int, default=16, help="concurrent requests to the server (default: %(default)s)"
    )
    parser.add_argument(
        "--beam", action="append", metavar="OPTION=VALUE", help="run on Apache Beam, with this pipeline option"
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Augments the data and prints a summary."""
    if overrides:
        raise UserError(f"{overrides[0]}: augment takes no config; leave this out")
    expand(parsed, ())
    if parsed.beam and parsed.processes is not None:
        raise UserError("--processes: with --beam, the number of workers is a Beam option")
    count = process_count(parsed)
    if parsed.connections < 1:
        raise UserError(f"--connections {parsed.connections}: give 1 or more")
    from moon_jax import progress
    from moon_jax.augment import engines, pipeline
    from moon_jax.ingest import workers

    interrupt.check()
    silence_libraries()
    options = Options(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Options)})
    max_pixels = config_lib.Config().data.max_pixels
    if options.uses_server or options.uses_pipeline:
        count = 1  # one process: it waits for the server with threads, and has the device to itself
    if parsed.beam:
        engine: engines.Engine = engines.Beam(tuple(f"--{option.removeprefix('--')}" for option in parsed.beam))
        engines.load_beam(engine.arguments)
    else:
        engine = engines.Local(functools.partial(workers.pool, count), count)
    terminal = progress.Terminal()
    prepared = pipeline.augment(
        parsed.data, parsed.output, options, max_pixels, engine, parsed.connections, terminal.progress
    )
    summary = prepared.manifest["augmented"]
    for kind, name in (("text", "enriched titles"), ("image", "expanded images")):
        left = ", ".join(f"{count:,} {reason}" for reason, count in summary[kind]["left_out"].items()) or "none"
        terminal.line(f"{name}: {summary[kind]['added']:,} added of {summary[kind]['made']:,} made; left out: {left}")
        if summary[kind]["made"] and not summary[kind]["added"]:
            terminal.line(f"no {name} passed; {pipeline.RESULTS} lists the reason for each")
    if not options.model:
        terminal.line("no filter: give an embedder with --model")
    terminal.line(f"sources of all results: {parsed.output}/{pipeline.RESULTS}")
    terminal.line(f"examples: {parsed.output}/{pipeline.PICTURE}")
    train = shlex.join(
        ["moon-jax", "train", "--config", "quickstart", "--data", parsed.output, "--workdir", "runs/augmented"]
    )
    terminal.line(f"augmented in {parsed.output}; to train: {train}")
