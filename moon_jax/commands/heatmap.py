"""moon-jax heatmap: draws where a model attends."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moon_jax import config as config_lib
from moon_jax.commands.shared import image, readable, silence_libraries
from moon_jax.errors import UserError

if TYPE_CHECKING:
    from moon_jax.serving.embedder import Embedder

HELP = "draw where a model attends in an image and its title"

DESCRIPTION = """\
Draws the attention of a model's layers over an item's image patches and title tokens. An .npz file beside the picture
holds all layers and heads. --compare draws a second model next to the first. --contributions draws instead what each
token adds to the similarity of a query and an item.

examples:
  moon-jax heatmap --model runs/first --text 'high quality red mug' --image mug.jpg --output mug.png
  moon-jax heatmap --model runs/first --compare runs/base --text 'red mug' --image mug.jpg --output both.png --layer 2
  moon-jax heatmap --model runs/first --text 'red mug' --item-image mug.jpg --output pair.png --contributions
"""

AFTER_STOP = "starts from scratch"
"""What the same command does after it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a workdir, a Hugging Face folder or hf://owner/name")
    parser.add_argument("--compare", default="", help="a second model, drawn next to the first")
    parser.add_argument("--text", default="", help="text of the query, or of the only item")
    parser.add_argument("--image", default="", help="image of the query, or of the only item")
    parser.add_argument("--item-text", default="", help="text of an item to compare the query with")
    parser.add_argument("--item-image", default="", help="image of that item")
    parser.add_argument("--layer", type=int, help="one layer, counted from 0; default: the mean over all")
    parser.add_argument("--head", type=int, help="one head, counted from 0; default: the mean over all")
    parser.add_argument(
        "--contributions", action="store_true", help="draw what each token adds to the pair's similarity"
    )
    parser.add_argument("--output", required=True, help="a .png file; the arrays go beside it")


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Draws where models attend in a query, an item, or both."""
    if overrides:
        raise UserError(f"{overrides[0]}: heatmap takes no config; leave this out")
    readable(parsed, "text", "item-text")
    parts = {"query": (parsed.text.strip(), parsed.image), "item": (parsed.item_text.strip(), parsed.item_image)}
    if not any(part for one in parts.values() for part in one):
        raise UserError("--text: give a text, an --image, or both; compare with --item-text and --item-image")
    if parsed.contributions and not all(any(one) for one in parts.values()):
        raise UserError("--contributions: needs a query and an item")
    if parsed.contributions and (parsed.layer, parsed.head) != (None, None):
        raise UserError("--contributions: have no layer or head; leave --layer and --head out")
    output = Path(parsed.output).expanduser()
    if output.suffix != ".png":
        raise UserError(f"--output {output}: give a file that ends in .png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; give a file in a folder that can be created") from None
    from moon_jax import progress
    from moon_jax.evaluation import heatmap
    from moon_jax.types import Product

    silence_libraries()
    terminal = progress.Terminal()
    items = {
        name: Product(text=text or None, images=image(flag, path))
        for (name, (text, path)), flag in zip(parts.items(), ("--image", "--item-image"), strict=True)
        if text or path
    }
    if len(items) == 1:  # there is nothing to compare
        items = {"item": next(iter(items.values()))}
    columns, arrays = [], {}
    for number, model in enumerate([parsed.model, parsed.compare] if parsed.compare else [parsed.model]):
        with terminal.busy(f"running {model}"):
            embedder = _ours("--compare" if number else "--model", model)
            shown = heatmap.maps(embedder, items, parsed.layer, parsed.head, parsed.contributions)
        arrays |= {f"{number}/{name}": entry for name, entry in zip(items, shown, strict=True)}
        columns.append((f"{Path(model).name}\nmodel {embedder.fingerprint}", shown))
    layer, head = ("mean" if number is None else number for number in (parsed.layer, parsed.head))
    which = "what each token adds to the cosine" if parsed.contributions else f"attention, layer {layer}, head {head}"
    footer = f"{which}; image patches and title tokens only, without the template"
    heatmap.draw(output, columns, config_lib.Config().data.max_pixels, footer, parsed.contributions)
    heatmap.save(output.with_suffix(".npz"), arrays)
    terminal.line(f"{output}; arrays of all layers and heads: {output.with_suffix('.npz')}")


def _ours(flag: str, model: str) -> Embedder:
    """A moon_jax model."""
    from moon_jax.embedders import registry
    from moon_jax.serving import embedder

    if model in registry.BASELINES and not Path(model).exists():
        raise UserError(f"{flag} {model}: has no attention to draw; give a moon_jax model, or Qwen3-VL")
    try:
        return embedder.load(model)
    except UserError as error:
        raise type(error)(f"{flag} {error}") from None
