"""moon-jax train: trains a config, from scratch or from public weights."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from moon_jax import interrupt, storage
from moon_jax.commands.shared import configured, silence_libraries

HELP = "train a config, from scratch or from public weights"

DESCRIPTION = """\
Trains a config on a catalogue. The same command again resumes, on any number of hosts or devices. With --init, training
starts from public weights (Qwen3-VL 2B to 30B-A3B, Qwen3-VL-Embedding) or from another run's workdir. If the config has
experts and the weights are dense, every expert starts as a copy of the dense feed-forward. Sizes, pooling and template
come from the weights unless the config sets them. Several processes find each other on TPU pods and SLURM, or through
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; launch/ has scripts.

examples:
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax train --config moon2_qwen3vl_2b --init models/Qwen3-VL-Embedding-2B --data catalogue/ --workdir runs/emb
  moon-jax train --config quickstart --data catalogue/ --workdir runs/scratch --steps 500
  moon-jax train --config moon2_qwen3vl_8b --init models/Qwen3-VL-8B-Instruct --data catalogue/ --workdir runs/8b \\
    --config.mesh.fsdp=8 --config.experts.reinitialized=0.5
  moon-jax train --config quickstart --workdir runs/more --init runs/scratch --config.training.optimizer=lion
  moon-jax train --config quickstart --workdir runs/watched --config.evaluation.every=50 --profile 10:15
  moon-jax train --config quickstart --workdir gs://bucket/runs/first    in a bucket; needs pip install -e '.[gcs]'

--init takes a folder, gs://bucket/folder of another run, or hf://owner/name[@revision] on the Hugging Face hub.
Otherwise, the network is used only between the hosts of the run.
--config.a.b=VALUE sets any option of the config; moon_jax/options.py documents them all.
"""

AFTER_STOP = "resumes from here"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a shipped config by name, or a file")
    parser.add_argument("--data", help="prepared data, or a file or folder of products; default: a synthetic catalogue")
    parser.add_argument("--workdir", required=True, help="the run's folder, or gs://bucket/folder")
    parser.add_argument(
        "--init", help="start from a workdir, a Hugging Face folder or hf://owner/name; default: random weights"
    )
    parser.add_argument("--steps", type=int, help="training steps, instead of the config's")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="write a profiler trace of these steps, counted from 1")
    parser.add_argument(
        "--stall-minutes",
        type=float,
        default=10.0,
        help="print all stacks when no step finishes for this long (default: %(default)s)",
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains; does not evaluate at the end."""
    init = parsed.init or ""
    init = init if storage.is_address(init) or not init else str(Path(init))
    config = configured(parsed, overrides, parsed.config, init)
    from moon_jax import distributed, progress
    from moon_jax.evaluation import validation
    from moon_jax.training import watchdog

    interrupt.check()
    silence_libraries()
    workdir = parsed.workdir
    watch = watchdog.Watchdog(parsed.profile and watchdog.parse_profile(parsed.profile), parsed.stall_minutes)
    distributed.initialize()
    validation.train(config, workdir, watch)
    served = f"{Path(workdir).name if storage.is_address(workdir) else workdir}-served"
    export = shlex.join(["moon-jax", "export", "--model", workdir, "--output", served])
    progress.Terminal().line(f"the model is in {workdir}; to serve it: {export}")
