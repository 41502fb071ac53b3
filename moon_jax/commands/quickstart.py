"""moon-jax quickstart: trains a small model on a catalogue and evaluates it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moon_jax import interrupt
from moon_jax.commands.shared import configured, silence_libraries

HELP = "train a small model on a catalogue and evaluate it, in minutes"

DESCRIPTION = """\
Trains MOON2.0 from scratch on a catalogue and evaluates it zero-shot: retrieval in all nine directions of text, image
and both; categories and attributes by label text. The workdir receives the model, its scores, pictures, and the vectors
of the held-out products. It takes six to seven minutes on two CPU cores. Without --data, it renders a synthetic
catalogue first. The same command again resumes.

examples:
  moon-jax quickstart
  moon-jax quickstart --data catalogue/ --workdir runs/first
  moon-jax quickstart --data products.parquet --workdir runs/short --steps 50
  moon-jax quickstart --data catalogue/ --workdir runs/dense --config.experts.count=0
  moon-jax quickstart --workdir runs/nested '--config.objective.matryoshka=(32,64)'

--config.a.b=VALUE sets any option of the config; moon_jax/options.py documents them all.
"""

AFTER_STOP = "resumes from here"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="prepared data, or a file or folder of products; default: a synthetic catalogue")
    parser.add_argument("--workdir", default="moon-jax-quickstart", help="the run's folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps, instead of the config's")
    parser.add_argument("--config", help="a shipped config by name, or a file; default: quickstart")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, evaluates and embeds. Skips or resumes training that has a result already."""
    config = configured(parsed, overrides, parsed.config or "quickstart")
    workdir = Path(parsed.workdir)

    # Importing JAX takes seconds: mistakes on the command line are reported first.
    from moon_jax import progress
    from moon_jax.evaluation import report as report_lib
    from moon_jax.evaluation import tables, validation
    from moon_jax.serving import embedder as serving

    interrupt.check()
    silence_libraries()
    began = time.monotonic()
    prepared = validation.train(config, workdir)
    terminal = progress.Terminal(workdir)
    metrics = report_lib.evaluate(serving.load(workdir), prepared, workdir, terminal)
    for table in tables.scores(metrics):
        terminal.table(table)
    given = {"--data": parsed.data, "--steps": parsed.steps, "--config": parsed.config}
    words = [str(word) for flag, value in given.items() if value for word in (flag, value)]
    again = ["moon-jax", "quickstart", *words, *overrides]
    for heading, lines in tables.summary(metrics, workdir, prepared, again):
        terminal.heading(heading)
        for line in lines:
            terminal.line(line)
    terminal.line(f"done in {time.monotonic() - began:.0f} s")
