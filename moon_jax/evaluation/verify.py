"""Compares a model with transformers running its exported folder, by embeddings of the same products."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moon_jax import config as config_lib
from moon_jax.data.images import ResizeRule
from moon_jax.data.text import Tokenizer
from moon_jax.errors import UserError
from moon_jax.hub.export import Trained
from moon_jax.serving.embedder import Embedder
from moon_jax.types import Product

LEAST = 0.9999
"""Minimum cosine. A lower one means that the served model would differ from the trained one."""


def products(fits: Callable[[str], bool], pixels: int) -> list[Product]:
    """A text, a 3:4 image of about `pixels` pixels, and both.

    The text is shortened until it `fits`: we truncate titles, servers do not.
    """
    high = math.ceil(math.sqrt(pixels * 4 / 3))
    rows, columns = np.mgrid[0:high, 0 : math.ceil(high * 3 / 4)]
    waves = [127 + 120 * np.sin(9 * rows / high + k) * np.cos((7 + k) * columns / high) for k in range(3)]
    picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    words = ["red", "canvas", "sneaker", "with", "white", "laces,", "size", "42"]
    title = next(" ".join(words[:count]) for count in range(len(words), 0, -1) if fits(" ".join(words[:count])))
    return [Product(text=title), Product(images=(picture,)), Product(text=title, images=(picture,))]


def ours(trained: Trained) -> tuple[list[Product], np.ndarray]:
    """The products, and their embeddings f32[products,D] by the model before export, computed in float32.

    Raises:
        UserError: torch or transformers is not installed; `theirs` needs both.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--verify: needs {error.name}, which is not installed; pip install -e '.[hf]'") from None
    config = config_lib.replace(trained.config, {"training.dtype": "float32"})
    tokenizer, longest = Tokenizer.load(trained.tokenizer), config.data.text_tokens
    embedder = Embedder(config, trained.encoder, tokenizer, trained.fingerprint, trained.step)
    # More pixels than the budget, so that both sides shrink the image.
    items = products(
        lambda title: len(tokenizer.encode([title], longest + 1)[0]) <= longest, 2 * ResizeRule.of(config).max_pixels
    )
    return items, embedder.encode(items)


def theirs(folder: Path, items: list[Product]) -> np.ndarray:
    """The products' embeddings f32[products,D] by transformers in float32; all other settings come from the folder."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    template = (folder / "chat_template.jinja").read_text("utf-8")
    last = json.loads((folder / "1_Pooling" / "config.json").read_text("utf-8"))["pooling_mode"] == "lasttoken"
    vectors = []
    for product in items:
        with torch.no_grad():
            states = model(**_inputs(product, tokenizer, images, template)).last_hidden_state[0]
        pooled = states[-1] if last else states.mean(0)
        vectors.append(torch.nn.functional.normalize(pooled, dim=0).numpy())
    return np.stack(vectors)


def _inputs(product: Product, tokenizer: Any, images: Any, template: str) -> dict[str, Any]:
    """The inputs that Qwen3VLProcessor builds from one message. The processor itself would need torchvision."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in product.images]
    content += [{"type": "text", "text": product.text}] if product.text else []
    message = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(message, chat_template=template, tokenize=False)
    inputs: dict[str, Any] = {}
    if product.images:
        inputs = dict(images(images=list(product.images), return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            count = int(grid.prod()) // images.merge_size**2
            prompt = prompt.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        prompt = prompt.replace("<|placeholder|>", "<|image_pad|>")
    encoded = tokenizer(prompt, return_tensors="pt")
    visual = encoded["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return inputs | {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "mm_token_type_ids": visual.int(),
    }


def check(cosines: np.ndarray) -> None:
    """Compares the cosines of our embeddings with those of transformers to LEAST.

    Raises:
        UserError: one is lower.
    """
    if not np.min(cosines) >= LEAST:
        raise UserError(
            f"--verify: embeddings of transformers differ: cosine {np.min(cosines):.6f}, below {LEAST}; do not serve"
            " this folder"
        )
