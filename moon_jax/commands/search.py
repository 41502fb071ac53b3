"""moon-jax search: searches the vectors that moon-jax embed wrote."""

from __future__ import annotations

import argparse

from moon_jax import config as config_lib
from moon_jax.commands.shared import image, opened, readable, silence_libraries
from moon_jax.errors import UserError

HELP = "search a catalogue by text, image or both"

DESCRIPTION = """\
Finds the products most similar to a text, an image or both. The search is exact: it compares every vector. An index of
another model than --model is refused. --faiss writes the vectors as a FAISS index for other servers.

examples:
  moon-jax search --index vectors --model runs/first --text 'red canvas sneaker'
  moon-jax search --index vectors --model runs/first --image shoe.jpg -k 5
  moon-jax search --index vectors --model runs/first --text 'in blue' --image shoe.jpg
  moon-jax search --index vectors --faiss vectors.faiss
"""

AFTER_STOP = "starts from scratch"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="the output of moon-jax embed")
    parser.add_argument("--model", default="", help="the model that embedded it")
    parser.add_argument("--text", default="", help="the query's text")
    parser.add_argument("--image", default="", help="the query's image")
    parser.add_argument("-k", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument("--view", default="", help="t, i or mm, if the index holds several views of a product")
    parser.add_argument("--faiss", default="", metavar="FILE", help="write a FAISS index to this file")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Searches and prints the results."""
    if overrides:
        raise UserError(f"{overrides[0]}: search takes no config; leave this out")
    if not (parsed.text.strip() or parsed.image or parsed.faiss):
        raise UserError("--text: give a text, an --image, or both")
    readable(parsed, "text")
    if parsed.k < 1:
        raise UserError(f"-k {parsed.k}: give 1 or more")
    from moon_jax import progress
    from moon_jax.serving import search
    from moon_jax.types import Product

    silence_libraries()
    terminal = progress.Terminal()
    index = search.Index(parsed.index, parsed.view)
    if parsed.faiss:
        index.write_faiss(parsed.faiss)
        terminal.line(f"{len(index):,} vectors in {parsed.faiss}, their ids in {parsed.faiss}.ids.json")
    if parsed.text.strip() or parsed.image:
        if not parsed.model:
            raise UserError(f"--model: give the model that made these vectors ({index.model})")
        item = Product(text=parsed.text.strip() or None, images=image("--image", parsed.image))
        embedder = opened("--model", parsed.model, config_lib.Config())
        [found] = index.search(embedder, [item], parsed.k)
        for rank, (identity, score) in enumerate(found, start=1):
            terminal.line(f"{rank:3}  {score:.4f}  {identity}")
