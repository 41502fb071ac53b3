"""moon-jax export: writes a model as a Hugging Face folder."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from moon_jax import interrupt
from moon_jax.commands.shared import silence_libraries
from moon_jax.errors import UserError

HELP = "write a model as a Hugging Face folder"

DESCRIPTION = """\
Writes a model as a Hugging Face folder (qwen3_vl_moe with experts, qwen3_vl without) that transformers,
sentence-transformers and servers built on them load. --verify also embeds a text, an image and both with transformers,
and fails if the embeddings differ from ours (it needs pip install -e '.[hf]').

examples:
  moon-jax export --model moon-jax-quickstart --output served
  moon-jax export --model runs/2b --output served --dtype bfloat16 --verify
"""

AFTER_STOP = "starts from scratch"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a workdir, a Hugging Face folder, or hf://owner/name")
    parser.add_argument("--output", required=True, help="a folder that is new or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; default: as trained")
    parser.add_argument("--verify", action="store_true", help="compare the embeddings with transformers")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the folder; with --verify compares its embeddings with transformers."""
    if overrides:
        raise UserError(f"{overrides[0]}: export takes no config; leave this out")
    output = Path(parsed.output).resolve()
    from moon_jax import progress
    from moon_jax.hub import export
    from moon_jax.serving import embedder

    export.require_empty(output)
    interrupt.check()
    silence_libraries()
    terminal = progress.Terminal()
    trained = embedder.read(parsed.model, track=functools.partial(terminal.track, "loading"))
    if parsed.dtype:
        trained = embedder.cast(trained, parsed.dtype)
    if parsed.verify:
        from moon_jax.evaluation import verify

        with terminal.busy("embedding a text, an image and both"):
            items, ours = verify.ours(trained)
    export.export(trained, output, functools.partial(terminal.track, "writing"))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    terminal.line(f"{output}: {size / 1e6:,.1f} MB")
    if parsed.verify:
        del trained
        with terminal.busy("embedding them with transformers"):
            cosines = (ours * verify.theirs(output, items)).sum(axis=1)
        listed = ", ".join(
            f"{name} {cosine:.7f}" for name, cosine in zip(("text", "image", "both"), cosines, strict=True)
        )
        terminal.line(f"cosine similarity to transformers' embeddings: {listed}")
        verify.check(cosines)
